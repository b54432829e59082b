"""What it is worth that a network sees more than a slice: on the page, and as `context.csv`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ich.pages.description import interval_text
from ich.pages.figures import Plot, save_plot, subplots
from ich.pages.page import Block, Table
from ich.scoring.comparison import EvaluationSet
from ich.scoring.context import WAYS, Worth
from ich.scoring.metrics import ANY
from ich.scoring.uncertainty import UNDEFINED

Found = list[tuple[EvaluationSet, list[Worth]]]
_COLUMNS = ["network", "rows", "way", "seeds", "level", "metric", "value", "low", "high"]
_COLUMNS += ["difference", "difference_low", "difference_high"]
_STUDY = "study_"
_APART = 0.08  # of the figure's networks, where a way has its place at a whole number


def context_table(found: Found) -> pd.DataFrame:
    """Every metric of every way that a network sees its slices; columns in docs/results.md."""
    lines = [
        (worth.network, rows.predictions.fingerprint, worth.way, worth.seeds, *line)
        for rows, worths in found
        for worth in worths
        for line in _lines(worth)
    ]
    return pd.DataFrame(lines, columns=_COLUMNS)


def _lines(worth: Worth) -> Iterator[tuple[object, ...]]:
    for metric, value in worth.value.items():
        level = "study" if metric.startswith(_STUDY) else "slice"
        own = worth.interval.get(metric, UNDEFINED)
        other = worth.difference_interval.get(metric, UNDEFINED)
        numbers = (value, own.low, own.high, worth.difference.get(metric), other.low, other.high)
        yield (level, metric.removeprefix(_STUDY), *numbers)


def context_blocks(found: Found, folder: Path) -> Iterator[Block]:
    """Tables of what each way is worth against the slice network, and the figure of each set of
    rows, which goes to `folder` too."""
    for number, (rows, worths) in enumerate(found):
        several = len(found) > 1
        where = f"On the rows of {rows.name}: " if several else ""
        labels = rows.predictions.scored.labels
        unit = rows.predictions.unit
        yield Table(
            f"{where}Each network by what it sees. slice: a slice alone; smoothed: its logits "
            f"averaged over a slice and its two neighbours, which costs nothing; neighbours: a "
            f"network of three slices; study: a head over all slices of a series. In brackets the "
            f"difference from the slice network, and its 95 % interval, on the same {unit} and "
            f"seeds. Log loss: lower is better. Every metric is in context.csv.",
            _differences(worths, _overall(labels)),
        )
        name = f"context-{number + 1}" if several else "context"
        yield _draw(worths, _overall(labels), name, where, folder)
        if len(labels) > 1:
            per_label = {f"auc_{label}": label for label in labels}
            yield Table(
                f"{where}AUC per label, per slice", _differences(worths, per_label), folded=True
            )
        if any(f"{_STUDY}auc" in w.value for w in worths):
            per_study = {_STUDY + k: text for k, text in _overall(labels).items()}
            per_study |= {f"{_STUDY}auc_{label}": f"AUC {label}" for label in labels}
            yield Table(f"{where}Per study", _differences(worths, per_study), folded=True)


def _overall(labels: Sequence[str]) -> dict[str, str]:
    """The metrics to look at first, the figure's first and last."""
    if ANY in labels:
        names = {f"auc_{ANY}": "AUC any", "auc_macro": "AUC macro"}
        return {**names, "log_loss_weighted": "log loss, any twice"}
    return {"auc": "AUC micro", "auc_macro": "AUC macro", "log_loss": "log loss"}


def _differences(worths: Sequence[Worth], metrics: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame([_line(worth, metrics) for worth in worths])


def _line(worth: Worth, metrics: dict[str, str]) -> dict[str, str]:
    line = {"network": worth.network, "sees": worth.way, "seeds": str(worth.seeds)}
    for metric, heading in metrics.items():
        value = worth.value.get(metric, float("nan"))
        text = "" if value != value else f"{value:.4f}"
        if text and metric in worth.difference:
            between = interval_text(worth.difference_interval.get(metric, UNDEFINED), "+.4f")
            text += f" ({worth.difference[metric]:+.4f}{f', {between}' if between else ''})"
        line[heading] = text
    return line


def _draw(
    worths: Sequence[Worth], metrics: dict[str, str], name: str, where: str, folder: Path
) -> Block:
    folder.mkdir(parents=True, exist_ok=True)
    area, *_, loss = metrics
    shown = {area: metrics[area], loss: metrics[loss]}
    alt = f"{metrics[area]} and {metrics[loss]} of each network by what it sees"
    caption = f"{where}{alt[0].upper()}{alt[1:]}, with 95 % intervals where they were computed."
    return save_plot(Plot(name, partial(_curves, worths, shown), alt, caption), folder)


def _curves(worths: Sequence[Worth], metrics: dict[str, str]) -> Any:
    ways = [way for way in WAYS if any(w.way == way for w in worths)]
    networks = list(dict.fromkeys(w.network for w in worths))
    figure, axes = subplots(1, len(metrics), (4.2 * len(metrics), 3.4))
    for axis, (metric, heading) in zip(axes[0], metrics.items(), strict=True):
        for number, network in enumerate(networks):
            own = [w for w in worths if w.network == network and metric in w.value]
            aside = _APART * (number - (len(networks) - 1) / 2)
            x = [ways.index(w.way) + aside for w in own]
            colour = f"C{number % 10}"
            axis.plot(x, [w.value[metric] for w in own], "o-", ms=4, color=colour, label=network)
            for place, worth in zip(x, own, strict=True):
                interval = worth.interval.get(metric, UNDEFINED)
                axis.plot([place] * 2, [interval.low, interval.high], color=colour, alpha=0.5)
        axis.set_xticks(range(len(ways)), ways)
        axis.set_xlim(-0.5, len(ways) - 0.5)
        axis.set_ylabel(heading)
    axes[0, 0].legend(fontsize=8)
    return figure

"""A model's metrics on other rows beside those of the validation it was chosen on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich import figures
from ich.comparison import Comparison, Group, Predictions, RowSet, Run, replicates
from ich.metrics import per_study, sigmoid
from ich.page import Block, Bullets, Grid, Section, Text, to_html, to_markdown
from ich.results import FINISHED, RunPaths, write_text
from ich.uncertainty import FEWEST_GROUPS, Interval, Scored, draw_counts

HERE, VALIDATION = "here", "validation"
# Per label, of the decisions at the model's thresholds.
_DECISIONS = ("sensitivity", "specificity", "precision", "npv")
OVERALL = ("auc", "auc_macro", "accuracy", "exact_match", "ap_macro", "log_loss",
            "log_loss_weighted", "brier", "ece")  # fmt: skip
PER_LABEL = ("auc", "ap", *_DECISIONS)


@dataclass(frozen=True)
class Evaluation:
    """model: its name. here, validation: predictions of the same labels; validation is None where
    it is not at hand. thresholds: per label. notes: what a reader must know. left_out: `image_id`
    and `reason` of files that could not be used."""

    model: str
    here: Predictions
    validation: Predictions | None
    thresholds: dict[str, float]
    notes: list[str]
    left_out: pd.DataFrame

    @property
    def is_paired(self) -> bool:
        """Whether both sides are of the same rows, in the same order."""
        other = self.validation
        return other is not None and np.array_equal(self.here.image_id, other.image_id)


def metrics_table(evaluation: Evaluation, resamples: int) -> pd.DataFrame:
    """Every metric of the comparison, and the decisions at the model's thresholds.

    Returns:
        `level` (slice or study), `metric`, `here` with `here_low` and `here_high`, the same of
        `validation`, and of `difference`, here minus validation: of two sets of rows, so that its
        interval is unpaired, unless they are the very same. Intervals are 95 %; empty below ten
        patients, and where there is none.
    """
    here, validation = evaluation.here, evaluation.validation
    sides = {HERE: here}
    if validation is not None:
        # The same rows are drawn alike, and their differences are paired.
        same = evaluation.is_paired
        scored = replace(validation.scored, group=here.scored.group) if same else validation.scored
        sides[VALIDATION] = replace(validation, scored=scored)
    values = {k: _values(p, evaluation.thresholds) for k, p in sides.items()}
    drawn = {
        k: _resampled(p, evaluation.thresholds, resamples, 0 if evaluation.is_paired else seed)
        for seed, (k, p) in enumerate(sides.items())
    }
    lines = []
    for name in values[HERE]:
        level = "study" if name.startswith("study_") else "slice"
        line: dict[str, object] = {"level": level, "metric": name.removeprefix("study_")}
        for side in (HERE, VALIDATION):
            line[side] = values.get(side, {}).get(name, np.nan)
            line |= _limits(side, drawn.get(side, {}).get(name))
        line["difference"] = float(line[HERE]) - float(line[VALIDATION])  # type: ignore[arg-type]
        pair = [drawn.get(side, {}).get(name) for side in (HERE, VALIDATION)]
        both = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
        lines.append(line | _limits("difference", both))
    return pd.DataFrame(lines)


def _limits(name: str, values: np.ndarray | None) -> dict[str, float]:
    nothing = Interval(float("nan"), float("nan"))
    found = nothing if values is None else Interval.of(values)
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _values(found: Predictions, thresholds: dict[str, float]) -> dict[str, float]:
    every = np.ones((int(found.scored.group.max()) + 1, 1), np.float32)
    decided = _all_decisions(found, thresholds, every)
    decisions = {k: float(v[0]) for k, v in decided.items()}
    studies = {f"study_{k}": v for k, v in found.study_metrics.items()}
    return {**found.metrics, **decisions, **studies}


def _resampled(
    found: Predictions, thresholds: dict[str, float], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    groups = int(found.scored.group.max()) + 1
    if not resamples or groups < FEWEST_GROUPS:
        return {}
    counts = draw_counts(groups, resamples, seed)
    return replicates(found, counts) | _all_decisions(found, thresholds, counts)


def _all_decisions(
    found: Predictions, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Of `_decisions`, per slice and, as `study_<metric>`, per study: positive where any of its
    slices is."""
    out = _decisions(found.scored, thresholds, counts)
    if (found.study >= 0).any():
        logits, target, first = per_study(found.scored.logits, found.scored.target, found.study)
        studies = Scored(found.scored.labels, target, logits, found.scored.group[first])
        out |= {f"study_{k}": v for k, v in _decisions(studies, thresholds, counts).items()}
    return out


def _decisions(
    scored: Scored, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Per label the four shares at its threshold, of every resample.

    Args:
        scored: rows of at most G groups.
        thresholds: probabilities.
        counts: how often each group is drawn, [G, R].

    Returns:
        float64 [R] each, NaN where nothing is counted.
    """
    out = {}
    drawn = counts.astype(np.float64)

    def counted(rows: np.ndarray) -> np.ndarray:
        return np.bincount(scored.group, rows, len(counts)) @ drawn

    for i, label in enumerate(scored.labels):
        said = sigmoid(scored.logits[:, i]) >= thresholds[label]
        truth = scored.target[:, i] > 0.5
        hits, rejected = counted(said & truth), counted(~said & ~truth)
        shares = (
            (hits, counted(truth)),
            (rejected, counted(~truth)),
            (hits, counted(said)),
            (rejected, counted(~said)),
        )
        for name, (part, whole) in zip(_DECISIONS, shares, strict=True):
            share = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
            out[f"{name}_{label}"] = share
    return out


def write_evaluation(evaluation: Evaluation, table: pd.DataFrame, folder: Path) -> Path:
    """Writes `evaluation.csv`, `.md` and `.html`, `predictions.csv`, figures, and, if any,
    `left_out.csv`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "evaluation.csv", table.to_csv(index=False))
    write_text(folder / "predictions.csv", _rows(evaluation).to_csv(index=False))
    if len(evaluation.left_out):
        write_text(folder / "left_out.csv", evaluation.left_out.to_csv(index=False))
    else:
        (folder / "left_out.csv").unlink(missing_ok=True)  # of an earlier time
    pictures = figures.draw_some(_compared(evaluation), folder / "figures")
    sections: list[Section] = [("What was evaluated", [Bullets(evaluation.notes)])]
    sections += [("Metrics", list(_tables(evaluation, table))), ("Figures", list(pictures))]
    facts = {"model": evaluation.model, "rows": f"{len(evaluation.here.image_id):,}"}
    title = "Evaluation"
    write_text(folder / "evaluation.md", to_markdown(title, facts, sections))
    page = folder / "evaluation.html"
    write_text(page, to_html(title, facts, sections))
    return page


def _rows(evaluation: Evaluation) -> pd.DataFrame:
    found = evaluation.here
    frame = pd.DataFrame({"image_id": found.image_id, "study": found.study})
    for i, k in enumerate(found.scored.labels):
        frame[k] = sigmoid(found.scored.logits[:, i])
        frame[f"{k}_target"] = found.scored.target[:, i].astype(int)
    return frame


def shown_table(table: pd.DataFrame, metrics: Sequence[str], level: str) -> pd.DataFrame:
    """Some metrics as text: value and interval of both sides, and of their difference."""
    part = table[table["level"] == level].set_index("metric").to_dict("index")
    lines = []
    for name in metrics:
        if row := part.get(name):
            each = {side: _cell(row, side, "") for side in (HERE, VALIDATION)}
            lines.append({"metric": name, **each, "difference": _cell(row, "difference", "+")})
    return pd.DataFrame(lines, columns=["metric", HERE, VALIDATION, "difference"])


def _cell(row: dict[Any, Any], side: str, sign: str) -> str:
    if np.isnan(row[side]):
        return ""
    low, high = row[f"{side}_low"], row[f"{side}_high"]
    limits = "" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{row[side]:{sign}.4f}{limits}"


def _tables(evaluation: Evaluation, table: pd.DataFrame) -> Iterator[Block]:
    labels = evaluation.here.scored.labels
    pairs = (
        "Both are of the same rows, and differences are paired"
        if evaluation.is_paired
        else "Differences are of two sets of patients: their intervals are unpaired"
    )
    yield Text(
        f"Validation chose the epoch and the thresholds, which flatters its scores. {pairs}; where "
        f"an interval leaves out zero, the model does better or worse here by more than chance "
        f"among patients explains."
    )
    for level in ("slice", "study"):
        if not (table["level"] == level).any():
            continue
        folded = level == "study"
        overall = shown_table(table, OVERALL, level)
        yield Grid(f"All labels, per {level}", overall, folded)
        for label in labels:
            heading = f"{label}, per {level}, decided at {evaluation.thresholds[label]:.3f}"
            names = [f"{k}_{label}" for k in PER_LABEL]
            yield Grid(heading, shown_table(table, names, level), folded)


def _compared(evaluation: Evaluation) -> Comparison:
    """As a comparison of two settings on different rows, for the figures."""
    sides = [(HERE, evaluation.here), (VALIDATION, evaluation.validation)]
    sets = []
    for name, found in sides:
        if found is not None:
            run = Run(name, RunPaths(Path(name)), {"status": FINISHED}, None, found)
            sets.append(RowSet(found.rows, [Group(name, [run])]))
    runs = [g.runs[0] for s in sets for g in s.groups]
    return Comparison(evaluation.model, runs, sets, 0, [])

"""Figures of a comparison, as PNG and SVG: curves, calibration, confusion, cost, hardest cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ich.base.config import Config, UserError, WindowConfig, load
from ich.data.dataset import is_prepared, load_dataset
from ich.pages.page import Picture, drawn
from ich.scoring.comparison import RANKING_METRIC, Comparison, Run, SettingResult
from ich.scoring.metrics import ANY, sigmoid

log = logging.getLogger(__name__)
_POINTS = 400  # of a curve, at most: an SVG of every row would be megabytes
_BINS = 10  # of a reliability diagram
_HARDEST = 4  # cases of each kind
_LEGEND_ROWS = 18  # lines of a legend; more settings than that are not told apart by colour anyway
_FIRST = " Of several seeds, the first."
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "ich",  # equal figures are equal files
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the report: `name` is its files' stem."""

    name: str
    draw: Callable[[Comparison], Any]
    alt: str
    caption: str


def draw_all(comparison: Comparison, folder: Path) -> list[Picture]:
    """Writes every figure that the runs allow; none without a finished run.

    Args:
        comparison: the runs.
        folder: made if absent; gets `<name>.png` and `<name>.svg`.

    Returns:
        The figures as pictures of a page, in order.
    """
    if not comparison.finished:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(figure, comparison, folder) for figure in _wanted(comparison)]


def draw_some(comparison: Comparison, folder: Path) -> list[Picture]:
    """Of those figures the ones that need nothing but predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(figure, comparison, folder) for figure in _of_predictions(comparison)]


def _wanted(comparison: Comparison) -> Iterator[Figure]:
    yield Figure(
        "learning_curves",
        _learning_curves,
        "training loss, validation accuracy and validation AUC by epoch",
        "Learning curves. Dotted: always negative.",
    )
    if not comparison.settings:
        return
    for name, axis, x in (
        ("auc_by_size", "params", "trained parameters, millions"),
        ("auc_by_minutes", "minutes", "minutes of training"),
    ):
        yield Figure(
            name,
            partial(_cost, key=axis, title=x),
            f"AUC against {x}",
            f"AUC (micro) against {x}, with 95 % intervals where they were computed. The line "
            f"joins the Pareto front, where all were scored on the same rows: nothing else is "
            f"both cheaper and better.",
        )
    yield from _of_predictions(comparison)
    best = next((s.best for s in comparison.evaluation_sets if s.best), None)
    if best:
        yield Figure(
            "confusion",
            lambda _: _confusion(best),
            "confusion per label at the chosen threshold",
            f"{best.name}: rows and what was said of them, at the threshold with the best F1 on "
            f"validation.",
        )


def _of_predictions(comparison: Comparison) -> Iterator[Figure]:
    first = _FIRST if any(len(g.runs) > 1 for g in comparison.settings) else ""
    yield Figure(
        "roc",
        lambda c: _curves(c, _roc_points, "1 - specificity", "sensitivity"),
        "receiver operating characteristic of each label",
        f"Receiver operating characteristic per label.{first}",
    )
    yield Figure(
        "precision_recall",
        lambda c: _curves(c, _precision_recall_points, "recall", "precision"),
        "precision against recall of each label",
        f"Precision and recall per label. Dotted: the share of positives, which chance "
        f"reaches.{first}",
    )
    yield Figure(
        "calibration",
        _calibration,
        "share of positives against predicted probability",
        f"Calibration: in {_BINS} bins of predicted probability, all labels pooled, the share "
        f"that is positive. On the diagonal a probability means what it says.{first}",
    )


def _save(figure: Figure, comparison: Comparison, folder: Path) -> Picture:
    import matplotlib

    matplotlib.use("Agg")

    def draw() -> Any:
        plotted = figure.draw(comparison)
        # Without a date, so that equal figures are equal files.
        plotted.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})
        return plotted

    with matplotlib.rc_context(_STYLE):
        png, width = drawn(draw)
        _close_all()
    (folder / f"{figure.name}.png").write_bytes(png)
    return Picture(figure.name, png, width, figure.alt, figure.caption)


def _close_all() -> None:
    from matplotlib import pyplot as plt

    plt.close("all")


def _subplots(*args: int, **kwargs: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(*args, layout="constrained", dpi=110, **kwargs)
    return figure, axes


def _colour(number: int) -> dict[str, Any]:
    """Ten colours, then the same dashed."""
    return {"color": f"C{number % 10}", "ls": ("-", "--", ":", "-.")[number // 10 % 4]}


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles[:_LEGEND_ROWS],
        labels[:_LEGEND_ROWS],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )


def _learning_curves(comparison: Comparison) -> Any:
    figure, axes = _subplots(1, 3, figsize=(12, 3.8))
    panels = [
        ("train/loss", "training loss"),
        ("val/accuracy", "validation accuracy"),
        ("val/auc", "validation AUC (micro)"),
    ]
    settings = list(dict.fromkeys(r.setting for r in comparison.finished))
    for axis, (key, title) in zip(axes, panels, strict=True):
        seen = set()
        for run in comparison.finished:
            journal = run.paths.read_metrics()
            points = [(line["step"], line[key]) for line in journal if line[key] is not None]
            label = None if run.setting in seen else run.setting  # of its seeds, one
            seen.add(run.setting)
            style = _colour(settings.index(run.setting)) | {"marker": "o", "ms": 3}
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if comparison.finished[0].result["cohort"]["scored"] == "val":  # the panels show validation
        baseline = comparison.finished[0].result["always_negative"]["accuracy"]
        axes[1].axhline(baseline, color="grey", ls=":", label="always negative")
    _legend(figure, *axes[1].get_legend_handles_labels())
    return figure


def _cost(comparison: Comparison, key: str, title: str) -> Any:
    figure, axis = _subplots(figsize=(7, 4.2))
    points = []
    for number, group in enumerate(comparison.settings):
        scale = 1e6 if key == "params" else 1
        x = float(np.mean([r.result[key] for r in group.runs])) / scale
        y, interval = group.mean(RANKING_METRIC), group.interval(RANKING_METRIC)
        if np.isnan(y):
            continue
        colour = _colour(number)["color"]
        if not np.isnan(interval.low):
            axis.plot([x, x], [interval.low, interval.high], color=colour, alpha=0.5)
        axis.scatter(x, y, s=36, color=colour, zorder=3)
        axis.annotate(
            group.name,
            (x, y),
            textcoords="offset points",
            xytext=(6, 4 if number % 2 else -10),
            fontsize=8,
        )
        points.append((x, y))
    if len(comparison.evaluation_sets) == 1 and (front := pareto_front(points)):
        axis.plot(*zip(*front, strict=True), color="grey", lw=1, zorder=1)
    axis.set(xlabel=title, ylabel="AUC (micro)")
    axis.margins(x=0.2, y=0.12)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, score) that no other beats in one and equals in the other; cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


Points = tuple[np.ndarray, np.ndarray]


def _ranked(score: np.ndarray, target: np.ndarray) -> Points:
    """Positives and negatives at or above each rank, from the highest score on."""
    positive = target[np.argsort(-score, kind="stable")] > 0.5
    return np.append(0, np.cumsum(positive)), np.append(0, np.cumsum(~positive))


def _roc_points(score: np.ndarray, target: np.ndarray) -> Points:
    hits, misses = _ranked(score, target)
    return misses / misses[-1], hits / hits[-1]


def _precision_recall_points(score: np.ndarray, target: np.ndarray) -> Points:
    hits, misses = _ranked(score, target)
    return hits[1:] / hits[-1], hits[1:] / (hits[1:] + misses[1:])


def _curves(
    comparison: Comparison,
    points: Callable[[np.ndarray, np.ndarray], Points],
    xlabel: str,
    ylabel: str,
) -> Any:
    labels = comparison.settings[0].predictions.scored.labels
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    figure, axes = _subplots(
        rows,
        columns,
        figsize=(3.2 * columns + 2, 3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for i, (label, axis) in enumerate(zip(labels, axes.flat, strict=False)):
        axis.set(title=label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for number, group in enumerate(comparison.settings):
            scored = group.predictions.scored
            if label not in scored.labels:
                continue
            at = scored.labels.index(label)
            score, truth = scored.logits[:, at], scored.target[:, at]
            if not 0 < truth.sum() < len(truth) or not np.isfinite(score).all():
                continue
            x, y = points(score, truth)
            kept = np.unique(np.linspace(0, len(x) - 1, _POINTS).astype(int))
            axis.plot(x[kept], y[kept], lw=1.1, label=group.name, **_colour(number))
        target = comparison.settings[0].predictions.scored.target[:, i]
        if ylabel == "precision":
            axis.axhline(target.mean(), color="grey", ls=":", lw=1)
        else:
            axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    shown: dict[str, Any] = {}
    for axis in axes.flat:
        handles, names = axis.get_legend_handles_labels()
        shown = dict(zip(names, handles, strict=True)) | shown
    _legend(figure, list(shown.values()), list(shown))
    return figure


def _calibration(comparison: Comparison) -> Any:
    figure, axis = _subplots(figsize=(6.6, 4.4))
    axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
    for number, group in enumerate(comparison.settings):
        scored = group.predictions.scored
        known = np.isfinite(scored.logits)
        probability, target = sigmoid(scored.logits[known]), scored.target[known]
        place = np.minimum((probability * _BINS).astype(int), _BINS - 1)
        size = np.bincount(place, minlength=_BINS)
        there = size > 0
        x = np.bincount(place, probability, _BINS)[there] / size[there]
        y = np.bincount(place, target, _BINS)[there] / size[there]
        axis.plot(x, y, marker="o", ms=3, lw=1.1, label=group.name, **_colour(number))
    axis.set(xlabel="predicted probability", ylabel="share of positives")
    _legend(figure, *axis.get_legend_handles_labels())
    return figure


def _confusion(best: SettingResult) -> Any:
    scored, thresholds = best.predictions.scored, best.predictions.thresholds
    labels = [k for k in scored.labels if k in thresholds]
    figure, axes = _subplots(1, max(1, len(labels)), figsize=(1.9 * len(labels) + 0.8, 2.4))
    for label, axis in zip(labels, np.atleast_1d(axes), strict=False):
        i = scored.labels.index(label)
        said = sigmoid(scored.logits[:, i]) >= thresholds[label]
        truth = scored.target[:, i] > 0.5
        counts = np.array([[np.sum((truth == t) & (said == s)) for s in (0, 1)] for t in (0, 1)])
        axis.imshow(
            counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1
        )
        for (row, column), n in np.ndenumerate(counts):
            dark = n > 0.5 * counts[row].sum()
            colour = "white" if dark else "black"
            axis.text(column, row, f"{n:,}", ha="center", va="center", color=colour)
        axis.set(
            title=f"{label}\nat {thresholds[label]:.2f}",
            xticks=[0, 1],
            yticks=[0, 1],
            xticklabels=["no", "yes"],
            yticklabels=["no", "yes"],
            xlabel="said",
        )
        axis.grid(False)
    np.atleast_1d(axes)[0].set_ylabel("is")
    return figure


# Hardest cases


@dataclass(frozen=True)
class Case:
    """A slice that a run got wrong: its id, what it shows, and the probability of `label`."""

    image_id: str
    truth: str
    probability: float


def hardest(run: Run) -> tuple[str, list[Case], list[Case]]:
    """The most confident mistakes on one label: `any` if there is one, else the most frequent.

    Returns:
        The label, missed positives (the least probable first) and false alarms (the most probable
        first), each image once.
    """
    assert run.predictions is not None
    scored, ids = run.predictions.scored, run.predictions.image_id
    labels = scored.labels
    i = labels.index(ANY) if ANY in labels else int(scored.target.sum(0).argmax())
    probability = sigmoid(scored.logits[:, i])
    order = np.argsort(probability, kind="stable")

    def cases(rows: np.ndarray) -> list[Case]:
        found: dict[str, Case] = {}
        for row in rows:
            shown = [k for k, t in zip(labels, scored.target[row], strict=True) if t and k != ANY]
            truth = ", ".join(shown) or ("positive" if scored.target[row, i] else "none")
            case = Case(str(ids[row]), truth, float(probability[row]))
            found.setdefault(case.image_id, case)
            if len(found) == _HARDEST:
                break
        return list(found.values())

    positive = scored.target[order, i] > 0.5
    return labels[i], cases(order[positive]), cases(order[~positive][::-1])


def draw_hardest(run: Run, folder: Path) -> Picture | str:
    """The hardest cases as window images; a sentence where their slices are not at hand."""
    import matplotlib

    label, missed, alarms = hardest(run)
    try:
        config = load(run.paths.config)
        slices = _slices(config, [case.image_id for case in (*missed, *alarms)])
    except (UserError, OSError, KeyError) as error:
        log.warning("the hardest cases are not drawn: %s", error)
        config, slices = None, {}
    if not slices or config is None:
        return "The decoded slices of this cohort are not at hand here: nothing is shown."
    matplotlib.use("Agg")
    with matplotlib.rc_context(_STYLE):
        png, width = drawn(_cases, label, missed, alarms, slices, config.windows.channels)
        _close_all()
    (folder / "hardest.png").write_bytes(png)
    return Picture(
        "hardest",
        png,
        width,
        f"hardest false negatives and false positives of {run.name}",
        f"{run.name}: slices with {label} that it found least likely (left), and slices without "
        f"that it found most likely (right), in the run's windows. Above each, what it shows and "
        f"the probability that was predicted.",
    )


def _slices(config: Config, image_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """int16 HU [S, S] of some scored images, from the cache of decoded slices; none without it."""
    if not is_prepared(config):
        return {}
    dataset = load_dataset(config, build=False)
    split = dataset.test if dataset.test is not None else dataset.val
    place = dict(zip(split.image_id.tolist(), split.row.tolist(), strict=True))
    return {k: np.asarray(dataset.hu[place[k]]) for k in image_ids}


def _cases(
    label: str,
    missed: Sequence[Case],
    alarms: Sequence[Case],
    slices: dict[str, np.ndarray],
    windows: Sequence[WindowConfig],
) -> Any:
    cases = [*missed, *alarms]
    shown = windows[:3]
    figure, axes = _subplots(
        len(shown), len(cases), figsize=(1.5 * len(cases), 1.45 * len(shown) + 0.7), squeeze=False
    )
    for column, case in enumerate(cases):
        kind = f"no {label}" if column >= len(missed) else case.truth.replace(", ", ",\n")
        axes[0, column].set_title(f"{kind}\n{case.probability:.3f}", fontsize=8)
        for row, window in enumerate(shown):
            axis = axes[row, column]
            low = window.center - window.width / 2
            axis.imshow(slices[case.image_id], cmap="gray", vmin=low, vmax=low + window.width)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if column == 0:
                axis.set_ylabel(window.name, fontsize=8)
    return figure

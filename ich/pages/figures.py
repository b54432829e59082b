"""Figures of a comparison, as PNG and SVG: learning, cost, curves, calibration, confusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ich.base.files import replacing, write_bytes
from ich.pages.page import Picture, draw_picture
from ich.scoring.comparison import RANKING_METRIC, Comparison, SettingResult
from ich.scoring.metrics import counts_by_threshold, sigmoid

_POINTS = 400  # of a curve, at most: an SVG of every row would be megabytes
_BINS = 10  # of a reliability diagram
_LEGEND_ROWS = 18  # of a legend; more settings than that are not told apart by colour anyway
_FIRST = " Of several seeds, the first."
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "ich",  # equal figures are equal files
    # Letters as text, which can be searched and copied, and not as outlines.
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """A figure of the report: `name` is its files' stem."""

    name: str
    draw: Callable[[], Any]
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
    return [save_plot(plot, folder) for plot in _wanted(comparison)]


def draw_some(comparison: Comparison, folder: Path) -> list[Picture]:
    """Of those figures the ones that need nothing but predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    return [save_plot(plot, folder) for plot in _of_predictions(comparison)]


def _wanted(comparison: Comparison) -> Iterator[Plot]:
    yield Plot(
        "learning_curves",
        partial(_learning_curves, comparison),
        "training loss, validation accuracy and validation AUC by epoch",
        "Learning curves. Dotted: always negative.",
    )
    if not comparison.settings:
        return
    for name, axis, x in (
        ("auc_by_size", "params", "trained parameters, millions"),
        ("auc_by_minutes", "minutes", "minutes of training"),
    ):
        yield Plot(
            name,
            partial(_cost, comparison, key=axis, title=x),
            f"AUC against {x}",
            f"AUC (micro) against {x}, with 95 % intervals where they were computed. The line "
            f"joins the Pareto front, where all were scored on the same rows: nothing else is "
            f"both cheaper and better.",
        )
    yield from _of_predictions(comparison)
    best = next((s.best for s in comparison.evaluation_sets if s.best), None)
    if best:
        yield Plot(
            "confusion",
            partial(_confusion, best),
            "confusion per label at the chosen threshold",
            f"{best.name}: rows and what was said of them, at the threshold with the best F1 on "
            f"validation.",
        )


def _of_predictions(comparison: Comparison) -> Iterator[Plot]:
    first = _FIRST if any(len(s.runs) > 1 for s in comparison.settings) else ""
    yield Plot(
        "roc",
        partial(_roc, comparison),
        "receiver operating characteristic of each label",
        f"Receiver operating characteristic per label.{first}",
    )
    yield Plot(
        "precision_recall",
        partial(_precision_recall, comparison),
        "precision against recall of each label",
        f"Precision and recall per label. Dotted: the share of positives, which chance "
        f"reaches.{first}",
    )
    yield Plot(
        "calibration",
        partial(_calibration, comparison),
        "share of positives against predicted probability",
        f"Calibration: in {_BINS} bins of predicted probability, all labels pooled, the share "
        f"that is positive. On the diagonal a probability means what it says.{first}",
    )


def save_plot(plot: Plot, folder: Path) -> Picture:
    """Writes `<name>.png` and `.svg` into a folder that is there."""
    import matplotlib

    def draw() -> Any:
        figure = plot.draw()
        # Without a date, so that equal figures are equal files.
        with replacing(folder / f"{plot.name}.svg") as part:
            figure.savefig(part, format="svg", metadata={"Date": None})
        return figure

    # For this figure, and not for whatever else the process draws.
    with matplotlib.rc_context(STYLE):
        picture = draw_picture(plot.name, plot.alt, plot.caption, draw)
    write_bytes(folder / f"{plot.name}.png", picture.png)
    return picture


def subplots(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes [rows, columns].

    Not of pyplot, which would keep every figure, and look for a display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _colour(number: int) -> dict[str, Any]:
    """Ten colours, then the same dashed."""
    return {"color": f"C{number % 10}", "ls": ("-", "--", ":", "-.")[number // 10 % 4]}


def _legend(figure: Any, *axes: Any) -> None:
    """Outside, each name of the axes once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        own, names = axis.get_legend_handles_labels()
        handles = dict(zip(names, own, strict=True)) | handles
    figure.legend(
        list(handles.values())[:_LEGEND_ROWS],
        list(handles)[:_LEGEND_ROWS],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )


def _learning_curves(comparison: Comparison) -> Any:
    panels = [
        ("train/loss", "training loss"),
        ("val/accuracy", "validation accuracy"),
        ("val/auc", "validation AUC (micro)"),
    ]
    figure, axes = subplots(1, len(panels), (12, 3.8))
    settings = list(dict.fromkeys(r.setting for r in comparison.finished))
    # Read once, and not for each panel.
    journals = [run.paths.read_metrics() for run in comparison.finished]
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for run, journal in zip(comparison.finished, journals, strict=True):
            # A metric that was NaN stands in the journal as null.
            values = [(line.step, line.metrics.get(key)) for line in journal]
            points = [(step, value) for step, value in values if value is not None]
            style = _colour(settings.index(run.setting))
            if points:
                axis.plot(*zip(*points, strict=True), label=run.setting, marker="o", ms=3, **style)
        axis.set(title=title, xlabel="epoch")
        # No tick at an epoch and a half.
        axis.xaxis.get_major_locator().set_params(integer=True)
    # What answering "no bleed" to everything scores.
    accuracy = axes[0, 1]
    fit = comparison.finished[0].fit
    if fit.cohort.scored == "val":  # the panels show validation
        baseline = fit.always_negative.get("accuracy")
        if baseline is not None:
            accuracy.axhline(baseline, color="grey", ls=":", label="always negative")
    _legend(figure, accuracy)
    return figure


def _cost(comparison: Comparison, key: str, title: str) -> Any:
    figure, axes = subplots(1, 1, (7, 4.2))
    axis, points = axes[0, 0], []
    for number, setting in enumerate(comparison.settings):
        scale = 1e6 if key == "params" else 1
        x = float(np.mean([getattr(r.fit, key) for r in setting.runs])) / scale
        y, interval = setting.mean(RANKING_METRIC), setting.interval(RANKING_METRIC)
        if np.isnan(y):
            continue
        colour = _colour(number)["color"]
        if not np.isnan(interval.low):
            axis.plot([x, x], [interval.low, interval.high], color=colour, alpha=0.5)
        axis.scatter(x, y, s=36, color=colour, zorder=3)
        # Above and below by turns: networks of like cost would write over each other.
        offset = (6, 4 if number % 2 else -10)
        axis.annotate(setting.name, (x, y), offset, textcoords="offset points", fontsize=8)
        points.append((x, y))
    if len(comparison.evaluation_sets) == 1 and (front := pareto_front(points)):
        axis.plot(*zip(*front, strict=True), color="grey", lw=1, zorder=1)
    axis.set(xlabel=title, ylabel="AUC (micro)")
    axis.margins(x=0.2, y=0.12)  # room for the names
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, score) that no other beats in one and equals in the other; cheapest first."""
    front: list[tuple[float, float]] = []
    # Of equal cost the best comes first, and the others do not exceed it.
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


CurvePoints = tuple[np.ndarray, np.ndarray]


def roc_points(score: np.ndarray, target: np.ndarray) -> CurvePoints:
    """1 - specificity and sensitivity at each distinct score, from nothing called on: [K + 1] each.
    Equal scores are one step, as in the area (`ich.scoring.metrics.auc`)."""
    _, hits, misses = counts_by_threshold(score, target)
    return np.append(0, misses) / misses[-1], np.append(0, hits) / hits[-1]


def precision_recall_points(score: np.ndarray, target: np.ndarray) -> CurvePoints:
    """Recall and precision at each distinct score, [K + 1] each. The first point, at which nothing
    is called, has the precision of the second: its own is 0 / 0."""
    _, hits, misses = counts_by_threshold(score, target)
    precision = hits / (hits + misses)
    return np.append(0, hits) / hits[-1], np.append(precision[0], precision)


def _roc(comparison: Comparison) -> Any:
    def draw_chance(axis: Any, target: np.ndarray) -> None:
        axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)

    return _curves(comparison, roc_points, draw_chance, "1 - specificity", "sensitivity")


def _precision_recall(comparison: Comparison) -> Any:
    def draw_chance(axis: Any, target: np.ndarray) -> None:
        axis.axhline(target.mean(), color="grey", ls=":", lw=1)

    # In steps, whose area is the average precision: between two points lies no other.
    names = ("recall", "precision")
    return _curves(comparison, precision_recall_points, draw_chance, *names, drawstyle="steps-pre")


def _curves(
    comparison: Comparison,
    points: Callable[[np.ndarray, np.ndarray], CurvePoints],
    draw_chance: Callable[[Any, np.ndarray], None],
    xlabel: str,
    ylabel: str,
    **style: Any,
) -> Any:
    """A panel per label, with a curve of each setting and one of chance."""
    first = comparison.settings[0].predictions.scored
    columns = min(3, len(first.labels))
    rows = -(-len(first.labels) // columns)
    figure, axes = subplots(rows, columns, (3.2 * columns + 2, 3 * rows), sharex=True, sharey=True)
    # The panels that the last row has too many.
    for axis in axes.flat[len(first.labels) :]:
        axis.set_visible(False)
    for i, (label, axis) in enumerate(zip(first.labels, axes.flat, strict=False)):
        axis.set(title=label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for number, setting in enumerate(comparison.settings):
            curve = _curve(setting, label, points)
            if curve is not None:
                axis.plot(*curve, lw=1.1, label=setting.name, **_colour(number), **style)
        draw_chance(axis, first.target[:, i])
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    _legend(figure, *axes.flat)
    return figure


def _curve(
    setting: SettingResult, label: str, points: Callable[[np.ndarray, np.ndarray], CurvePoints]
) -> CurvePoints | None:
    """None where a setting lacks the label, one of its classes, or a finite logit of any row."""
    scored = setting.predictions.scored
    if label not in scored.labels:
        return None
    i = scored.labels.index(label)
    score, target = scored.logits[:, i], scored.target[:, i]
    if not 0 < target.sum() < len(target) or not np.isfinite(score).all():
        return None
    x, y = points(score, target)
    # Evenly by rank, the ends among them: more points are not seen at this size.
    kept = np.unique(np.linspace(0, len(x) - 1, _POINTS).astype(int))
    return x[kept], y[kept]


def _calibration(comparison: Comparison) -> Any:
    figure, axes = subplots(1, 1, (6.6, 4.4))
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
    for number, setting in enumerate(comparison.settings):
        scored = setting.predictions.scored
        finite = np.isfinite(scored.logits)
        probability, target = sigmoid(scored.logits[finite]), scored.target[finite]
        # A probability of 1, which float32 reaches, belongs to the last bin.
        bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
        size = np.bincount(bins, minlength=_BINS)
        filled = size > 0
        x = np.bincount(bins, probability, _BINS)[filled] / size[filled]
        y = np.bincount(bins, target, _BINS)[filled] / size[filled]
        axis.plot(x, y, marker="o", ms=3, lw=1.1, label=setting.name, **_colour(number))
    axis.set(xlabel="predicted probability", ylabel="share of positives")
    _legend(figure, axis)
    return figure


def _confusion(best: SettingResult) -> Any:
    scored, thresholds = best.predictions.scored, best.predictions.thresholds
    labels = [k for k in scored.labels if k in thresholds]
    # Without a label that has both classes there is one empty panel: a figure has one at least.
    figure, axes = subplots(1, max(1, len(labels)), (1.9 * len(labels) + 0.8, 2.4))
    for label, axis in zip(labels, axes[0], strict=False):
        i = scored.labels.index(label)
        predicted = sigmoid(scored.logits[:, i]) >= thresholds[label]
        target = scored.target[:, i] > 0.5
        counts = np.array(
            [[np.sum((target == t) & (predicted == p)) for p in (0, 1)] for t in (0, 1)]
        )
        # By row: a rare label's positives would pale beside its negatives.
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), n in np.ndenumerate(counts):
            colour = "white" if n > 0.5 * counts[row].sum() else "black"
            axis.text(column, row, f"{n:,}", ha="center", va="center", color=colour)
        ticks: dict[str, Any] = {f"{k}ticks": [0, 1] for k in "xy"}
        ticks |= {f"{k}ticklabels": ["no", "yes"] for k in "xy"}
        axis.set(title=f"{label}\nat {thresholds[label]:.2f}", xlabel="said", **ticks)
        axis.grid(False)
    axes[0, 0].set_ylabel("is")
    return figure

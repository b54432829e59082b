"""Figures of a comparison, as PNG and SVG: learning, cost, curves, calibration, confusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ich.base.files import write_bytes, write_text
from ich.base.records import EpochMetrics
from ich.pages.curves import PRECISION_RECALL, ROC, CurveKind, band, mean_curve
from ich.pages.page import Block, Picture, draw_picture
from ich.pages.vector import name_on_hover
from ich.scoring.comparison import RANKING_METRIC, Comparison, SettingResult, ranked
from ich.scoring.metrics import sigmoid
from ich.scoring.predictions import Predictions

_BINS = 10  # of a reliability diagram
_LONGEST = 48  # letters of a name beside a panel
_BANDS = 3  # settings whose curves have one
_MEAN = "Mean of a setting's seeds."
_BAND = " The bands of the first {}: where 95 % of resampled patients and seeds have them."
_FIRST = ", of its first seed"
# Okabe and Ito's, told apart by colour-blind readers; black is the page's ink, a grey stands for
# their yellow, which is not seen on white. Each has a dash of its own, for who sees no colours.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#7d7d7d")
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), "-")
_GREY = "#b5bbc1"
ON_PALE = "#111111"  # on a cell of a heat map; black takes the ink of a page, which may be white
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Plot:
    """A figure of the report: `name` is its files' stem."""

    name: str
    draw: Callable[[], Any]
    alt: str
    caption: str


def draw_all(comparison: Comparison, folder: Path) -> dict[str, list[Block]]:
    """Draws every figure that the runs allow; none without a finished run.

    Args:
        comparison: the runs.
        folder: made if absent; gets `<name>.png` and `<name>.svg`.

    Returns:
        The figures as pictures of a page, by heading, in order.
    """
    if not comparison.finished:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    return {heading: [save_plot(plot, folder)] for heading, plot in _wanted(comparison)}


def draw_some(comparison: Comparison, folder: Path) -> list[Block]:
    """Of those figures the ones that need nothing but predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    return [save_plot(plot, folder) for _, plot in _of_predictions(comparison)]


def _wanted(comparison: Comparison) -> Iterator[tuple[str, Plot]]:
    looks = Looks(comparison)
    yield (
        "Learning curves",
        Plot(
            "learning_curves",
            partial(_learning_curves, comparison, looks),
            "training loss, validation accuracy and validation AUC by epoch",
            f"Learning curves: the mean of a setting's seeds, and from the least to the greatest "
            f"of them. Dotted: always negative. {looks.says}",
        ),
    )
    if not comparison.settings:
        return
    yield (
        "Cost",
        Plot(
            "cost",
            partial(_costs, comparison, looks),
            "AUC against trained parameters and against minutes of training",
            f"AUC (micro) against what a network costs, with 95 % intervals where they were "
            f"computed. The line joins the Pareto front, where all were scored on the same rows: "
            f"nothing else is both cheaper and better. {looks.says}",
        ),
    )
    if any(s.replicates for s in comparison.settings):
        yield (
            "Label by label",
            Plot(
                "labels",
                partial(_labels, comparison, looks),
                "AUC of each setting for each label, with 95 % intervals",
                f"AUC of each label, the settings in the order of the page's ranking, with 95 % "
                f"intervals. {looks.says}",
            ),
        )
    yield from _of_predictions(comparison)
    best = next((s.best for s in comparison.evaluation_sets if s.best), None)
    if best:
        yield (
            "Confusion",
            Plot(
                "confusion",
                partial(_confusion, best),
                "confusion per label at the chosen threshold",
                f"{best.name}: rows and what was said of them, at the threshold with the best F1 "
                f"on validation{_FIRST if len(best.runs) > 1 else ''}.",
            ),
        )


def _of_predictions(comparison: Comparison) -> Iterator[tuple[str, Plot]]:
    looks = Looks(comparison)
    mean = f"{_MEAN}{_BAND.format(_BANDS)}" if comparison.resamples else _MEAN
    yield (
        "Sensitivity and specificity",
        Plot(
            "roc",
            partial(_curves, comparison, looks, ROC, "1 - specificity", "sensitivity"),
            "receiver operating characteristic of each label",
            f"Receiver operating characteristic per label. {mean} {looks.says}",
        ),
    )
    yield (
        "Precision and recall",
        Plot(
            "precision_recall",
            partial(_curves, comparison, looks, PRECISION_RECALL, "recall", "precision"),
            "precision against recall of each label",
            f"Precision and recall per label. Dotted: the share of positives, which chance "
            f"reaches. {mean} {looks.says}",
        ),
    )
    yield (
        "Calibration",
        Plot(
            "calibration",
            partial(_calibration, comparison, looks),
            "share of positives against predicted probability",
            f"Calibration: in {_BINS} bins of predicted probability, all labels and seeds pooled, "
            f"the share that is positive. On the diagonal a probability means what it says. "
            f"{looks.says}",
        ),
    )


class Looks:
    """How each setting is drawn, alike in all figures: the best in colours that colour-blind
    readers tell apart, each with a dash of its own, and all others in grey."""

    def __init__(self, comparison: Comparison):
        # A page may have settings of several sets of rows: each is ranked by its own AUC.
        names = [s.name for s in ranked(comparison.settings)]
        names += [r.setting for r in comparison.finished]
        self.names = list(dict.fromkeys(names))

    @property
    def says(self) -> str:
        others = len(self.names) - len(_COLOURS)
        return f"Pale: those with lower AUC, {others} in number." if others > 0 else ""

    def is_named(self, name: str) -> bool:
        return self.names.index(name) < len(_COLOURS)

    def colour(self, name: str) -> str:
        return _COLOURS[self.names.index(name)] if self.is_named(name) else _GREY

    def line(self, name: str) -> dict[str, Any]:
        """Of a curve."""
        if not self.is_named(name):
            return {"color": _GREY, "lw": 0.8, "zorder": 1}
        number = self.names.index(name)
        return {"color": _COLOURS[number], "ls": _DASHES[number], "lw": 1.4, "label": name}


def save_plot(plot: Plot, folder: Path) -> Picture:
    """Writes `<name>.png` and `.svg` into a folder that is there."""
    import matplotlib

    # For this figure, and not for whatever else the process draws.
    with matplotlib.rc_context(STYLE):
        picture = draw_picture(plot.name, plot.alt, plot.caption, plot.draw)
    write_bytes(folder / f"{plot.name}.png", picture.png)
    write_text(folder / f"{plot.name}.svg", picture.svg)
    return picture


def subplots(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes [rows, columns].

    Not of pyplot, which would keep every figure, and look for a display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _legend(figure: Any, *axes: Any) -> None:
    """Below, each name of the axes once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        own, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, own, strict=True))
    if handles:
        longest = max(map(len, handles))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=max(1, min(len(handles), int(110 / (longest + 8)))),
            frameon=False,
            fontsize=8,
            handlelength=3,
        )


def _learning_curves(comparison: Comparison, looks: Looks) -> Any:
    panels = [
        ("train/loss", "training loss"),
        ("val/accuracy", "validation accuracy"),
        ("val/auc", "validation AUC (micro)"),
    ]
    figure, axes = subplots(1, len(panels), (10.5, 3.4))
    # Read once, and not for each panel.
    journals: dict[str, list[list[EpochMetrics]]] = {}
    for run in comparison.finished:
        journals.setdefault(run.setting, []).append(run.paths.read_metrics())
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for name in sorted(journals, key=looks.names.index):
            _learning_curve(axis, name, journals[name], key, looks)
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


def _learning_curve(
    axis: Any, name: str, of_seeds: Sequence[Sequence[EpochMetrics]], key: str, looks: Looks
) -> None:
    values: dict[int, list[float]] = {}
    for journal in of_seeds:
        for line in journal:
            # A metric that was NaN stands in the journal as null.
            if (value := line.metrics.get(key)) is not None:
                values.setdefault(line.step, []).append(value)
    if not values:
        return
    steps = sorted(values)
    means = [float(np.mean(values[step])) for step in steps]
    (drawn,) = axis.plot(steps, means, marker="o", ms=2.5, **looks.line(name))
    name_on_hover(drawn, f"{name}: {means[-1]:.4f} at the last epoch")
    if looks.is_named(name) and max(map(len, values.values())) > 1:
        ends = [(min(values[step]), max(values[step])) for step in steps]
        axis.fill_between(
            steps, *zip(*ends, strict=True), color=looks.colour(name), alpha=0.15, lw=0
        )


def _costs(comparison: Comparison, looks: Looks) -> Any:
    settings = [s for s in comparison.settings if not np.isnan(s.mean(RANKING_METRIC))]
    height = max(3.8, 0.16 * len(settings) + 1)
    figure, axes = subplots(1, 2, (10, height), sharey=True)
    for axis, key, title in zip(
        axes[0], ("params", "minutes"), ("trained parameters, millions", "minutes"), strict=True
    ):
        points = []
        for setting in settings:
            scale = 1e6 if key == "params" else 1
            x = float(np.mean([getattr(r.fit, key) for r in setting.runs])) / scale
            y, interval = setting.mean(RANKING_METRIC), setting.interval(RANKING_METRIC)
            colour = looks.colour(setting.name)
            if not np.isnan(interval.low):
                axis.plot([x, x], [interval.low, interval.high], color=colour, alpha=0.5)
            (dot,) = axis.plot(x, y, "o", ms=6, color=colour, zorder=3)
            name_on_hover(dot, f"{setting.name}: AUC {y:.4f}, {x:.3g} {title.split(', ')[-1]}")
            points.append((x, y))
        if len(comparison.evaluation_sets) == 1 and (front := pareto_front(points)):
            axis.plot(*zip(*front, strict=True), color="grey", lw=1, zorder=1)
        axis.set_xlabel(title)
    axes[0, 0].set_ylabel("AUC (micro)")
    _name_at_the_right(axes[0, 1], settings, points, height, looks)
    return figure


def _name_at_the_right(
    axis: Any,
    settings: Sequence[SettingResult],
    points: Sequence[tuple[float, float]],
    height: float,
    looks: Looks,
) -> None:
    """Names beside the panel, at their points' height as far as they do not touch each other."""
    low, high = axis.get_ylim()
    order = sorted(range(len(points)), key=lambda n: -points[n][1])
    wanted = [(points[n][1] - low) / (high - low) for n in order]
    for n, at in zip(order, spread(wanted, 0.19 / height), strict=True):
        name = settings[n].name
        axis.annotate(
            cut(name),
            points[n],
            (1.03, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": looks.colour(name), "lw": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


def cut(name: str, longest: int = _LONGEST) -> str:
    """A name that leaves a figure its room."""
    return name if len(name) <= longest else f"{name[:longest]}..."


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from the highest to the lowest, 1..0, moved as little as keeps them `gap` apart;
    beyond 1 only where there is no more room."""
    moved: list[float] = []
    for place in places:
        moved.append(min(place, moved[-1] - gap) if moved else place)
    # Those that were pushed off the lower end push back.
    least = 0.0
    for n in reversed(range(len(moved))):
        moved[n] = max(moved[n], least)
        least = moved[n] + gap
    return moved


def _labels(comparison: Comparison, looks: Looks) -> Any:
    settings = ranked(comparison.settings)
    labels = comparison.settings[0].predictions.scored.labels
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    size = (10, rows * (0.17 * len(settings) + 0.8))
    figure, axes = subplots(rows, columns, size, sharex=True, sharey=True)
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for label, axis in zip(labels, axes.flat, strict=False):
        metric = f"auc_{label}"
        for y, setting in enumerate(settings):
            value, interval = setting.mean(metric), setting.interval(metric)
            if np.isnan(value):
                continue
            colour = looks.colour(setting.name)
            axis.plot([interval.low, interval.high], [y, y], color=colour, lw=1.6)
            (dot,) = axis.plot(value, y, "o", ms=4.5, color=colour)
            between = f" ({interval.low:.3f} to {interval.high:.3f})"
            name_on_hover(dot, f"{setting.name}, {label}: {value:.4f}{between}")
        axis.set_title(label)
    axes[0, 0].set_yticks(range(len(settings)), [cut(s.name) for s in settings])
    axes[0, 0].set_ylim(len(settings) - 0.5, -0.5)
    for axis in axes[-1]:
        axis.set_xlabel("AUC")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, score) that no other beats in one and equals in the other; cheapest first."""
    front: list[tuple[float, float]] = []
    # Of equal cost the best comes first, and the others do not exceed it.
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _curves(comparison: Comparison, looks: Looks, kind: CurveKind, xlabel: str, ylabel: str) -> Any:
    """A panel per label, with a curve of each setting and one of chance."""
    first = comparison.settings[0].predictions.scored
    columns = min(3, len(first.labels))
    rows = -(-len(first.labels) // columns)
    size = (3.2 * columns, 2.9 * rows + 0.4)
    figure, axes = subplots(rows, columns, size, sharex=True, sharey=True)
    # The panels that the last row has too many.
    for axis in axes.flat[len(first.labels) :]:
        axis.set_visible(False)
    step = "pre" if kind is PRECISION_RECALL else None
    for i, (label, axis) in enumerate(zip(first.labels, axes.flat, strict=False)):
        axis.set(title=label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for number, setting in enumerate(ranked(comparison.settings)):
            height = mean_curve(setting, label, kind)
            if height is None:
                continue
            style = looks.line(setting.name) | {"drawstyle": f"steps-{step}" if step else "default"}
            (line,) = axis.plot(kind.x, height, **style)
            name_on_hover(line, f"{setting.name}: AUC {setting.mean(f'auc_{label}'):.4f}")
            # Drawn on top of each other, more of them would hide what they are of.
            limits = band(setting, label, kind) if number < _BANDS and setting.replicates else None
            if limits is not None:
                colour = {"color": looks.colour(setting.name), "alpha": 0.13, "lw": 0}
                axis.fill_between(kind.x, *limits, step=step, **colour)
        prevalence = first.target[:, i].mean()
        axis.plot([0, 1], [0, 1] if kind is ROC else [prevalence] * 2, color="grey", ls=":", lw=1)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    _legend(figure, *axes.flat)
    return figure


def _calibration(comparison: Comparison, looks: Looks) -> Any:
    figure, axes = subplots(1, 1, (5.6, 5))
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
    for setting in ranked(comparison.settings):
        size, probability, positive = np.zeros((3, _BINS))
        for run in setting.runs:
            for total, counted in zip(
                (size, probability, positive), _binned(run.predictions), strict=True
            ):
                total += counted
        filled = size > 0
        x, y = probability[filled] / size[filled], positive[filled] / size[filled]
        (line,) = axis.plot(x, y, marker="o", ms=3, **looks.line(setting.name))
        name_on_hover(line, f"{setting.name}: calibration error {setting.mean('ece'):.4f}")
    axis.set(xlabel="predicted probability", ylabel="share of positives")
    _legend(figure, axis)
    return figure


def _binned(predictions: Predictions | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin the rows, the sum of their probabilities, and the positives."""
    assert predictions is not None
    scored = predictions.scored
    finite = np.isfinite(scored.logits)
    probability, target = sigmoid(scored.logits[finite]), scored.target[finite]
    # A probability of 1, which float32 reaches, belongs to the last bin.
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    return (
        np.bincount(bins, minlength=_BINS),
        np.bincount(bins, probability, _BINS),
        np.bincount(bins, target, _BINS),
    )


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
            colour = "white" if n > 0.5 * counts[row].sum() else ON_PALE
            axis.text(column, row, f"{n:,}", ha="center", va="center", color=colour)
        ticks: dict[str, Any] = {f"{k}ticks": [0, 1] for k in "xy"}
        ticks |= {f"{k}ticklabels": ["no", "yes"] for k in "xy"}
        axis.set(title=f"{label}\nat {thresholds[label]:.2f}", xlabel="said", **ticks)
        axis.grid(False)
    axes[0, 0].set_ylabel("is")
    return figure

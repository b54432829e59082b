"""Figures of the data report: class balance, labels together, HU and windows, examples."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ich.base.config import WindowConfig
from ich.data.dicom import HU_MAX, HU_MIN
from ich.data.protocol import TEST, TRAIN, VAL
from ich.pages.figures import ON_PALE

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = {"before": "#8c8c8c", TRAIN: "#0072b2", VAL: "#e69f00", TEST: "#009e73"}
_WINDOW_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_DPI, _MONTAGE_DPI = 150, 120  # of charts, sharp on a phone; of noise, which compresses badly


def shorten(name: str, most: int = 28) -> str:
    """A name on one line of a figure; long ones often differ at their end."""
    line = " ".join(str(name).split())
    tail = most // 3
    return line if len(line) <= most else f"{line[: most - tail - 1]}…{line[-tail:]}"


def draw_balance(labels: Sequence[str], rates: dict[str, list[float]]) -> Any:
    """rates: percent positive of each label [L], before and in each split."""
    from matplotlib.figure import Figure

    height = 1.1 + 0.17 * len(labels) * len(rates) + 0.1 * len(labels)  # inches, by the bars
    figure = Figure(figsize=(9, height), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    positive = [r for rate in rates.values() for r in rate if r > 0] or [1.0]
    # A logarithmic axis has no zero: bars begin at the power of ten below the smallest.
    least = 10 ** math.floor(math.log10(min(positive) / 1.5))
    thickness = 0.84 / len(rates)
    for n, (split, rate) in enumerate(rates.items()):
        # The bars of a label stand side by side around its tick.
        y = np.arange(len(labels)) + (n - (len(rates) - 1) / 2) * thickness
        axis.barh(y, rate, thickness * 0.9, color=_COLOURS[split], label=split)
        for bar, r in zip(y, rate, strict=True):
            # The number itself, which nobody reads from a logarithmic axis.
            text, end = f"{r:.2f}" if r else "0", (max(r, least), bar)
            axis.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(least, 2.2 * max(positive))  # with room for the numbers beside the bars
    axis.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top, as in the table
    _percent_ticks(axis.xaxis, 1)
    axis.set_yticks(range(len(labels)), [shorten(k) for k in labels])
    axis.set_xlabel("positive, logarithmic")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(rates), frameon=False)
    return figure


def _percent_ticks(axis: Any, factor: float) -> None:
    """Plain percentages on a logarithmic axis: matplotlib would write formulas."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{factor * x:g} %"))
    axis.set_minor_formatter(NullFormatter())


def draw_cooccurrence(labels: Sequence[str], counts: np.ndarray) -> Any:
    """counts: int [L, L]; each row is coloured by its share of the diagonal."""
    from matplotlib.figure import Figure

    names = [shorten(label) for label in labels]
    side = 0.72 * len(names)  # inches
    figure = Figure(figsize=(side + 2.6, side + 1.9), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    # The diagonal has each label's own count; one without a positive has 0, and shares of 0.
    share = counts / np.maximum(1, counts.diagonal())[:, None]
    image = axis.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), n in np.ndenumerate(counts):
        text = f"{_compact(n)}\n{share[row, column]:.0%}" if n else "0"
        colour = "white" if share[row, column] > 0.6 else ON_PALE
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="% of the row's label", shrink=0.8)
    return figure


def _compact(count: int) -> str:
    """A count in the width of a cell."""
    return f"{count:,}" if count < 100_000 else f"{count / 1000:,.0f}k"


def draw_hounsfield(share: np.ndarray, windows: Sequence[WindowConfig]) -> Any:
    """share: of all pixels, at each HU from HU_MIN to HU_MAX."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=_DPI, layout="constrained")
    # Steps that divide their ranges, 4,096 and 500 HU, into whole bins.
    panels = (("all HU", HU_MIN, HU_MAX + 1, 16), ("near water", -200, 300, 2))
    for axis, (title, low, high, step) in zip(figure.subplots(1, 2), panels, strict=True):
        density = share[low - HU_MIN : high - HU_MIN].reshape(-1, step).mean(1)
        axis.stairs(density, np.arange(low, high + 1, step), fill=True, color="#b0b0b0", lw=0)
        filled = density[density > 0]
        # Without a pixel in a panel, any limits do.
        floor, top = (filled.min(), filled.max()) if len(filled) else (1e-6, 1e-3)
        used = max(0.3, 0.93 - 0.08 * len(windows))  # of the height; windows are above
        least = floor / 2
        axis.set(yscale="log", xlim=(low, high), title=title)
        # On a logarithmic axis, a power of 1 / used leaves the rest of the height to the windows.
        axis.set(ylim=(least, least * (top / least) ** (1 / used)))
        axis.set(xlabel="HU", ylabel="of all pixels, per HU")
        # Of matplotlib's ticks, which go on above 100 %, those that are drawn.
        ticks = axis.get_yticks()
        axis.set_yticks(ticks[(ticks >= least) & (ticks <= min(1, 3 * top))])
        _percent_ticks(axis.yaxis, 100)
        axis.spines[["top", "right"]].set_visible(False)
        # The windows, one below the other, above the histogram.
        for n, window in enumerate(windows):
            _mark_window(axis, window, 0.93 - 0.08 * n, _WINDOW_COLOURS[n % 5], low, high)
    return figure


def _mark_window(
    axis: Any, window: WindowConfig, y: float, colour: str, low: float, high: float
) -> None:
    """A line from the window's lower to its upper end, at the height y of the axes."""
    left = max(low, window.center - window.width / 2)
    right = min(high, window.center + window.width / 2)
    if left >= right:
        return
    # x in HU, y as a share of the height.
    where = axis.get_xaxis_transform()
    axis.plot([left, right], [y, y], transform=where, color=colour, lw=3, solid_capstyle="butt")
    ends = [x for x in (left, right) if low < x < high]
    axis.vlines(ends, 0, y, transform=where, color=colour, lw=0.8, ls=":")
    text = f"{shorten(window.name)} {window.center:g} / {window.width:g}"
    margin = 0.2 * (high - low)  # a text of usual length stays inside
    middle = min(max((left + right) / 2, low + margin), high - margin)
    card = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axis.text(middle, y + 0.024, text, transform=where, ha="center", fontsize=8, bbox=card)


def draw_montage(
    named: list[tuple[str, str]],
    pictures: list[list[np.ndarray]],
    windows: Sequence[WindowConfig],
) -> Any:
    """named: (label, id) of each row; pictures: per row one image per column."""
    from matplotlib.figure import Figure

    side = 1.7 if len(named) <= 8 else 1.35  # all lengths are inches
    left, top, under = 1.5, 0.5, 0.22
    columns = len(pictures[0])
    width, height = left + max(2, columns) * side, top + len(named) * (side + under)
    figure = Figure(figsize=(width, height), dpi=_MONTAGE_DPI, facecolor="black")
    titles = [f"{shorten(w.name, 18)}\n{w.center:g} / {w.width:g}" for w in windows]
    titles += [f"the {'first three' if len(windows) > 3 else 'windows'}\nas colours"]
    # 72 points to an inch, and 4.6 of them to a character.
    room = int((width - left) * 72 / 4.6)  # characters of 7 pt
    label_style: dict[str, Any] = {"color": "white", "va": "center", "fontsize": 9}
    id_style: dict[str, Any] = {"color": "#b8b8b8", "va": "top", "fontsize": 7}
    for row, ((label, image_id), images) in enumerate(zip(named, pictures, strict=True)):
        # From the top down, while matplotlib counts from the bottom.
        y = height - top - row * (side + under) - side
        text = textwrap.fill(label, 17)
        figure.text(0.1 / width, (y + side / 2) / height, text, **label_style)
        figure.text(left / width, (y - 0.04) / height, shorten(image_id, room), **id_style)
        for column, image in enumerate(images):
            box = (left + column * side) / width, y / height, 0.98 * side / width, side / height
            axis = figure.add_axes(box)
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], color="white", fontsize=9, pad=4)
    return figure

"""The comparison as one picture, a forest plot: a line per setting, its AUC and its interval.

Drawn from the table of `comparison.csv` alone, so that a folder without predictions, which is what
can be given to others, has its picture too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.base.records import FINISHED
from ich.base.results import SweepPaths
from ich.pages.description import decimals, interval_text, signed
from ich.pages.figures import Plot, save_plot, subplots
from ich.pages.page import Picture
from ich.scoring.ensembles import GREEDY, MEAN
from ich.scoring.equivalence import BEST, DIFFERENT, EQUAL, UNKNOWN
from ich.scoring.uncertainty import Interval

_LIMITS = ("auc_low", "auc_high", "auc_minus_best_low", "auc_minus_best_high")
_TEXTS = ("job", "model", "setting", "rows", "against_best", "scored_on")
_NEEDED = ("status", "seeds", "auc", "auc_sd", "minutes", "params", *_LIMITS, *_TEXTS)
_ROW = 0.27  # inches
_NAME_WIDTH, _NAME_LINE = 44, 0.6  # letters of a line of a name; what a further line takes of a row
_HEADING = 1.4  # rows that a group's heading takes
# Right of the plot: columns, and where each ends; in points from its edge.
_HEADINGS = ("AUC", "95 % interval", "minus the best", "minutes", "trained M")
_COLUMNS = (38, 120, 236, 288, 346)
_SCORED = {"val": "validation", "test": "test"}
_INK, _BLUE, _GREY = "#1b1f24", "#0072b2", "#57606a"
_TOGETHER = "together"
# By `against_best`: marker, colours of its edge and face, and text of the legend. Told apart by
# their form too; as in the page.
_STYLES: dict[str, tuple[str, str, str, str]] = {
    BEST: ("D", _BLUE, _BLUE, "best"),
    EQUAL: ("o", _BLUE, _BLUE, "equal to it within the margin"),
    UNKNOWN: ("o", _INK, "white", "not known to differ or to be equal"),
    DIFFERENT: ("s", _GREY, _GREY, "different"),
    "": ("o", _INK, "white", "not compared"),
    _TOGETHER: ("^", _GREY, "white", "several networks together"),
}


@dataclass(frozen=True)
class _Line:
    """A setting, or an ensemble. told: a key of `_STYLES`. seeds: the AUC of each. difference: from
    the best. minutes, params: what it cost."""

    name: str
    told: str
    seeds: Sequence[float]
    interval: Interval
    difference: Interval
    minutes: float
    params: float

    @property
    def auc(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def name_lines(self) -> list[str]:
        # Broken at commas, where a name says one more thing.
        words = self.name.replace(",", ", ")
        lines = textwrap.wrap(words, _NAME_WIDTH, break_on_hyphens=False)
        return [line.replace(", ", ",") for line in lines]

    @property
    def height(self) -> float:
        """In rows."""
        return 1 + _NAME_LINE * (len(self.name_lines) - 1)


@dataclass(frozen=True)
class _Group:
    """Settings that were scored on the same rows, the highest AUC first."""

    name: str
    lines: Sequence[_Line]


def draw_forest(table: pd.DataFrame, folder: Path) -> Picture | None:
    """Writes `forest.png` and `.svg`; None if no job has finished.

    Args:
        table: of `ich.pages.columns.build_table`.
        folder: made if absent.
    """
    # Rows of settings and baselines have no job.
    jobs = table[table["job"].notna() & (table["status"] == FINISHED)]
    if not len(jobs):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    groups = _groups(jobs, table[table["model"].isin((MEAN, GREEDY))])
    title = _title(groups, list(jobs["scored_on"].dropna().unique()))
    caption = f"{title}; 95 % intervals where they were computed."
    if len(groups) > 1:
        caption += " Between groups, which were scored on different rows, nothing is compared."
    alt = "AUC of each setting with its 95 % interval, the highest first"
    plot = Plot("forest", partial(_forest, groups, title), alt, caption)
    return save_plot(plot, folder)


def redraw_forest(sweep: SweepPaths) -> Path:
    """The same from a folder's `comparison.csv` as it stands; returns the PNG.

    Raises:
        UserError: there is none, it is not one of this version, or no job in it has finished.
    """
    if not sweep.csv.exists():
        raise UserError(
            f"{sweep.root} has no {sweep.csv.name}, which the forest plot is drawn from. Make it "
            f"first: ich report {sweep.root}"
        )
    # As texts: fingerprints of digits alone, or 12e3, would be read as numbers.
    table = pd.read_csv(sweep.csv, dtype=dict.fromkeys(_TEXTS, str))
    if missing := [name for name in _NEEDED if name not in table]:
        raise UserError(
            f"{sweep.csv} lacks the columns {', '.join(missing)}: an earlier version wrote it. "
            f"Make it again: ich report {sweep.root}"
        )
    if draw_forest(table, sweep.figures) is None:
        raise UserError(f"{sweep.csv} has no finished job: there is nothing to draw.")
    return sweep.figures / "forest.png"


def _title(groups: Sequence[_Group], scored_on: Sequence[str]) -> str:
    """What the numbers are."""
    seeds = sorted({len(line.seeds) for group in groups for line in group.lines})
    parts = ["AUC (micro)", " or ".join(f"{_SCORED[k]} rows" for k in scored_on)]
    if seeds != [1]:
        parts.append(f"mean of {' or '.join(map(str, seeds))} seeds")
    return ", ".join(part for part in parts if part)


def _groups(jobs: pd.DataFrame, ensembles: pd.DataFrame) -> list[_Group]:
    """The finished jobs of a table, by the rows they were scored on and then by setting; below
    them the ensembles of these rows."""
    groups = []
    for rows, on_same_rows in jobs.groupby("rows", sort=False, dropna=False):
        # Names can be cut to the same text; what settings have of their own tells them apart.
        several = on_same_rows["seeds"].fillna(1) > 1
        # As texts: without predictions both columns are NaN throughout.
        own = on_same_rows["setting"].astype(str) + on_same_rows["auc_sd"].astype(str)
        key = own.where(several, on_same_rows["job"])
        lines = [_line(runs) for _, runs in on_same_rows.groupby(key, sort=False)]
        lines.sort(key=lambda line: -np.nan_to_num(line.auc, nan=-1))
        if not any(line.told for line in lines) and len(lines) > 1:
            lines[0] = replace(lines[0], told=BEST)  # without intervals nothing else is known
        elif len(lines) == 1:
            lines = [replace(lines[0], told="")]  # alone, everything would be the best
        together = ensembles[ensembles["rows"] == rows]
        lines += [
            replace(_line(together[together["model"] == name]), name=name, told=_TOGETHER)
            for name in together["model"]
        ]
        first = on_same_rows["job"].iloc[0]
        name = "without predictions" if pd.isna(rows) else f"on the rows of {first}"
        groups.append(_Group(name, lines))
    return groups


def _line(runs: pd.DataFrame) -> _Line:
    first = runs.iloc[0]
    limits = [float(first[name]) if pd.notna(first[name]) else np.nan for name in _LIMITS]
    told = first["against_best"] if pd.notna(first["against_best"]) else ""
    name = first["setting"] if pd.notna(first["setting"]) else first["job"]
    seeds = runs["auc"].astype(float).tolist()
    intervals = Interval(*limits[:2]), Interval(*limits[2:])
    costs = runs[["minutes", "params"]].astype(float).mean()
    return _Line(str(name), told, seeds, *intervals, costs["minutes"], costs["params"])


# --- Drawing -------------------------------------------------------------------------------------


def _forest(groups: Sequence[_Group], title: str) -> Any:
    lines = [line for group in groups for line in group.lines]
    heading = _HEADING if len(groups) > 1 else 0
    rows = heading * len(groups) + sum(line.height for line in lines)
    longest = max(len(text) for line in lines for text in line.name_lines)
    # Inches: long names shall not take the plot's.
    size = (10 + 0.07 * max(0, longest - 18), _ROW * rows + 1.15)
    figure, axes = subplots(1, 1, size)
    axis, y = axes[0, 0], 0.0
    has_intervals = any(not np.isnan(line.interval.low) for line in lines)
    headings = _HEADINGS if has_intervals else ("AUC", "", "", *_HEADINGS[3:])
    _write_columns(axis, -0.35, headings, color=_GREY)
    for group in groups:
        if heading:
            where, style = axis.get_yaxis_transform(), {"color": _GREY, "style": "italic"}
            axis.text(0, y + 0.6 * heading, group.name, transform=where, va="center", **style)
        y += heading
        _draw_group(axis, y, group)
        y += sum(line.height for line in group.lines)
    axis.set_ylim(y + 0.1, 0)  # downwards
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(title)
    axis.margins(x=0.04)
    axis.xaxis.get_major_locator().set_params(nbins=6)
    _add_legend(figure, lines)
    return figure


def _draw_group(axis: Any, top: float, group: _Group) -> None:
    """Rows from `top` downwards, and through them a line at the best."""
    y = top
    places = (
        decimals(line.interval for line in group.lines),
        decimals(line.difference for line in group.lines),
    )
    for line in group.lines:
        _draw_line(axis, y + line.height / 2, line, places)
        y += line.height
    for line in group.lines:
        if line.told == BEST:
            axis.plot([line.auc] * 2, [top, y], color=_BLUE, lw=0.8, ls=":", zorder=1)


def _draw_line(axis: Any, y: float, line: _Line, places: tuple[int, int]) -> None:
    """places: decimals of the AUC, and of the difference."""
    marker, edge, face, _ = _STYLES[line.told]
    low, high = line.interval.low, line.interval.high
    axis.plot([low, high], [y, y], color=edge, lw=1.6, solid_capstyle="butt", zorder=2)
    axis.plot(line.auc, y, marker, ms=6.5, color=edge, mfc=face, mew=1.4, zorder=4)
    if len(line.seeds) > 1:
        # Below the line, which would hide them.
        axis.plot(line.seeds, [y + 0.28] * len(line.seeds), "o", ms=2.6, color=edge, mew=0)
    style = {"color": _GREY if line.told == _TOGETHER else _INK}
    style |= {"weight": "bold" if line.told == BEST else "normal"}
    _annotate(axis, y, -6, "\n".join(line.name_lines), **style)
    texts = (
        "no AUC" if np.isnan(line.auc) else f"{line.auc:.{places[0]}f}",
        interval_text(line.interval, f".{places[0]}f"),
        interval_text(line.difference, f"+.{places[1]}f"),
        "" if np.isnan(line.minutes) else f"{line.minutes:.1f}",
        "" if np.isnan(line.params) else f"{line.params / 1e6:.1f}",
    )
    _write_columns(axis, y, [signed(text) for text in texts], **style)


def _write_columns(axis: Any, y: float, texts: Sequence[str], **style: Any) -> None:
    for text, x in zip(texts, _COLUMNS, strict=True):
        _annotate(axis, y, x, text, **style)


def _annotate(axis: Any, y: float, x: float, text: str, ha: str = "right", **style: Any) -> None:
    """A text that ends, or with `ha` begins, x points right of the plot; left of it if x < 0."""
    axis.annotate(
        text,
        (float(x > 0), y),
        (x, 0),
        xycoords=axis.get_yaxis_transform(),
        textcoords="offset points",
        ha=ha,
        va="center_baseline",
        annotation_clip=False,
        **style,
    )


def _add_legend(figure: Any, lines: Sequence[_Line]) -> None:
    """Of the styles that are there, in one row below."""
    from matplotlib.lines import Line2D

    told = {line.told for line in lines}
    handles = [
        Line2D([], [], marker=marker, color=edge, mfc=face, ms=6, mew=1.4, lw=1.6, label=text)
        for key, (marker, edge, face, text) in _STYLES.items()
        if key in told
    ]
    if any(len(line.seeds) > 1 for line in lines):
        handles.append(Line2D([], [], marker="o", color=_GREY, ms=2.6, mew=0, lw=0, label="a seed"))
    style = {"frameon": False, "fontsize": 8, "handlelength": 2}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **style)

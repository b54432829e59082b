"""What can be told apart: conclusions, each setting against the best, how sure the order is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich.pages.answers.pairs import pair_blocks
from ich.pages.answers.words import probability, some_names
from ich.pages.description import describe_verdicts, interval_text
from ich.pages.figures import ON_PALE, Plot, cut, save_plot, subplots
from ich.pages.page import Block, Bullets, Picture, Table
from ich.scoring.comparison import RANKING_METRIC, Comparison, EvaluationSet, SettingResult
from ich.scoring.ensembles import GREEDY, EnsembleResult
from ich.scoring.equivalence import DIFFERENT, EQUAL, UNKNOWN
from ich.scoring.uncertainty import UNDEFINED

_CELL, _SIDE = 0.4, 2.6  # inches, of a cell and, at least, of all: two would make a stamp
_LONGEST = 60  # letters of a name


def told_apart(comparison: Comparison, folder: Path) -> Iterator[Block]:
    """The conclusions, every setting against the best and against every other, and the chance of
    each rank, of each set of rows; the figure goes to `folder` too."""
    several = len(comparison.evaluation_sets) > 1
    for number, rows in enumerate(comparison.evaluation_sets):
        where = f"On the rows of {rows.name}: " if several else ""
        ensembles = [_together(e, rows) for e in rows.ensembles]
        yield Bullets([*_conclusions(rows, where, comparison.margin), *ensembles])
        compared = [s for s in rows.settings if s.against_best]
        if len(compared) > 1:
            yield _against_best(compared, where)
            yield from pair_blocks(rows, where)
            # Named after the table's, in a report that has several.
            yield _draw_ranks(
                compared, f"ranks-{number + 1}" if several else "ranks", where, folder
            )


def _conclusions(rows: EvaluationSet, where: str, margin: float) -> Iterator[str]:
    best = rows.best
    if best is None:
        yield "No setting has an AUC: there is no best."
        return
    interval = interval_text(best.interval(RANKING_METRIC))
    between = f" ({interval})" if interval else ""
    yield f"{where}{best.name} has the highest AUC, {best.mean(RANKING_METRIC):.4f}{between}."
    others = [g for g in rows.settings if g is not best]
    if not others:
        return
    if not best.replicates:
        yield "Without intervals, nothing says whether that is more than chance."
        return
    for verdict, text in (
        (EQUAL, f"Equal to it within {margin:g} AUC"),
        (DIFFERENT, "Different from it, and lower"),
        (UNKNOWN, "Not known"),
    ):
        if names := [
            g.name for g in others if g.against_best and g.against_best.verdict == verdict
        ]:
            yield f"{text}: {some_names(names)}."
    yield f"{describe_verdicts(margin)} The best was picked for its score, which flatters it."
    same = [g.name for g in others if g.differs_from_best is False]
    worse = [g.name for g in others if g.differs_from_best]
    alone = "By each comparison alone, of which one in twenty errs at 95 %"
    if same:
        yield f"{alone}, not distinguishable from it (\u2248): {some_names(same)}."
    if worse:
        yield f"{alone}, lower: {some_names(worse)}."


def _together(ensemble: EnsembleResult, rows: EvaluationSet) -> str:
    """What an ensemble gives, against the best single setting."""
    highest = rows.best.mean(RANKING_METRIC) if rows.best else np.nan
    value = ensemble.predictions.metrics[RANKING_METRIC]
    own = interval_text(ensemble.interval(RANKING_METRIC))
    difference = ensemble.difference_from_best.get(RANKING_METRIC, UNDEFINED)
    between = interval_text(difference, "+.4f")
    chosen = " (chosen on validation)" if ensemble.name == GREEDY else ""
    return (
        f"The {ensemble.name}{chosen}, of {len(ensemble.members)}, has an AUC of {value:.4f}"
        f"{f' ({own})' if own else ''}, {value - highest:+.4f}{f' ({between})' if between else ''} "
        f"against the best single one."
    )


def _against_best(settings: Sequence[SettingResult], where: str) -> Table:
    lines = []
    for setting in sorted(settings, key=lambda s: -s.mean(RANKING_METRIC)):
        against = setting.against_best
        assert against is not None
        lines.append(
            {
                "setting": setting.name,
                "verdict": against.verdict,
                "90 % interval": interval_text(against.interval, "+.4f"),
                "p": probability(against.p),
                "p, corrected": probability(against.p_holm),
                "chance of being the best": f"{against.chance_best:.1%}",
            }
        )
    caption = (
        f"{where}Each setting against the best, in AUC: the interval and the p of the difference, "
        f"without and with Holm's correction over all pairs; and in which share of the resamples "
        f"it is the best itself."
    )
    return Table(caption, pd.DataFrame(lines))


# --- How sure the order is -----------------------------------------------------------------------


def _draw_ranks(settings: Sequence[SettingResult], name: str, where: str, folder: Path) -> Picture:
    folder.mkdir(parents=True, exist_ok=True)
    ranked = sorted(settings, key=lambda s: -s.mean(RANKING_METRIC))
    caption = (
        f"{where}In what share of the resamples, in percent, a setting has a rank by AUC. A row of "
        f"one dark cell is sure of its place; a pale, wide one is not."
    )
    alt = "chance of each rank, a row per setting from the highest AUC on"
    return save_plot(Plot(name, partial(_heat_map, ranked), alt, caption), folder)


def _heat_map(settings: Sequence[SettingResult]) -> Any:
    chances = np.stack([s.against_best.chances for s in settings if s.against_best])
    names = [cut(s.name, _LONGEST) for s in settings]
    side = max(_CELL * len(names), _SIDE)
    figure, axes = subplots(1, 1, (side + 0.09 * max(map(len, names)) + 0.5, side + 0.6))
    axis = axes[0, 0]
    axis.imshow(chances, cmap="Blues", vmin=0, vmax=1)
    for (row, column), chance in np.ndenumerate(chances):
        text = f"{100 * chance:.0f}"
        if text != "0":
            colour = "white" if chance > 0.5 else ON_PALE
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), [str(n + 1) for n in range(len(names))])
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("rank")
    axis.grid(False)
    return figure

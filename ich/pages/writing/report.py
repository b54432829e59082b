"""The comparison in words, `report.md`: the verdict, the picture and a table of its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ich.base.files import write_text
from ich.base.results import SweepPaths
from ich.pages.description import describe_verdicts, interval_text
from ich.pages.page import render
from ich.scoring.comparison import RANKING_METRIC, Comparison, EvaluationSet, SettingResult
from ich.scoring.equivalence import DIFFERENT, EQUAL, UNKNOWN

COLUMNS = (
    *("setting", "seeds", "AUC", "95 % interval", "against the best", "accuracy"),
    *("parameters (M)", "minutes"),
)


def write_report(comparison: Comparison, paths: SweepPaths, has_page: bool) -> None:
    """Writes `report.md`.

    Args:
        comparison: the runs.
        paths: the folder of the sweep, or of the report on several.
        has_page: whether figures and `report.html` are made too.
    """
    rows = [
        setting_cells(setting)
        for compared in comparison.evaluation_sets
        for setting in sorted(compared.settings, key=lambda s: -s.mean(RANKING_METRIC))
    ]
    text = render(
        "report.md.j2",
        title=comparison.name,
        verdicts=list(verdicts(comparison)),
        has_page=has_page and bool(rows),
        columns=COLUMNS,
        rows=rows,
        legend=describe_verdicts(comparison.margin),
    )
    write_text(paths.text, text)


def verdicts(comparison: Comparison) -> Iterator[str]:
    """One sentence per set of scored rows: which setting is the best, and what the others are."""
    if not comparison.settings:
        yield "No job has finished with a score: nothing can be compared."
    for rows in comparison.evaluation_sets:
        several = len(comparison.evaluation_sets) > 1
        where = f"On the rows of {rows.name}: " if several else ""
        yield where + _verdict(rows, comparison.margin)


def _verdict(rows: EvaluationSet, margin: float) -> str:
    best = rows.best
    if best is None:
        return "no setting has an AUC, so there is no best."
    interval = interval_text(best.interval(RANKING_METRIC))
    between = f" ({interval})" if interval else ""
    text = f"{best.name} has the highest AUC, {best.mean(RANKING_METRIC):.3f}{between}"
    others = [s for s in rows.settings if s is not best]
    if not others:
        return f"{text}; there is no other setting to compare it with."
    if not best.replicates:
        return f"{text}; without intervals, nothing says whether that is more than chance."
    parts = []
    for word, meaning in (
        (EQUAL, f"equal to it within {margin:g}"),
        (DIFFERENT, "lower"),
        (UNKNOWN, "not known to differ or to be equal"),
    ):
        names = [s.name for s in others if s.against_best and s.against_best.verdict == word]
        if names:
            parts.append(f"{meaning}: {', '.join(names)}")
    return f"{'; '.join([text, *parts])}."


def setting_cells(setting: SettingResult) -> Sequence[str]:
    """A setting's row, under `COLUMNS`."""
    minutes = float(np.mean([run.fit.minutes for run in setting.runs]))
    return (
        setting.name,
        str(len(setting.runs)),
        f"{setting.mean(RANKING_METRIC):.3f}",
        interval_text(setting.interval(RANKING_METRIC)),
        setting.against_best.verdict if setting.against_best else "",
        f"{setting.mean('accuracy'):.3f}",
        f"{setting.runs[0].fit.params / 1e6:.1f}",
        f"{minutes:.1f}",
    )

"""The comparison in words: `report.md` with the verdict, a table and the methods; and in LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ich.base.files import write_text
from ich.base.results import SweepPaths
from ich.pages.answers.words import some_names
from ich.pages.description import describe_verdicts, interval_text
from ich.pages.page import render
from ich.pages.writing.answers import methods
from ich.scoring.comparison import (
    BASELINE,
    RANKING_METRIC,
    Comparison,
    EvaluationSet,
    SettingResult,
    ranked,
)
from ich.scoring.ensembles import EnsembleResult
from ich.scoring.equivalence import DIFFERENT, EQUAL, UNKNOWN

COLUMNS = (
    *("setting", "seeds", "AUC", "95 % interval", "against the best", "accuracy"),
    *("parameters (M)", "minutes"),
)

_NAMED = 3  # settings in a verdict


def write_report(comparison: Comparison, paths: SweepPaths, has_page: bool) -> None:
    """Writes `report.md`.

    Args:
        comparison: the runs.
        paths: the folder of the sweep, or of the report on several.
        has_page: whether figures and `report.html` are made too.
    """
    rows = []
    for compared in comparison.evaluation_sets:
        rows += [setting_cells(s) for s in ranked(compared.settings)]
        rows += [ensemble_cells(e, compared) for e in compared.ensembles]
    text = render(
        "report.md.j2",
        {},
        title=comparison.name,
        verdicts=list(verdicts(comparison)),
        has_page=has_page and bool(rows),
        columns=COLUMNS,
        rows=rows,
        legend=describe_verdicts(comparison.margin),
        methods=methods(comparison),
        unfinished=[run.name for run in comparison.runs if not run.is_finished],
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
    others = [s for s in ranked(rows.settings) if s is not best]
    if not others:
        return f"{text}; there is no other setting to compare it with."
    if not best.replicates:
        return f"{text}; without intervals, nothing says whether that is more than chance."
    parts = [text]
    for word, meaning in (
        (EQUAL, f"Equal to it within {margin:g}"),
        (UNKNOWN, "Not known to differ or to be equal"),
        (DIFFERENT, "Lower"),
    ):
        names = [s.name for s in others if s.against_best and s.against_best.verdict == word]
        if names:
            parts.append(f"{meaning}: {some_names(names, _NAMED)}")
    return f"{'. '.join(parts)}."


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


def ensemble_cells(ensemble: EnsembleResult, rows: EvaluationSet) -> Sequence[str]:
    """An ensemble's row, under `COLUMNS`; its costs are those of all its members."""
    metrics = ensemble.predictions.metrics
    fits = [r.fit for s in rows.settings for r in s.runs if r.name in ensemble.members]
    return (
        f"{ensemble.name} ({len(ensemble.members)})",
        "",
        f"{metrics[RANKING_METRIC]:.3f}",
        interval_text(ensemble.interval(RANKING_METRIC)),
        "",
        f"{metrics['accuracy']:.3f}",
        f"{sum(fit.params for fit in fits) / 1e6:.1f}",
        f"{sum(fit.minutes for fit in fits):.1f}",
    )


# --- LaTeX ---------------------------------------------------------------------------------------

_OF_A_PAGE = 40  # rows; a longer table goes on on the next one
# Of TeX's special characters (The TeXbook, chapter 7) what prints each.
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "_%&#${}"},
}


def tex(text: str) -> str:
    """A text as LaTeX prints it, whatever its characters mean there."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def write_latex(comparison: Comparison, paths: SweepPaths, heading: Sequence[str]) -> None:
    """Writes `comparison.tex`: a booktabs table, a row per setting and ensemble, and what answering
    "no bleed" to everything scores.

    Args:
        comparison: the runs.
        paths: the folder of the sweep, or of the report on several.
        heading: of `describe`; goes along as comments.
    """
    groups = []
    for compared in comparison.evaluation_sets:
        scores = compared.baseline()
        numbers = {"AUC": f"{scores[RANKING_METRIC]:.3f}", "accuracy": f"{scores['accuracy']:.3f}"}
        baseline = [BASELINE, *(numbers.get(column, "") for column in COLUMNS[1:])]
        rows = [setting_cells(s) for s in ranked(compared.settings)]
        together = [ensemble_cells(e, compared) for e in compared.ensembles]
        groups.append({"settings": rows, "others": [*together, baseline]})
    lines = [" ".join(text.split()) for text in heading]
    count = sum(len(rows) for group in groups for rows in group.values())
    table = "tabular" if count <= _OF_A_PAGE else "longtable"
    values = {"heading": lines, "columns": COLUMNS, "groups": groups, "table": table}
    values["packages"] = r"\usepackage{booktabs" + (",longtable}" if table == "longtable" else "}")
    write_text(paths.latex, render("comparison.tex.j2", {"tex": tex}, **values))

"""How many patients it would take: of the comparison, and of a plan."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ich.base.config import ReportConfig
from ich.base.results import SweepPaths
from ich.pages.page import Block, Table
from ich.scoring.comparison import (
    RANKING_METRIC,
    Comparison,
    EvaluationSet,
    SettingResult,
    load_comparison,
)
from ich.scoring.power import POWER, SampleSize, assumed_patients

_RESAMPLES = 500  # for a plan: one digit is enough


def patients_needed(comparison: Comparison) -> Iterator[Block]:
    """A table for each set of rows: of every setting, what telling it from the best takes."""
    several = len(comparison.evaluation_sets) > 1
    for rows in comparison.evaluation_sets:
        sized, best = _sized(rows), rows.best
        if not sized or best is None:
            continue
        highest = best.mean(RANKING_METRIC)
        lines = [
            {
                "setting": setting.name,
                "minus the best": f"{setting.mean(RANKING_METRIC) - highest:+.4f}",
                rows.predictions.unit: f"{n.patients:,}" if n.patients else "no number",
                "of them positive": f"{n.positives:,}" if n.positives else "",
                "by": "resampling" if n.is_resampled else "square root of n",
                "smallest difference told now": f"{n.smallest:.4f}",
            }
            for setting, n in sized
        ]
        where = f"On the rows of {rows.name}: " if several else ""
        caption = (
            f"{where}{_unit(rows)} that would tell a setting from the best with {POWER:.0%} power, "
            f"at 95 % and for that comparison alone, if the difference is the one seen, which is "
            f"uncertain itself. Where no number would, there is no difference, or its seeds differ "
            f"too much, and more of them would. Last, the difference that the {_at_hand(rows)} "
            f"tell."
        )
        yield Table(caption, pd.DataFrame(lines))


def describe_patients(sweep: SweepPaths, config: ReportConfig) -> Iterator[str]:
    """The same in sentences, for a plan: by the finished runs in its folder, else by what is
    assumed."""
    found = False
    if sweep.record.is_file() and sweep.read_record().jobs:
        for rows in load_comparison([sweep], _RESAMPLES).evaluation_sets:
            sized, best = _sized(rows), rows.best
            if not sized or best is None:
                continue
            found = True
            (second, n), *others = sized
            text = (
                f"Patients: to tell {best.name} from {second.name}, its second, {_needs(rows, n)}"
            )
            if others:
                each = (f"from {setting.name}, {_needs(rows, n)}" for setting, n in others)
                text += f"; {'; '.join(each)}"
            yield (
                f"{text}, with {POWER:.0%} power, if differences are those of the finished runs. "
                f"The {_at_hand(rows)} tell a difference from the second of {n.smallest:.3f} AUC."
            )
    if not found:
        a = config.assumed
        patients, positives = assumed_patients(a.aucs, a.prevalence, a.correlation)
        yield (
            f"Patients: no two finished runs tell how many it takes. Assumed that AUCs are "
            f"{a.aucs[0]:g} and {a.aucs[1]:g}, of one score per patient, a share of "
            f"{a.prevalence:g} is positive, and the scores correlate by {a.correlation:g} "
            f"(report.assumed), {patients:,} scored patients, {positives:,} of them positive, tell "
            f"two networks apart with {POWER:.0%} power."
        )


def _sized(rows: EvaluationSet) -> list[tuple[SettingResult, SampleSize]]:
    """All but the best, the highest AUC first."""
    found = [(s, s.sample_size) for s in rows.settings if s.sample_size]
    return sorted(found, key=lambda pair: -pair[0].mean(RANKING_METRIC))


def _unit(rows: EvaluationSet) -> str:
    return rows.predictions.unit.capitalize()


def _at_hand(rows: EvaluationSet) -> str:
    scored = rows.predictions.scored
    return (
        f"{scored.group_count:,} {rows.predictions.unit} at hand ({scored.positive_count:,} "
        f"positive)"
    )


def _needs(rows: EvaluationSet, n: SampleSize) -> str:
    if n.patients is None:
        return f"no number of {rows.predictions.unit} is enough without more seeds"
    return f"{n.patients:,} {rows.predictions.unit} ({n.positives:,} positive)"

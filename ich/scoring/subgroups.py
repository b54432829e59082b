"""Metrics of subgroups of the scored rows, and what sets a subgroup apart from all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ich.scoring.comparison import SettingResult
from ich.scoring.predictions import Predictions, bootstrap_predictions
from ich.scoring.uncertainty import MIN_GROUPS, Interval, draw_counts


@dataclass(frozen=True)
class SubgroupResult:
    """One subgroup. patients, positives: how many of what is drawn as one it has, and how many of
    these are positive. value: of each metric, the mean over the seeds. interval: of it.
    difference, difference_interval: from the rows of all other subgroups, if these have
    as many patients as a subgroup needs."""

    name: str
    patients: int
    positives: int
    value: Mapping[str, float]
    interval: Mapping[str, Interval]
    difference: Mapping[str, float]
    difference_interval: Mapping[str, Interval]


def subgroup_results(
    setting: SettingResult, groups: Sequence[str], resamples: int
) -> Iterator[SubgroupResult]:
    """Each subgroup of at least MIN_GROUPS patients.

    All are of the same resamples of all patients, so that a patient who is in two subgroups, as by
    the kernel of two series, is drawn for both. Seeds are averaged, and not drawn.

    Args:
        setting: whose predictions are scored. groups: of its N rows. resamples: 0 for no intervals.
    """
    of_row = np.array(groups)
    runs = [r.predictions for r in setting.runs if r.predictions is not None]
    total = runs[0].scored.group_count
    counts = draw_counts(total, resamples) if resamples else None
    for name in sorted(set(groups)):
        inside = of_row == name
        part = [p.select_rows(inside) for p in runs]
        patients = len(np.unique(part[0].scored.group))
        if patients < MIN_GROUPS:
            continue
        others = len(np.unique(runs[0].scored.group[~inside]))
        rest = [p.select_rows(~inside) for p in runs] if others >= MIN_GROUPS else []
        value, other = _mean_metrics(part), _mean_metrics(rest)
        drawn, drawn_rest = _replicates(part, counts), _replicates(rest, counts)
        yield SubgroupResult(
            name,
            patients,
            part[0].scored.positive_count,
            value,
            {k: Interval.of(v) for k, v in drawn.items()},
            {k: v - other[k] for k, v in value.items() if k in other},
            {k: Interval.of(v - drawn_rest[k]) for k, v in drawn.items() if k in drawn_rest},
        )


def _mean_metrics(runs: Sequence[Predictions]) -> dict[str, float]:
    each = [p.every_metric for p in runs]
    return {k: float(np.mean([m[k] for m in each])) for k in each[0]} if each else {}


def _replicates(runs: Sequence[Predictions], counts: np.ndarray | None) -> dict[str, np.ndarray]:
    if counts is None or not runs:
        return {}
    each = [bootstrap_predictions(p, counts) for p in runs]
    return {k: np.asarray(np.mean([v[k] for v in each], axis=0)) for k in each[0]}

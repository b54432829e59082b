"""What makes the difference: each level of a varied factor against its first level.

The settings of a sweep over `loss=bce,focal` and eight networks make eight pairs that differ in
nothing else; the effect of `focal` is the mean difference over these, and its interval is of the
same resamples of patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ich.scoring.comparison import RANKING_METRIC, Comparison, SettingResult
from ich.scoring.uncertainty import UNDEFINED, Interval


@dataclass(frozen=True)
class Effect:
    """What a level of a factor is worth against the factor's first, over `pairs` of settings that
    differ in nothing else, in a metric: mean difference, and its interval."""

    factor: str
    level: str
    against: str
    pairs: int
    mean: float
    interval: Interval


def compute_effects(comparison: Comparison, metric: str = RANKING_METRIC) -> Iterator[Effect]:
    """The worth of each level of each varied factor, where settings can be paired."""
    for factor in comparison.factors():
        for rows in comparison.evaluation_sets:
            yield from _effects_of(factor, rows.settings, metric)


def _effects_of(factor: str, settings: Sequence[SettingResult], metric: str) -> Iterator[Effect]:
    levels: dict[str, dict[str, SettingResult]] = {}
    # Two settings of one `rest` differ in this factor and in nothing else.
    for setting in settings:
        level, rest = split_setting(setting, factor)
        if level:
            levels.setdefault(level, {})[rest] = setting
    if len(levels) < 2:
        return
    first, *others = levels  # in the order of the sweep: what was named first is the reference
    for level in others:
        pairs = [(levels[level][k], levels[first][k]) for k in levels[level] if k in levels[first]]
        if not pairs:
            continue
        means = [a.mean(metric) - b.mean(metric) for a, b in pairs]
        interval = UNDEFINED
        if all(a.replicates and b.replicates for a, b in pairs):
            differences = [a.replicates[metric] - b.replicates[metric] for a, b in pairs]
            # The mean within each resample: all pairs share its patients, so their errors go
            # together, and do not cancel as those of independent pairs would.
            interval = Interval.of(np.mean(differences, axis=0))
        yield Effect(factor, level, first, len(pairs), float(np.mean(means)), interval)


def split_setting(setting: SettingResult, factor: str) -> tuple[str, str]:
    """A setting's level of a factor (empty if it has none), and the setting without it."""
    model, *parts = setting.name.split(",")
    if factor == "model":
        # A name begins with its model, and with its sweep before that where several are compared.
        sweep = model.rpartition("/")[0]
        return setting.runs[0].model, ",".join([sweep, *parts])
    varied = [p for p in parts if p.startswith(f"{factor}=")]
    level = varied[0].partition("=")[2] if varied else ""
    return level, ",".join([model, *(p for p in parts if p not in varied)])

"""What it is worth that a network sees more than a slice: per network, on the same rows.

A job of `context=study` has predicted every scored row three times: by its slice network alone, by
that smoothed over a slice and its two neighbours, and with its head. `context=slice` and
`neighbours` are other jobs. Each way is compared with the slice network, on the same patients and,
as far as both have them, the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ich.base.config import ContextName, select_value
from ich.base.workers import available_cores
from ich.scoring.comparison import Comparison, EvaluationSet, Run, mean_over_seeds, within_range
from ich.scoring.effects import split_setting
from ich.scoring.predictions import Predictions, bootstrap_predictions, read_stages
from ich.scoring.uncertainty import MIN_GROUPS, Interval, draw_counts

SLICE, SMOOTHED = ContextName.slice.value, "smoothed"
WAYS = (SLICE, SMOOTHED, ContextName.neighbours.value, ContextName.study.value)

_Seeds = dict[int, Predictions]


@dataclass(frozen=True)
class Worth:
    """A way of a network to see its slices. network: the setting without its context. way: of WAYS.
    seeds: that it was trained with. value: of each metric, per slice and as `study_<metric>` per
    study, the mean over the seeds; interval: of it. difference, difference_interval: from the slice
    network, over the seeds that both have; empty for that itself, and without such seeds."""

    network: str
    way: str
    seeds: int
    value: dict[str, float]
    interval: dict[str, Interval]
    difference: dict[str, float]
    difference_interval: dict[str, Interval]


def worth_of_context(comparison: Comparison) -> list[tuple[EvaluationSet, list[Worth]]]:
    """For each set of rows on which a network was scored that sees more than a slice, its networks
    one after another, each in the order of WAYS."""
    found = []
    for rows in comparison.evaluation_sets:
        networks = _networks(rows)
        if networks:
            found.append((rows, list(_worth(networks, comparison.resamples))))
    return found


def _networks(rows: EvaluationSet) -> dict[str, dict[str, _Seeds]]:
    """Per network and way, the predictions of each seed; only networks with several ways."""
    networks: dict[str, dict[str, _Seeds]] = {}
    for setting in rows.settings:
        network = split_setting(setting, "context")[1].removesuffix(",")
        ways = networks.setdefault(network, {})
        for number, run in enumerate(setting.runs):
            seed = number if run.seed is None else run.seed
            for way, predictions in _ways_of(run).items():
                # A slice network by itself and one below a head are the same to the bit.
                ways.setdefault(way, {}).setdefault(seed, predictions)
    return {name: ways for name, ways in networks.items() if len(ways) > 1}


def _ways_of(run: Run) -> dict[str, Predictions]:
    assert run.predictions is not None
    context = select_value(run.config, "context.name") or SLICE
    return read_stages(run.paths, run.predictions) | {str(context): run.predictions}


def _worth(networks: dict[str, dict[str, _Seeds]], resamples: int) -> Iterator[Worth]:
    every = [p for ways in networks.values() for seeds in ways.values() for p in seeds.values()]
    groups = every[0].scored.group_count
    drawn: dict[int, dict[str, np.ndarray]] = {}
    if resamples and groups >= MIN_GROUPS:
        counts = draw_counts(groups, resamples)
        with ThreadPoolExecutor(available_cores()) as threads:
            values = threads.map(lambda p: bootstrap_predictions(p, counts), every)
            drawn = {id(p): v for p, v in zip(every, values, strict=True)}
    for name, ways in networks.items():
        reference = ways.get(SLICE, {})
        for way in WAYS:
            if way not in ways:
                continue
            seeds = ways[way]
            both = [] if way == SLICE else sorted(seeds.keys() & reference.keys())
            value, interval = _means([(seeds[s], None) for s in sorted(seeds)], drawn)
            pairs = [(seeds[s], reference[s]) for s in both]
            yield Worth(name, way, len(seeds), value, interval, *_means(pairs, drawn))


def _means(
    pairs: Sequence[tuple[Predictions, Predictions | None]],
    drawn: dict[int, dict[str, np.ndarray]],
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Of each metric the mean over pairs, one minus the other if there is another, and its
    interval, for which patients and pairs are drawn."""
    if not pairs:
        return {}, {}
    values = [_minus(a.every_metric, b.every_metric if b else None) for a, b in pairs]
    means = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
    if not drawn:
        return means, {}
    each = [_minus(drawn[id(a)], drawn[id(b)] if b else None) for a, b in pairs]
    resamples = len(next(iter(each[0].values())))
    # The same seeds for each way: those that share a slice network share its luck.
    chosen = np.random.default_rng(0).integers(0, len(pairs), (len(pairs), resamples))
    stacked = {k: np.stack([v[k] for v in each]) for k in each[0]}
    resampled = {k: mean_over_seeds(v, chosen) for k, v in stacked.items()}
    if not any(other for _, other in pairs):  # differences may be negative
        resampled = {k: within_range(k, v) for k, v in resampled.items()}
    intervals = {k: Interval.of(v) for k, v in resampled.items()}
    return means, {k: i for k, i in intervals.items() if k in means}


def _minus(one: dict, other: dict | None) -> dict:  # type: ignore[type-arg]
    return one if other is None else {k: one[k] - other[k] for k in one if k in other}

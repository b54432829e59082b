"""What the networks of a comparison give together: the mean of their logits, of all or of some.

Which some is chosen on validation, greedily (Caruana et al. 2004, doi 10.1145/1015330.1015432, here
without choosing one twice): never on the rows that are scored, so that there is no choice where the
protocol has no test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ich.scoring.metrics import auc
from ich.scoring.predictions import Predictions, bootstrap_predictions
from ich.scoring.uncertainty import UNDEFINED, Interval, draw_counts

MEAN, GREEDY = "mean of all", "greedy ensemble"


@dataclass(frozen=True)
class EnsembleResult:
    """name: MEAN or GREEDY. members: names of runs. predictions: of their mean logits. replicates:
    of each metric, one value per resample [R]. difference_from_best: of compared metrics, minus the
    best single setting, on the same patients; both empty where nothing is resampled."""

    name: str
    members: tuple[str, ...]
    predictions: Predictions
    replicates: Mapping[str, np.ndarray]
    difference_from_best: Mapping[str, Interval]

    def interval(self, metric: str) -> Interval:
        values = self.replicates.get(metric)
        return UNDEFINED if values is None else Interval.of(values)


def ensemble_results(
    runs: Mapping[str, Predictions],
    has_test_set: bool,
    resamples: int,
    best: Mapping[str, np.ndarray],
    compared: Sequence[str],
) -> list[EnsembleResult]:
    """The mean of all, and the greedy choice if there is one; none of a single run.

    Args:
        runs: by name, of the same scored rows. has_test_set: whether these are no validation rows.
        resamples: 0 for no intervals. best: replicates of the best setting, of the same resamples.
        compared: metrics whose difference from the best has an interval.
    """
    if len(runs) < 2 or not all(np.isfinite(p.scored.logits).all() for p in runs.values()):
        return []
    chosen = {MEAN: list(runs)}
    if has_test_set and (greedy := choose_greedily(runs)):
        chosen[GREEDY] = greedy
    results = []
    for name, members in chosen.items():
        first = runs[members[0]]
        # Of the scored rows alone: validation may be of other rows in each run.
        logits = np.mean([runs[k].scored.logits for k in members], axis=0)
        predictions = replace(first, scored=replace(first.scored, logits=logits))
        replicates: dict[str, np.ndarray] = {}
        if resamples and best:
            counts = draw_counts(predictions.scored.group_count, resamples)
            replicates = bootstrap_predictions(predictions, counts)
        differences = {m: Interval.of(replicates[m] - best[m]) for m in compared if replicates}
        results.append(EnsembleResult(name, tuple(members), predictions, replicates, differences))
    return results


def choose_greedily(runs: Mapping[str, Predictions]) -> list[str]:
    """Adds the run that raises the validation AUC of the mean most, until none does; empty if they
    were not validated on the same rows, or these have one class."""
    logits = {k: p.validation_rows[0].astype(np.float64) for k, p in runs.items()}
    target, *others = [p.validation_rows[1] for p in runs.values()]
    if not all(np.array_equal(target, other) for other in others):
        return []
    chosen: list[str] = []
    total, highest = np.zeros(target.shape), -np.inf
    while len(chosen) < len(runs):
        scores = {
            k: auc(((total + z) / (len(chosen) + 1)).ravel(), target.ravel())
            for k, z in logits.items()
            if k not in chosen
        }
        # Of equal ones the first; NaN, without both classes, is above nothing.
        name = max(scores, key=lambda k: np.nan_to_num(scores[k], nan=-1))
        if not scores[name] > highest:
            break
        chosen.append(name)
        total, highest = total + logits[name], scores[name]
    return chosen

"""How many patients would tell two settings apart, and which difference the present ones tell.

Told apart means that the 95 % interval of their difference in AUC leaves out zero; power is how
often it would, over cohorts of so many patients. More patients narrow an interval, but not the part
of its width that comes of few seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

from ich.base.workers import available_cores
from ich.scoring.uncertainty import MIN_GROUPS, ScoredRows, bootstrap_auc, draw_counts

POWER = 0.80
_NORMAL = NormalDist()
_LIMIT = _NORMAL.inv_cdf(0.975)
_DISTANCE = _LIMIT + _NORMAL.inv_cdf(POWER)  # of zero, in standard errors
# Of the patients at hand, up to how many times as many are resampled. In far larger ones the
# patients that happen to be missing here would count as if there were none like them.
_LARGEST = 4
_SIZES = 6  # between these two that are resampled: each 26 % larger than the one before
_RESAMPLES = 1000
_NODES = 40  # of a quadrature: more change no digit that is shown


@dataclass(frozen=True)
class SampleSize:
    """What telling two settings apart takes.

    patients: at least, None if no number would do. positives: of them, in the proportion of those
    at hand. is_resampled: by resamples of that many, else by the square root of their number.
    smallest: the difference in AUC that the patients at hand tell.
    """

    patients: int | None
    positives: int | None
    is_resampled: bool
    smallest: float


def sample_sizes(
    rows: Sequence[Sequence[ScoredRows]],
    means: Sequence[float],
    replicates: np.ndarray,
    of_patients: np.ndarray,
    pairs: Sequence[tuple[int, int]],
) -> list[SampleSize]:
    """What telling two settings apart takes, if their difference is the one seen, of each pair.

    The difference's variance is that of patients, which falls as their number grows, and that of
    seeds, which does not. By the former's square root law first; where that asks for more patients
    than there are, up to _LARGEST times as many, about so many are resampled, and the result is
    mended by how often their interval leaves out zero.

    Args:
        rows: of each of S settings its seeds, the same rows throughout. means: their AUCs.
        replicates: AUC in each resample of patients and seeds, [S, R]. of_patients: of patients
            alone, [S, R].
        pairs: numbers of settings.
    """
    first = rows[0][0]
    groups, found = first.group_count, {}
    at_size: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one, other in pairs:
        of_pair = of_patients[one] - of_patients[other]
        variance = float(np.nanvar(of_pair, ddof=1))
        both = float(np.nanvar(replicates[one] - replicates[other], ddof=1))
        pair = _Pair(abs(means[one] - means[other]), variance, max(0.0, both - variance))
        found[one, other] = pair
        patients = pair.patients(variance * groups)
        if groups < patients <= _LARGEST * groups:
            at_size[_size_near(patients, groups)].append((one, other))
    mended = {}
    for size, of_size in at_size.items():
        for numbers, per_patient in _resampled(rows, size, {n: found[n] for n in of_size}):
            mended[numbers] = per_patient
    result = []
    for numbers in pairs:
        pair = found[numbers]
        patients = pair.patients(mended.get(numbers, pair.variance * groups))
        smallest = _DISTANCE * math.sqrt(pair.variance + pair.of_seeds)
        if not math.isfinite(patients):
            result.append(SampleSize(None, None, False, smallest))
            continue
        count = max(MIN_GROUPS, math.ceil(patients))
        positives = math.ceil(count * first.positive_count / groups)
        result.append(SampleSize(count, positives, numbers in mended, smallest))
    return result


@dataclass(frozen=True)
class _Pair:
    """difference: of two settings, 0 or more. variance: of it, of the patients at hand; of_seeds:
    what the draws of seeds add."""

    difference: float
    variance: float
    of_seeds: float

    def patients(self, per_patient: float) -> float:
        """How many it takes, from the variance of the difference of one patient."""
        left = (self.difference / _DISTANCE) ** 2 - self.of_seeds
        return per_patient / left if left > 0 else math.inf


def _size_near(patients: float, groups: int) -> int:
    """The nearest of a few sizes between 1 and _LARGEST times as many as there are: pairs share
    their resamples."""
    step = round(_SIZES * math.log(patients / groups, _LARGEST))
    times: float = _LARGEST ** (max(1, step) / _SIZES)
    return math.ceil(groups * times)


def _resampled(
    rows: Sequence[Sequence[ScoredRows]], size: int, pairs: Mapping[tuple[int, int], _Pair]
) -> Iterator[tuple[tuple[int, int], float]]:
    """Pairs, and of each the variance of one patient with which so many have the power that they
    have in resamples; without those that have none."""
    counts = draw_counts(rows[0][0].group_count, _RESAMPLES, size=size)
    numbers = sorted({n for pair in pairs for n in pair})
    runs = [(n, scored) for n in numbers for scored in rows[n]]
    with ThreadPoolExecutor(available_cores()) as threads:
        areas = list(threads.map(lambda run: bootstrap_auc(run[1], counts), runs))
    mean = {
        n: np.mean([a for (m, _), a in zip(runs, areas, strict=True) if m == n], axis=0)
        for n in numbers
    }
    luck = np.random.default_rng(0).normal(size=_RESAMPLES)
    for (one, other), pair in pairs.items():
        differences = mean[one] - mean[other]
        error = math.sqrt(float(np.nanvar(differences, ddof=1)) + pair.of_seeds)
        drawn = differences + math.sqrt(pair.of_seeds) * luck
        power = float(np.mean(np.abs(drawn) > _LIMIT * error))
        distance = _LIMIT + _NORMAL.inv_cdf(min(max(power, 0.01), 0.99))
        if distance > 0:
            per_patient = size * ((pair.difference / distance) ** 2 - pair.of_seeds)
            if per_patient > 0:
                yield (one, other), per_patient


def assumed_patients(
    aucs: Sequence[float], prevalence: float, correlation: float
) -> tuple[int, int]:
    """Patients, and how many of them positive, that tell two networks apart, before there is one.

    Of one score per patient, normal with variance 1 among the positives and among the negatives
    (binormal), the variance of the difference is V / positives + V / negatives, with V that of
    Phi(X) - Phi(Y), X and Y the two scores of a positive (DeLong et al. 1988,
    doi 10.2307/2531595, for these distributions).

    Args:
        aucs: of the two. prevalence: share of positives. correlation: of the two scores, of
            positives and of negatives.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    common, own = np.meshgrid(points, points, indexing="ij")
    one, other = (math.sqrt(2) * _NORMAL.inv_cdf(auc) for auc in aucs)
    x, y = one + common, other + correlation * common + math.sqrt(1 - correlation**2) * own
    place = ndtr(x) - ndtr(y)
    variance = float((weights * place**2).sum() - (weights * place).sum() ** 2)
    per_patient = variance * (1 / prevalence + 1 / (1 - prevalence))
    patients = math.ceil(per_patient * (_DISTANCE / (aucs[0] - aucs[1])) ** 2)
    return patients, math.ceil(patients * prevalence)

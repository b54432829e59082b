"""How many patients would tell two settings apart, and which difference the present ones tell.

Told apart means that the 95 % interval of their difference in AUC leaves out zero; power is how
often it would, over cohorts of so many patients. More patients narrow an interval, but not the part
of its width that comes of few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

from ich.scoring.uncertainty import MIN_GROUPS, ScoredRows, bootstrap_auc, draw_counts

POWER = 0.80
_NORMAL = NormalDist()
_LIMIT = _NORMAL.inv_cdf(0.975)
_DISTANCE = _LIMIT + _NORMAL.inv_cdf(POWER)  # of zero, in standard errors
# Of the patients at hand, up to how many times as many are resampled. In far larger ones the
# patients that happen to be missing here would count as if there were none like them.
_LARGEST = 4
_RESAMPLES = 1000
_NODES = 40  # of a quadrature: more change no digit that is shown


@dataclass(frozen=True)
class SampleSize:
    """What telling one setting from the best takes.

    patients: at least, None if no number would do. positives: of them, in the proportion of those
    at hand. is_resampled: by resamples of that many, else by the square root of their number.
    smallest: the difference in AUC that the patients at hand tell.
    """

    patients: int | None
    positives: int | None
    is_resampled: bool
    smallest: float


def sample_size(
    one: Sequence[ScoredRows],
    other: Sequence[ScoredRows],
    difference: float,
    replicates: np.ndarray,
    of_patients: np.ndarray,
) -> SampleSize:
    """What telling two settings apart takes, if their difference is the one seen.

    The difference's variance is that of patients, which falls as their number grows, and that of
    seeds, which does not. By the former's square root law first; where that asks for more patients
    than there are, up to _LARGEST times as many, so many are resampled, and the result is mended by
    how often their interval leaves out zero.

    Args:
        one, other: rows of each seed of two settings, the same rows throughout.
        difference: of their mean AUCs.
        replicates: of the difference, of patients and seeds, [R]. of_patients: of patients alone.
    """
    groups = one[0].group_count
    variance = float(np.nanvar(of_patients, ddof=1))
    of_seeds = max(0.0, float(np.nanvar(replicates, ddof=1)) - variance)
    patients = _needed(difference, variance * groups, of_seeds)
    is_resampled = groups < patients <= _LARGEST * groups
    if is_resampled:
        size = math.ceil(patients)
        power = _resampled_power(one, other, size, of_seeds)
        # The variance of one patient with which so many have this power.
        distance = _LIMIT + _NORMAL.inv_cdf(min(max(power, 0.01), 0.99))
        mended = size * ((difference / distance) ** 2 - of_seeds) if distance > 0 else 0.0
        patients = _needed(difference, mended, of_seeds) if mended > 0 else patients
    smallest = _DISTANCE * math.sqrt(variance + of_seeds)
    if not math.isfinite(patients):
        return SampleSize(None, None, False, smallest)
    count = max(MIN_GROUPS, math.ceil(patients))
    positives = math.ceil(count * one[0].positive_count / groups)
    return SampleSize(count, positives, is_resampled, smallest)


def _needed(difference: float, per_patient: float, of_seeds: float) -> float:
    """Patients, from the variance of a difference of one patient, and that of seeds."""
    left = (difference / _DISTANCE) ** 2 - of_seeds
    return per_patient / left if left > 0 else math.inf


def _resampled_power(
    one: Sequence[ScoredRows], other: Sequence[ScoredRows], size: int, of_seeds: float
) -> float:
    """In which share of resamples of so many patients two settings are told apart."""
    counts = draw_counts(one[0].group_count, _RESAMPLES, size=size)
    first, second = (np.mean([bootstrap_auc(r, counts) for r in rows], 0) for rows in (one, other))
    seeds = np.random.default_rng(0).normal(0, math.sqrt(of_seeds), _RESAMPLES)
    differences = first - second
    error = math.sqrt(float(np.nanvar(differences, ddof=1)) + of_seeds)
    return float(np.mean(np.abs(differences + seeds) > _LIMIT * error))


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

"""Against the best: equal within a margin, different, or not known; and how sure the order is.

That two settings cannot be told apart does not say that they are the same. They are called equal
only if the interval of their difference lies within a margin that does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from ich.scoring.uncertainty import UNDEFINED, Interval

BEST, EQUAL, DIFFERENT, UNKNOWN = "best", "equal", "different", "not known"
# Of each test. Two one-sided ones of equivalence at 5 % are one interval of 90 % (Schuirmann 1987,
# doi 10.1007/BF01068419).
ALPHA = 0.05


@dataclass(frozen=True)
class AgainstBest:
    """A setting's AUC against that of the best.

    margin: within which they are equal. interval: of the difference, 90 %. p: two-sided, of no
    difference; p_holm: the same, corrected; these three are NaN of the best itself. chances: of
    each rank, the first at index 0, [S] of S settings that have one.
    """

    margin: float
    interval: Interval
    p: float
    p_holm: float
    chances: np.ndarray

    @property
    def chance_best(self) -> float:
        return float(self.chances[0])

    @property
    def verdict(self) -> str:
        """BEST, EQUAL, DIFFERENT or UNKNOWN."""
        if np.isnan(self.p):
            return BEST
        return verdict(self.interval, self.p_holm, self.margin)


def verdict(interval: Interval, p_holm: float, margin: float) -> str:
    """EQUAL, DIFFERENT or UNKNOWN.

    Args:
        interval: of a difference, 90 %. p_holm: of no difference, corrected. margin: within which
            there is none that matters.
    """
    # First: a difference that is surely within the margin does not matter, however surely there
    # is one.
    if -margin <= interval.low and interval.high <= margin:
        return EQUAL
    return DIFFERENT if p_holm < ALPHA else UNKNOWN


def against_best(
    means: Sequence[float], replicates: Sequence[np.ndarray], best: int, margin: float
) -> list[AgainstBest | None]:
    """Each setting against the best one; None for a setting that has no interval.

    Args:
        means: AUC of S settings. replicates: of each, one AUC per resample, [R], all of the same
            resamples. best: which setting has the highest. margin: within which they are equal.
    """
    usable = [n for n, r in enumerate(replicates) if np.isfinite(Interval.of(r).low)]
    result: list[AgainstBest | None] = [None] * len(means)
    if best not in usable:
        return result
    resampled = np.stack([replicates[n] for n in usable])
    # What one of them lacks in a resample ranks nothing there.
    resampled = resampled[:, np.isfinite(resampled).all(0)]
    p = p_values(np.array([means[n] for n in usable]), resampled)
    corrected, chances, at = holm(p), rank_chances(resampled), usable.index(best)
    for i, n in enumerate(usable):
        difference = resampled[i] - resampled[at]
        interval = UNDEFINED if i == at else Interval.of(difference, tail=ALPHA)
        result[n] = AgainstBest(margin, interval, p[i, at], corrected[i, at], chances[i])
    return result


def p_values(means: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """Of no difference between two settings, two-sided: 2 Phi(-|difference| / its standard error),
    which is that of the bootstrap (Efron and Tibshirani 1993, equations 6.6 and 12.20).

    By the standard error, and not by counting resamples beyond zero: of 2,000 none is left to count
    where a correction for 276 pairs asks for a p of 0.0002.

    Args:
        means: [S]. replicates: [S, R].

    Returns:
        float64 [S, S], symmetric; 1 where a pair is the same throughout, and NaN on the diagonal.
    """
    size = len(means)
    p = np.full((size, size), np.nan)
    for i in range(size):
        for j in range(i):
            error = float(np.std(replicates[i] - replicates[j], ddof=1))
            z = abs(means[i] - means[j]) / error if error > 0 else 0.0
            p[i, j] = p[j, i] = 2 * ndtr(-z)
    return p


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction over all pairs (Holm 1979, Scandinavian Journal of Statistics 6, 65-70).

    Over all pairs, and not those with the best alone: the best is found in the same numbers, so any
    pair could have been one of them. Over those with the best alone, 13 of 100 sweeps of eight
    equal networks had a false difference, and 25 of 24 networks; over all pairs 4 of either.

    Args:
        p: symmetric [S, S], NaN on the diagonal.

    Returns:
        The same shape, at most 1.
    """
    corrected = np.full_like(p, np.nan)
    rows, columns = np.tril_indices(len(p), -1)
    values = p[rows, columns]
    order = np.argsort(values)
    times = len(values) - np.arange(len(values))
    # Never below that of a smaller p.
    adjusted = np.minimum(1, np.maximum.accumulate(times * values[order]))
    corrected[rows[order], columns[order]] = corrected[columns[order], rows[order]] = adjusted
    return corrected


def rank_chances(replicates: np.ndarray) -> np.ndarray:
    """In which share of the resamples a setting has each rank (Wiesenfarth et al. 2021,
    doi 10.1038/s41598-021-82017-6).

    Args:
        replicates: the score of S settings in R resamples, [S, R].

    Returns:
        float64 [S, S]: of each setting its ranks from the highest score on. Rows sum to 1.
    """
    size, resamples = replicates.shape
    # Equal scores are ordered by lot: the first of two that are the same would always win.
    lots = np.random.default_rng(0).random(replicates.shape)
    order = np.lexsort((lots, -replicates), axis=0)  # of each resample the settings, best first
    ranks = np.argsort(order, axis=0)
    chances = np.stack([np.bincount(row, minlength=size) for row in ranks]) / resamples
    return np.asarray(chances)

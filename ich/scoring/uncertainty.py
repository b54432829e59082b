"""95 % intervals by bootstrap over patients, of metrics and of their differences between runs.

Slices of a patient resemble each other, so patients are drawn, not slices: with all their slices,
with replacement, as many as there are (Efron and Tibshirani 1993, chapter 8; percentile intervals).
Runs that were scored on the same rows are drawn with the same patients, which makes their
differences far less uncertain than their scores.

A resample is never made: what it scores is computed from how often each patient was drawn. For an
AUC, the counts of negatives between one positive score and the next are summed with these weights,
which is one sparse matrix product for all resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

from ich.scoring.metrics import ANY, CALIBRATION_BINS, calibration_bins, log_losses, sigmoid

_AT_ONCE = 250  # resamples: what is held at a time stays within the processor's caches
_DEFINED = 0.95  # of the resamples, at least, for an interval
# Resamples of fewer patients are too much alike: one would have an interval without width.
MIN_GROUPS = 10


@dataclass(frozen=True)
class ScoredRows:
    """Predictions of one run on the rows it was scored on.

    labels: the L names. target: 0 or 1 [N, L]. logits: float [N, L].
    group: int64 [N], 0..G-1: what is drawn as one, a patient, or an image where patients are
    unknown.
    """

    labels: tuple[str, ...]
    target: np.ndarray
    logits: np.ndarray
    group: np.ndarray

    @property
    def group_count(self) -> int:
        """G."""
        return int(self.group.max()) + 1

    @property
    def positive_count(self) -> int:
        """How many groups have a positive row of any label."""
        return len(np.unique(self.group[(self.target > 0.5).any(1)]))


@dataclass(frozen=True)
class Interval:
    """Of a bootstrap distribution, the values that 2.5 % lie below and above; NaN if undefined.
    With another tail than 0.025, that share on either side."""

    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray, tail: float = 0.025) -> Interval:
        """Of one value per resample [R]; undefined if more than 5 % of them are."""
        defined = values[np.isfinite(values)]
        if len(defined) < _DEFINED * len(values) or not len(defined):
            return UNDEFINED
        low, high = np.quantile(defined, [tail, 1 - tail])
        return Interval(float(low), float(high))

    @property
    def contains_zero(self) -> bool:
        """Whether a difference with this interval may be none; also where it is undefined."""
        return not (self.low > 0 or self.high < 0)


UNDEFINED = Interval(float("nan"), float("nan"))


def draw_counts(groups: int, resamples: int, seed: int = 0, size: int | None = None) -> np.ndarray:
    """How often each group stands in each resample, float32 [G, R]; each column sums to `size`,
    which is G if it is not given."""
    # The seed is fixed: a report that is made again is the same to the byte.
    rng = np.random.default_rng(seed)
    # float32: 7,000 patients in 2,000 resamples are 56 MB, and counts are whole numbers.
    counts = np.empty((groups, resamples), np.float32)
    for r in range(resamples):
        counts[:, r] = np.bincount(rng.integers(0, groups, size or groups), minlength=groups)
    return counts


def bootstrap(scored: ScoredRows, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample.

    Args:
        scored: of at most G groups.
        counts: of `draw_counts`, [G, R].

    Returns:
        float64 [R] each: `accuracy`, `exact_match`, `log_loss`, `log_loss_weighted` (with a label
        `any`), `brier`, `ece`, `auc` (micro), `auc_macro`, `ap_macro`, and per label
        `accuracy_<label>`, `auc_<label>`, `ap_<label>`, `f1_<label>`, and sensitivity and
        specificity as in `ich.scoring.metrics.all_metrics`. NaN where a resample has one class
        only.
    """
    groups = len(counts)
    # What all resamples share, counted once: sums and ranks per group.
    means, calibration = _Means.of(scored, groups), _Calibration.of(scored, groups)
    ranks = {
        label: _Ranks.of(scored.logits[:, i], scored.target[:, i], scored.group, groups)
        for i, label in enumerate(scored.labels)
    }
    pooled, parts = _Ranks.pooled(scored, groups), []
    for drawn in _in_parts(counts):
        part = means.score(drawn) | pooled.score(drawn, area_alone=True)
        part["ece"] = calibration.score(drawn)
        for label, rank in ranks.items():
            part |= {f"{metric}_{label}": values for metric, values in rank.score(drawn).items()}
        parts.append(part)
    replicates = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    for kind in ("auc", "ap"):
        # A label without positives at all is left out, as in the metric itself; one that a
        # resample happens to lack leaves that resample undefined.
        per_label = [replicates[f"{kind}_{k}"] for k in scored.labels]
        usable = [v for v in per_label if np.isfinite(v).any()]
        undefined = np.full(counts.shape[1], np.nan)
        replicates[f"{kind}_macro"] = np.mean(usable, axis=0) if usable else undefined
    return replicates


def bootstrap_auc(scored: ScoredRows, counts: np.ndarray) -> np.ndarray:
    """The `auc` of `bootstrap` alone, float64 [R]."""
    ranks = _Ranks.pooled(scored, len(counts))
    parts = [ranks.score(drawn, area_alone=True)["auc"] for drawn in _in_parts(counts)]
    return np.concatenate(parts)


def _in_parts(counts: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, counts.shape[1], _AT_ONCE):
        # Some columns of an array are not contiguous: each product would copy them once more.
        yield np.ascontiguousarray(counts[:, start : start + _AT_ONCE])


@dataclass(frozen=True)
class _Means:
    """Metrics that are means over rows: their sums over each group, [M, G], and its rows [G]."""

    names: list[str]
    sums: np.ndarray
    size: np.ndarray

    @staticmethod
    def of(scored: ScoredRows, groups: int) -> _Means:
        target, logits = scored.target.astype(np.float64), scored.logits.astype(np.float64)
        right = ((logits > 0) == (target > 0.5)).astype(np.float64)
        right[~np.isfinite(logits)] = np.nan  # no decision, as in the metric itself
        losses = log_losses(logits, target)
        rows = {
            "accuracy": right.mean(1),
            # 1 only where all L decisions are right, NaN where there is none.
            "exact_match": right.min(1),
            "log_loss": losses.mean(1),
            "brier": ((sigmoid(logits) - target) ** 2).mean(1),
            **{f"accuracy_{k}": right[:, i] for i, k in enumerate(scored.labels)},
        }
        if ANY in scored.labels:
            weights = np.array([2.0 if k == ANY else 1.0 for k in scored.labels])
            rows["log_loss_weighted"] = losses @ weights / weights.sum()
        sums = np.stack([np.bincount(scored.group, v, groups) for v in rows.values()])
        size = np.bincount(scored.group, minlength=groups).astype(np.float64)
        return _Means(list(rows), sums, size)

    def score(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        drawn = counts.astype(np.float64)
        # A resample has as many patients as there are, but not as many rows: hence the division.
        with np.errstate(invalid="ignore"):
            return dict(zip(self.names, self.sums @ drawn / (self.size @ drawn), strict=True))


@dataclass(frozen=True)
class _Ranks:
    """Rows counted by score and group.

    hits: positives, [K, G], at their K distinct scores, lowest first. misses: negatives,
    [K + 1, G], below the first of these scores, from one on to below the next, and from the last
    on. ties: those on a score, [K, G], None if there are none. All None with one class only.
    """

    hits: sparse.csr_array | None
    misses: sparse.csr_array | None
    ties: sparse.csr_array | None

    @staticmethod
    def of(score: np.ndarray, target: np.ndarray, group: np.ndarray, groups: int) -> _Ranks:
        positive = target > 0.5
        if not positive.any() or positive.all() or np.isnan(score).any():
            return _Ranks(None, None, None)
        # Halves below 2**23 are exact in float32, which is twice as fast. No resample has eight
        # times as many rows as there are.
        kind = np.float32 if len(score) <= 1 << 20 else np.float64
        levels, level = np.unique(score[positive], return_inverse=True)
        negative, of_negative = score[~positive], group[~positive]
        above = np.searchsorted(levels, negative, "right")
        tied = np.flatnonzero(np.searchsorted(levels, negative, "left") != above)
        shape = (len(levels), groups)
        return _Ranks(
            _count_rows(level, group[positive], shape, kind),
            _count_rows(above, of_negative, (len(levels) + 1, groups), kind),
            _count_rows(above[tied] - 1, of_negative[tied], shape, kind) if len(tied) else None,
        )

    @staticmethod
    def pooled(scored: ScoredRows, groups: int) -> _Ranks:
        """Of the micro-averaged AUC, which pools the L decisions of a row; they stay in its
        patient."""
        rows = np.repeat(scored.group, len(scored.labels))
        return _Ranks.of(scored.logits.ravel(), scored.target.ravel(), rows, groups)

    def score(self, counts: np.ndarray, area_alone: bool = False) -> dict[str, np.ndarray]:
        """The metrics of _RANKED for each resample, float64 [R] each, NaN without both classes.

        Args:
            counts: [G, R].
            area_alone: only the AUC (ties count half), in a third of the time.
        """
        names = _RANKED[:1] if area_alone else _RANKED
        if self.hits is None or self.misses is None:
            return {name: np.full(counts.shape[1], np.nan) for name in names}
        hits, below = self.hits @ counts, _running_sums(self.misses @ counts)
        # Whole numbers, whose sums are exact in any order.
        below, negatives = below[:-1], below[-1].astype(np.float64)
        positives = hits.sum(0, dtype=np.float64)
        # Of each score the negatives below, and half of those on it.
        ahead = below if self.ties is None else below + 0.5 * (self.ties @ counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            area = np.einsum("kr,kr->r", hits, ahead, dtype=np.float64) / (positives * negatives)
            if area_alone:
                return {"auc": area}
            true = _running_sums(hits[::-1].copy())[::-1]  # positives at or above each score
            false = self.misses.dtype.type(negatives) - below  # negatives at or above it
            values = {"auc": area, **_at_thresholds(hits, true, false, positives, negatives)}
        # Of one class some would be 1, or 0, throughout: as undefined as the area.
        undefined = (positives == 0) | (negatives == 0)
        for column in values.values():
            column[undefined] = np.nan
        return values


def _running_sums(values: np.ndarray) -> np.ndarray:
    """Over the rows of [K, R], in place. As `np.cumsum(values, axis=0)`, which goes through one
    column after the other and takes three times as long."""
    length = max(1, math.isqrt(len(values)))
    parts = values[: len(values) // length * length].reshape(-1, length, values.shape[1])
    for i in range(1, length):
        parts[:, i] += parts[:, i - 1]
    for i in range(1, len(parts)):
        parts[i] += parts[i - 1, -1]
    for i in range(parts.shape[0] * length, len(values)):
        values[i] += values[i - 1]
    return values


_POINTS = (90, 95)  # percent
_RANKED = (
    *("auc", "ap", "f1"),
    *(f"{metric}_at_{p}" for p in _POINTS for metric in ("sensitivity", "specificity")),
)


def _at_thresholds(
    hits: np.ndarray,
    true: np.ndarray,
    false: np.ndarray,
    positives: np.ndarray,
    negatives: np.ndarray,
) -> dict[str, np.ndarray]:
    """What is a sum or the best over thresholds. The scores of positives are enough: a threshold
    at a negative's has more false alarms, and no more hits, than that at the positive above it.

    Args:
        hits: positives on each of K scores, lowest first, [K, R]. true, false: positives and
            negatives at or above it. positives, negatives: in all, [R].
    """
    said = true + false
    # Above the highest score that was drawn there are none: 0 / 1, of no hits.
    precision = np.divide(true, np.maximum(said, 1), dtype=np.float64)
    precision *= hits
    values = {"ap": precision.sum(0) / positives}
    # 2 TP / (2 TP + FP + FN), as in the metric itself.
    said += said.dtype.type(positives)
    f1 = np.divide(true, said, dtype=np.float64, out=precision)
    values["f1"] = 2 * f1.max(0)
    columns, rounding = np.arange(true.shape[1]), 1e-12

    def specificity(row: np.ndarray) -> np.ndarray:
        return np.asarray(1 - false[row, columns] / negatives)

    def sensitivity(row: np.ndarray) -> np.ndarray:
        return np.asarray(true[row, columns] / positives)

    def is_specific(least: float, row: np.ndarray) -> np.ndarray:
        return specificity(row) >= least

    def is_too_late(least: float, row: np.ndarray) -> np.ndarray:
        return sensitivity(row) < least

    for percent in _POINTS:
        least = percent / 100 - rounding
        # `true` and `false` fall from score to score: the first that has few enough false alarms,
        # if any has, and the last that has hits enough.
        first = _first_row(partial(is_specific, least), true.shape)
        found = sensitivity(np.minimum(first, len(true) - 1))
        values[f"sensitivity_at_{percent}"] = np.where(first < len(true), found, 0.0)
        beyond = _first_row(partial(is_too_late, least), true.shape)
        values[f"specificity_at_{percent}"] = specificity(beyond - 1)
    return values


def _first_row(holds: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Of each of R columns the first of K rows that something holds for, int [R]; K if for none.

    Args:
        holds: of one row of each column, [R] -> bool [R]; of the rows after it too, if of one.
        shape: K, R.
    """
    low, high = np.zeros(shape[1], int), np.full(shape[1], shape[0])
    while (is_open := low < high).any():
        middle = (low + high) // 2
        found = holds(np.minimum(middle, shape[0] - 1))
        high = np.where(is_open & found, middle, high)
        low = np.where(is_open & ~found, middle + 1, low)
    return low


@dataclass(frozen=True)
class _Calibration:
    """Of the expected calibration error: sums of p - y in each bin of p, over each group, [B, G],
    and its decisions [G]."""

    gaps: np.ndarray
    size: np.ndarray

    @staticmethod
    def of(scored: ScoredRows, groups: int) -> _Calibration:
        probability = sigmoid(scored.logits)
        gap = probability - scored.target
        group = np.repeat(scored.group, len(scored.labels))
        size = np.bincount(group, minlength=groups).astype(np.float64)
        if np.isnan(gap).any():  # as in the metric itself
            return _Calibration(np.full((1, groups), np.nan), size)
        place = calibration_bins(probability.ravel()) * groups + group
        gaps = np.bincount(place, gap.ravel(), CALIBRATION_BINS * groups)
        return _Calibration(gaps.reshape(CALIBRATION_BINS, groups), size)

    def score(self, counts: np.ndarray) -> np.ndarray:
        drawn = counts.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(self.gaps @ drawn).sum(0) / (self.size @ drawn))


def _count_rows(
    bins: np.ndarray, group: np.ndarray, shape: tuple[int, int], kind: type[np.floating[Any]]
) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(bins), kind), (bins, group)), shape=shape)


def group_rows(patient: np.ndarray, image_id: np.ndarray) -> tuple[np.ndarray, str]:
    """What is drawn as one.

    Args:
        patient: int [N], the same number for the same patient, -1 if unknown.
        image_id: of any type, [N]; copies of an image share it.

    Returns:
        int64 [N], 0..G-1, and its name: "patients", or "images" where no patient is known. A row
        of unknown patient among known ones is its image alone.
    """
    _, image = np.unique(image_id, return_inverse=True)
    known = patient >= 0
    # Images have numbers below zero here, which no patient has.
    _, group = np.unique(np.where(known, patient, -1 - image), return_inverse=True)
    return group.astype(np.int64), "patients" if known.any() else "images"

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

from collections.abc import Iterator
from dataclasses import dataclass

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
    [2 K + 1, G], between two of these scores (even bins) or on one (odd bins). Both None where
    there is one class only.
    """

    hits: sparse.csr_array | None
    misses: sparse.csr_array | None

    @staticmethod
    def of(score: np.ndarray, target: np.ndarray, group: np.ndarray, groups: int) -> _Ranks:
        positive = target > 0.5
        if not positive.any() or positive.all() or np.isnan(score).any():
            return _Ranks(None, None)
        levels, level = np.unique(score[positive], return_inverse=True)
        negative = score[~positive]
        # Left and right differ by one where a negative ties with a positive: an odd bin.
        tie_bin = sum(np.searchsorted(levels, negative, side) for side in ("left", "right"))
        return _Ranks(
            _count_rows(level, group[positive], (len(levels), groups)),
            _count_rows(np.asarray(tie_bin), group[~positive], (2 * len(levels) + 1, groups)),
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
            area_alone: only the AUC (ties count half), in half of the time.
        """
        names = _RANKED[:1] if area_alone else _RANKED
        if self.hits is None or self.misses is None:
            return {name: np.full(counts.shape[1], np.nan) for name in names}
        # Whole numbers below 2**24: float32 is exact in the product, and twice as fast.
        hits = np.asarray(self.hits @ counts, np.float64)
        misses = np.asarray(self.misses @ counts, np.float64)
        below = np.cumsum(misses, axis=0)
        positives, negatives = hits.sum(0), below[-1]
        ahead = below[0:-1:2] + 0.5 * misses[1::2]  # of each score: negatives below, and half on it
        with np.errstate(invalid="ignore", divide="ignore"):
            area = np.einsum("kr,kr->r", hits, ahead) / (positives * negatives)
            if area_alone:
                return {"auc": area}
            true = positives - np.cumsum(hits, axis=0) + hits  # positives at or above each score
            false = negatives - below[0:-1:2]  # negatives at or above it
            values = {"auc": area, **_at_thresholds(hits, true, false, positives, negatives)}
        # Of one class some would be 1, or 0, throughout: as undefined as the area.
        undefined = (positives == 0) | (negatives == 0)
        for column in values.values():
            column[undefined] = np.nan
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
    # Above the highest score that was drawn it is 0 / 0, of no hits.
    values = {"ap": (hits * np.nan_to_num(true / said)).sum(0) / positives}
    # 2 TP / (2 TP + FP + FN), as in the metric itself.
    values["f1"] = (2 * true / (said + positives)).max(0)
    scores, columns, rounding = len(true), np.arange(true.shape[1]), 1e-12
    for percent in _POINTS:
        least = percent / 100 - rounding
        # `true` and `false` fall from score to score: the first that has few enough false alarms,
        # if any has, and the last that has hits enough.
        first = scores - (1 - false / negatives >= least).sum(0)
        found = true[np.minimum(first, scores - 1), columns] / positives
        values[f"sensitivity_at_{percent}"] = np.where(first < scores, found, 0.0)
        last = (true / positives >= least).sum(0) - 1
        values[f"specificity_at_{percent}"] = 1 - false[last, columns] / negatives
    return values


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


def _count_rows(bins: np.ndarray, group: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(bins), np.float32), (bins, group)), shape=shape)


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

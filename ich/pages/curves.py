"""Curves of a setting, over its seeds, and between which limits they lie for other patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ich.scoring.comparison import SettingResult, mean_over_seeds
from ich.scoring.metrics import counts_by_threshold
from ich.scoring.uncertainty import MIN_GROUPS, ScoredRows, draw_counts

RESAMPLES = 200  # a band is wider than what more of them would move it by
_AT_ONCE = 25  # resamples: 75,000 rows of them are 15 MB

Points = tuple[np.ndarray, np.ndarray]


def roc_points(hits: np.ndarray, misses: np.ndarray) -> Points:
    """1 - specificity and sensitivity at each distinct score, from nothing called on: [K + 1] each.
    Equal scores are one step, as in the area (`ich.scoring.metrics.auc`).

    Args:
        hits, misses: positives and negatives at or above each distinct score, [K], as of
            `ich.scoring.metrics.counts_by_threshold`; at least one of either.
    """
    return np.append(0, misses) / misses[-1], np.append(0, hits) / hits[-1]


def precision_recall_points(hits: np.ndarray, misses: np.ndarray) -> Points:
    """Recall and precision at each distinct score, [K + 1] each. The first point, at which nothing
    is called, has the precision of the second: its own is 0 / 0. Args: as of `roc_points`."""
    called = hits + misses > 0  # not so where a resample lacks those with the highest scores
    hits, misses = hits[called], misses[called]
    precision = hits / (hits + misses)
    return np.append(0, hits) / hits[-1], np.append(precision[0], precision)


@dataclass(frozen=True)
class CurveKind:
    """x: where it is looked at, [X]. height: its y there, [X], of hits and misses."""

    x: np.ndarray
    height: Callable[[np.ndarray, np.ndarray], np.ndarray]


# Denser at the left, where it rises.
_ROC_X = np.linspace(0, 1, 101) ** 2
_RECALL_X = np.linspace(0, 1, 101)


def _sensitivity(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    return np.interp(_ROC_X, *roc_points(hits, misses))


def _precision(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    # In steps, whose area is the average precision: between two points lies no other.
    recall, precision = precision_recall_points(hits, misses)
    at = np.searchsorted(recall, _RECALL_X - 1e-12)
    return np.asarray(precision[np.minimum(at, len(precision) - 1)])


ROC = CurveKind(_ROC_X, _sensitivity)
PRECISION_RECALL = CurveKind(_RECALL_X, _precision)


def mean_curve(setting: SettingResult, label: str, kind: CurveKind) -> np.ndarray | None:
    """Mean height over the seeds, [X]; None where a setting lacks the label, one of its classes, or
    a finite logit of any row."""
    heights = []
    for scored in _scored(setting):
        if label not in scored.labels:
            return None
        score, target = _column(scored, label)
        if not 0 < target.sum() < len(target) or not np.isfinite(score).all():
            return None
        heights.append(kind.height(*counts_by_threshold(score, target)[1:]))
    return np.asarray(np.mean(heights, axis=0))


def band(setting: SettingResult, label: str, kind: CurveKind) -> Points | None:
    """Between which heights 95 % of the curves of resampled patients and seeds lie, at each x, low
    and high [X]; None where there is no curve, or too few patients."""
    groups = setting.predictions.scored.group_count
    if groups < MIN_GROUPS or mean_curve(setting, label, kind) is None:
        return None
    counts = draw_counts(groups, RESAMPLES)
    heights = np.stack([resampled_heights(s, label, kind, counts) for s in _scored(setting)])
    drawn = np.random.default_rng(0).integers(0, len(heights), (len(heights), RESAMPLES))
    curves = mean_over_seeds(heights, drawn)
    # Of a resample without a positive or a negative there is no curve.
    known = curves[np.isfinite(curves).all(1)]
    if len(known) < 0.95 * RESAMPLES:
        return None
    low, high = np.clip(np.quantile(known, [0.025, 0.975], axis=0), 0, 1)
    return low, high


def resampled_heights(
    scored: ScoredRows, label: str, kind: CurveKind, counts: np.ndarray
) -> np.ndarray:
    """Heights of every resample, [R, X]; NaN where it has one class only."""
    score, target = _column(scored, label)
    order = np.argsort(-score)
    ranked, positive = score[order], target[order] > 0.5
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of equal scores
    group, heights = scored.group[order], np.full((counts.shape[1], len(kind.x)), np.nan)
    for start in range(0, counts.shape[1], _AT_ONCE):
        weight = counts[:, start : start + _AT_ONCE][group].astype(np.float64)
        hits = np.cumsum(weight * positive[:, None], 0)[last]
        misses = np.cumsum(weight * ~positive[:, None], 0)[last]
        for r in np.flatnonzero((hits[-1] > 0) & (misses[-1] > 0)):
            heights[start + r] = kind.height(hits[:, r], misses[:, r])
    return heights


def _scored(setting: SettingResult) -> Sequence[ScoredRows]:
    return [run.predictions.scored for run in setting.runs if run.predictions is not None]


def _column(scored: ScoredRows, label: str) -> Points:
    i = scored.labels.index(label)
    return scored.logits[:, i], scored.target[:, i]

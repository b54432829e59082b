"""Metrics of multi-label predictions: pure functions of logits and targets, numpy, float64.

Rule for what is undefined: what needs both classes (AUC, average precision, F1, sensitivity at a
specificity) is NaN for a label whose targets are all alike, is left out of the mean over labels,
and shows as an empty cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CALIBRATION_BINS = 15
ANY = "any"  # the RSNA set's name for the label that one of the others is positive


def multilabel_metrics(
    logits: np.ndarray, target: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """All metrics of one validation pass.

    Args:
        logits: float [N, L]. target: 0 or 1 [N, L]. labels: the L names.

    Returns:
        `log_loss` (mean binary cross-entropy over N x L), `accuracy` (share of the N x L decisions
        at probability 0.5 that are right: the report's), `auc` (micro: all N x L pooled),
        `auc_macro` (mean over labels that have both classes), and `auc_<label>`.
    """
    logits, target = logits.astype(np.float64), target.astype(np.float64)
    per_label = {f"auc_{k}": auc(logits[:, i], target[:, i]) for i, k in enumerate(labels)}
    defined = [v for v in per_label.values() if not np.isnan(v)]
    # A logit above 0 is a probability above 0.5.
    right = (logits > 0) == (target > 0.5)
    # NaN > 0 is false: without the check, a network that diverged would pass for "no bleed".
    return {
        "log_loss": log_loss(logits, target),
        "accuracy": float(right.mean()) if np.isfinite(logits).all() else float("nan"),
        "auc": auc(logits.ravel(), target.ravel()),
        "auc_macro": float(np.mean(defined)) if defined else float("nan"),
        **per_label,
    }


def log_loss(logits: np.ndarray, target: np.ndarray) -> float:
    """Mean binary cross-entropy, from logits, so that no probability has to be clipped."""
    return float(np.mean(log_losses(logits, target)))


def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Area under the ROC curve, which is the Mann-Whitney statistic; ties count half.

    Args:
        score: float [N]. target: 0 or 1 [N].

    Returns:
        The area, or NaN when the targets are all alike or a score is NaN.
    """
    if _is_undefined(score, target):
        return float("nan")
    _, hits, misses = counts_by_threshold(score, target)
    # Trapezoids, twice as large and in whole numbers: the sum is exact, and ties count half.
    twice = int(np.sum(np.diff(misses, prepend=0) * (hits + np.append(0, hits[:-1]))))
    return twice / (2 * int(hits[-1]) * int(misses[-1]))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank: float64 [N] of [N]; all NaN if a value is.

    scipy's `rankdata` takes three times as long, and half a second to import.
    """
    if np.isnan(values).any():  # np.unique would rank it highest: a plausible number
        return np.full(len(values), np.nan)
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = np.cumsum(count) - (count - 1) / 2
    return ranks[place]


def always_negative(target: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy and AUC of answering "no bleed" to everything: what any network has to beat."""
    constant = multilabel_metrics(np.full(target.shape, -1.0), target, labels)
    return {k: v for k, v in constant.items() if k != "log_loss"}


def all_metrics(logits: np.ndarray, target: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Every metric of the comparison, for final predictions.

    Args:
        logits: float [N, L]. target: 0 or 1 [N, L]. labels: the L names.

    Returns:
        Those of `multilabel_metrics` and
        `exact_match` (share of the N rows whose L decisions are all right),
        `log_loss_weighted` (the RSNA 2019 competition's: `any` counts twice; absent without it),
        `brier` and `ece` over the N x L probabilities, `ap_macro`, and per label
        `accuracy_<label>`, `ap_<label>`, `f1_<label>` (at its best threshold) and that
        `threshold_<label>`, `sensitivity_at_90_<label>` and `_95_` (at that specificity in
        percent), `specificity_at_90_<label>` and `_95_` (at that sensitivity).
        What a label with one class cannot have is NaN, and left out of means.
    """
    logits, target = logits.astype(np.float64), target.astype(np.float64)
    probability = sigmoid(logits)
    right = (logits > 0) == (target > 0.5)
    metrics = multilabel_metrics(logits, target, labels)
    metrics |= {
        "exact_match": float(right.all(axis=1).mean()) if len(right) else float("nan"),
        "brier": float(np.mean((probability - target) ** 2)),
        "ece": calibration_error(probability.ravel(), target.ravel()),
    }
    if ANY in labels:
        weights = np.array([2.0 if k == ANY else 1.0 for k in labels])
        metrics["log_loss_weighted"] = float(log_losses(logits, target).mean(0) @ weights) / float(
            weights.sum()
        )
    ap = []
    for i, k in enumerate(labels):
        score, truth = logits[:, i], target[:, i]
        # On logits: float64 probabilities of confident answers round to 1 and would tie.
        f1, threshold = best_f1(score, truth)
        ap.append(average_precision(score, truth))
        metrics |= {
            f"accuracy_{k}": float(right[:, i].mean()),
            f"ap_{k}": ap[-1],
            f"f1_{k}": f1,
            f"threshold_{k}": float(sigmoid(np.array(threshold))),
        }
        for percent in (90, 95):
            sensitivity, specificity = operating_points(score, truth, percent / 100)
            metrics[f"sensitivity_at_{percent}_{k}"] = sensitivity
            metrics[f"specificity_at_{percent}_{k}"] = specificity
    defined = [v for v in ap if not np.isnan(v)]
    metrics["ap_macro"] = float(np.mean(defined)) if defined else float("nan")
    return metrics


def per_study(
    logits: np.ndarray, target: np.ndarray, study: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slices -> studies: of each label the highest logit, and whether any slice is positive.

    Args:
        logits: float [N, L]. target: 0 or 1 [N, L].
        study: int [N], the same number for slices of the same study; slices of -1, whose study is
            unknown, are left out.

    Returns:
        logits [S, L], target [S, L], and for each study the first of its rows [S].
    """
    known = np.flatnonzero(study >= 0)
    studies, first, number = np.unique(study[known], return_index=True, return_inverse=True)
    shape = (len(studies), logits.shape[1])
    highest = np.full(shape, -np.inf)
    positive = np.zeros(shape, target.dtype)
    # `.at`, since with an index alone a study would get its last slice's value.
    np.maximum.at(highest, number, logits[known])
    np.maximum.at(positive, number, target[known])
    return highest, positive, known[first]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, without overflow."""
    with np.errstate(invalid="ignore"):
        return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def log_losses(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of each decision, of the shape of the logits."""
    with np.errstate(invalid="ignore"):  # NaN logits have a NaN loss, and that is no news
        # log(1 + exp(x)) - x y, which overflows for no x.
        return np.asarray(np.logaddexp(0, logits) - logits * target)


def counts_by_threshold(
    score: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points of every curve: each distinct score [K], highest first, and the positives and the
    negatives at or above it, int64 [K]. Areas and figures are made of these alone.

    Args:
        score: float [N], no NaN. target: 0 or 1 [N], N > 0.
    """
    order = np.argsort(-score)  # not stable: of equal scores only the last row is looked at
    ranked, positive = score[order], target[order] > 0.5
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of equal scores
    hits = np.cumsum(positive)[last]
    # At index i, i + 1 rows score as high or higher.
    return ranked[last], hits, last + 1 - hits


def average_precision(score: np.ndarray, target: np.ndarray) -> float:
    """Mean precision over the positives, as scikit-learn's: no interpolation.

    Args:
        score: float [N]. target: 0 or 1 [N].

    Returns:
        The average precision, or NaN without a positive or a negative, or with a NaN score.
    """
    if _is_undefined(score, target):
        return float("nan")
    _, hits, misses = counts_by_threshold(score, target)
    # Each threshold's gain in recall, times the precision there.
    return float(np.sum(np.diff(hits, prepend=0) * hits / (hits + misses)) / hits[-1])


def best_f1(score: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """The highest F1 that any threshold reaches, and that threshold: positive is what scores at
    least so much. The highest of equally good ones; NaN where `average_precision` is."""
    if _is_undefined(score, target):
        return float("nan"), float("nan")
    values, hits, misses = counts_by_threshold(score, target)
    # 2 TP / (2 TP + FP + FN): `hits + misses` are called positive, and `hits[-1]` are.
    f1 = 2 * hits / (hits + misses + hits[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(values[best])


def best_thresholds(
    logits: np.ndarray, target: np.ndarray, labels: Sequence[str]
) -> dict[str, float | None]:
    """Per label the probability that reaches the best F1; None for a label with one class.

    Args:
        logits: float [N, L]. target: 0 or 1 [N, L]. labels: the L names.
    """
    logit = {k: best_f1(logits[:, i], target[:, i])[1] for i, k in enumerate(labels)}
    return {k: None if np.isnan(t) else float(sigmoid(np.array(t))) for k, t in logit.items()}


def operating_points(score: np.ndarray, target: np.ndarray, least: float) -> tuple[float, float]:
    """The best sensitivity at a specificity of at least `least`, and the reverse, over all
    thresholds; no interpolation between them. NaN where `average_precision` is."""
    if _is_undefined(score, target):
        return float("nan"), float("nan")
    _, hits, misses = counts_by_threshold(score, target)
    # From the threshold above every score on, at which nothing is positive.
    sensitivity = np.append(0, hits) / hits[-1]
    specificity = 1 - np.append(0, misses) / misses[-1]
    rounding = 1e-12  # 1 - 0.05 is not 0.95
    return (
        float(sensitivity[specificity >= least - rounding].max()),
        float(specificity[sensitivity >= least - rounding].max()),
    )


def calibration_bins(probability: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Of each probability its bin of equal width, int [N] of 0..bins - 1."""
    # A probability of 1 belongs to the last bin, not to one of its own.
    return np.asarray(np.minimum((probability * bins).astype(int), bins - 1))


def calibration_error(
    probability: np.ndarray, target: np.ndarray, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): over bins of equal width, the
    mean distance of a bin's mean probability from its share of positives, weighted by its size."""
    if not len(probability) or np.isnan(probability).any():
        return float("nan")
    # Summed over a bin, p - y is its size times the distance of the two means.
    gap = np.bincount(calibration_bins(probability, bins), probability - target)
    return float(np.abs(gap).sum() / len(probability))


def _is_undefined(score: np.ndarray, target: np.ndarray) -> bool:
    positive = target > 0.5
    return not positive.any() or bool(positive.all()) or bool(np.isnan(score).any())

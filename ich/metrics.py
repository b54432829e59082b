"""Metrics of multi-label predictions: pure functions of logits and targets, numpy, float64.

Rule for what is undefined: the AUC of a label whose targets are all alike is NaN, is left out of
the macro average, and shows as an empty cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


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
    right = (logits > 0) == (target > 0.5)
    return {
        "log_loss": log_loss(logits, target),
        "accuracy": float(right.mean()) if np.isfinite(logits).all() else float("nan"),
        "auc": auc(logits.ravel(), target.ravel()),
        "auc_macro": float(np.mean(defined)) if defined else float("nan"),
        **per_label,
    }


def log_loss(logits: np.ndarray, target: np.ndarray) -> float:
    """Mean binary cross-entropy, from logits, so that no probability has to be clipped."""
    with np.errstate(invalid="ignore"):  # NaN logits have a NaN loss, and that is no news
        return float(np.mean(np.logaddexp(0, logits) - logits * target))


def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic; ties count half.

    Args:
        score: float [N]. target: 0 or 1 [N].

    Returns:
        The area, or NaN when the targets are all alike or a score is NaN.
    """
    positive = target > 0.5
    p = int(positive.sum())
    n = len(target) - p
    if p == 0 or n == 0 or np.isnan(score).any():
        return float("nan")
    rank_sum = float(rankdata(score)[positive].sum())
    return (rank_sum - p * (p + 1) / 2) / (p * n)


def always_negative(target: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy and AUC of answering "no bleed" to everything: what any network has to beat."""
    constant = multilabel_metrics(np.full(target.shape, -1.0), target, labels)
    return {k: v for k, v in constant.items() if k != "log_loss"}

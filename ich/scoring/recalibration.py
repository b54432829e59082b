"""Temperature and prior shift of each label, fitted on some patients of a site and tried on others.

A network's logit z becomes z / T + s. T, the temperature, mends how sure it is (Guo et al. 2017,
arXiv 1706.04599); s, in log odds, moves with the prevalence (Saerens et al. 2002,
doi 10.1162/089976602753284446). Together they are Platt's scaling (1999) by a rising line: the
order of a label's scores, and its AUC, stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from ich.scoring.metrics import best_thresholds, log_loss
from ich.scoring.predictions import Predictions

# Of 1 / T. Beyond, a label whose classes are apart in the sample would get an infinite one.
_STEEPNESS = (0.05, 20.0)


@dataclass(frozen=True)
class Recalibration:
    """Per label, for those that it was fitted for. threshold: the probability with the best F1."""

    temperature: dict[str, float]
    shift: dict[str, float]
    threshold: dict[str, float]

    def apply(self, logits: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
        """float [N, L] -> float64 [N, L]; a label without a fit keeps its logits."""
        scale = np.array([1 / self.temperature.get(k, 1.0) for k in labels])
        shift = np.array([self.shift.get(k, 0.0) for k in labels])
        return np.asarray(logits * scale + shift, np.float64)


def split_patients(predictions: Predictions) -> np.ndarray:
    """Which rows are of the patients that are fitted on, bool [N]: half of them, by lot, the same
    each time."""
    count = predictions.scored.group_count
    chosen = np.random.default_rng(0).permutation(count)[: count // 2]
    return np.isin(predictions.scored.group, chosen)


def fit_recalibration(predictions: Predictions) -> Recalibration:
    """The least log loss of each label; none for a label with one class, or with NaN logits."""
    scored = predictions.scored
    temperature, shift = {}, {}
    for i, label in enumerate(scored.labels):
        z, y = scored.logits[:, i].astype(np.float64), scored.target[:, i].astype(np.float64)
        if not 0 < y.sum() < len(y) or not np.isfinite(z).all():
            continue
        found = minimize(
            lambda line, z=z, y=y: log_loss(line[0] * z + line[1], y),
            (1.0, 0.0),
            method="L-BFGS-B",
            bounds=(_STEEPNESS, (None, None)),
        )
        temperature[label], shift[label] = float(1 / found.x[0]), float(found.x[1])
    fitted = Recalibration(temperature, shift, {})
    thresholds = best_thresholds(
        fitted.apply(scored.logits, scored.labels), scored.target, scored.labels
    )
    known = {k: t for k, t in thresholds.items() if t is not None and k in temperature}
    return replace(fitted, threshold=known)


def of_rows(predictions: Predictions, kept: np.ndarray) -> Predictions:
    """Some of the rows, their patients numbered anew."""
    part = predictions.select_rows(kept)
    _, group = np.unique(part.scored.group, return_inverse=True)
    return replace(part, scored=replace(part.scored, group=group.astype(np.int64)))


def recalibrated(predictions: Predictions, by: Recalibration) -> Predictions:
    """The same rows after it."""
    scored = predictions.scored
    return replace(
        predictions, scored=replace(scored, logits=by.apply(scored.logits, scored.labels))
    )

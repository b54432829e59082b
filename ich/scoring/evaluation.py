"""A model's metrics on other rows beside those of the validation it was chosen on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ich.base.progress import ProgressCallback
from ich.scoring.metrics import sigmoid
from ich.scoring.predictions import Predictions, bootstrap_predictions
from ich.scoring.uncertainty import MIN_GROUPS, UNDEFINED, Interval, ScoredRows, draw_counts

HERE, VALIDATION = "here", "validation"
# Per label, of the decisions at the model's thresholds.
DECISIONS = ("sensitivity", "specificity", "precision", "npv")


@dataclass(frozen=True)
class Evaluation:
    """model: its name. here, validation: predictions of the same labels; validation is None where
    it is not at hand. thresholds: per label. notes: what a reader must know. left_out: `image_id`
    and `reason` of files that could not be used."""

    model: str
    here: Predictions
    validation: Predictions | None
    thresholds: dict[str, float]
    notes: list[str]
    left_out: pd.DataFrame
    other_thresholds: dict[str, float] | None = None

    @property
    def is_paired(self) -> bool:
        """Whether both sides are of the same rows, in the same order."""
        other = self.validation
        return other is not None and np.array_equal(self.here.image_id, other.image_id)


def metrics_table(
    evaluation: Evaluation, resamples: int, progress: ProgressCallback | None = None
) -> pd.DataFrame:
    """Every metric of the comparison, and the decisions at the model's thresholds.

    Args:
        evaluation: of one or two sides.
        resamples: of the bootstrap; 0 for no intervals.
        progress: told of sides.

    Returns:
        `level` (slice or study), `metric`, `here` with `here_low` and `here_high`, the same of
        `validation`, and of `difference`, here minus validation: of two sets of rows, so that its
        interval is unpaired, unless they are the very same. Intervals are 95 %; empty below ten
        patients, and where there is none.
    """
    here, validation = evaluation.here, evaluation.validation
    sides = {HERE: here}
    if validation is not None:
        # The same rows are drawn alike, and their differences are paired.
        same = evaluation.is_paired
        scored = replace(validation.scored, group=here.scored.group) if same else validation.scored
        sides[VALIDATION] = replace(validation, scored=scored)
    others = evaluation.other_thresholds or evaluation.thresholds
    thresholds = {HERE: evaluation.thresholds, VALIDATION: others}
    values = {k: _values(p, thresholds[k]) for k, p in sides.items()}
    # Of two sets of rows each side has its own seed: with one seed, patient 3 of one would be drawn
    # whenever patient 3 of the other is, as if they had something in common.
    resampled = {}
    for seed, (k, p) in enumerate(sides.items()):
        if progress and resamples:
            progress(seed, len(sides))
        seed = 0 if evaluation.is_paired else seed
        resampled[k] = _resample(p, thresholds[k], resamples, seed)
    lines = []
    for name in values[HERE]:
        level = "study" if name.startswith("study_") else "slice"
        line: dict[str, object] = {"level": level, "metric": name.removeprefix("study_")}
        for side in (HERE, VALIDATION):
            line[side] = values.get(side, {}).get(name, np.nan)
            line |= _limits(side, resampled.get(side, {}).get(name))
        line["difference"] = float(line[HERE]) - float(line[VALIDATION])  # type: ignore[arg-type]
        # Resample by resample: of two draws that have nothing to do with each other, the difference
        # is spread as an unpaired one is.
        one, other = (resampled.get(side, {}).get(name) for side in (HERE, VALIDATION))
        difference = None if one is None or other is None else one - other
        lines.append(line | _limits("difference", difference))
    return pd.DataFrame(lines)


def _limits(name: str, values: np.ndarray | None) -> dict[str, float]:
    interval = UNDEFINED if values is None else Interval.of(values)
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _values(predictions: Predictions, thresholds: dict[str, float]) -> dict[str, float]:
    # The rows as they are: one "resample" in which each group stands once.
    once = np.ones((predictions.scored.group_count, 1), np.float32)
    decisions = {k: float(v[0]) for k, v in _decisions(predictions, thresholds, once).items()}
    studies = {f"study_{k}": v for k, v in predictions.study_metrics.items()}
    return {**predictions.metrics, **decisions, **studies}


def _resample(
    predictions: Predictions, thresholds: dict[str, float], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    groups = predictions.scored.group_count
    if not resamples or groups < MIN_GROUPS:
        return {}
    counts = draw_counts(groups, resamples, seed)
    return bootstrap_predictions(predictions, counts) | _decisions(predictions, thresholds, counts)


def _decisions(
    predictions: Predictions, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Of `_decisions_of_rows`, per slice and, as `study_<metric>`, per study: positive where any of
    its slices is."""
    shares = _decisions_of_rows(predictions.scored, thresholds, counts)
    if (studies := predictions.scored_studies) is not None:
        per_study = _decisions_of_rows(studies, thresholds, counts)
        shares |= {f"study_{k}": v for k, v in per_study.items()}
    return shares


def _decisions_of_rows(
    scored: ScoredRows, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Per label the four shares at its threshold, of every resample.

    Args:
        scored: rows of at most G groups.
        thresholds: probabilities.
        counts: how often each group is drawn, [G, R].

    Returns:
        float64 [R] each, NaN where nothing is counted.
    """
    shares = {}
    weights = counts.astype(np.float64)

    def count(rows: np.ndarray) -> np.ndarray:
        # Per group first: what a resample counts is then one product, with how often each is drawn.
        return np.bincount(scored.group, rows, len(counts)) @ weights

    for i, label in enumerate(scored.labels):
        positive = sigmoid(scored.logits[:, i]) >= thresholds[label]
        truth = scored.target[:, i] > 0.5
        true_positives, true_negatives = count(positive & truth), count(~positive & ~truth)
        # In the order of DECISIONS.
        fractions = (
            (true_positives, count(truth)),
            (true_negatives, count(~truth)),
            (true_positives, count(positive)),
            (true_negatives, count(~positive)),
        )
        for name, (part, whole) in zip(DECISIONS, fractions, strict=True):
            share = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
            shares[f"{name}_{label}"] = share
    return shares

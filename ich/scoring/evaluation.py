"""A model's metrics on other rows beside those of the validation it was chosen on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ich.scoring.comparison import Predictions, replicates
from ich.scoring.metrics import per_study, sigmoid
from ich.scoring.uncertainty import FEWEST_GROUPS, Interval, Scored, draw_counts

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

    @property
    def is_paired(self) -> bool:
        """Whether both sides are of the same rows, in the same order."""
        other = self.validation
        return other is not None and np.array_equal(self.here.image_id, other.image_id)


def metrics_table(evaluation: Evaluation, resamples: int) -> pd.DataFrame:
    """Every metric of the comparison, and the decisions at the model's thresholds.

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
    values = {k: _values(p, evaluation.thresholds) for k, p in sides.items()}
    drawn = {
        k: _resampled(p, evaluation.thresholds, resamples, 0 if evaluation.is_paired else seed)
        for seed, (k, p) in enumerate(sides.items())
    }
    lines = []
    for name in values[HERE]:
        level = "study" if name.startswith("study_") else "slice"
        line: dict[str, object] = {"level": level, "metric": name.removeprefix("study_")}
        for side in (HERE, VALIDATION):
            line[side] = values.get(side, {}).get(name, np.nan)
            line |= _limits(side, drawn.get(side, {}).get(name))
        line["difference"] = float(line[HERE]) - float(line[VALIDATION])  # type: ignore[arg-type]
        pair = [drawn.get(side, {}).get(name) for side in (HERE, VALIDATION)]
        both = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
        lines.append(line | _limits("difference", both))
    return pd.DataFrame(lines)


def _limits(name: str, values: np.ndarray | None) -> dict[str, float]:
    nothing = Interval(float("nan"), float("nan"))
    found = nothing if values is None else Interval.of(values)
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _values(found: Predictions, thresholds: dict[str, float]) -> dict[str, float]:
    every = np.ones((int(found.scored.group.max()) + 1, 1), np.float32)
    decided = _all_decisions(found, thresholds, every)
    decisions = {k: float(v[0]) for k, v in decided.items()}
    studies = {f"study_{k}": v for k, v in found.study_metrics.items()}
    return {**found.metrics, **decisions, **studies}


def _resampled(
    found: Predictions, thresholds: dict[str, float], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    groups = int(found.scored.group.max()) + 1
    if not resamples or groups < FEWEST_GROUPS:
        return {}
    counts = draw_counts(groups, resamples, seed)
    return replicates(found, counts) | _all_decisions(found, thresholds, counts)


def _all_decisions(
    found: Predictions, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Of `_decisions`, per slice and, as `study_<metric>`, per study: positive where any of its
    slices is."""
    out = _decisions(found.scored, thresholds, counts)
    if (found.study >= 0).any():
        logits, target, first = per_study(found.scored.logits, found.scored.target, found.study)
        studies = Scored(found.scored.labels, target, logits, found.scored.group[first])
        out |= {f"study_{k}": v for k, v in _decisions(studies, thresholds, counts).items()}
    return out


def _decisions(
    scored: Scored, thresholds: dict[str, float], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Per label the four shares at its threshold, of every resample.

    Args:
        scored: rows of at most G groups.
        thresholds: probabilities.
        counts: how often each group is drawn, [G, R].

    Returns:
        float64 [R] each, NaN where nothing is counted.
    """
    out = {}
    drawn = counts.astype(np.float64)

    def counted(rows: np.ndarray) -> np.ndarray:
        return np.bincount(scored.group, rows, len(counts)) @ drawn

    for i, label in enumerate(scored.labels):
        said = sigmoid(scored.logits[:, i]) >= thresholds[label]
        truth = scored.target[:, i] > 0.5
        hits, rejected = counted(said & truth), counted(~said & ~truth)
        shares = (
            (hits, counted(truth)),
            (rejected, counted(~truth)),
            (hits, counted(said)),
            (rejected, counted(~said)),
        )
        for name, (part, whole) in zip(DECISIONS, shares, strict=True):
            share = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
            out[f"{name}_{label}"] = share
    return out

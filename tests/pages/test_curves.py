"""Curves against scikit-learn, and against the areas printed beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from made_up import binormal
from sklearn.metrics import precision_recall_curve, roc_curve

from ich.base.records import FINISHED, RunResult
from ich.base.results import RunPaths
from ich.pages.curves import (
    PRECISION_RECALL,
    ROC,
    CurveKind,
    band,
    precision_recall_points,
    resampled_heights,
    roc_points,
)
from ich.scoring.comparison import Run, SettingResult
from ich.scoring.metrics import auc, average_precision, counts_by_threshold
from ich.scoring.predictions import Predictions
from ich.scoring.uncertainty import draw_counts

RNG = np.random.default_rng(3)
TARGET = (RNG.random(400) < 0.3).astype(np.float32)
SCORES = {
    "none tie": RNG.normal(size=400) + TARGET,
    "many tie": np.round(RNG.normal(size=400) + TARGET),
    "all tie": np.zeros(400),
    "infinite": np.where(RNG.random(400) < 0.5, np.inf, -np.inf) * (2 * TARGET - 1),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_points_are_those_of_scikit_learn_and_enclose_the_printed_area(score: np.ndarray) -> None:
    _, *counts = counts_by_threshold(score, TARGET)
    x, y = roc_points(*counts)
    # scikit-learn takes no infinity; only the order counts.
    ranked = np.clip(score, -99, 99)
    false, true, _ = roc_curve(TARGET, ranked, drop_intermediate=False)
    np.testing.assert_allclose((x, y), (false, true))
    assert np.trapezoid(y, x) == pytest.approx(auc(score, TARGET))
    recall, precision = precision_recall_points(*counts)
    sk_precision, sk_recall, _ = precision_recall_curve(TARGET, ranked)
    np.testing.assert_allclose(recall[1:], sk_recall[-2::-1])
    np.testing.assert_allclose(precision[1:], sk_precision[-2::-1])
    assert np.diff(recall) @ precision[1:] == pytest.approx(average_precision(score, TARGET))


def test_the_order_of_the_rows_changes_no_curve() -> None:
    """Of equal scores the positives first gave an area of 1, and the negatives first one of 0."""
    order, tied = np.argsort(TARGET), np.zeros(400)
    for points in (roc_points, precision_recall_points):
        forth, back = (
            points(*counts_by_threshold(tied, TARGET[rows])[1:]) for rows in (order, order[::-1])
        )
        np.testing.assert_array_equal(forth, back)
    assert roc_points(*counts_by_threshold(tied, TARGET)[1:])[0].tolist() == [0, 1]
    assert auc(tied, TARGET[order]) == 0.5


@pytest.mark.parametrize("kind", [ROC, PRECISION_RECALL], ids=["roc", "precision-recall"])
def test_a_resample_is_the_curve_of_the_rows_that_it_repeats(kind: CurveKind) -> None:
    rng = np.random.default_rng(1)
    (scored,) = binormal(rng, [0.8], patients=60)
    scored = replace(scored, logits=np.round(scored.logits, 1))  # so that some tie
    counts = draw_counts(60, 30)
    heights = resampled_heights(scored, "any", kind, counts)
    for r in range(30):
        rows = np.repeat(np.arange(60), counts[:, r].astype(int))
        score, target = scored.logits[rows, 0], scored.target[rows, 0]
        expected = kind.height(*counts_by_threshold(score, target)[1:])
        np.testing.assert_allclose(heights[r], expected, atol=1e-9)


def test_the_height_is_the_step_of_the_curve() -> None:
    hits, misses = np.array([1, 2, 2, 3]), np.array([0, 0, 1, 1])
    assert PRECISION_RECALL.height(hits, misses)[[0, 50, 100]] == pytest.approx([1, 1, 0.75])
    assert ROC.height(hits, misses)[[0, 100]] == pytest.approx([2 / 3, 1])


@pytest.mark.faults
def test_a_band_holds_the_true_curve_as_often_as_it_says() -> None:
    """At three specificities of two binormal scores, whose curve is known."""
    inside, x = np.zeros(3), np.searchsorted(ROC.x, [0.1, 0.3, 0.5])
    distance = 2**0.5 * NormalDist().inv_cdf(0.85)
    true = [1 - NormalDist(distance).cdf(NormalDist().inv_cdf(1 - at)) for at in ROC.x[x]]
    for n in range(300):
        (scored,) = binormal(np.random.default_rng(n), [0.85], patients=200)
        predictions = Predictions(
            scored, "patients", np.arange(200).astype(str), np.arange(200), ()
        )
        run = Run("a", RunPaths(Path("a")), RunResult(FINISHED), {}, predictions)
        limits = band(SettingResult("a", [run]), "any", ROC)
        assert limits is not None
        inside += (limits[0][x] <= true) & (true <= limits[1][x])
    # 95 % +- 2.6 standard errors of 300, and a percentile interval's own shortfall of a point.
    assert (inside / 300 > 0.90).all()
    assert (inside / 300 < 0.99).all()

"""Curves of the figures against scikit-learn, and against the areas printed beside them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from ich.pages.figures import precision_recall_points, roc_points
from ich.scoring.metrics import auc, average_precision

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
    x, y = roc_points(score, TARGET)
    # scikit-learn takes no infinity; only the order counts.
    ranked = np.clip(score, -99, 99)
    false, true, _ = roc_curve(TARGET, ranked, drop_intermediate=False)
    np.testing.assert_allclose((x, y), (false, true))
    assert np.trapezoid(y, x) == pytest.approx(auc(score, TARGET))
    recall, precision = precision_recall_points(score, TARGET)
    sk_precision, sk_recall, _ = precision_recall_curve(TARGET, ranked)
    np.testing.assert_allclose(recall[1:], sk_recall[-2::-1])
    np.testing.assert_allclose(precision[1:], sk_precision[-2::-1])
    assert np.diff(recall) @ precision[1:] == pytest.approx(average_precision(score, TARGET))


def test_the_order_of_the_rows_changes_no_curve() -> None:
    """Of equal scores the positives first gave an area of 1, and the negatives first one of 0."""
    order, tied = np.argsort(TARGET), np.zeros(400)
    for points in (roc_points, precision_recall_points):
        forth, back = points(tied, TARGET[order]), points(tied, TARGET[order[::-1]])
        np.testing.assert_array_equal(forth, back)
    assert roc_points(tied, TARGET[order])[0].tolist() == [0, 1]
    assert auc(tied, TARGET[order]) == 0.5

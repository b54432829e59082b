"""Metrics against scikit-learn, losses against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from sklearn.metrics import log_loss as sk_log_loss

from ich.base.config import LossConfig, LossName
from ich.data.phantom.spec import LABELS
from ich.scoring.metrics import (
    all_metrics,
    always_negative,
    auc,
    calibration_error,
    mean_ranks,
    multilabel_metrics,
    per_study,
)
from ich.training.losses import build_loss, focal_loss


def predictions(rows: int = 300, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    target = (rng.random((rows, len(LABELS))) < 0.2).astype(np.float32)
    logits = rng.normal(size=target.shape).astype(np.float32) + target
    return (np.round(logits) if ties else logits), target


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_scikit_learn(ties: bool) -> None:
    logits, target = predictions(ties=ties)
    got = multilabel_metrics(logits, target, LABELS)
    assert got["auc"] == pytest.approx(roc_auc_score(target, logits, average="micro"))
    assert got["auc_macro"] == pytest.approx(roc_auc_score(target, logits, average="macro"))
    for i, label in enumerate(LABELS):
        assert got[f"auc_{label}"] == pytest.approx(roc_auc_score(target[:, i], logits[:, i]))


def test_accuracy_and_log_loss_against_scikit_learn() -> None:
    logits, target = predictions()
    got = multilabel_metrics(logits, target, LABELS)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert got["accuracy"] == pytest.approx(
        accuracy_score(target.ravel(), probability.ravel() > 0.5)
    )
    assert got["log_loss"] == pytest.approx(sk_log_loss(target.ravel(), probability.ravel()))


def test_a_label_of_one_class_is_undefined_and_left_out_of_the_mean() -> None:
    logits, target = predictions()
    target[:, 0] = 0
    got = multilabel_metrics(logits, target, LABELS)
    assert math.isnan(got["auc_epidural"])
    rest = [got[f"auc_{k}"] for k in LABELS[1:]]
    assert got["auc_macro"] == pytest.approx(np.mean(rest))


def test_nan_scores_have_neither_auc_nor_accuracy() -> None:
    assert math.isnan(auc(np.array([0.1, np.nan]), np.array([0, 1])))
    logits, target = predictions()
    logits[0, 0] = np.nan
    assert math.isnan(multilabel_metrics(logits, target, LABELS)["accuracy"])


def test_always_negative_scores_the_share_of_negatives() -> None:
    _, target = predictions()
    got = always_negative(target, LABELS)
    assert got["accuracy"] == pytest.approx(1 - target.mean())
    assert got["auc"] == 0.5


def test_every_metric_against_scikit_learn_and_by_hand() -> None:
    for ties in (False, True):
        logits, target = predictions(rows=80, ties=ties)
        got = all_metrics(logits, target, LABELS)
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        assert got["exact_match"] == accuracy_score(target, probability > 0.5)
        assert got["brier"] == pytest.approx(np.mean((probability - target) ** 2))
        assert got["ap_macro"] == pytest.approx(average_precision_score(target, logits))
        weights = [2 if k == "any" else 1 for k in LABELS]
        each = [sk_log_loss(target[:, i], probability[:, i]) for i in range(len(LABELS))]
        assert got["log_loss_weighted"] == pytest.approx(np.average(each, weights=weights))
        for i, label in enumerate(LABELS):
            truth, score = target[:, i], logits[:, i]
            assert got[f"ap_{label}"] == pytest.approx(average_precision_score(truth, score))
            assert got[f"accuracy_{label}"] == accuracy_score(truth, score > 0)
            cuts = np.unique(score)
            assert got[f"f1_{label}"] == pytest.approx(
                max(f1_score(truth, score >= cut) for cut in cuts)
            )
            cut = got[f"threshold_{label}"]
            assert f1_score(truth, probability[:, i] >= cut - 1e-9) == pytest.approx(
                got[f"f1_{label}"]
            )
            false, true, _ = roc_curve(truth, score, drop_intermediate=False)
            assert got[f"sensitivity_at_90_{label}"] == true[1 - false >= 0.9].max()
            assert got[f"specificity_at_95_{label}"] == (1 - false)[true >= 0.95].max()


def test_calibration_error_by_hand() -> None:
    # Bins of a fifth: 0.1 and 0.15 with one positive of two; 0.9 with none.
    got = calibration_error(np.array([0.1, 0.15, 0.9]), np.array([1, 0, 0]), bins=5)
    assert got == pytest.approx((abs(0.25 - 1) + 0.9) / 3)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_one_class_has_no_average_precision_and_no_operating_point() -> None:
    logits, target = predictions()
    target[:, 1] = 1
    got = all_metrics(logits, target, LABELS)
    for metric in ("ap", "f1", "threshold", "sensitivity_at_90", "specificity_at_95"):
        assert math.isnan(got[f"{metric}_{LABELS[1]}"])
    rest = [got[f"ap_{k}"] for k in LABELS if k != LABELS[1]]
    assert got["ap_macro"] == pytest.approx(np.mean(rest))


def test_a_study_is_as_positive_as_its_most_positive_slice() -> None:
    logits = np.array([[0.0, 5.0], [2.0, 1.0], [9.0, 9.0], [-1.0, -2.0]])
    target = np.array([[0, 1], [0, 0], [1, 1], [1, 0]])
    highest, positive, first = per_study(logits, target, np.array([7, 7, -1, 3]))
    assert highest.tolist() == [[-1, -2], [2, 5]]
    assert positive.tolist() == [[1, 0], [0, 1]]
    assert first.tolist() == [3, 0]


def test_losses_by_hand() -> None:
    logits, target = torch.tensor([[0.3, -1.2]]), torch.tensor([[1.0, 0.0]])
    p = torch.sigmoid(logits)
    terms = -torch.log(torch.where(target > 0, p, 1 - p))
    bce = build_loss(LossConfig(LossName.bce), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(bce(logits, target), terms.mean())
    weighted = build_loss(LossConfig(LossName.weighted_bce), torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(weighted(logits, target), (terms * torch.tensor([4.0, 1.0])).mean())
    p_t = torch.where(target > 0, p, 1 - p)
    alpha = torch.where(target > 0, 0.25, 0.75)
    torch.testing.assert_close(
        focal_loss(logits, target, 2.0, 0.25), (alpha * (1 - p_t) ** 2 * terms).mean()
    )
    torch.testing.assert_close(focal_loss(logits, target, 0.0, 0.5), terms.mean() / 2)


@pytest.mark.parametrize(
    "values",
    [[3.0, 1.0, 2.0], [1.0, 1.0, 0.0, 1.0], [math.inf, -math.inf, 0.0, -0.0], [1.0, math.nan], []],
)
def test_ranks_are_those_of_scipy(values: list[float]) -> None:
    np.testing.assert_array_equal(mean_ranks(np.array(values)), rankdata(values))

"""The report's findings on runs whose truth is known, and on the report's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from ich.scoring.findings import (
    FAILS,
    FINDINGS,
    HOLDS,
    REPORT_TABLE_1,
    REPORT_TABLE_2,
    UNKNOWN,
    imagenet_trend,
    judge,
)


def replicates(**means: float) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).normal(size=500) * 0.01
    own = np.random.default_rng(1)
    return {k: m + noise + own.normal(size=500) * 0.0005 for k, m in means.items()}


def test_the_reports_own_table_contradicts_one_of_its_findings() -> None:
    theirs = {m: {v.finding.text: v.theirs for v in judge(m, {})} for m in ("accuracy", "auc")}
    assert theirs["auc"]["VGG16 is the worst"] == HOLDS
    assert theirs["accuracy"]["VGG16 is the worst"] == FAILS  # MobileNetV2 is
    assert theirs["accuracy"]["EfficientNet-B3 is the best"] == HOLDS
    assert len(FINDINGS) == 7


def test_findings_hold_fail_or_cannot_be_told() -> None:
    scores = {k: auc for k, (_, auc) in REPORT_TABLE_2.items()}
    verdicts = {v.finding.text: v for v in judge("auc", replicates(**scores))}
    assert verdicts["VGG16 is the worst"].ours == HOLDS
    assert verdicts["ResNet50 and EfficientNet-B0 are similar"].ours == HOLDS
    # 0.9733 < 0.9756 < 0.9790: told apart by noise of 0.0007.
    assert verdicts["EfficientNets improve with size: B0 < B2 < B3"].ours == HOLDS
    close = judge("auc", replicates(**scores | {"efficientnet_b2": 0.9788}))
    told = {v.finding.text: v for v in close}
    assert told["EfficientNets improve with size: B0 < B2 < B3"].ours == UNKNOWN
    assert (
        "efficientnet_b3 - efficientnet_b2"
        in told["EfficientNets improve with size: B0 < B2 < B3"].why
    )
    swapped = judge("auc", replicates(**scores | {"vgg16": 0.99}))
    assert {v.finding.text: v.ours for v in swapped}["VGG16 is the worst"] == FAILS
    few = judge("auc", replicates(vgg16=0.9, mobilenet_v2=0.95))
    told = {v.finding.text: v for v in few}
    assert told["MobileNetV2 beats VGG16"].ours == HOLDS
    assert told["Xception beats InceptionV3"].why == "needs inception_v3, xception"


def test_the_imagenet_trend_of_the_reports_own_numbers() -> None:
    """Spearman against scipy, and by hand: ranks of its Table 1 against its Table 2."""
    scores = {k: auc for k, (_, auc) in REPORT_TABLE_2.items()}
    trend = imagenet_trend("auc", scores, replicates(**scores))
    assert trend is not None
    top_1 = [REPORT_TABLE_1[k][0] for k in scores]
    assert trend.theirs == pytest.approx(spearmanr(top_1, list(scores.values())).statistic)
    assert trend.correlation == pytest.approx(trend.theirs)
    broken = imagenet_trend("auc", scores | {"vgg16": float("nan")}, replicates(**scores))
    assert broken is not None
    assert np.isnan(broken.correlation)  # no plausible number
    # Differences of ranks: b3 0, b2 -1, xception 1, inception 0... with a tie of the two lowest.
    assert 0.9 < trend.theirs < 1
    assert trend.interval.low <= trend.correlation <= trend.interval.high
    assert imagenet_trend("auc", {"vgg16": 1.0}, replicates(vgg16=1.0)) is None

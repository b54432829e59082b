"""The report's tables and its seven findings, put to the test on our own runs.

A finding is one or more inequalities between networks. An inequality holds if the 95 % interval of
the difference lies on its side of zero, fails if it lies on the other, and cannot be told if it
holds zero. Two networks are similar if the interval lies within `SIMILAR`, and dissimilar if it
lies outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ich.scoring.metrics import mean_ranks
from ich.scoring.uncertainty import Interval

# The report's Table 1: top-1 and top-5 accuracy on ImageNet, millions of parameters.
REPORT_TABLE_1 = {
    "vgg16": (0.713, 0.901, 138.0),
    "resnet50": (0.749, 0.921, 26.0),
    "inception_v3": (0.779, 0.937, 24.0),
    "mobilenet_v2": (0.713, 0.901, 3.5),
    "xception": (0.790, 0.945, 23.0),
    "efficientnet_b0": (0.763, 0.932, 5.3),
    "efficientnet_b2": (0.798, 0.949, 9.2),
    "efficientnet_b3": (0.811, 0.955, 12.0),
}
# The report's Table 2: accuracy and AUC per network, best of 10 epochs on its validation set.
REPORT_TABLE_2 = {
    "vgg16": (0.9704, 0.9619),
    "resnet50": (0.9713, 0.9730),
    "inception_v3": (0.9727, 0.9761),
    "mobilenet_v2": (0.9700, 0.9714),
    "xception": (0.9728, 0.9769),
    "efficientnet_b0": (0.9711, 0.9733),
    "efficientnet_b2": (0.9728, 0.9756),
    "efficientnet_b3": (0.9729, 0.9790),
}
REPORT_METRICS = ("accuracy", "auc")  # in the order of REPORT_TABLE_2's columns
# Closer than a third of the distance from the worst to the best of the report's own eight.
SIMILAR = {
    metric: (max(column) - min(column)) / 3
    for metric, column in zip(
        REPORT_METRICS, zip(*REPORT_TABLE_2.values(), strict=True), strict=True
    )
}

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Better:
    """One network scores higher than another."""

    one: str
    other: str


@dataclass(frozen=True)
class Alike:
    """Two networks score about the same."""

    one: str
    other: str


@dataclass(frozen=True)
class Finding:
    """A sentence of the report's section 4, and what it claims."""

    text: str
    claims: tuple[Better | Alike, ...]

    @property
    def networks(self) -> set[str]:
        return {name for c in self.claims for name in (c.one, c.other)}


def _beats_all(best: str) -> tuple[Better, ...]:
    return tuple(Better(best, other) for other in REPORT_TABLE_2 if other != best)


FINDINGS = (
    Finding("EfficientNet-B3 is the best", _beats_all("efficientnet_b3")),
    Finding(
        "EfficientNets improve with size: B0 < B2 < B3",
        (
            Better("efficientnet_b2", "efficientnet_b0"),
            Better("efficientnet_b3", "efficientnet_b2"),
        ),
    ),
    Finding(
        "VGG16 is the worst",
        tuple(Better(other, "vgg16") for other in REPORT_TABLE_2 if other != "vgg16"),
    ),
    Finding("MobileNetV2 beats VGG16", (Better("mobilenet_v2", "vgg16"),)),
    Finding("ResNet50 and EfficientNet-B0 are similar", (Alike("resnet50", "efficientnet_b0"),)),
    Finding(
        "Xception is on par with EfficientNet-B2 and B3",
        (Alike("xception", "efficientnet_b2"), Alike("xception", "efficientnet_b3")),
    ),
    Finding("Xception beats InceptionV3", (Better("xception", "inception_v3"),)),
)


@dataclass(frozen=True)
class FindingResult:
    """What became of a finding on one metric.

    ours: HOLDS, FAILS or UNKNOWN on our runs. why: the inequality that decided, in words.
    theirs: HOLDS or FAILS on the report's own numbers.
    """

    finding: Finding
    metric: str
    ours: str
    why: str
    theirs: str


def judge(metric: str, replicates: Mapping[str, np.ndarray]) -> list[FindingResult]:
    """Each finding on one metric.

    Args:
        metric: `accuracy` or `auc`.
        replicates: per network, the metric in every bootstrap resample, [R]; resample r is of the
            same rows for all networks. A finding about a network that is missing cannot be told.
    """
    column = REPORT_METRICS.index(metric)
    printed = {name: values[column] for name, values in REPORT_TABLE_2.items()}
    results = []
    for finding in FINDINGS:
        # The report prints single numbers, without intervals: they are taken as they are.
        theirs = [_holds_for(c, printed, SIMILAR[metric]) for c in finding.claims]
        missing = sorted(finding.networks - set(replicates))
        if missing:
            ours, why = UNKNOWN, f"needs {', '.join(missing)}"
        else:
            ours, why = _judge(finding, replicates, SIMILAR[metric])
        results.append(FindingResult(finding, metric, ours, why, HOLDS if all(theirs) else FAILS))
    return results


def _judge(
    finding: Finding, replicates: Mapping[str, np.ndarray], similar: float
) -> tuple[str, str]:
    """Fails with its first claim that fails, holds if all hold; names the claim that decided."""
    judged = []
    for claim in finding.claims:
        interval = Interval.of(replicates[claim.one] - replicates[claim.other])
        why = f"{claim.one} - {claim.other}: {interval.low:+.4f} to {interval.high:+.4f}"
        judged.append((_judge_claim(claim, interval, similar), why))
    for outcome in (FAILS, UNKNOWN):
        for claimed, why in judged:
            if claimed == outcome:
                return outcome, why
    return HOLDS, judged[0][1] if len(judged) == 1 else f"all {len(judged)} differences say so"


def _judge_claim(claim: Better | Alike, interval: Interval, similar: float) -> str:
    low, high = interval.low, interval.high
    if isinstance(claim, Better):
        return HOLDS if low > 0 else FAILS if high < 0 else UNKNOWN
    if -similar <= low and high <= similar:
        return HOLDS
    return FAILS if low > similar or high < -similar else UNKNOWN


def _holds_for(claim: Better | Alike, scores: Mapping[str, float], similar: float) -> bool:
    """Whether a claim holds of single numbers, without intervals: the report prints none."""
    difference = scores[claim.one] - scores[claim.other]
    return difference > 0 if isinstance(claim, Better) else abs(difference) <= similar


@dataclass(frozen=True)
class Trend:
    """Spearman's rank correlation of ImageNet top-1 accuracy with a score, over `n` networks."""

    n: int
    correlation: float
    interval: Interval
    theirs: float


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    if len(set(other)) == 1:  # scores that are all alike: no correlation, and numpy would warn
        return float("nan")
    return float(np.corrcoef(mean_ranks(one), mean_ranks(other))[0, 1])


def imagenet_trend(
    metric: str, scores: Mapping[str, float], replicates: Mapping[str, np.ndarray]
) -> Trend | None:
    """Whether our scores rank the networks as ImageNet does: the report's conclusion 4.

    Args:
        metric: `accuracy` or `auc`.
        scores: per network; those that the report does not have are left out.
        replicates: see `judge`; the interval is over them, and says nothing of other networks.

    Returns:
        None with fewer than three networks.
    """
    networks = [name for name in REPORT_TABLE_1 if name in scores and name in replicates]
    if len(networks) < 3:
        return None
    top1 = np.array([REPORT_TABLE_1[name][0] for name in networks])
    column = REPORT_METRICS.index(metric)
    resampled = np.stack([replicates[name] for name in networks])
    # A resample in which one network has no score ranks nothing.
    defined = np.isfinite(resampled).all(0)
    return Trend(
        n=len(networks),
        correlation=_spearman(top1, np.array([scores[name] for name in networks])),
        interval=Interval.of(np.array([_spearman(top1, r) for r in resampled.T[defined]])),
        theirs=_spearman(top1, np.array([REPORT_TABLE_2[name][column] for name in networks])),
    )

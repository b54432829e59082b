"""How many patients it takes, against cohorts of that many in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import binormal

from ich.scoring.metrics import auc
from ich.scoring.power import SampleSize, assumed_patients, sample_sizes
from ich.scoring.uncertainty import Interval, ScoredRows, bootstrap_auc, draw_counts


def sized(one: ScoredRows, other: ScoredRows, noise: float = 0.0) -> SampleSize:
    counts = draw_counts(one.group_count, 400)
    of_patients = np.stack([bootstrap_auc(r, counts) for r in (one, other)])
    means = [auc(r.logits[:, 0], r.target[:, 0]) for r in (one, other)]
    replicates = of_patients + [[0], [1]] * np.random.default_rng(0).normal(0, noise, 400)
    (size,) = sample_sizes([[one], [other]], means, replicates, of_patients, [(0, 1)])
    return size


def told_apart(aucs: list[float], patients: int, cohorts: int) -> float:
    """In which share of cohorts the 95 % interval of the difference leaves out zero."""
    rng, told = np.random.default_rng(7), 0
    for _ in range(cohorts):
        one, other = binormal(rng, aucs, patients)
        counts = draw_counts(patients, 300, int(rng.integers(1 << 30)))
        told += not Interval.of(
            bootstrap_auc(one, counts) - bootstrap_auc(other, counts)
        ).contains_zero
    return told / cohorts


def test_more_patients_are_needed_for_less_and_seeds_may_leave_none_enough() -> None:
    best, near, far = binormal(np.random.default_rng(0), [0.90, 0.88, 0.75], 400)
    close, wide = sized(best, near), sized(best, far)
    assert close.patients is not None
    assert wide.patients is not None
    assert close.patients > 400 > wide.patients
    assert close.positives == pytest.approx(close.patients * best.positive_count / 400, abs=1)
    assert 0.01 < close.smallest < 0.06
    assert not wide.is_resampled
    noisy = sized(best, near, noise=0.02)
    assert (noisy.patients, noisy.positives) == (None, None)
    same = sized(best, best)
    assert same.patients is None


def test_what_is_resampled_is_about_what_the_square_root_says() -> None:
    one, other = binormal(np.random.default_rng(1), [0.90, 0.86], 300)
    n = sized(one, other)
    assert n.is_resampled
    means = [auc(r.logits[:, 0], r.target[:, 0]) for r in (one, other)]
    assert n.patients == pytest.approx(300 * (n.smallest / (means[0] - means[1])) ** 2, rel=0.2)


def test_a_plan_asks_for_more_of_a_rare_disease_and_of_unlike_networks() -> None:
    patients, positives = assumed_patients([0.90, 0.86], 0.3, 0.6)
    assert positives == pytest.approx(0.3 * patients, abs=1)
    assert assumed_patients([0.90, 0.86], 0.05, 0.6)[0] > 2 * patients
    assert assumed_patients([0.90, 0.86], 0.3, 0.1)[0] > 1.5 * patients
    assert assumed_patients([0.86, 0.90], 0.3, 0.6) == (patients, positives)


@pytest.mark.faults
def test_as_many_patients_as_a_plan_asks_for_have_the_power_that_it_says() -> None:
    """Within 5 points, of 1,000 cohorts."""
    patients, _ = assumed_patients([0.90, 0.86], 0.3, 0.6)
    assert told_apart([0.90, 0.86], patients, 1000) == pytest.approx(0.8, abs=0.05)


@pytest.mark.faults
@pytest.mark.parametrize("times", [0.4, 2])
def test_as_many_as_a_comparison_asks_for_have_the_power_that_it_says(times: float) -> None:
    """From 101 pilots, smaller than what they ask for (which is resampled then) and larger: each
    sees another difference, so it is their median that 1,000 cohorts are made of."""
    rng, found = np.random.default_rng(3), []
    size = round(times * assumed_patients([0.90, 0.86], 0.3, 0.6)[0])
    for _ in range(101):
        n = sized(*binormal(rng, [0.90, 0.86], size)).patients
        found.append(np.inf if n is None else n)
    power = told_apart([0.90, 0.86], round(float(np.median(found))), 1000)
    assert power == pytest.approx(0.8, abs=0.05)

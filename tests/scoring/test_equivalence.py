"""Equal, different or not known: by hand, and how often it errs where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import binormal

from ich.scoring.equivalence import (
    BEST,
    DIFFERENT,
    EQUAL,
    UNKNOWN,
    AgainstBest,
    against_best,
    holm,
    p_values,
    rank_chances,
)
from ich.scoring.metrics import auc
from ich.scoring.uncertainty import Interval, bootstrap_auc, draw_counts

NO_CHANCES = np.ones(1)


def verdicts(means: list[float], replicates: np.ndarray, margin: float = 0.005) -> list[str]:
    found = against_best(means, list(replicates), int(np.argmax(means)), margin)
    return [a.verdict for a in found if a]


def test_the_verdict_is_of_the_interval_and_of_the_corrected_p() -> None:
    def verdict(low: float, high: float, p_holm: float) -> str:
        return AgainstBest(0.005, Interval(low, high), 0.01, p_holm, NO_CHANCES).verdict

    assert verdict(-0.004, 0.003, 1.0) == EQUAL
    assert verdict(-0.004, -0.001, 0.01) == EQUAL  # surely different, and surely by too little
    assert verdict(-0.006, -0.001, 0.04) == DIFFERENT
    assert verdict(-0.006, -0.001, 0.06) == UNKNOWN
    assert verdict(-0.006, 0.003, 1.0) == UNKNOWN


def test_three_settings_are_best_equal_and_different() -> None:
    rng = np.random.default_rng(0)
    common, own = rng.normal(0, 0.02, 2000), rng.normal(0, 0.001, (3, 2000))
    means = [0.9, 0.899, 0.85]
    assert verdicts(means, np.array(means)[:, None] + common + own) == [BEST, EQUAL, DIFFERENT]
    # The same differences, of networks that err on other patients.
    alone = np.array(means)[:, None] + rng.normal(0, 0.02, (3, 2000))
    assert verdicts(means, alone) == [BEST, UNKNOWN, UNKNOWN]


def test_a_setting_without_a_score_is_not_compared() -> None:
    replicates = np.random.default_rng(0).normal(0.9, 0.01, (3, 200))
    replicates[1] = np.nan
    found = against_best([0.9, np.nan, 0.91], list(replicates), 2, 0.005)
    assert [a is None for a in found] == [False, True, False]
    assert all(a is None for a in against_best([0.9], [np.full(200, np.nan)], 0, 0.005))


def test_holm_by_hand() -> None:
    p = np.full((3, 3), np.nan)
    for (i, j), value in {(1, 0): 0.01, (2, 0): 0.03, (2, 1): 0.02}.items():
        p[i, j] = p[j, i] = value
    got = holm(p)
    assert [got[1, 0], got[2, 1], got[2, 0]] == pytest.approx([0.03, 0.04, 0.04])
    assert np.array_equal(got, got.T, equal_nan=True)


def test_the_p_of_a_difference_of_two_standard_errors() -> None:
    replicates = np.random.default_rng(0).normal(0, 0.01, (2, 200_000))
    p = p_values(np.array([0.9, 0.9 + 2 * 0.01 * 2**0.5]), replicates)
    assert p[0, 1] == pytest.approx(0.0455, abs=1e-3)
    same = p_values(np.array([0.9, 0.9]), replicates[[0, 0]])
    assert same[0, 1] == 1


def test_ranks_are_shared_out_and_equals_share_them() -> None:
    rng = np.random.default_rng(0)
    first, last = rng.normal(0.9, 0.01, 2000), rng.normal(0.5, 0.01, 2000)
    chances = rank_chances(np.stack([last, first, first]))
    assert np.allclose(chances.sum(0), 1)
    assert np.allclose(chances.sum(1), 1)
    assert chances[0].tolist() == [0, 0, 1]
    assert chances[1, 0] == pytest.approx(0.5, abs=0.05)


def resampled(rng: np.random.Generator, aucs: list[float], patients: int) -> tuple[list, list]:
    """Means and replicates of a made-up comparison."""
    rows = binormal(rng, aucs, patients)
    counts = draw_counts(patients, 400, int(rng.integers(1 << 30)))
    means = [auc(r.logits[:, 0], r.target[:, 0]) for r in rows]
    return means, [bootstrap_auc(r, counts) for r in rows]


@pytest.mark.faults
def test_equal_networks_are_called_different_in_one_sweep_of_twenty_at_most() -> None:
    """Of 1,000 sweeps of five equal networks; 1.4 points are what so many allow."""
    rng, false = np.random.default_rng(1), 0
    for _ in range(1000):
        means, replicates = resampled(rng, [0.85] * 5, 200)
        false += DIFFERENT in verdicts(means, np.stack(replicates))
    assert false <= 64


@pytest.mark.faults
def test_a_difference_of_the_margin_is_called_equal_once_in_twenty_at_most() -> None:
    """As close as it may be to equal without being so: the worst case of two one-sided tests."""
    rng, false = np.random.default_rng(2), 0
    for _ in range(1000):
        means, replicates = resampled(rng, [0.90, 0.86], 400)
        false += EQUAL in verdicts(means, np.stack(replicates), margin=0.04)
    assert 20 <= false <= 64


@pytest.mark.faults
def test_intervals_of_an_auc_and_of_a_difference_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of 1,000, within two standard errors of a share of so many."""
    rng, inside = np.random.default_rng(3), np.zeros(2, int)
    for _ in range(1000):
        _, (one, other) = resampled(rng, [0.88, 0.84], 300)
        for i, (values, truth) in enumerate(((one, 0.88), (one - other, 0.04))):
            interval = Interval.of(values)
            inside[i] += interval.low <= truth <= interval.high
    assert (inside >= 936).all()
    assert (inside <= 964).all()

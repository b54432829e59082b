"""Intervals: against resampling by hand, and over patients."""

from __future__ import annotations

import numpy as np
import pytest

from ich.data.phantom.spec import LABELS
from ich.scoring.metrics import all_metrics, auc
from ich.scoring.uncertainty import (
    Interval,
    ScoredRows,
    bootstrap,
    bootstrap_auc,
    draw_counts,
    group_rows,
)


def scored(rows: int = 120, groups: int = 15, ties: bool = True, noise: float = 1.0) -> ScoredRows:
    rng = np.random.default_rng(1)
    target = (rng.random((rows, len(LABELS))) < 0.3).astype(np.float32)
    logits = (rng.normal(size=target.shape) * noise + target).astype(np.float32)
    return ScoredRows(
        LABELS, target, np.round(logits, 1) if ties else logits, np.arange(rows) % groups
    )


@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_scores_what_its_rows_score(ties: bool) -> None:
    """Against the rows really repeated, and the metrics that scikit-learn confirms."""
    s = scored(ties=ties)
    counts = draw_counts(15, 12, seed=3)
    got = bootstrap(s, counts)
    assert {"accuracy", "auc", "auc_macro", "ap_any", "log_loss_weighted", "brier"} <= set(got)
    for r in range(12):
        times = counts[s.group, r].astype(int)
        rows = np.repeat(np.arange(len(times)), times)
        expected = all_metrics(s.logits[rows], s.target[rows], LABELS)
        for name, values in got.items():
            assert values[r] == pytest.approx(expected[name], abs=1e-9), name


def test_each_resample_holds_as_many_groups_and_depends_on_the_seed() -> None:
    counts = draw_counts(40, 30)
    assert (counts.sum(0) == 40).all()
    assert np.array_equal(counts, draw_counts(40, 30))
    assert not np.array_equal(counts, draw_counts(40, 30, seed=1))


def test_slices_of_few_patients_are_less_certain_than_as_many_patients() -> None:
    """A patient's slices all alike: the interval must be that of 20 patients, not 2,000 slices."""
    rng = np.random.default_rng(0)
    few = rng.random(20) < 0.5
    target = np.repeat(few, 100)[:, None].astype(np.float32)
    logits = np.repeat(rng.normal(size=20) + few, 100)[:, None]
    widths = []
    for group in (np.repeat(np.arange(20), 100), np.arange(2000)):
        values = bootstrap(
            ScoredRows(("x",), target, logits, group), draw_counts(int(group.max()) + 1, 400)
        )
        interval = Interval.of(values["auc"])
        widths.append(interval.high - interval.low)
    assert widths[0] > 5 * widths[1]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Accuracy 0.8 by construction, 200 experiments of 100 independent rows."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        right = rng.random((100, 1)) < 0.8
        s = ScoredRows(("x",), right.astype(np.float32), np.ones((100, 1)), np.arange(100))
        interval = Interval.of(bootstrap(s, draw_counts(100, 300))["accuracy"])
        inside += interval.low <= 0.8 <= interval.high
    assert 176 <= inside <= 199  # 95 % of 200, three standard errors about


def test_differences_of_paired_runs_are_more_certain() -> None:
    a = scored(ties=False)
    b = ScoredRows(a.labels, a.target, a.logits + 0.05 * scored(noise=2).logits, a.group)
    counts = draw_counts(15, 500)
    one, other = bootstrap(a, counts)["auc"], bootstrap(b, counts)["auc"]
    paired = Interval.of(one - other)
    unpaired = Interval.of(one - bootstrap(b, draw_counts(15, 500, seed=9))["auc"])
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_a_label_of_one_class_has_no_interval_and_is_left_out_of_the_mean() -> None:
    s = scored()
    s.target[:, 2] = 0
    got = bootstrap(s, draw_counts(15, 50))
    assert np.isnan(got[f"auc_{LABELS[2]}"]).all()
    assert np.isfinite(got["auc_macro"]).all()
    interval = Interval.of(got[f"auc_{LABELS[2]}"])
    assert np.isnan(interval.low)
    assert interval.contains_zero


def test_rows_of_unknown_patients_are_drawn_by_image() -> None:
    ids = np.array(["a", "b", "a", "c"])
    group, what = group_rows(np.array([-1, -1, -1, -1]), ids)
    assert what == "images"
    assert group[0] == group[2]
    assert len(set(group)) == 3
    group, what = group_rows(np.array([4, 4, 0, -1]), ids)
    assert what == "patients"
    assert group[0] == group[1] != group[2]
    assert sorted(set(group)) == [0, 1, 2]


def clustered(rng: np.random.Generator, patients: int, slices: int = 8) -> ScoredRows:
    """Slices of a patient are alike: in what they show, and in how far a network errs on them."""
    bleeds = rng.random((patients, 1)) < 0.5
    target = (bleeds & (rng.random((patients, slices)) < 0.6)).astype(float)
    of_patient, own = rng.normal(size=(patients, 1)), rng.normal(size=(patients, slices))
    logits = 1.5 * target + 0.8 * of_patient + 0.6 * own
    group = np.repeat(np.arange(patients), slices)
    return ScoredRows(("x",), target.reshape(-1, 1), logits.reshape(-1, 1), group)


@pytest.mark.faults
def test_the_interval_over_patients_holds_the_truth_as_it_says_and_one_over_slices_does_not() -> (
    None
):
    """95 % of 1,000, within two and a half standard errors of a share of so many."""
    rng, inside = np.random.default_rng(11), np.zeros(2, int)
    large = clustered(rng, 100_000)
    truth = auc(large.logits[:, 0], large.target[:, 0])
    for _ in range(1000):
        rows = clustered(rng, 150)
        alone = ScoredRows(rows.labels, rows.target, rows.logits, np.arange(len(rows.group)))
        for i, drawn in enumerate((rows, alone)):
            counts = draw_counts(drawn.group_count, 300, int(rng.integers(1 << 30)))
            interval = Interval.of(bootstrap_auc(drawn, counts))
            inside[i] += interval.low <= truth <= interval.high
    assert 933 <= inside[0] <= 967
    assert inside[1] < 850

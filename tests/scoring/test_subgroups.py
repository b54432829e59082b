"""Subgroups of rows: their own metrics, and differences whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import binormal

from ich.scoring.comparison import Run, SettingResult
from ich.scoring.metrics import auc
from ich.scoring.predictions import Predictions
from ich.scoring.subgroups import subgroup_results
from ich.scoring.uncertainty import ScoredRows


def setting(rows: ScoredRows) -> SettingResult:
    count = len(rows.target)
    ids, study = np.arange(count).astype(str), np.full(count, -1)
    predictions = Predictions(rows, "patients", ids, study, (rows.logits, rows.target))
    run = Run("x", None, None, {}, predictions)  # type: ignore[arg-type]
    return SettingResult("x", [run])


def two_sites(rng: np.random.Generator, one: float, other: float) -> tuple[ScoredRows, np.ndarray]:
    """200 patients each, of different AUC."""
    (a,), (b,) = binormal(rng, [one], 200), binormal(rng, [other], 200)
    rows = ScoredRows(
        ("any",), np.r_[a.target, b.target], np.r_[a.logits, b.logits], np.arange(400)
    )
    return rows, np.repeat(["a", "b"], 200)


def test_a_subgroup_is_scored_on_its_own_rows_and_small_ones_are_not_shown() -> None:
    rows, site = two_sites(np.random.default_rng(0), 0.95, 0.7)
    site[:9] = "few"
    a, b = subgroup_results(setting(rows), site.tolist(), 200)
    assert (a.name, a.patients, b.patients) == ("a", 191, 200)
    own = site == "a"
    assert a.value["auc"] == auc(rows.logits[own, 0], rows.target[own, 0])
    assert a.difference["auc"] == a.value["auc"] - auc(rows.logits[~own, 0], rows.target[~own, 0])
    assert a.difference_interval["auc"].low > 0 > b.difference_interval["auc"].high
    (whole,) = subgroup_results(setting(rows), ["all"] * 400, 0)
    assert whole.difference == {} == whole.interval
    assert whole.positives == rows.positive_count


@pytest.mark.faults
def test_the_interval_of_a_difference_between_subgroups_holds_the_truth_as_it_says() -> None:
    """95 % of 400, within two and a half standard errors of a share of so many."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        rows, site = two_sites(rng, 0.9, 0.8)
        a, _ = subgroup_results(setting(rows), site.tolist(), 300)
        interval = a.difference_interval["auc"]
        inside += interval.low <= 0.1 <= interval.high
    assert 369 <= inside <= 391

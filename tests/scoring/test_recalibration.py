"""Recalibration: temperature and shift that are known, found again, on patients apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ich.scoring.metrics import auc, sigmoid
from ich.scoring.predictions import Predictions
from ich.scoring.recalibration import fit_recalibration, of_rows, recalibrated, split_patients
from ich.scoring.uncertainty import ScoredRows


def site(rows: int = 20_000, patients: int = 400) -> Predictions:
    """Logits twice as sure as they should be, of a site with fewer positives than they think."""
    rng = np.random.default_rng(0)
    right = rng.normal(-2, 1.5, (rows, 2))
    target = (rng.random(right.shape) < sigmoid(right)).astype(np.float32)
    logits = 2 * right + 1.5
    group = np.arange(rows) % patients
    scored = ScoredRows(("a", "b"), target, logits, group)
    ids = np.arange(rows).astype(str)
    return Predictions(scored, "patients", ids, np.full(rows, -1), (logits, target))


def test_a_known_temperature_and_shift_are_found() -> None:
    whole = site()
    found = fit_recalibration(whole)
    for label in ("a", "b"):
        assert found.temperature[label] == pytest.approx(2, rel=0.1)
        assert found.shift[label] == pytest.approx(-0.75, abs=0.1)
    after = recalibrated(whole, found)
    assert after.metrics["ece"] < 0.01 < 0.05 < whole.metrics["ece"]
    assert after.metrics["auc_a"] == auc(whole.scored.logits[:, 0], whole.scored.target[:, 0])
    assert 0 < found.threshold["a"] < 1


def test_patients_are_whole_on_either_side() -> None:
    whole = site()
    inside = split_patients(whole)
    one, other = of_rows(whole, inside), of_rows(whole, ~inside)
    assert one.scored.group_count == other.scored.group_count == 200
    assert not set(whole.scored.group[inside]) & set(whole.scored.group[~inside])
    assert len(one.image_id) + len(other.image_id) == len(whole.image_id)


def test_a_label_that_cannot_be_fitted_stays_what_it_was() -> None:
    whole = site()
    target = whole.scored.target.copy()
    target[:, 1] = 0
    one_class = replace(whole, scored=replace(whole.scored, target=target))
    found = fit_recalibration(one_class)
    assert set(found.temperature) == {"a"} == set(found.threshold)
    after = found.apply(whole.scored.logits, ("a", "b"))
    assert np.array_equal(after[:, 1], whole.scored.logits[:, 1])
    # Classes that are apart would have no finite temperature.
    apart = np.where(whole.scored.target > 0.5, 5.0, -5.0)
    found = fit_recalibration(replace(whole, scored=replace(whole.scored, logits=apart)))
    assert found.temperature["a"] >= 0.05

"""The mean of networks, and the greedy choice of some: by hand, and never on the scored rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ich.scoring.ensembles import GREEDY, MEAN, choose_greedily, ensemble_results
from ich.scoring.metrics import auc
from ich.scoring.predictions import Predictions
from ich.scoring.uncertainty import ScoredRows, bootstrap, draw_counts

PATIENTS = 200


def runs(noise: dict[str, float]) -> dict[str, Predictions]:
    """One row per patient, other rows in validation; each run errs by itself."""
    rng = np.random.default_rng(0)
    target, validated = (rng.random((2, PATIENTS, 1)) < 0.4).astype(float)
    found = {}
    for name, size in noise.items():
        logits, on_validation = (
            2 * t - 1 + size * rng.normal(size=t.shape) for t in (target, validated)
        )
        scored = ScoredRows(("any",), target, logits, np.arange(PATIENTS))
        ids = np.arange(PATIENTS).astype(str)
        rows = (on_validation, validated)
        found[name] = Predictions(scored, "patients", ids, np.full(PATIENTS, -1), rows)
    return found


def test_the_mean_beats_networks_that_err_by_themselves_and_has_a_paired_difference() -> None:
    several = runs({"a": 1.5, "b": 1.6, "c": 1.7})
    best = bootstrap(several["a"].scored, draw_counts(PATIENTS, 300))
    (mean,) = ensemble_results(several, False, 300, best, ("auc",))
    assert (mean.name, mean.members) == (MEAN, ("a", "b", "c"))
    logits = np.mean([p.scored.logits for p in several.values()], axis=0)
    expected = auc(logits.ravel(), several["a"].scored.target.ravel())
    assert mean.predictions.metrics["auc"] == expected
    assert mean.interval("auc").low < expected < mean.interval("auc").high
    assert mean.difference_from_best["auc"].low > 0
    (without,) = ensemble_results(several, False, 0, {}, ("auc",))
    assert np.isnan(without.interval("auc").low)
    assert ensemble_results({"a": several["a"]}, True, 300, best, ("auc",)) == []


def test_the_greedy_choice_is_made_on_validation_alone() -> None:
    several = runs({"a": 1.5, "b": 1.6, "noise": 60.0})
    _, greedy = ensemble_results(several, True, 0, {}, ("auc",))
    assert greedy.name == GREEDY
    assert set(greedy.members) == {"a", "b"}
    # Whatever is scored, the choice is the same: it is not looked at.
    turned = {
        k: replace(p, scored=replace(p.scored, target=1 - p.scored.target))
        for k, p in several.items()
    }
    assert tuple(choose_greedily(turned)) == greedy.members


def test_runs_that_were_validated_on_other_rows_are_not_chosen_among() -> None:
    several = runs({"a": 1.5, "b": 1.6})
    logits, target = several["b"].validation_rows
    several["b"] = replace(several["b"], validation_rows=(logits, 1 - target))
    assert choose_greedily(several) == []
    one_class = {
        k: replace(p, validation_rows=(p.validation_rows[0], np.zeros_like(target)))
        for k, p in several.items()
    }
    assert choose_greedily(one_class) == []
    several["a"].scored.logits[3] = np.nan
    assert ensemble_results(several, True, 0, {}, ()) == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_that_is_surely_best_is_chosen_first(name: str) -> None:
    several = runs({k: 0.5 if k == name else 9.0 for k in ("a", "b")})
    assert choose_greedily(several)[0] == name

"""What context is worth, of sweeps whose predictions are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import cohort, write_sweep

from ich.base.config import Config
from ich.base.results import SweepPaths
from ich.data.phantom.spec import LABELS
from ich.pages.tables import compare
from ich.scoring.comparison import load_comparison
from ich.scoring.context import worth_of_context
from ich.scoring.metrics import multilabel_metrics
from ich.scoring.predictions import read_predictions
from ich.scoring.uncertainty import Interval, bootstrap_auc, draw_counts

Compose = Callable[..., Config]
NET = "mobilenet_v2"


@pytest.fixture
def sweep(tmp_path: Path, composed: Compose) -> SweepPaths:
    """Two seeds of a network with a head, one of them also as a slice network and with neighbours,
    and another network that sees slices alone."""
    rows, rng = cohort(), np.random.default_rng(3)
    shape = rows["target"].shape
    of_job = {}
    for seed in (0, 1):
        slice_logits = (1.2 * (rows["target"] - 0.6) + rng.normal(size=shape)).astype(np.float32)
        stages = {"slice_logits": slice_logits, "smoothed_logits": slice_logits * 0.5 + 0.1}
        of_job[f"{NET},context=study,seed={seed}"] = {**rows, **stages}
    jobs = dict.fromkeys(of_job, 2.5)
    jobs |= {f"{NET},context=neighbours,seed=0": 1.5, "resnet50,context=slice,seed=0": 1.0}
    return write_sweep(tmp_path / "s", jobs, composed, of_job)


def test_each_way_is_compared_with_the_slice_network_on_the_same_patients_and_seeds(
    sweep: SweepPaths,
) -> None:
    ((_, worths),) = worth_of_context(load_comparison([sweep], 300))
    assert [(w.network, w.way, w.seeds) for w in worths] == [
        *((NET, "slice", 2), (NET, "smoothed", 2)),
        *((NET, "neighbours", 1), (NET, "study", 2)),
    ]
    by_way = {w.way: w for w in worths}
    assert by_way["slice"].difference == {}
    # One monotonous function of the same logits ranks as they do.
    assert by_way["smoothed"].difference["auc"] == pytest.approx(0, abs=1e-6)
    runs = [sweep.run(f"{NET},context=study,seed={seed}") for seed in (0, 1)]
    gains, drawn = [], []
    counts = draw_counts(60, 300)
    for run in runs:
        predictions = read_predictions(run)
        assert predictions is not None
        scored = predictions.scored
        with np.load(run.predictions) as file:
            below = file["val_slice_logits"]
        each = [multilabel_metrics(x, scored.target, LABELS)["auc"] for x in (scored.logits, below)]
        gains.append(each[0] - each[1])
        alone = bootstrap_auc(replace(scored, logits=below), counts)
        drawn.append(bootstrap_auc(scored, counts) - alone)
    study = by_way["study"]
    assert study.difference["auc"] == pytest.approx(np.mean(gains))
    mean = np.mean(drawn, axis=0)
    patients_alone, found = Interval.of(mean), study.difference_interval["auc"]
    assert found.low < np.mean(gains) < found.high
    # Seeds are drawn too, which adds to what patients alone leave open.
    assert found.high - found.low > 0.8 * (patients_alone.high - patients_alone.low)
    assert by_way["neighbours"].difference["auc"] < study.difference["auc"]


def test_the_page_and_a_csv_have_it_per_slice_per_study_and_per_label(sweep: SweepPaths) -> None:
    compare(sweep, resamples=100)
    table = pd.read_csv(sweep.context)
    assert set(table["level"]) == {"slice", "study"}
    assert set(table.loc[table["metric"] == "log_loss_weighted", "way"]) == {
        *("slice", "smoothed", "neighbours", "study"),
    }
    study = table[(table["way"] == "study") & (table["metric"] == "auc_any")]
    assert (study["difference_low"] < study["difference"]).all()
    assert (study["difference"] < study["difference_high"]).all()
    page = sweep.page.read_text()
    assert "What context is worth" in page
    assert "AUC per label, per slice" in page
    assert (sweep.figures / "context.png").stat().st_size > 2_000


def test_a_sweep_of_slices_alone_has_none(tmp_path: Path, composed: Compose) -> None:
    sweep = write_sweep(tmp_path / "s", {"resnet50": 1.0, NET: 1.0}, composed)
    sweep.context.write_text("of an earlier report")
    compare(sweep, resamples=0)
    assert not sweep.context.exists()
    assert "What context is worth" not in sweep.page.read_text()

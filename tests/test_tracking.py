"""The journal and MLflow: what is recorded, and that MLflow never stops a training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ich.config import TrackingConfig, UserError
from ich.results import RunPaths, SweepPaths, write_json
from ich.tracking import MlflowStore, open_store, open_tracker


@pytest.fixture
def cfg(tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(True, f"sqlite:///{tmp_path / 'ml.db'}", str(tmp_path / "artifacts"))


def tracker_of(cfg: TrackingConfig, tmp_path: Path):  # type: ignore[no-untyped-def]
    store = open_store(cfg)
    assert store is not None
    parent = store.open_run("sweep", {})
    params = {"a.b": "1", "long": "x" * 9000}
    return store, parent, open_tracker(store, tmp_path / "metrics.jsonl", "job", parent, params, {})


def test_a_job_is_a_nested_run_with_metrics_parameters_and_files(
    cfg: TrackingConfig, tmp_path: Path
) -> None:
    _, parent, tracker = tracker_of(cfg, tmp_path)
    tracker.log({"val/auc": 0.75, "val/auc_epidural": math.nan}, 1)
    (tmp_path / "note.txt").write_text("x")
    tracker.artifact(tmp_path / "note.txt")
    tracker.finish("FAILED")
    run = MlflowClient(cfg.uri).get_run(tracker.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.metrics == {"val/auc": 0.75}  # NaN is left out, never 1.8e308
    assert run.data.params["a.b"] == "1"
    assert len(run.data.params["long"]) == 6000
    assert run.info.status == "FAILED"
    assert [f.path for f in MlflowClient(cfg.uri).list_artifacts(tracker.run_id)] == ["note.txt"]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["val/auc"], line["val/auc_epidural"]) == (1, 0.75, None)


def test_runs_that_a_dead_process_left_running_are_ended(
    cfg: TrackingConfig, tmp_path: Path
) -> None:
    store, parent, tracker = tracker_of(cfg, tmp_path)
    store.end_running_children(parent, "job", "FAILED")
    client = MlflowClient(cfg.uri)
    assert client.get_run(tracker.run_id).info.status == "FAILED"
    assert client.get_run(parent).info.status == "RUNNING"


def test_a_database_that_vanishes_does_not_stop_a_training(
    cfg: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, tracker = tracker_of(cfg, tmp_path)
    (tmp_path / "ml.db").write_bytes(b"no database any more" * 1000)
    shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
    for step in (1, 2):
        tracker.log({"val/auc": 0.5}, step)
    tracker.finish("FINISHED")
    assert len(RunPaths(tmp_path).read_metrics()) == 2
    assert "MLflow could not log metrics" in caplog.text


def test_a_file_that_is_no_database_is_refused_at_the_start(
    cfg: TrackingConfig, tmp_path: Path
) -> None:
    (tmp_path / "ml.db").write_text("hello, I am a text file")
    with pytest.raises(UserError, match=r"ml\.db is no SQLite database"):
        MlflowStore(cfg)


def test_a_plain_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracking.uri is './mlruns', but MLflow no longer"):
        MlflowStore(TrackingConfig(True, "./mlruns"))


def test_results_are_json_without_nan_and_a_cut_journal_still_reads(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    run.write_result({"status": "finished", "auc": math.nan, "list": [math.inf, 1.0]})
    assert run.read_result() == {"status": "finished", "auc": None, "list": [None, 1.0]}
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
    write_json(SweepPaths(tmp_path).record, {"jobs": []})
    assert SweepPaths(tmp_path).read_record() == {"jobs": []}
    assert not list(tmp_path.glob("*.part"))

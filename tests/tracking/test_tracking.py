"""The journal and MLflow: what is recorded, and that MLflow never stops a training."""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from commands import forkserver
from made_up import FIT
from mlflow import MlflowClient
from mlflow.entities import Run

from ich.base.config import Config, TrackingConfig, UserError, to_dict, to_yaml
from ich.base.records import FINISHED, GitState, Origin, Provenance, RunResult, SweepRecord
from ich.base.results import RunPaths, SweepPaths
from ich.tracking.journal import Journal
from ich.tracking.mirror import Mirror, RunMirror
from ich.tracking.store import MlflowStore
from ich.tracking.sweep_report import sweep_note
from ich.tracking.sweep_run import (
    check_tracking,
    close_in_this_process,
    close_sweep_run,
    open_sweep_run,
)


@pytest.fixture
def config(composed: Callable[..., Config], database: Path, tmp_path: Path) -> Config:
    shutil.copy(database, tmp_path / "ml.db")
    return composed(
        "model=mobilenet_v2",
        f"tracking.uri=sqlite:///{tmp_path / 'ml.db'}",
        f"tracking.artifacts={tmp_path / 'artifacts'}",
    )


@pytest.fixture
def sweep(config: Config) -> SweepPaths:
    """A sweep of one job, which has started."""
    place = SweepPaths(Path(config.sweep.output) / config.name)
    run = place.run(config.job)
    run.root.mkdir(parents=True)
    run.config.write_text(to_yaml(config))
    record = SweepRecord(jobs=(config.job,), configs={config.job: to_dict(config)})
    place.write_record(replace(record, mlflow_run=open_sweep_run(config, place)))
    return place


def parent(sweep: SweepPaths) -> str:
    return str(sweep.read_record().mlflow_run)


def line(auc: float = 0.75) -> dict[str, float]:
    return {"train/lr": 0.1, "val/auc": auc}


def finish(run: RunPaths, status: str = FINISHED) -> None:
    run.write_result(RunResult(status, fit=FIT if status == FINISHED else None))


def runs_of(config: Config) -> dict[str, list[Run]]:
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("ich")
    found: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment.experiment_id]) if experiment else ():
        found.setdefault(run.info.run_name, []).append(run)
    return found


def history(config: Config, run_id: str, key: str = "val/auc") -> list[tuple[int, float]]:
    client = MlflowClient(config.tracking.uri)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_job_is_a_nested_run_with_metrics_parameters_and_files(
    config: Config, sweep: SweepPaths
) -> None:
    config.data.label_columns = ["x" * 9000, "y"]
    run = sweep.run(config.job)
    run.config.write_text(to_yaml(config))
    mirror = Mirror(config, run, parent(sweep))
    journal = Journal(run.metrics, mirror.notify)
    journal.log(line() | {"val/auc_epidural": math.nan, "val/log_loss": math.inf}, 1)
    journal.log(line(0.8), 2)
    finish(run)
    assert mirror.finish(60)
    (job,) = runs_of(config)["job"]
    assert job.data.tags["mlflow.parentRunId"] == parent(sweep)
    assert job.data.tags["ich.cohort"] == "unknown"  # no origin.json tells it
    assert history(config, job.info.run_id) == [(1, 0.75), (2, 0.8)]
    # FAULTS 17: left out and said, never 1.8e308
    assert not {"val/auc_epidural", "val/log_loss"} & set(job.data.metrics)
    assert job.data.tags["ich.undefined"] == "val/auc_epidural, val/log_loss"
    assert job.data.metrics["best/accuracy"] == 0.9
    assert job.data.metrics["data/leak_image"] == 0.1
    assert job.data.params["optimizer.lr"] == "0.0001"
    assert len(job.data.params["data.label_columns"]) == 6000
    assert job.data.params["data.label_columns"].endswith("whole in config.yaml")
    assert job.info.status == "FINISHED"
    client = MlflowClient(config.tracking.uri)
    kept = {f.path for f in client.list_artifacts(job.info.run_id)}
    assert kept == {"config.yaml", "result.json"}
    (first, second) = run.read_metrics()
    assert first.step == 1
    assert (first.metrics["val/auc"], first.metrics["val/auc_epidural"]) == (0.75, None)
    assert second.metrics["val/auc"] == 0.8


def test_pushing_again_adds_nothing_twice(config: Config, sweep: SweepPaths) -> None:
    run = sweep.run(config.job)
    for step in (1, 2):
        Journal(run.metrics).log(line(), step)
        RunMirror(config, run, parent(sweep)).push()  # each a process of its own, as in a resume
    finish(run)
    for _ in range(2):
        RunMirror(config, run, parent(sweep)).push()
    (job,) = runs_of(config)["job"]
    assert history(config, job.info.run_id) == [(1, 0.75), (2, 0.75)]
    assert len(history(config, job.info.run_id, "best/accuracy")) == 1


def test_a_superseded_run_says_so(config: Config, sweep: SweepPaths) -> None:
    run = sweep.run(config.job)
    RunMirror(config, run, parent(sweep)).push()
    run.supersede()
    run.config.write_text(to_yaml(config))
    RunMirror(config, run, parent(sweep)).push()
    tags = [r.data.tags.get("ich.superseded") for r in runs_of(config)["job"]]
    assert sorted(map(str, tags)) == ["None", "true"]


def test_runs_that_a_dead_process_left_running_are_ended(config: Config, sweep: SweepPaths) -> None:
    """FAULTS 16."""
    RunMirror(config, sweep.run(config.job), parent(sweep)).push()
    assert runs_of(config)["job"][0].info.status == "RUNNING"
    assert open_sweep_run(config, sweep) == parent(sweep)
    assert runs_of(config)["job"][0].info.status == "KILLED"
    assert runs_of(config)["test"][0].info.status == "RUNNING"


def test_a_locked_database_holds_up_no_training_and_is_caught_up_with(
    config: Config, sweep: SweepPaths, tmp_path: Path
) -> None:
    """FAULTS 14: locked for as long as the training takes."""
    run = sweep.run(config.job)
    locked = sqlite3.connect(tmp_path / "ml.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    mirror = Mirror(config, run, parent(sweep))
    journal = Journal(run.metrics, mirror.notify)
    begin = time.monotonic()
    for step in (1, 2, 3):
        journal.log(line(), step)
    assert time.monotonic() - begin < 1  # not a speed: MLflow waits 5 s for a lock, a training none
    finish(run)
    assert not mirror.finish(0.1)
    locked.execute("ROLLBACK")
    locked.close()
    close_sweep_run(sweep, "FINISHED")
    jobs = runs_of(config)["job"]
    ended = [j for j in jobs if j.info.status == "FINISHED"]
    assert history(config, ended[0].info.run_id) == [(1, 0.75), (2, 0.75), (3, 0.75)]


def test_a_deleted_database_is_made_anew_with_everything_in_it(
    config: Config, sweep: SweepPaths, tmp_path: Path
) -> None:
    """FAULTS 14: deleted."""
    run = sweep.run(config.job)
    Journal(run.metrics).log(line(), 1)
    mirror = Mirror(config, run, parent(sweep))
    (tmp_path / "ml.db").unlink()
    Journal(run.metrics, mirror.notify).log(line(), 2)
    finish(run)
    mirror.finish(30)
    close_sweep_run(sweep, "FINISHED")
    with sqlite3.connect(tmp_path / "ml.db") as db:  # MLflow here still has the deleted file open
        ended = dict(db.execute("SELECT name, status FROM runs"))
        assert ended == {"job": "FINISHED", "test": "FINISHED"}
        above = db.execute("SELECT value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall()
        assert above == [(parent(sweep),)]
        steps = "SELECT step FROM metrics WHERE key = 'val/auc' ORDER BY step"
        assert db.execute(steps).fetchall() == [(1,), (2,)]


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["full", "broken", "server down"])
def test_mlflow_that_fails_stops_no_training(
    config: Config,
    sweep: SweepPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """FAULTS 14: full, overwritten, away."""
    run = sweep.run(config.job)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    if fault == "full":
        monkeypatch.setattr(MlflowStore, "log_metrics", full)
    elif fault == "broken":
        (tmp_path / "ml.db").write_bytes(b"no database any more" * 1000)
    else:
        config.tracking.uri = "http://127.0.0.1:9"
    mirror = Mirror(config, run, parent(sweep))
    journal = Journal(run.metrics, mirror.notify)
    for step in (1, 2):
        journal.log(line(), step)
    finish(run)
    mirror.finish(60)
    close_sweep_run(sweep, "FINISHED")
    assert [line.step for line in run.read_metrics()] == [1, 2]
    assert "MLflow cannot be used" in caplog.text
    if fault == "full":  # and once there is room, the same command copies everything
        monkeypatch.undo()
        close_sweep_run(sweep, "FINISHED")
        (job,) = runs_of(config)["job"]
        assert history(config, job.info.run_id) == [(1, 0.75), (2, 0.75)]


def test_a_sweep_shows_its_verdict_where_its_data_and_its_code_are_from(
    config: Config, sweep: SweepPaths
) -> None:
    run = sweep.run(config.job)
    run.write_origin(Origin(cohort="0123abcd"))
    run.write_provenance(Provenance(git=GitState("f" * 40, changed=True)))
    record = sweep.read_record()
    command = "ich sweep -m data.root=/home/ann/scans seed=0,1"
    origins = {config.job: Origin(cohort="0123abcd")}
    sweep.write_record(replace(record, command=command, cohorts=("0123abcd",), origins=origins))
    sweep.text.write_text(
        "# test\n\n**A is best.**\n\n![AUC](figures/forest.png)\n\n## Methods\n\nLong.\n"
    )
    sweep.page.write_text("a page")
    sweep.csv.write_text(
        "job,setting,seeds,auc,auc_low,auc_high,accuracy,accuracy_low,accuracy_high\n"
        '"a,seed=0","a=1,b",2,0.7,,,0.6,,\n"a,seed=1","a=1,b",2,0.9,,,0.8,,\n'
        ',"a=1,b",2,0.8,0.75,0.85,0.7,0.65,0.75\nc,c,1,0.5,0.4,0.6,0.9,,\n'
        ",,,0.5,,,0.7,,\n"
    )
    finish(run)
    for _ in range(2):  # a second copy doubles nothing
        RunMirror(config, run, parent(sweep)).push()
        close_in_this_process(sweep, "FINISHED")
    client = MlflowClient(config.tracking.uri)
    above, (job,) = client.get_run(parent(sweep)), runs_of(config)["job"]
    for one in (above, client.get_run(job.info.run_id)):
        assert one.data.tags["mlflow.source.name"] == "ich sweep -m data.root=scans seed=0,1"
        (logged,) = one.inputs.dataset_inputs
        assert (logged.dataset.name, logged.dataset.digest) == ("phantom", "0123abcd")
        assert "/" not in f"{logged.dataset.source} {logged.dataset.profile}"
    assert job.data.tags["mlflow.source.git.commit"] == "f" * 40
    assert job.data.tags["mlflow.source.git.dirty"] == "true"
    assert "mlflow.source.git.commit" not in above.data.tags  # its record tells none
    assert above.data.tags["mlflow.note.content"] == (
        f"**A is best.**\n\n![AUC](get-artifact?path=figures%2Fforest.png&run_uuid={parent(sweep)})"
    )
    numbers = {k: v for k, v in above.data.metrics.items() if not k.startswith("best/")}
    assert numbers == {
        **{"a 1 b/auc": 0.8, "a 1 b/auc_low": 0.75, "a 1 b/auc_high": 0.85},
        **{"a 1 b/accuracy": 0.7, "a 1 b/accuracy_low": 0.65, "a 1 b/accuracy_high": 0.75},
        **{"c/auc": 0.5, "c/auc_low": 0.4, "c/auc_high": 0.6, "c/accuracy": 0.9},
    }
    sweep.csv.write_text(sweep.csv.read_text().replace("c,c,1,0.5,", "c,c,1,0.55,"))
    close_in_this_process(sweep, "FINISHED")  # after a later launch
    assert history(config, parent(sweep), "c/auc") == [(0, 0.5), (1, 0.55)]
    assert history(config, parent(sweep), "c/auc_low") == [(0, 0.4)]
    kept = [f.path for f in client.list_artifacts(parent(sweep))]
    assert kept[0] == "0-verdict"
    assert {"report.md", "report.html"} <= set(kept)


def test_a_long_report_is_cut_to_what_a_description_holds(sweep: SweepPaths) -> None:
    sweep.text.write_text(f"# t\n\n**A is best.**\n\n## Table\n\n{'x' * 9000}\n\n## Methods\n")
    assert sweep_note(sweep, "1") == "**A is best.**"
    sweep.text.write_bytes(b"\xff")
    assert sweep_note(sweep, "1") == ""


def open_one(cfg: TrackingConfig) -> str:
    return MlflowStore(cfg).open_run("job", {})


@pytest.mark.faults
def test_eight_jobs_that_open_a_new_database_at_once_are_eight_runs(
    config: Config, tmp_path: Path
) -> None:
    """FAULTS 13."""
    (tmp_path / "ml.db").unlink()
    with ProcessPoolExecutor(8, mp_context=forkserver) as pool:
        ids = list(pool.map(open_one, [config.tracking] * 8))
    assert len(set(ids)) == 8
    assert {r.info.run_id for r in runs_of(config)["job"]} == set(ids)


def test_a_file_that_is_no_database_is_refused_at_the_start(config: Config, tmp_path: Path) -> None:
    """FAULTS 15."""
    (tmp_path / "ml.db").write_text("hello, I am a text file")
    with pytest.raises(UserError, match=r"ml\.db is no SQLite database"):
        check_tracking(config)


def test_a_plain_folder_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracking.uri is './mlruns', but MLflow no longer"):
        MlflowStore(TrackingConfig(True, "./mlruns"))


# Deleted in MLflow (FAULTS 42)


def test_a_deleted_experiment_is_refused_and_once_restored_gets_its_copy(
    config: Config, sweep: SweepPaths, caplog: pytest.LogCaptureFixture
) -> None:
    run = sweep.run(config.job)
    Journal(run.metrics).log(line(), 1)
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("ich").experiment_id
    client.delete_experiment(experiment)
    command = f"mlflow experiments restore --experiment-id {experiment}`"
    with pytest.raises(UserError, match=f"'ich' at .* has been deleted, .*{command} brings it"):
        check_tracking(config)
    finish(run)
    close_in_this_process(sweep, "FINISHED")
    assert command in caplog.text
    client.restore_experiment(experiment)
    check_tracking(config)
    close_in_this_process(sweep, "FINISHED")
    (job,) = runs_of(config)["job"]
    assert history(config, job.info.run_id) == [(1, 0.75)]
    assert job.info.status == "FINISHED"


def test_files_that_were_deleted_from_the_artifacts_are_copied_again(
    config: Config, sweep: SweepPaths, tmp_path: Path
) -> None:
    run = sweep.run(config.job)
    run.best.write_text("of an early version: weights without metadata")
    finish(run)
    close_in_this_process(sweep, "FINISHED")
    (before,) = runs_of(config)["job"]
    kept = sorted(p.name for p in (tmp_path / "artifacts" / before.info.run_id).rglob("*"))
    assert run.best.name in kept
    for gone in (tmp_path / "artifacts", tmp_path / "artifacts" / before.info.run_id):
        shutil.rmtree(gone)
        close_in_this_process(sweep, "FINISHED")
        folder = tmp_path / "artifacts" / before.info.run_id
        assert sorted(p.name for p in folder.rglob("*")) == kept
    (after,) = runs_of(config)["job"]
    assert after.info.end_time == before.info.end_time  # its times stay those of the training


def test_parameters_that_could_not_be_logged_are_logged_later(
    config: Config, sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was noted before, and whoever went on with it took it to be complete."""
    run = sweep.run(config.job)

    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(MlflowStore, "log_params", locked)
    with pytest.raises(sqlite3.OperationalError):
        RunMirror(config, run, parent(sweep)).push()
    monkeypatch.undo()
    config.train.threads = 1  # a setting that is no part of the run
    for _ in range(2):
        RunMirror(config, run, parent(sweep)).push()
    (job,) = runs_of(config)["job"]
    assert job.data.params["optimizer.lr"] == "0.0001"


def test_a_sweep_that_is_given_again_with_another_experiment_is_copied_there(
    config: Config, sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(sweep.run(config.job))
    close_in_this_process(sweep, "FINISHED")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stroke")
    close_in_this_process(sweep, "FINISHED")
    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("stroke")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"job", "test"}
    assert runs["job"].data.tags["mlflow.parentRunId"] == runs["test"].info.run_id


def test_the_start_names_the_store_and_a_mistake_the_variable_that_made_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(config.tracking.uri))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stroke")
    config.tracking.uri = None
    check_tracking(config)
    assert "ml.db (MLFLOW_TRACKING_URI), experiment stroke" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    refused = r"MLflow at http://\*\*\*@127.0.0.1:9 \(MLFLOW_TRACKING_URI\) cannot be used: "
    with pytest.raises(UserError, match=f"{refused}.* refused.* Start the server; or") as error:
        check_tracking(config)
    assert "secret" not in str(error.value)


@pytest.mark.faults
def test_a_proxy_that_fails_is_named_and_no_server_is_to_be_started(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    config.tracking.uri = "http://tracking.example:5000"
    with pytest.raises(UserError, match=r"ProxyError\(.*NO_PROXY; or use tracking=none"):
        check_tracking(config)


def test_a_database_of_another_version_says_the_command_that_mends_it(
    config: Config, tmp_path: Path
) -> None:
    """The command stood behind the 300th character, where the message was cut off."""
    with sqlite3.connect(tmp_path / "ml.db") as db:
        db.execute("UPDATE alembic_version SET version_num = 'cc1f77228345'")
    with pytest.raises(
        UserError, match=r"mlflow db upgrade sqlite:.*ml.db' .*Copy the database, then do as it"
    ):
        check_tracking(config)

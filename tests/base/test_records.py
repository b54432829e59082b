"""Records of runs and sweeps: what is written comes back, and what earlier versions wrote too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from made_up import COHORT, FIT

from ich.base.files import write_json
from ich.base.records import (
    FAILED,
    FINISHED,
    KILLED,
    NOT_STARTED,
    ComputeMode,
    EpochMetrics,
    GitState,
    Hardware,
    JobProgress,
    Origin,
    Provenance,
    RunResult,
    SweepRecord,
    TrackingState,
)
from ich.base.results import RunPaths, SweepPaths
from ich.tracking.journal import Journal

MODE = ComputeMode("fp32", "channels_last", "a chip")
PROVENANCE = Provenance(
    "c0de", GitState("1234", True), {"torch": "2.6"}, Hardware("a chip", 2, 8.0, "Linux", ("a",))
)
# A finished run as the first version wrote it: no labels, no validation, one leak.
FIRST: dict[str, Any] = {
    "job": "vgg16",
    "model": "vgg16",
    "mlflow_run": "4be7",
    "status": "finished",
    "reason": "",
    "log_loss": 0.5,
    "accuracy": 0.75,
    "auc": 0.7,
    "auc_any": None,
    "best_epoch": 3,
    "auc_top": 0.72,
    "params": 14717766,
    "params_imagenet": 138357544,
    "epochs": 3,
    "minutes": 1.5,
    "images_per_s": 28.1,
    "device": "CPU, 2 threads",
    "cohort": {
        "repeated_ids": 0,
        "images": 2489,
        "train": 827,
        "val": 146,
        "rates": {"train": {"any": 0.6}},
        "leak_images": 0.3151,
        "quarantined": 1,
        "cache": "hu128-01ff",
    },
    "always_negative": {"accuracy": 0.72, "auc": 0.5},
}


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepPaths:
    return SweepPaths(tmp_path)


@pytest.mark.parametrize(
    "result",
    [
        RunResult(FINISHED, "", "job", "vgg16", replace(FIT, threads=2, resumed=1)),
        RunResult(FAILED, "out of memory", "job", "vgg16"),
        RunResult(KILLED, "ended by SIGTERM", "job", "vgg16"),
    ],
    ids=lambda result: result.status,
)
def test_a_result_comes_back(run: RunPaths, result: RunResult) -> None:
    run.write_result(result)
    assert run.read_result() == result


def test_the_keys_of_a_result_are_what_other_peoples_scripts_rely_on(run: RunPaths) -> None:
    run.write_result(RunResult(FINISHED, "", "job", "vgg16", FIT))
    written = json.loads(run.result.read_text())
    assert list(written) == [
        *("job", "model", "status", "reason", "accuracy", "auc", "val_accuracy", "val_auc"),
        *("best_epoch", "auc_top", "labels", "params", "params_imagenet", "epochs", "minutes"),
        *("images_per_s", "resumed", "device", "threads", "precision", "layout"),
        *("graph", "cohort"),
        "always_negative",
    ]
    assert list(written["cohort"]) == [
        *("images", "train", "val", "rates", "scored", "leak", "quarantined", "cohort", "cache"),
        "protocol",
    ]
    run.write_result(RunResult(FAILED, "why", "job", "vgg16"))
    assert list(json.loads(run.result.read_text())) == ["job", "model", "status", "reason"]


def test_what_is_undefined_is_null_in_the_file(run: RunPaths) -> None:
    scores = {"accuracy": 0.5, "auc": math.nan, "log_loss": math.inf}
    fit = replace(FIT, scores=scores, auc_top=math.nan)
    run.write_result(RunResult(FINISHED, fit=fit))
    assert "NaN" not in run.result.read_text()
    back = run.read_result().fit
    assert back is not None
    undefined = {"accuracy": 0.5, "auc": None, "log_loss": None}
    assert (dict(back.scores), back.auc_top) == (undefined, None)


def test_a_result_of_the_first_version_is_read(run: RunPaths) -> None:
    write_json(run.result, FIRST)
    result = run.read_result()
    fit = result.fit
    assert fit is not None
    assert (result.job, result.is_finished) == ("vgg16", True)
    assert fit.scores == {"log_loss": 0.5, "accuracy": 0.75, "auc": 0.7, "auc_any": None}
    assert fit.val_scores == {}
    assert (fit.labels, fit.threads, fit.precision, fit.resumed) == ((), None, None, 0)
    assert fit.cohort.steps == {"repeated_ids": 0, "images": 2489, "train": 827, "val": 146}
    assert (fit.cohort.scored, fit.cohort.leak) == ("val", {"image": 0.3151})


@pytest.mark.parametrize(
    "text",
    [
        '{"status": "fini',
        "[]",
        "{}",
        '{"status": null, "reason": ""}',
        '{"status": "finished", "auc": 0.9}',
        json.dumps(FIRST | {"cohort": 7}),
        json.dumps({k: v for k, v in FIRST.items() if k != "params"}),
    ],
)
def test_a_damaged_result_is_a_failed_run_and_not_a_plausible_one(run: RunPaths, text: str) -> None:
    run.result.write_text(text)
    assert run.read_result() == RunResult(FAILED, "result.json is damaged")


def test_a_record_of_a_later_version_is_read_without_what_is_new(run: RunPaths) -> None:
    write_json(run.result, RunResult(FINISHED, "", "a", "b", FIT).to_json() | {"new": "x"})
    assert run.read_result().fit == FIT
    write_json(run.origin, Origin("c", "w", "x", MODE).to_json() | {"new": 1})
    assert run.read_origin() == Origin("c", "w", "x", MODE)
    hardware = PROVENANCE.to_json()["hardware"] | {"tpus": []}
    write_json(run.provenance, PROVENANCE.to_json() | {"hardware": hardware, "new": 1})
    assert run.read_provenance() == PROVENANCE


@pytest.mark.parametrize("text", [None, "", '{"coh', "[1, 2]", "7"])
def test_of_what_only_helps_a_damaged_file_tells_nothing(run: RunPaths, text: str | None) -> None:
    for path in (run.origin, run.provenance, run.tracking) if text is not None else ():
        path.write_text(text)
    assert run.read_origin() == Origin()
    assert run.read_provenance() == Provenance()
    assert run.read_tracking() == TrackingState()


def test_an_origin_names_only_what_is_known(run: RunPaths) -> None:
    run.write_origin(Origin(mode=MODE))
    assert list(json.loads(run.origin.read_text())) == ["mode"]
    assert run.read_origin() == Origin(mode=MODE)
    write_json(run.origin, {"cohort": "c", "weights": None, "mode": {"precision": "fp32"}})
    assert run.read_origin() == Origin(cohort="c")


def test_provenance_comes_back_also_from_outside_a_checkout(run: RunPaths) -> None:
    for made_with in (PROVENANCE, replace(PROVENANCE, git=None)):
        run.write_provenance(made_with)
        assert run.read_provenance() == made_with
    assert json.loads(run.provenance.read_text())["git"] == {}


def test_the_state_of_the_copy_in_mlflow_comes_back(run: RunPaths) -> None:
    run.write_tracking(TrackingState(supersedes="1234"))
    assert json.loads(run.tracking.read_text()) == {"supersedes": "1234"}
    state = replace(run.read_tracking(), mlflow_run="5678", complete=False)
    run.write_tracking(state)
    assert run.read_tracking() == state


def test_a_sweeps_record_comes_back(sweep: SweepPaths) -> None:
    record = SweepRecord(
        name="demo",
        jobs=("a", "b"),
        cohorts=("c",),
        mlflow_run="1234",
        started="2026-11-25 12:00",
        command="ich sweep",
        modes={"vgg16 32x3x96 cpu": MODE},
        origins={"a": Origin("c", "w", "x", MODE), "b": Origin("c", "w", "x")},
        configs={"a": {"seed": 0}},
        provenance=PROVENANCE,
    )
    sweep.write_record(record)
    assert sweep.read_record() == record
    written = json.loads(sweep.record.read_text())
    assert list(written) == [
        *("name", "jobs", "cohorts", "mlflow_run", "started", "command", "modes", "origins"),
        *("configs", "provenance", "sharing"),
    ]
    assert written["origins"]["b"] == {"cohort": "c", "weights": "w", "code": "x"}


def test_a_sweep_of_the_first_version_is_read(sweep: SweepPaths) -> None:
    first = {"name": "demo", "jobs": ["a"], "mlflow_run": None, "started": "", "command": "c"}
    write_json(sweep.record, first)
    assert sweep.read_record() == SweepRecord("demo", ("a",), command="c")
    assert sweep.read_results() == [RunResult(NOT_STARTED, job="a")]
    sweep.record.unlink()
    assert sweep.read_record() == SweepRecord()


@pytest.mark.parametrize("text", ['{"name": "demo", "jo', "", "[]", '{"jobs": [7]}', "\0" * 9])
def test_a_damaged_record_of_a_sweep_has_the_jobs_whose_folders_are_there(
    sweep: SweepPaths, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    for job in ("b", "a"):
        sweep.run(job).root.mkdir()
        sweep.run(job).write_result(RunResult(FAILED, "why", job))
    sweep.record.write_text(text)
    assert sweep.read_record().jobs == ("a", "b")
    assert [r.reason for r in sweep.read_results()] == ["why", "why"]
    assert f"{sweep.record} is damaged" in caplog.text
    assert f"the jobs are those whose folders are in {sweep.root}" in caplog.text


def test_a_record_leads_out_of_no_folder(sweep: SweepPaths) -> None:
    names = ["a", "../x", "/etc", ".hidden", "a/b", "", "x\0", "b,seed=1"]
    write_json(sweep.record, {"jobs": names, "cohorts": ["0a1b", "../../x", "not made yet"]})
    record = sweep.read_record()
    assert record.jobs == ("a", "b,seed=1")
    assert record.cohorts == ("0a1b", "not made yet")


def test_a_journal_comes_back_without_a_line_that_a_crash_cut_off(run: RunPaths) -> None:
    assert run.read_metrics() == []
    line = EpochMetrics(1, 12.5, {"val/auc": 0.75, "val/auc_any": None})
    run.metrics.write_text(json.dumps(line.to_json()) + '\n{"step": 2, "ti')
    assert run.read_metrics() == [line]


def test_a_line_of_the_journal_that_is_damaged_costs_itself_and_is_named(
    run: RunPaths, caplog: pytest.LogCaptureFixture
) -> None:
    line = EpochMetrics(1, 12.5, {"val/auc": 0.75})
    text = json.dumps(line.to_json())
    others = ['{"st', "\0\0", "[1]", '{"step": "1", "time": 0}', '{"step": 1, "time": 0, "a": "b"}']
    run.metrics.write_text("\n".join([*others[:3], text, *others[3:]]) + "\n")
    assert run.read_metrics() == [line]
    _, damaged = run.read_journal()
    assert len(damaged) == len(others)
    assert f"line 1 of {run.metrics} is damaged" in caplog.text
    Journal(run.metrics).rewind(1)
    assert run.metrics.read_text() == text + "\n"


def test_progress_comes_back_and_is_none_before_the_first_step(run: RunPaths) -> None:
    assert run.read_progress() is None
    progress = JobProgress("training", 1, 10, 3, 40)
    run.write_progress(progress)
    assert run.read_progress() == progress


@pytest.mark.parametrize(
    "text",
    ["", '{"ph', "\0" * 20, "[]", '{"phase": "training"}'],
)
def test_damaged_progress_is_none(run: RunPaths, text: str) -> None:
    run.progress.write_text(text)
    assert run.read_progress() is None
    for key, value in (("steps", 0), ("epochs", 0), ("step", "1"), ("epoch", None)):
        write_json(run.progress, asdict(JobProgress("training", 1, 1, 1, 1)) | {key: value})
        assert run.read_progress() is None


ODD: list[Any] = [None, "x", -1, [], {"a": 1}, True, 10**99]


def test_no_value_of_another_type_is_taken(run: RunPaths, sweep: SweepPaths) -> None:
    """Each value of each record, replaced by each of another type: read, or refused as damaged."""
    finished = RunResult(FINISHED, "", "job", "vgg16", replace(FIT, threads=2))
    record = SweepRecord(
        "s", ("a",), ("c",), "1", "", "x", {"k": MODE}, {"a": Origin("c", mode=MODE)}
    )
    records: list[tuple[Path, Any, Callable[[], Any]]] = [
        (run.result, finished.to_json(), run.read_result),
        (run.result, FIRST, run.read_result),
        (run.origin, Origin("c", "w", "x", MODE).to_json(), run.read_origin),
        (run.provenance, PROVENANCE.to_json(), run.read_provenance),
        (run.tracking, TrackingState("1", True, "2").to_json(), run.read_tracking),
        (run.metrics, EpochMetrics(1, 2.0, {"a": 1.0}).to_json(), run.read_metrics),
        (run.progress, asdict(JobProgress("training", 1, 1, 1, 1)), run.read_progress),
        (sweep.record, replace(record, provenance=PROVENANCE).to_json(), sweep.read_record),
        (sweep.stopped, {"job": "a"}, sweep.read_results),
    ]
    for path, values, read in records:
        kind = type(read())
        for changed in changes(values):
            path.write_text(json.dumps(changed) + "\n")
            value = read()
            assert isinstance(value, kind | JobProgress)
            if hasattr(value, "to_json"):
                json.dumps(value.to_json())
        path.unlink()


def changes(values: Any) -> Iterator[Any]:
    """The same with one value, at any depth, replaced or left out."""
    yield from ODD
    if isinstance(values, dict):
        for key, child in values.items():
            yield {k: v for k, v in values.items() if k != key}
            for changed in changes(child):
                yield values | {key: changed}


def test_every_writer_leaves_whole_files_alone(run: RunPaths) -> None:
    run.write_result(RunResult(FINISHED, fit=replace(FIT, cohort=COHORT)))
    run.write_origin(Origin("c"))
    assert not list(run.root.glob("*.part"))

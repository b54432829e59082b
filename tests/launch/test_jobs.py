"""How children are supervised, with children of a few lines in a training's place (FAULTS 1 to 9,
12): whatever becomes of one is a result with a reason, and nothing of it lives on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import FIT
from rich.console import Console
from sweeps import alive, wait_for

from ich.base.config import Config, OnFailure, load_config
from ich.base.records import (
    FAILED,
    FINISHED,
    KILLED,
    NOT_STARTED,
    Origin,
    RunResult,
    SweepRecord,
    TrackingState,
)
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.terminal import Board
from ich.launch.jobs import Slot, run_in_slots, run_job
from ich.launch.steps import train

ORIGIN = Origin(cohort="c", weights="random", code="x")

# What every child begins with; what it does then is the test's.
BEGINNING = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path(sys.argv[1])
checkpoint = run / "checkpoint-a.ich"
print("begun", flush=True)

def finish():
    (run / "best.safetensors").write_text("weights")
    (run / "result.json").write_text(os.environ["FINISHED"])

def ready(process):
    (run / "writing").write_text(str(process))
    (run / "writing").rename(run / "process")
"""
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
HANG = "ready(os.getpid()); time.sleep(600)"
WORKER = "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])"
END = "os.kill(os.getpid(), signal.%s)"


def quiet(*_: object) -> None:
    """Takes news and tells nobody."""


def place(*lines: str) -> Slot:
    """Where a job is such a child."""
    finished = RunResult(FINISHED, "", "job", "mobilenet_v2", FIT).to_json()
    # -S: without site-packages it starts in a fiftieth of a second.
    command = (sys.executable, "-S", "-c", BEGINNING + "\n".join(lines))
    return Slot("a place", {"FINISHED": json.dumps(finished)}, command)


@pytest.fixture
def config(composed: Callable[..., Config]) -> Config:
    return composed("model=mobilenet_v2", "model.pretrained=false", "tracking=none")


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "out" / "test" / "job")


def started(run: RunPaths) -> int:
    """How often a child has begun there."""
    return run.log.read_text().count("begun")


def process_of(run: RunPaths) -> int:
    return int((run.root / "process").read_text())


@pytest.mark.parametrize(
    ("ending", "status", "reason"),
    [
        ("raise RuntimeError('a bug')", FAILED, "exited with code 1 without a result"),
        ("sys.exit(0)", FAILED, "exited with code 0 without a result"),
        ("sys.exit(3)", FAILED, "exited with code 3 without a result"),
        (END % "SIGKILL", FAILED, "ended by SIGKILL (out of memory?)"),
        (END % "SIGSEGV", FAILED, "ended by SIGSEGV"),
        (END % "SIGABRT", FAILED, "ended by SIGABRT"),
        (END % "SIGTERM", KILLED, "ended by SIGTERM"),
        (END % "SIGRTMIN + 6", FAILED, "ended by signal 40"),
        ("finish(); sys.exit(3)", FINISHED, ""),
    ],
)
def test_however_a_child_ends_there_is_a_result(
    config: Config, run: RunPaths, ending: str, status: str, reason: str
) -> None:
    result = run_job(config, run, ORIGIN, None, quiet, place(ending))
    assert (result.status, result.reason, result.job) == (status, reason, "job")
    assert result == run.read_result()
    assert started(run) == 1
    assert ("RuntimeError: a bug" in run.log.read_text()) == ("a bug" in ending)
    assert not run.progress.exists()


def test_a_child_that_hangs_is_ended_at_its_time_limit(config: Config, run: RunPaths) -> None:
    """The limit is the reason, also where the child still wrote that it was told to end."""
    config.sweep.time_limit = 0.01
    wrote = json.dumps(RunResult(KILLED, "ended by SIGTERM or an interrupt", "job").to_json())
    write = f"(run / 'result.json').write_text('{wrote}')"
    told = f"signal.signal(signal.SIGTERM, lambda *_: ({write}, sys.exit(1)))"
    for hang in (HANG, f"{told}; time.sleep(600)"):
        result = run_job(config, run, ORIGIN, None, quiet, place(hang))
        assert (result.status, result.reason) == (
            *(FAILED, "exceeded its time limit of 0.01 minutes"),
        )


def test_a_child_that_does_not_end_when_told_is_killed_with_all_it_started(
    config: Config, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.launch.jobs.GRACE_SECONDS", 0.2)
    stop, config.sweep.retry = threading.Event(), 3

    def watch() -> None:
        if (run.root / "process").exists():
            stop.set()

    result = run_job(config, run, ORIGIN, None, watch, place(IGNORE, WORKER, HANG), stop)
    assert (result.status, result.reason) == (KILLED, "ended by SIGTERM, with its sweep")
    assert started(run) == 1  # what was told to end is not tried again
    wait_for(lambda: not alive(process_of(run)), 10)


def test_what_a_child_leaves_behind_ends_with_it(config: Config, run: RunPaths) -> None:
    leaves = place("ready(os.getpid())", WORKER, "finish()")
    assert run_job(config, run, ORIGIN, None, quiet, leaves).is_finished
    wait_for(lambda: not alive(process_of(run)), 10)


def test_an_interrupt_ends_the_child_and_the_next_start_goes_on(
    config: Config, run: RunPaths
) -> None:
    """The child writes its checkpoint when it is told to end."""

    def interrupt() -> None:
        if (run.root / "process").exists():
            raise KeyboardInterrupt

    save = "signal.signal(signal.SIGTERM, lambda *_: (checkpoint.touch(), sys.exit(1)))"
    with pytest.raises(KeyboardInterrupt):
        run_job(config, run, ORIGIN, None, interrupt, place(save, HANG))
    assert not alive(process_of(run))
    assert run.state(config, ORIGIN) is State.resume
    goes_on = place("assert checkpoint.exists(); finish()")
    assert run_job(config, run, ORIGIN, None, quiet, goes_on).is_finished
    assert started(run) == 2


SUPERVISOR = """
import sys, threading
from pathlib import Path
from ich.base.results import RunPaths
from ich.launch.jobs import Slot, supervise
run = RunPaths(Path(sys.argv[1]))
command = [sys.executable, "-c", sys.argv[2], str(run.root), "--watched-by"]
import os
supervise([*command, str(os.getpid())], run, None, lambda: None, Slot(), threading.Event())
"""


def test_a_child_whose_supervisor_is_killed_saves_and_ends(run: RunPaths) -> None:
    run.root.mkdir(parents=True)
    save = "signal.signal(signal.SIGTERM, lambda *_: (checkpoint.touch(), os._exit(1)))"
    watch = "from ich.base.processes import watch_supervisor; watch_supervisor(int(sys.argv[3]))"
    child = "\n".join([BEGINNING, save, watch, HANG])
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(run.root), child])
    wait_for((run.root / "process").exists)
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not alive(process_of(run)))
    assert run.has_checkpoint()


# What comes next


def test_a_failed_job_is_tried_again_from_its_checkpoint(config: Config, run: RunPaths) -> None:
    config.sweep.retry = 2
    dies_once = f"if not checkpoint.exists():\n  checkpoint.touch(); {END % 'SIGKILL'}\nfinish()"
    assert run_job(config, run, ORIGIN, None, quiet, place(dies_once)).is_finished
    assert started(run) == 2
    assert not (run.root.parent / "superseded").exists()


def test_who_fails_each_time_is_tried_so_often_and_no_more(config: Config, run: RunPaths) -> None:
    config.sweep.retry = 2
    result = run_job(config, run, ORIGIN, None, quiet, place("checkpoint.touch(); sys.exit(3)"))
    assert (result.status, started(run)) == (FAILED, 3)
    killed = run_job(config, run, ORIGIN, None, quiet, place(END % "SIGTERM"))
    assert (killed.status, started(run)) == (KILLED, 4)


def test_a_finished_job_is_not_run_again(config: Config, run: RunPaths) -> None:
    first = run_job(config, run, ORIGIN, None, quiet, place("finish()"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.root.iterdir()}
    config.sweep.time_limit, config.train.threads = 90, 1  # no part of what a training is
    assert run_job(config, run, ORIGIN, None, quiet, place("sys.exit(3)")) == first
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.root.iterdir()}


@pytest.mark.parametrize("change", ["config", "cohort", "weights"])
def test_what_was_made_from_something_else_is_kept_and_a_new_run_begun(
    config: Config, run: RunPaths, change: str
) -> None:
    run_job(config, run, ORIGIN, None, quiet, place("checkpoint.touch(); finish()"))
    origin = ORIGIN if change == "config" else replace(ORIGIN, **{change: "other"})
    config.optimizer.lr *= 2 if change == "config" else 1
    anew = place("assert not checkpoint.exists(); sys.exit(3)")
    assert run_job(config, run, origin, None, quiet, anew).status == FAILED
    kept = RunPaths(run.root.parent / "superseded" / "job.1")
    assert kept.read_result().is_finished
    assert kept.best.read_text() == "weights"
    assert started(run) == started(kept) == 1


def test_a_failure_without_a_checkpoint_begins_anew(config: Config, run: RunPaths) -> None:
    run_job(config, run, ORIGIN, None, quiet, place(END % "SIGSEGV"))
    assert run_job(config, run, ORIGIN, None, quiet, place("finish()")).is_finished
    kept = RunPaths(run.root.parent / "superseded" / "job.1")
    assert kept.read_result().reason == "ended by SIGSEGV"


def test_one_that_is_ended_before_its_first_checkpoint_begins_again_in_its_place(
    config: Config, run: RunPaths
) -> None:
    """There is nothing to keep, and MLflow would have one more run that was killed."""
    assert run_job(config, run, ORIGIN, None, quiet, place(END % "SIGTERM")).status == KILLED
    run.write_tracking(TrackingState(mlflow_run="1234", complete=True))
    assert run_job(config, run, ORIGIN, None, quiet, place("finish()")).is_finished
    assert not (run.root.parent / "superseded").exists()
    assert run.read_tracking() == TrackingState(mlflow_run="1234", complete=False)
    assert started(run) == 2


# Damaged state

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "NUL": lambda data: b"\0" * len(data),
    "garbage": lambda data: bytes(b ^ 0xA5 for b in data),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["config.yaml", "origin.json", "result.json", "metrics.jsonl", "tracking.json"]
)
def test_a_damaged_file_of_a_finished_run_costs_no_more_than_that_run(
    config: Config, run: RunPaths, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_job(config, run, ORIGIN, None, quiet, place("finish()"))
    run.write_tracking(TrackingState(mlflow_run="1234"))
    run.metrics.write_text('{"step": 1, "time": 0.0}\n')
    path = run.root / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert run_job(config, run, ORIGIN, None, quiet, place("finish()")).is_finished
    decides = name in ("config.yaml", "origin.json", "result.json")
    kept = run.root.parent / "superseded" / "job.1"
    assert kept.exists() == decides
    if name in ("config.yaml", "origin.json") and damage != "cut":
        assert f"{path} is damaged" in caplog.text
    assert load_config(run.config) == config


# Several jobs


def jobs_of(config: Config, number: int) -> tuple[SweepPaths, list[Config]]:
    """An opened sweep of so many jobs."""
    configs = [replace(config, job=f"job{n}", seed=n) for n in range(number)]
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    sweep.root.mkdir(parents=True)
    names = tuple(c.job for c in configs)
    sweep.write_record(SweepRecord(jobs=names, origins=dict.fromkeys(names, ORIGIN)))
    return sweep, configs


def launch(configs: list[Config], slots: list[Slot], stop: threading.Event) -> list[float | None]:
    with Board([c.job for c in configs], Console(quiet=True)) as board:
        return run_in_slots(lambda c, slot: train(c, board, slot, stop), configs, slots, stop)


def test_the_first_failure_stops_the_sweep_if_it_is_to(config: Config) -> None:
    config.sweep.on_failure = OnFailure.stop
    sweep, configs = jobs_of(config, 3)
    fails = place("sys.exit(3) if run.name == 'job1' else finish()")
    assert launch(configs, [fails], threading.Event()) == [FIT.val_scores["accuracy"], None, None]
    results = sweep.read_results()
    assert [r.status for r in results] == [FINISHED, FAILED, NOT_STARTED]
    assert results[2].reason == "not started: sweep.on_failure=stop, and job1 failed"


def test_a_folder_that_cannot_be_used_costs_its_own_job(config: Config) -> None:
    sweep, configs = jobs_of(config, 2)
    sweep.run("job0").root.write_text("a file")
    scores = launch(configs, [place("finish()")], threading.Event())
    assert scores == [None, FIT.val_scores["accuracy"]]


def test_jobs_run_side_by_side_and_an_interrupt_ends_them_all(config: Config) -> None:
    """A signal raises in the main thread; the job that waits is not started."""
    sweep, configs = jobs_of(config, 3)
    runs = [sweep.run(c.job) for c in configs]

    def interrupt_once_two_run() -> None:
        wait_for(lambda: all((r.root / "process").exists() for r in runs[:2]))
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.Thread(target=interrupt_once_two_run, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(configs, [place(HANG), place(HANG)], threading.Event())
    signal.signal(signal.SIGUSR1, before)
    assert [r.status for r in sweep.read_results()] == [KILLED, KILLED, NOT_STARTED]
    assert not any(alive(process_of(r)) for r in runs[:2])


def test_an_error_in_a_slot_is_raised_where_the_work_was_given(config: Config) -> None:
    def fail(item: int, _: Slot) -> Any:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        run_in_slots(fail, [1], [Slot()], threading.Event())

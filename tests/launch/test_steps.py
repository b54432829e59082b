"""The steps of a launch, whichever launcher places its jobs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from made_up import FIT
from sweeps import TINY

from ich.base.config import Config, to_yaml
from ich.base.records import FINISHED, KILLED, RunResult, SweepRecord
from ich.base.results import SweepPaths
from ich.launch import preflight
from ich.launch.steps import board_for, prepare


def test_jobs_of_earlier_batches_and_other_processes_are_not_waiting(
    composed: Callable[..., Config],
) -> None:
    config = composed()
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    for job in ("before", "ours"):
        sweep.run(job).root.mkdir(parents=True)
        sweep.run(job).write_result(RunResult(KILLED, "by hand"))
    sweep.write_record(SweepRecord(jobs=("before", "ours", "after")))
    board = board_for(replace(config, job="ours"))
    assert {job: row.status for job, row in board._rows.items()} == {
        "before": KILLED,
        "ours": "waiting",
        "after": "waiting or elsewhere",
    }


@pytest.fixture
def launch(
    composed: Callable[..., Config],
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., str]]:
    """What a launch says of a copy of the phantom; its job has finished before."""
    locks: dict[Path, IO[str]] = {}
    monkeypatch.setattr(preflight, "_locks", locks)
    shutil.copytree(phantom, tmp_path / "data")
    own = ("model=mobilenet_v2", *TINY, "tracking=none", "train.precision=fp32")

    def launch(*overrides: str, root: str = "data") -> str:
        config = composed(*own, f"data.root={tmp_path / root}", *overrides)
        sweep = prepare([config])
        run = sweep.run(config.job)
        said = capsys.readouterr().out
        if not run.config.exists():
            run.root.mkdir()
            run.config.write_text(to_yaml(config))
            run.write_origin(sweep.read_record().origins[config.job])
            run.write_result(RunResult(FINISHED, job=config.job, fit=FIT))
            run.best.touch()
        return " ".join(said.split())

    assert "1 to run" in launch()
    yield launch
    for handle in locks.values():
        handle.close()


def test_what_is_finished_stays_so_wherever_its_data_lie(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "data" / ".DS_Store").touch()
    (tmp_path / "data" / "stage_2_train.csv").touch()
    assert "1 finished before" in launch()
    shutil.copytree(tmp_path / "data", tmp_path / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "data")
    assert "1 finished before" in launch(root="moved")
    labels = shutil.copy(tmp_path / "moved" / "stage_2_train.csv", tmp_path / "l.csv")
    assert "1 finished before" in launch(f"data.labels={labels}", root="moved")


def test_what_has_changed_is_said_before_a_finished_run_moves_aside(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    moves = "1 finished run moves to superseded/ (job; name=NEW leaves all in place), since this "
    moves += "has changed: "
    assert f"{moves}train.epochs was 10 and is 2." in launch("train.epochs=2")
    files = sorted((tmp_path / "data").glob("*/*.dcm"))
    files[0].unlink()
    wanted = f"{moves}{len(files)} labelled files then, {len(files) - 1} now."
    assert wanted in launch("data.max_quarantine=0.5")
    run = SweepPaths(tmp_path / "out" / "test").run("job")
    shutil.copy(files[1], files[0])
    run.write_origin(replace(run.read_origin(), weights="other"))
    said = launch("data.max_quarantine=0.5")
    assert "labelled files have other names, sizes or bytes; initial weights were other" in said
    run.write_origin(replace(run.read_origin(), cohort="0123456789ab", weights="random"))
    assert f"{moves}its data were noted by an earlier version of ich" in launch()


def test_a_finished_run_without_weights_is_said_to_move(
    launch: Callable[..., str], tmp_path: Path
) -> None:
    SweepPaths(tmp_path / "out" / "test").run("job").best.unlink()
    assert "since this has changed: its best.safetensors is gone" in launch()

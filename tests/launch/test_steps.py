"""The steps of a launch, whichever launcher places its jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ich.base.config import Config
from ich.base.records import KILLED, RunResult, SweepRecord
from ich.base.results import SweepPaths
from ich.launch.steps import board_for


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

"""Folders of a sweep and of its runs: the one place that names their files, reads and writes them.

What the JSON files say is in `ich.base.records`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from ich.base.config import Config, load_config
from ich.base.files import write_json
from ich.base.naming import identity
from ich.base.records import (
    FAILED,
    NOT_STARTED,
    EpochMetrics,
    JobProgress,
    Json,
    Origin,
    Provenance,
    RunResult,
    SweepRecord,
    TrackingState,
)


class State(Enum):
    """What starting a job does: nothing, go on, try again, or begin."""

    done = "done"
    resume = "resume"
    retry = "retry"
    new = "new"


@dataclass(frozen=True)
class RunPaths:
    """A run's folder, `multirun_reports/<name>/<job>/`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "job.log"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def best(self) -> Path:
        return self.root / "best.safetensors"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions.npz"

    @property
    def tracking(self) -> Path:
        """The run's MLflow run, by which a resumed or dead process's is found again."""
        return self.root / "tracking.json"

    @property
    def origin(self) -> Path:
        """What the run was made from, beside its config: cohort, weights, code, versions."""
        return self.root / "origin.json"

    @property
    def provenance(self) -> Path:
        """Code, packages and hardware as the run began; a later launch of its sweep may have
        others, and leaves a finished run as it is."""
        return self.root / "provenance.json"

    @property
    def diff(self) -> Path:
        """What the code had changed since its commit as the run began; absent for nothing."""
        return self.root / "launch.diff"

    @property
    def comparison(self) -> Path:
        """How a rerun, in whose folder it lies, compares with the run it repeats."""
        return self.root / "rerun.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.root / ".lock"

    def read_result(self) -> RunResult:
        """The run's outcome; a run that never wrote one is `not started`."""
        if not self.result.exists():
            return RunResult(NOT_STARTED)
        try:
            return RunResult.from_json(json.loads(self.result.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError):
            # A row that says so, rather than a table that is not written for one file's sake.
            return RunResult(FAILED, f"{self.result.name} is damaged")

    def write_result(self, result: RunResult) -> None:
        """Writes `result.json`, whole or not at all. NaN becomes null: JSON has no NaN."""
        write_json(self.result, result.to_json())

    def read_metrics(self) -> list[EpochMetrics]:
        """The journal, a line per epoch."""
        if not self.metrics.exists():
            return []
        # Read again at each look, while its process writes: a line may be half there.
        lines = self.metrics.read_text().splitlines()
        return [EpochMetrics.from_json(values) for values in _parsed(lines)]

    def read_progress(self) -> JobProgress | None:
        """Where its training is; None before it has begun and after its end."""
        try:
            return JobProgress(**json.loads(self.progress.read_text()))
        except FileNotFoundError:
            return None

    def write_progress(self, progress: JobProgress) -> None:
        # Several times a second, and of no use after a power cut: not synced.
        write_json(self.progress, asdict(progress), sync=False)

    def state(self, config: Config, origin: Origin) -> State:
        """What starting this job would do, judged by what the folder holds."""
        if not self._is_of(config, origin):
            return State.new
        result = self.read_result()
        # A result alone is not enough: the weights may have been deleted.
        if result.is_finished and self.best.exists():
            return State.done
        if result.status == FAILED:  # maybe for the machine's sake: a full disk, others' memory
            return State.retry
        # Killed, or without a result because its machine went down.
        return State.resume if self.has_checkpoint() else State.new

    def has_checkpoint(self) -> bool:
        """Whether a training could go on from here; a damaged checkpoint counts."""
        return any(self.root.glob("checkpoint-*.ich"))

    def _is_of(self, config: Config, origin: Origin) -> bool:
        """Whether the folder is of this very training, whatever became of it."""
        # Not by the code: a sweep whose code was changed goes on, and says so. `name=NEW` runs all
        # of it with the code of now.
        recorded = self.read_origin()
        if (recorded.cohort, recorded.weights) != (origin.cohort, origin.weights):
            return False
        try:
            return identity(load_config(self.config)) == identity(config)
        except (OSError, OmegaConfBaseException):  # gone, or written by another version of ich
            return False

    def read_origin(self) -> Origin:
        """What the run was made from, empty if nothing tells."""
        return Origin.from_json(_read_json(self.origin))

    def write_origin(self, origin: Origin) -> None:
        write_json(self.origin, origin.to_json())

    def read_provenance(self) -> Provenance:
        """What `ich.base.provenance.record` returned as the run began, empty if nothing tells."""
        return Provenance.from_json(_read_json(self.provenance))

    def write_provenance(self, provenance: Provenance) -> None:
        write_json(self.provenance, provenance.to_json())

    def read_tracking(self) -> TrackingState:
        """The run's copy in MLflow, empty if nothing tells."""
        return TrackingState.from_json(_read_json(self.tracking))

    def write_tracking(self, state: TrackingState) -> None:
        write_json(self.tracking, state.to_json())

    def supersede(self) -> None:
        """Moves an earlier run of the same job aside; it is kept, and no table lists it.

        What takes its place is told which MLflow run is out of date.
        """
        if not (self.config.exists() or self.result.exists()):  # a lock or a log at most
            return
        mlflow_run = self.read_tracking().mlflow_run
        folder = self.root.parent / "superseded"
        folder.mkdir(exist_ok=True)
        n = 1
        while (folder / f"{self.root.name}.{n}").exists():
            n += 1
        # The whole folder, so that no file of one run is ever taken for one of another.
        shutil.move(self.root, folder / f"{self.root.name}.{n}")
        self.root.mkdir()
        if mlflow_run:
            self.write_tracking(TrackingState(supersedes=mlflow_run))


@dataclass(frozen=True)
class SweepPaths:
    """A sweep's folder, `multirun_reports/<name>/`."""

    root: Path

    @property
    def record(self) -> Path:
        """What the latest launch was: its jobs in order, its command, its MLflow parent run."""
        return self.root / "sweep.json"

    @property
    def csv(self) -> Path:
        return self.root / "comparison.csv"

    @property
    def markdown(self) -> Path:
        return self.root / "comparison.md"

    @property
    def latex(self) -> Path:
        return self.root / "comparison.tex"

    @property
    def metrics(self) -> Path:
        """Every metric of every setting, one per line."""
        return self.root / "metrics.csv"

    @property
    def page(self) -> Path:
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def data(self, cohort: str) -> Path:
        """The folder of the data report of one cohort, by its fingerprint."""
        return self.root / f"data-{cohort}"

    def run(self, job: str) -> RunPaths:
        return RunPaths(self.root / job)

    @property
    def reruns(self) -> Path:
        """The folder of what `ich rerun` repeated, one folder per run."""
        return self.root / "reruns"

    def rerun(self, job: str) -> RunPaths:
        return RunPaths(self.reruns / job)

    @property
    def stopped(self) -> Path:
        """Says which failure stopped the latest launch; absent if none did."""
        return self.root / "stopped.json"

    def stop_after(self, job: str) -> None:
        """Keeps the launch's other jobs from starting, since this one failed."""
        # On disk, for jobs may wait in other processes, or on other machines.
        write_json(self.stopped, {"job": job})

    def interrupt(self) -> None:
        """Tells jobs that run or wait elsewhere that the launch was interrupted."""
        # No signal reaches another machine, but the folder is on a file system that both share.
        write_json(self.stopped, {"interrupted": True})

    def is_interrupted(self) -> bool:
        """Whether the latest launch was interrupted, so that its jobs are to end."""
        return self.stopped.exists() and "interrupted" in _read_json(self.stopped)

    @property
    def diff(self) -> Path:
        """What the code of the latest launch had changed since its commit."""
        return self.root / "launch.diff"

    def read_results(self) -> list[RunResult]:
        """The outcome of each job of the latest launch, in its order."""
        stopped = _read_json(self.stopped).get("job")
        reason = f"not started: sweep.on_failure=stop, and {stopped} failed" if stopped else ""
        results = []
        for job in self.read_record().jobs:
            # By the folder: what fails before it trains may not have written its name.
            result = replace(self.run(job).read_result(), job=job)
            not_started = result.status == NOT_STARTED
            results.append(replace(result, reason=reason) if not_started else result)
        return results

    def write_record(self, record: SweepRecord) -> None:
        write_json(self.record, record.to_json())

    def read_record(self) -> SweepRecord:
        """The latest launch, empty for a folder that holds none."""
        if not self.record.exists():
            return SweepRecord()
        # Not by `_read_json`: a damaged record, read as empty, would be a sweep without jobs.
        return SweepRecord.from_json(json.loads(self.record.read_text()))


def _read_json(path: Path) -> Json:
    """An object, empty if the file is not there or damaged: what it says can be found out again."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(lines: list[str]) -> Iterator[Json]:
    """What the lines of a journal hold; a last one that is cut off is left out."""
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number != len(lines) - 1:  # no crash leaves that: the file was edited, or is broken
                raise

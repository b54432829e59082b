"""Folders of a sweep and of its runs: the one place that names their files, reads and writes them.

What the JSON files say is in `ich.base.records`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import count
from pathlib import Path

from ich.base.config import Config, load_config, select_value, to_yaml
from ich.base.files import (
    DamagedError,
    read_json,
    read_json_lines,
    read_yaml,
    tell_damaged,
    write_json,
    write_text,
)
from ich.base.naming import identity
from ich.base.records import (
    FAILED,
    KILLED,
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


class _Named:
    """A file or a folder by its name, which is the same in each run or sweep."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, place: RunPaths | SweepPaths, _: type) -> Path:
        return place.root / self._name


@dataclass(frozen=True)
class RunPaths:
    """A run's folder, `multirun_reports/<name>/<job>/`."""

    root: Path
    config = _Named("config.yaml")
    result = _Named("result.json")
    metrics = _Named("metrics.jsonl")
    log = _Named("job.log")
    progress = _Named("progress.json")
    best = _Named("best.safetensors")
    predictions = _Named("predictions.npz")
    # The folder of what the head of `context=study` is trained from, until it is.
    study = _Named("study")
    # The run's MLflow run, by which a resumed or dead process's is found again.
    tracking = _Named("tracking.json")
    # What the run was made from, beside its config: cohort, weights, code, versions.
    origin = _Named("origin.json")
    # Code, packages and hardware as the run began; a later launch of its sweep may have others, and
    # leaves a finished run as it is.
    provenance = _Named("provenance.json")
    # What the code had changed since its commit as the run began; absent for nothing.
    diff = _Named("launch.diff")
    # How a rerun, in whose folder it lies, compares with the run it repeats.
    comparison = _Named("rerun.json")
    lock = _Named(".lock")  # held by the process that trains here

    def read_result(self) -> RunResult:
        """The run's outcome; a run that never wrote one is `not started`."""
        try:
            return RunResult.from_json(read_json(self.result))
        except FileNotFoundError:
            return RunResult(NOT_STARTED)
        except (DamagedError, ValueError):
            # A row that says so, rather than a table that is not written for one file's sake.
            return RunResult(FAILED, f"{self.result.name} is damaged")

    def write_result(self, result: RunResult) -> None:
        """Writes `result.json`, whole or not at all. NaN becomes null: JSON has no NaN."""
        write_json(self.result, result.to_json())

    def read_config(self) -> Json:
        """The config as plain values, of whatever version of ich; empty if nothing tells."""
        try:
            return read_yaml(self.config)
        except FileNotFoundError:
            return {}
        except DamagedError as error:
            tell_damaged(str(error))
            return {}

    def setting(self, key: str) -> object:
        """A setting by its dotted key, of whatever version of ich; None if nothing tells."""
        return select_value(self.read_config(), key)

    def write_config(self, config: Config) -> None:
        write_text(self.config, to_yaml(config))

    def read_metrics(self) -> list[EpochMetrics]:
        """The journal, a line per epoch; without those that cannot be read."""
        try:
            lines, damaged = self.read_journal()
        except FileNotFoundError:
            return []
        except DamagedError as error:
            lines, damaged = [], [str(error)]
        for what in damaged:
            tell_damaged(f"{what}, and is left out")
        return lines

    def read_journal(self) -> tuple[list[EpochMetrics], list[str]]:
        """The journal, and of each line that cannot be read a text that names it.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: none of it can be read.
        """
        # Read again at each look, while its process writes: a line may be half there.
        objects, damaged = read_json_lines(self.metrics)
        lines = []
        for values in objects:
            try:
                lines.append(EpochMetrics.from_json(values))
            except ValueError as error:
                damaged.append(f"a line of {self.metrics} is damaged ({error})")
        return lines, damaged

    def read_progress(self) -> JobProgress | None:
        """Where its training is; None before it has begun and after its end."""
        try:
            return JobProgress.from_json(read_json(self.progress))
        except (FileNotFoundError, DamagedError, ValueError):
            return None  # it is written again within the second

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

    def is_empty(self, config: Config, origin: Origin) -> bool:
        """Whether a training of this job was ended here before it had made anything."""
        if not self._is_of(config, origin) or self.has_checkpoint() or self.best.exists():
            return False
        return self.read_result().status in (KILLED, NOT_STARTED) and not self.read_metrics()

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
        except FileNotFoundError:
            return False
        except DamagedError as error:  # or written by another version of ich
            tell_damaged(f"{error}: its job is trained anew, and what is there kept")
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
        shelf = free_shelf(self.root.parent, self.root.name)
        shelf.parent.mkdir(exist_ok=True)
        # The whole folder, so that no file of one run is ever taken for one of another.
        shutil.move(self.root, shelf)
        self.root.mkdir()
        if mlflow_run:
            self.write_tracking(TrackingState(supersedes=mlflow_run))


@dataclass(frozen=True)
class SweepPaths:
    """A sweep's folder, `multirun_reports/<name>/`."""

    root: Path

    # What the latest launch was: its jobs in order, its command, its MLflow parent run.
    record = _Named("sweep.json")
    csv = _Named("comparison.csv")
    markdown = _Named("comparison.md")
    latex = _Named("comparison.tex")
    metrics = _Named("metrics.csv")  # every metric of every setting, one per line
    # Every two settings against each other; absent if there are none with intervals.
    pairs = _Named("pairs.csv")
    # Every metric of the best setting in every subgroup; absent if none was asked for.
    subgroups = _Named("subgroups.csv")
    # Every metric of every network by what it sees; absent if all see a slice alone.
    context = _Named("context.csv")
    page = _Named("report.html")
    # The verdict, a table and the methods in words, to write a paper with.
    text = _Named("report.md")
    checklist = _Named("checklist.html")  # what guidelines ask of a paper, answered from the record
    figures = _Named("figures")
    # The jobs whose mean the report chose on validation; absent if it chose none.
    ensemble = _Named("ensemble.json")
    reruns = _Named("reruns")  # the folder of what `ich rerun` repeated, one folder per run
    # Says which failure stopped the latest launch; absent if none did.
    stopped = _Named("stopped.json")
    diff = _Named("launch.diff")  # what the code of the latest launch had changed since its commit

    def write_ensemble(self, jobs: Sequence[str]) -> None:
        write_json(self.ensemble, {"jobs": list(jobs)})

    def ensemble_runs(self) -> list[RunPaths]:
        """The runs whose mean is the sweep's own: those that its report chose, else all of the
        latest launch that finished; empty for a folder that is no sweep's."""
        if not self.record.is_file():
            return []
        finished = {r.job: self.run(r.job) for r in self.read_results() if r.is_finished}
        present = {job: run for job, run in finished.items() if run.best.is_file()}
        chosen = _read_json(self.ensemble).get("jobs")
        # By the jobs of the record, which lead out of no folder; of a later launch's, all again.
        if isinstance(chosen, list) and chosen and all(job in [*present] for job in chosen):
            return [present[job] for job in chosen]
        return list(present.values())

    def data(self, cohort: str) -> Path:
        """The folder of the data report of one cohort, by its fingerprint."""
        return self.root / f"data-{cohort}"

    def run(self, job: str) -> RunPaths:
        return RunPaths(self.root / job)

    def rerun(self, job: str) -> RunPaths:
        return RunPaths(self.reruns / job)

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
        return "interrupted" in _read_json(self.stopped)

    def read_results(self) -> list[RunResult]:
        """The outcome of each job of the latest launch, in its order."""
        stopped = _read_json(self.stopped).get("job")
        reason = f"not started: sweep.on_failure=stop, and {stopped} failed" if stopped else ""
        results = []
        for job in self.read_record().jobs:
            run = self.run(job)
            # By the folder: what fails before it trains may not have written its name.
            result = replace(run.read_result(), job=job)
            not_started = result.status == NOT_STARTED
            results.append(replace(result, reason=reason) if not_started else result)
        return results

    def write_record(self, record: SweepRecord) -> None:
        write_json(self.record, record.to_json())

    def read_record(self) -> SweepRecord:
        """The latest launch, empty for a folder that holds none. Of one that is damaged, the jobs
        are those whose folders are here, in alphabetical order."""
        try:
            record = SweepRecord.from_json(read_json(self.record))
        except FileNotFoundError:
            return SweepRecord()
        except DamagedError as error:
            record, why = SweepRecord(), str(error)
        else:
            why = f"{self.record} is damaged (it names no job)"
        if record.jobs:
            return record
        tell_damaged(f"{why}: the jobs are those whose folders are in {self.root}")
        # Never a sweep without jobs, which would be a table without rows.
        paths = sorted([*self.root.glob("*/config.yaml"), *self.root.glob("*/result.json")])
        return replace(record, jobs=tuple(dict.fromkeys(path.parent.name for path in paths)))


def free_shelf(folder: Path, name: str) -> Path:
    """Where what a sweep's folder had under a name is kept, `superseded/<name>.<n>`; not made."""
    shelf = folder / "superseded"
    return next(p for n in count(1) if not (p := shelf / f"{name}.{n}").exists())


def _read_json(path: Path) -> Json:
    """An object, empty if the file is not there or damaged: what it says can be found out again."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except DamagedError as error:
        tell_damaged(f"{error}: it is done without")
        return {}

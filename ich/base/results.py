"""Files of a sweep and of its runs: the one owner of every file name, their reader and writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from omegaconf.errors import OmegaConfBaseException

from ich.base.config import Config, load_config
from ich.base.files import write_json
from ich.base.naming import identity

FINISHED, FAILED, KILLED, NOT_STARTED = "finished", "failed", "killed", "not started"


class State(Enum):
    """What starting a job does: nothing, go on, try again, or begin."""

    done = "done"
    resume = "resume"
    retry = "retry"
    new = "new"


class Origin(TypedDict):
    """What a run is made from beside its config: fingerprints of data, weights and code, and what
    it computes in (`ich.training.mode.Mode`), once that is settled."""

    cohort: str
    weights: str
    code: str
    mode: NotRequired[dict[str, str]]


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

    def read_result(self) -> dict[str, Any]:
        """The run's outcome; a run that never wrote one is `not started`."""
        if not self.result.exists():
            return {"status": NOT_STARTED, "reason": ""}
        try:
            result: dict[str, Any] = json.loads(self.result.read_text())
        except json.JSONDecodeError:
            return {"status": FAILED, "reason": f"{self.result.name} is damaged"}
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes `result.json`, whole or not at all. NaN becomes null: JSON has no NaN."""
        write_json(self.result, result)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The journal: one dict per epoch. A last line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines()
        return list(_parsed(lines))

    def state(self, config: Config, origin: Origin) -> State:
        """What starting this job would do, judged by what the folder holds."""
        if not self._holds(config, origin):
            return State.new
        status = self.read_result()["status"]
        if status == FINISHED and self.best.exists():
            return State.done
        if status == FAILED:
            return State.retry
        return State.resume if self.has_checkpoint() else State.new

    def has_checkpoint(self) -> bool:
        """Whether a training could go on from here; a damaged checkpoint counts."""
        return any(self.root.glob("checkpoint-*.ich"))

    def _holds(self, config: Config, origin: Origin) -> bool:
        """Whether the folder is of this very training, whatever became of it."""
        made_of = self.read_origin()
        if any(made_of.get(k) != origin[k] for k in ("cohort", "weights")):
            return False
        try:
            return identity(load_config(self.config)) == identity(config)
        except (OSError, OmegaConfBaseException):  # gone, or written by another version of ich
            return False

    def read_origin(self) -> dict[str, Any]:
        """What the run was made from, empty if nothing tells."""
        return _read_json(self.origin)

    def read_provenance(self) -> dict[str, Any]:
        """What `ich.base.provenance.record` returned as the run began, empty if nothing tells."""
        return _read_json(self.provenance)

    def read_tracking(self) -> dict[str, Any]:
        """`mlflow_run`, whether the copy in MLflow is `complete`, and which run it supersedes."""
        return _read_json(self.tracking)

    def write_tracking(self, value: dict[str, Any]) -> None:
        write_json(self.tracking, value)

    def supersede(self) -> None:
        """Moves an earlier run of the same job aside; it is kept, and no table lists it.

        What takes its place is told which MLflow run is out of date.
        """
        if not (self.config.exists() or self.result.exists()):
            return
        earlier = self.read_tracking().get("mlflow_run")
        shelf = self.root.parent / "superseded"
        shelf.mkdir(exist_ok=True)
        n = 1
        while (shelf / f"{self.root.name}.{n}").exists():
            n += 1
        shutil.move(self.root, shelf / f"{self.root.name}.{n}")
        self.root.mkdir()
        if earlier:
            self.write_tracking({"supersedes": earlier})


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
        """The folder of what `python -m ich.rerun` repeated, one folder per run."""
        return self.root / "reruns"

    def rerun(self, job: str) -> RunPaths:
        return RunPaths(self.reruns / job)

    @property
    def stopped(self) -> Path:
        """Says which failure stopped the latest launch; absent if none did."""
        return self.root / "stopped.json"

    def interrupt(self) -> None:
        """Tells jobs that run or wait elsewhere that the launch was interrupted."""
        write_json(self.stopped, {"interrupted": True})

    def is_interrupted(self) -> bool:
        """Whether the latest launch was interrupted, so that its jobs are to end."""
        return self.stopped.exists() and "interrupted" in _read_json(self.stopped)

    @property
    def diff(self) -> Path:
        """What the code of the latest launch had changed since its commit."""
        return self.root / "launch.diff"

    def read_results(self) -> list[dict[str, Any]]:
        """The outcome of each job of the latest launch, in its order."""
        stopped = _read_json(self.stopped).get("job")
        reason = f"not started: sweep.on_failure=stop, and {stopped} failed" if stopped else ""
        results = []
        for job in self.read_record()["jobs"]:
            result = self.run(job).read_result() | {"job": job}
            if result["status"] == NOT_STARTED:
                result["reason"] = reason
            results.append(result)
        return results

    def write_record(self, record: dict[str, Any]) -> None:
        write_json(self.record, record)

    def read_record(self) -> dict[str, Any]:
        """The latest launch, or an empty dict for a folder that holds none."""
        if not self.record.exists():
            return {}
        record: dict[str, Any] = json.loads(self.record.read_text())
        return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise

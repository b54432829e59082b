"""Files of a sweep and of its runs: the one owner of every file name, their reader and writer."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from ich.config import Config, identity, load

FINISHED, FAILED, KILLED, NOT_STARTED = "finished", "failed", "killed", "not started"


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

    def is_finished(self, config: Config) -> bool:
        """Whether this folder holds a finished run of this very training, weights included."""
        finished = self.read_result()["status"] == FINISHED and self.best.exists()
        return finished and self._holds(config)

    def is_resumable(self, config: Config) -> bool:
        """Whether this folder holds a checkpoint of this very training, damaged or not."""
        return any(self.root.glob("checkpoint-*.ich")) and self._holds(config)

    def mlflow_run(self) -> str | None:
        """The MLflow run of what this folder holds, if there is one."""
        try:
            run_id = json.loads(self.tracking.read_text())["mlflow_run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return run_id if isinstance(run_id, str) else None

    def _holds(self, config: Config) -> bool:
        try:
            return identity(load(self.config)) == identity(config)
        except (OSError, OmegaConfBaseException):  # gone, or written by another version of ich
            return False

    def supersede(self) -> None:
        """Moves an earlier run of the same job aside; it is kept, and no table lists it."""
        if not (self.config.exists() or self.result.exists()):
            return
        shelf = self.root.parent / "superseded"
        shelf.mkdir(exist_ok=True)
        n = 1
        while (shelf / f"{self.root.name}.{n}").exists():
            n += 1
        shutil.move(self.root, shelf / f"{self.root.name}.{n}")


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
    def figures(self) -> Path:
        return self.root / "figures"

    def data(self, cohort: str) -> Path:
        """The folder of the data report of one cohort, by its fingerprint."""
        return self.root / f"data-{cohort}"

    def run(self, job: str) -> RunPaths:
        return RunPaths(self.root / job)

    def read_record(self) -> dict[str, Any]:
        """The latest launch, or an empty dict for a folder that holds none."""
        if not self.record.exists():
            return {}
        record: dict[str, Any] = json.loads(self.record.read_text())
        return record


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Writes JSON atomically: a temporary name, sync, rename. NaN and infinities become null.

    `sync=False` is for files that nobody misses after a power cut.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    part.rename(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise

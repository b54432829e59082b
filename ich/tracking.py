"""Metrics go to `metrics.jsonl` first and to MLflow after: the files are the truth, MLflow a view.

A sweep is a parent run and each job a nested run. Whatever MLflow does (slow, locked, full, gone),
a training goes on: what it raises is logged once per call and the journal stays complete.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ich.cache import lock
from ich.config import TrackingConfig, UserError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow would otherwise retry a dead server for minutes, at every call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

log = logging.getLogger(__name__)
_EVERY_STEP = "train/lr"  # a metric that every line of the journal has, and that is finite
_PARAM_LIMIT = 6000  # MLflow cuts longer values; config.yaml holds them whole


class Tracker:
    """Writes the journal and nothing else; what `tracking=none` uses."""

    run_id: str | None = None

    def __init__(self, journal: Path):
        self.journal = journal

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends one line, `{"step": ..., "time": ..., <metric>: <value or null>}`."""
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.journal.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drops the journal's lines after a step: a resumed training writes them again."""
        if self.journal.exists():
            part = self.journal.with_suffix(".part")
            kept = [line for line in self._lines() if line["step"] <= step]
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self.journal)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The journal's whole lines; a crash may have cut the last one."""
        for line in self.journal.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def artifact(self, path: Path) -> None:
        """Keeps a file with the run."""

    def summary(self, metrics: dict[str, float]) -> None:
        """Values of the whole run, shown beside its parameters."""

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""


class MlflowTracker(Tracker):
    """The journal, then the same to one MLflow run."""

    def __init__(self, journal: Path, store: MlflowStore, run_id: str):
        super().__init__(journal)
        self.store, self.run_id = store, run_id
        self.run: str = run_id
        # A step logged twice would stand twice in MLflow.
        self._steps = store.logged_steps(run_id, _EVERY_STEP) if journal.exists() else set()

    def log(self, metrics: dict[str, float], step: int) -> None:
        super().log(metrics, step)
        self._mirror(metrics, step)

    def _mirror(self, metrics: dict[str, float], step: int) -> None:
        if step not in self._steps and self.store.log_metrics(self.run, metrics, step):
            self._steps.add(step)

    def _catch_up(self) -> None:
        """Logs what MLflow missed while it was slow, locked or away."""
        for line in self._lines() if self.journal.exists() else ():
            values = {k: v for k, v in line.items() if k not in ("step", "time") and v is not None}
            self._mirror(values, line["step"])

    def artifact(self, path: Path) -> None:
        self.store.log_artifact(self.run, path)

    def summary(self, metrics: dict[str, float]) -> None:
        self.store.log_metrics(self.run, metrics, 0)

    def finish(self, status: str) -> None:
        self._catch_up()
        self.store.end(self.run, status)


class MlflowStore:
    """One MLflow tracking store and the experiment in it.

    Raises:
        UserError: the database file is no SQLite database.
    """

    def __init__(self, cfg: TrackingConfig):
        self.uri, artifacts = _locations(cfg)
        _require_sqlite(self.uri)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # creating tables is no news to the person at the screen
            logging.getLogger(name).setLevel(logging.WARNING)
        with _creation_lock(self.uri):
            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(cfg.experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else self.client.create_experiment(cfg.experiment, artifacts)
            )

    def open_run(self, name: str, tags: dict[str, str], parent: str | None = None) -> str | None:
        """Starts a run; None if MLflow would not."""
        tags = {**tags, "mlflow.runName": name}
        if parent:
            tags["mlflow.parentRunId"] = parent

        def create() -> str:
            run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            return str(run.info.run_id)

        return _safely("create a run", create)

    def reopen(self, run_id: str) -> bool:
        """Sets an ended run to RUNNING again; False if it is not there."""
        return (
            _safely(
                "reopen a run",
                lambda: self.client.update_run(run_id, status="RUNNING"),
                default=False,
            )
            is None
        )

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(k, v[:_PARAM_LIMIT]) for k, v in params.items()]
        for start in range(0, len(items), 100):  # MLflow's limit per call
            call = partial(self.client.log_batch, run_id, params=items[start : start + 100])
            _safely("log parameters", call)

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int) -> bool:
        """Logs finite values at a step; True if MLflow took them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow would store an infinity as 1.8e308; an undefined value is left out instead.
        items = [Metric(k, v, now, step) for k, v in metrics.items() if math.isfinite(v)]
        call = partial(self.client.log_batch, run_id, metrics=items)
        return _safely("log metrics", call, default=False) is None

    def logged_steps(self, run_id: str, metric: str) -> set[int]:
        """The steps at which a run has a metric."""
        call = partial(self.client.get_metric_history, run_id, metric)
        return {m.step for m in _safely("read metrics", call, default=[])}

    def log_artifact(self, run_id: str, path: Path) -> None:
        method = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        folder = path.name if path.is_dir() else None
        _safely(f"keep {path.name}", lambda: method(run_id, str(path), folder))

    def end_running_children(self, parent: str, status: str, name: str | None = None) -> None:
        """Ends the runs under a sweep, or of one job, that a dead process left RUNNING."""
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        if name is not None:
            query += f" and tags.`mlflow.runName` = '{name}'"
        found = _safely(
            "search runs", lambda: self.client.search_runs([self.experiment_id], query), default=[]
        )
        for run in found:
            self.end(run.info.run_id, status)

    def end(self, run_id: str, status: str) -> None:
        """Ends a run with an MLflow status: FINISHED, FAILED or KILLED."""
        _safely("end a run", lambda: self.client.set_terminated(run_id, status))


def open_store(cfg: TrackingConfig, required: bool = False) -> MlflowStore | None:
    """The configured store; None for `tracking=none`, or if MLflow cannot be reached.

    Args:
        cfg: where MLflow is.
        required: at the start of a sweep, when nothing is lost yet, refuse instead of going on.

    Raises:
        UserError: the store cannot be opened, and it is required.
    """
    if not cfg.mlflow:
        return None
    try:
        return MlflowStore(cfg)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if required:
            raise (
                error
                if isinstance(error, UserError)
                else UserError(
                    f"MLflow at tracking.uri={cfg.uri!r} cannot be used: {reason}. Start the "
                    f"server, leave tracking.uri null for a database in this folder, or use "
                    f"tracking=none."
                )
            ) from None
        log.warning("MLflow cannot be used (%s); the run's own files are complete", reason)
        return None


def open_tracker(
    store: MlflowStore | None,
    journal: Path,
    name: str,
    parent: str | None,
    params: dict[str, str],
    tags: dict[str, str],
    earlier: str | None = None,
) -> Tracker:
    """A job's tracker; without a store, or if MLflow refuses the run, the journal alone.

    Args:
        store: where to log.
        journal: the run's `metrics.jsonl`.
        name: the job.
        parent: the sweep's run.
        params: the job's flat configuration.
        tags: what the run is found by.
        earlier: the run of a training that goes on; a new one is made if it is gone.
    """
    if store is None:
        return Tracker(journal)
    if earlier and store.reopen(earlier):
        return MlflowTracker(journal, store, earlier)
    run_id = store.open_run(name, tags, parent)
    if run_id is None:
        return Tracker(journal)
    store.log_params(run_id, params)
    return MlflowTracker(journal, store, run_id)


def _locations(cfg: TrackingConfig) -> tuple[str, str | None]:
    """Tracking URI and artifact folder; absolute, since the UI may run elsewhere."""
    here = Path.cwd()
    uri = cfg.uri or f"sqlite:///{here / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        return f"sqlite:///{path.absolute()}", (
            Path(cfg.artifacts or here / "mlartifacts").absolute().as_uri()
        )
    if uri.startswith("file:") or "://" not in uri:
        raise UserError(
            f"tracking.uri is {uri!r}, but MLflow no longer writes to plain folders. Use "
            f"sqlite:///FILE, a server's http://HOST:PORT, or tracking=none."
        )
    return uri, cfg.artifacts


def _require_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise UserError(
                f"the MLflow database {path.name} is no SQLite database. Move it away, or name "
                f"another with tracking.uri=sqlite:///FILE; the sweep's own files do not need it."
            )


@contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Two processes that create the tables of one database at once can leave it unusable."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock")):
        yield


def _safely(what: str, call: Callable[[], Any], default: Any = None) -> Any:
    try:
        return call()
    except Exception as error:  # a tracker must never end a training
        log.warning(
            "MLflow could not %s (%s); the run's own files are complete",
            what,
            " ".join(str(error).split())[:300],
        )
        return default

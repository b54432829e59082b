"""Metrics go to `metrics.jsonl` first and to MLflow after: the files are the truth, MLflow a view.

A sweep is a parent run and each job a nested run. A job's MLflow run is a copy of its folder, made
by a thread that the training never waits for; the copy can be made again at any time, and adds only
what is missing. So MLflow may be slow, locked, full or gone: what it missed is there when the sweep
ends, or when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ich.cache import lock
from ich.comparison import BY, COMPARED, load_comparison
from ich.config import Config, TrackingConfig, UserError, flatten, load, typed
from ich.results import FAILED, FINISHED, KILLED, RunPaths, SweepPaths

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow would otherwise retry a dead server for minutes, at every call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

log = logging.getLogger(__name__)
_EVERY_STEP = "train/lr"  # a metric that every line of the journal has, and that is finite
_PARAM_LIMIT = 6000  # of MLflow, characters
_CUT = " ... cut here, whole in config.yaml"
_TRY_AGAIN_SECONDS = 20
_MODEL, _SERVER = "model", "ich.serving"  # the model among a run's artifacts, and who loads it
_WEIGHTS_IN_RUN = Path(_MODEL, "data", "best.safetensors")  # MLflow's layout
_SERVED_WITH = ("torch", "timm", "safetensors", "pydicom", "numpy")
MODEL, BEST = "ich", "best"  # in MLflow's registry: the model's name, and the alias of its best


class Journal:
    """`metrics.jsonl`: one line per epoch, safe on disk before anything else hears of it."""

    def __init__(self, path: Path, told: Callable[[], None] = lambda: None):
        self._path, self._told = path, told

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends one line, `{"step": ..., "time": ..., <metric>: <value or null>}`."""
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._told()

    def rewind(self, step: int) -> None:
        """Drops the lines after a step: a resumed training writes them again."""
        kept = [line for line in RunPaths(self._path.parent).read_metrics() if line["step"] <= step]
        if self._path.exists():
            part = self._path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self._path)


class RunMirror:
    """The MLflow run of one job, a copy of the job's folder."""

    def __init__(self, config: Config, run: RunPaths, parent: str | None):
        self._config, self._run, self._parent = config, run, parent
        self._store: MlflowStore | None = None
        self._run_id = ""
        self._steps: set[int] = set()

    def push(self) -> None:
        """Adds to MLflow what it does not have yet; ends its run when the job has ended.

        Raises:
            Exception: whatever MLflow raises; calling again goes on.
        """
        if self._store is None:
            self._store = MlflowStore(self._config.tracking)
        if not self._run_id:
            self._run_id = self._open(self._store)
        store, run_id, lines = self._store, self._run_id, self._run.read_metrics()
        for line in lines:
            # A step logged twice would stand twice in MLflow.
            if line["step"] not in self._steps:
                values = {k: v for k, v in line.items() if k not in ("step", "time")}
                store.log_metrics(run_id, values, line["step"], line["time"])
                self._steps.add(line["step"])
        if undefined := sorted({k for line in lines for k, v in line.items() if v is None}):
            store.tag(run_id, "ich.undefined", ", ".join(undefined))
        result = self._run.read_result()
        if result["status"] in (FINISHED, FAILED, KILLED):
            self._end(store, run_id, result)

    def _open(self, store: MlflowStore) -> str:
        """The run of an earlier process, or a new one with parameters and configuration."""
        known = self._run.read_tracking()
        run_id = known.get("mlflow_run")
        if isinstance(run_id, str) and store.exists(run_id):
            self._steps = store.logged_steps(run_id, _EVERY_STEP)
            store.reopen(run_id)
        else:
            self._steps = set()
            cohort = {"ich.cohort": str(self._run.read_origin().get("cohort", "unknown"))}
            tags = _tags(self._config) | cohort
            run_id = store.open_run(self._config.job, tags, self._parent)
            self._run.write_tracking(known | {"mlflow_run": run_id})
            store.log_params(run_id, flatten(self._config))
            store.log_artifact(run_id, self._run.config)
        self._run.write_tracking(known | {"mlflow_run": run_id, "complete": False})
        if self._parent:
            store.tag(run_id, "mlflow.parentRunId", self._parent)
        superseded = known.get("supersedes")
        if isinstance(superseded, str) and store.exists(superseded):
            store.tag(superseded, "ich.superseded", "true")
        return run_id

    def _end(self, store: MlflowStore, run_id: str, result: dict[str, Any]) -> None:
        if result["status"] == FINISHED and not store.logged_steps(run_id, "best/accuracy"):
            store.log_metrics(run_id, _summary(result), 0, time.time())
        if result.get("reason"):
            store.tag(run_id, "ich.reason", str(result["reason"])[:500])
        run = self._run
        files = (run.config, run.predictions, run.log, run.result, run.origin, run.provenance)
        for path in files:
            if path.exists():
                store.log_artifact(run_id, path)
        if run.best.exists():
            with TemporaryDirectory() as scratch:
                store.log_artifact(run_id, _as_model(run, Path(scratch) / _MODEL))
        store.end(run_id, result["status"].upper())
        run.write_tracking(run.read_tracking() | {"complete": True})


class Mirror:
    """Pushes a job's folder to MLflow from a thread of its own.

    Args:
        config: the job; without `tracking.mlflow` nothing happens.
        run: its folder.
        parent: the sweep's MLflow run.
    """

    def __init__(self, config: Config, run: RunPaths, parent: str | None):
        self._mirror = RunMirror(config, run, parent)
        self._news, self._last = threading.Event(), False
        self._thread: threading.Thread | None = None
        if config.tracking.mlflow:
            self._news.set()  # MLflow shows a run as soon as it starts
            self._thread = threading.Thread(target=self._follow, daemon=True, name="mlflow")
            self._thread.start()

    def notify(self) -> None:
        """There is something new in the folder. Returns at once."""
        self._news.set()

    def finish(self, seconds: float) -> bool:
        """Waits until MLflow has everything, at most so long; True if it has.

        The caller has written the result; what is missing is pushed when the sweep ends.
        """
        if self._thread is None:
            return True
        self._last = True
        self._news.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("MLflow is slow or away; what it misses is copied when the sweep ends")
        return not self._thread.is_alive()

    def _follow(self) -> None:
        said = ""
        while True:
            self._news.wait(_TRY_AGAIN_SECONDS if said else None)
            self._news.clear()
            last = self._last
            try:
                self._mirror.push()
                said = ""
            except Exception as error:  # a tracker must never end a training
                reason = _in_a_line(error)
                if reason != said:
                    log.warning("MLflow cannot be used now (%s); the run's files are whole", reason)
                said = reason
            if last:
                return


class MlflowStore:
    """One MLflow tracking store and the experiment in it. Every method raises what MLflow raises.

    Raises:
        UserError: the database file is no SQLite database.
    """

    def __init__(self, cfg: TrackingConfig):
        self.uri, artifacts = _locations(cfg)
        _require_sqlite(self.uri)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # creating tables is no news to the person at the screen
            logging.getLogger(name).setLevel(logging.WARNING)
        # It prints pages about what it also raises.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with _creation_lock(self.uri):
            self.client = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(cfg.experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else self.client.create_experiment(cfg.experiment, artifacts)
            )

    def open_run(self, name: str, tags: dict[str, str], parent: str | None = None) -> str:
        """Starts a run and returns its id."""
        tags = {**tags, "mlflow.runName": name}
        if parent:
            tags["mlflow.parentRunId"] = parent
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def exists(self, run_id: str) -> bool:
        """Whether there is such a run, and it has not been deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def reopen(self, run_id: str) -> None:
        """Sets an ended run to RUNNING again."""
        self.client.update_run(run_id, status="RUNNING")

    def tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Logs parameters; of a value too long for MLflow, its beginning."""
        from mlflow.entities import Param

        limit = _PARAM_LIMIT - len(_CUT)
        short = {k: v if len(v) <= _PARAM_LIMIT else v[:limit] + _CUT for k, v in params.items()}
        items = [Param(k, v) for k, v in short.items()]
        for start in range(0, len(items), 100):  # MLflow's limit per call
            self.client.log_batch(run_id, params=items[start : start + 100])

    def log_metrics(
        self, run_id: str, metrics: dict[str, float | None], step: int, when: float
    ) -> None:
        """Logs the finite values at a step and a time (seconds since 1970)."""
        from mlflow.entities import Metric

        # MLflow would store an infinity as 1.8e308; an undefined value is left out instead.
        finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        items = [Metric(k, v, int(when * 1000), step) for k, v in finite.items()]
        self.client.log_batch(run_id, metrics=items)

    def metrics(self, run_id: str) -> dict[str, float]:
        """The latest value of each metric of a run."""
        return dict(self.client.get_run(run_id).data.metrics)

    def logged_steps(self, run_id: str, metric: str) -> set[int]:
        """The steps at which a run has a metric."""
        return {m.step for m in self.client.get_metric_history(run_id, metric)}

    def log_artifact(self, run_id: str, path: Path) -> None:
        """Keeps a file or a folder with a run."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), path.name)
        else:
            self.client.log_artifact(run_id, str(path))

    def register(self, run_id: str, tags: dict[str, str]) -> str:
        """The version of the model `ich` that is this run's artifacts; made once."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(
                MODEL, description="Best runs of sweeps. An alias names the sweep."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = self.client.search_model_versions(f"name = '{MODEL}' and run_id = '{run_id}'")
        if found:
            version = str(found[0].version)
            for key, value in tags.items():
                self.client.set_model_version_tag(MODEL, version, key, value)
            return version
        source = self.client.get_run(run_id).info.artifact_uri
        if self.client.list_artifacts(run_id, _MODEL):
            source = f"{source}/{_MODEL}"
        made = self.client.create_model_version(MODEL, source, run_id, tags=tags)
        return str(made.version)

    def alias(self, name: str, version: str) -> None:
        """Names a version of the model `ich`; another that had the name loses it."""
        self.client.set_registered_model_alias(MODEL, name, version)

    def tags_of_alias(self, name: str) -> dict[str, str]:
        """The tags of the version that has this alias; none if there is no such alias."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self.client.get_model_version_by_alias(MODEL, name).tags)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return {}
            raise

    def fetch(self, name: str) -> Path:
        """The artifacts of a run, or of the run that a registered model's version came from."""
        run_id = name.removeprefix("runs:/").partition("/")[0]
        if name.startswith("models:/"):
            model, at, alias = name.removeprefix("models:/").partition("@")
            if at:
                found = self.client.get_model_version_by_alias(model, alias)
            else:
                found = self.client.get_model_version(*model.split("/", 1))
            run_id = found.run_id
        return Path(self.client.download_artifacts(run_id, ""))

    def end(self, run_id: str, status: str) -> None:
        """Ends a run with an MLflow status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def end_running_children(self, parent: str, status: str) -> None:
        """Ends the runs under a sweep that dead processes left RUNNING."""
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], query):
            self.end(run.info.run_id, status)


def _as_model(run: RunPaths, folder: Path) -> Path:
    """A run's best weights as a model that `mlflow models serve` can serve; without pickle or code.

    Args:
        run: one that has weights.
        folder: made here.

    Returns:
        The folder; or the weights as they are, if an earlier version of ich wrote them.
    """
    from ich.model import read_metadata  # torch takes seconds

    try:
        metadata = read_metadata(run.best)
    except UserError:
        return run.best
    # The README has the examples that MLflow would warn are missing.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import pyfunc

        pyfunc.save_model(
            folder,
            loader_module=_SERVER,
            data_path=str(run.best),
            signature=_signature(metadata.labels),
            # Not ich itself: on a package index, that name may be anybody's.
            pip_requirements=[f"{name}=={version(name)}" for name in _SERVED_WITH],
            metadata={"ich": metadata.to_json()},
        )
    return folder


def _signature(labels: Sequence[str]) -> Any:
    """A row is one slice: a DICOM file in base64, or HU as rows of pixels."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    given = [
        ColSpec(DataType.string, "dicom", required=False),
        ColSpec(Array(Array(DataType.long)), "hu", required=False),
    ]
    found = [ColSpec(DataType.double, k, required=False) for k in labels]
    texts = [ColSpec(DataType.string, k) for k in ("positive", "reason")]
    return ModelSignature(Schema(given), Schema([*found, *texts]))


def check_tracking(config: Config) -> None:
    """Opens the tracking store before anything is spent or written for a sweep.

    Nothing is lost yet, so what cannot be used is refused here; only a database that is locked for
    the moment is not worth a refusal, and everything is copied to it when the sweep ends.

    Raises:
        UserError: MLflow cannot be used.
    """
    if not config.tracking.mlflow:
        return
    try:
        MlflowStore(config.tracking)
    except UserError:
        raise
    except Exception as error:
        reason = _in_a_line(error)
        if "database is locked" not in reason:
            raise UserError(
                f"MLflow at tracking.uri={config.tracking.uri!r} cannot be used: {reason}. Start "
                f"the server, leave tracking.uri null for a database in this folder, or use "
                f"tracking=none."
            ) from None


def open_sweep_run(config: Config, sweep: SweepPaths) -> str | None:
    """The sweep's MLflow run: the one of an earlier launch in this folder, or a new one."""
    if not config.tracking.mlflow:
        return None
    earlier = sweep.read_record().get("mlflow_run")
    try:
        return _parent_run(MlflowStore(config.tracking), config, earlier)
    except Exception as error:
        log.warning(
            "MLflow cannot be used now (%s); it gets its copy when the sweep ends",
            _in_a_line(error),
        )
        return earlier if isinstance(earlier, str) else None


def _parent_run(store: MlflowStore, config: Config, earlier: object) -> str:
    if isinstance(earlier, str) and store.exists(earlier):
        store.reopen(earlier)
        # The folder is locked, so what a killed sweep left RUNNING runs no more.
        store.end_running_children(earlier, "KILLED")
        return earlier
    tags = {k: v for k, v in _tags(config).items() if k not in ("ich.job", "ich.model")}
    return store.open_run(config.name, {**tags, "ich.kind": "sweep"})


def close_sweep_run(sweep: SweepPaths, status: str, seconds: float | None = None) -> None:
    """Copies what MLflow missed of the sweep's jobs, keeps the table with the sweep, and ends it.

    In a process of its own: MLflow keeps connections to a database even when that has been deleted
    and made anew, and a server that hangs must not keep whoever pressed Ctrl-C waiting.

    Args:
        sweep: its folder.
        status: FINISHED, FAILED or KILLED.
        seconds: how long it may take; what is missing then is copied after the next launch.
    """
    if not any(c["tracking"]["mlflow"] for c in sweep.read_record()["configs"].values()):
        return
    command = [sys.executable, "-m", "ich.tracking", str(sweep.root), status]
    try:
        subprocess.run(command, timeout=seconds, start_new_session=True, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        log.warning("MLflow is slow or away; the next launch copies what it misses")


def main() -> None:
    """`python -m ich.tracking SWEEP_DIR STATUS`: what `close_sweep_run` does, here and now."""
    sweep, status = SweepPaths(Path(sys.argv[1])), sys.argv[2]
    record = sweep.read_record()
    config = typed(next(iter(record["configs"].values())))
    try:
        store = MlflowStore(config.tracking)
        parent = record.get("mlflow_run")
        if not (isinstance(parent, str) and store.exists(parent)):
            parent = _parent_run(store, config, None)
            sweep.write_record(record | {"mlflow_run": parent})
        for job in record["jobs"]:
            _catch_up(store, sweep.run(job), parent)
        store.end_running_children(parent, "KILLED")
        data_reports = [sweep.data(key) for key in record.get("cohorts", [])]
        tables = (sweep.csv, sweep.markdown, sweep.latex, sweep.metrics, sweep.page)
        for path in (*tables, sweep.record, sweep.figures, *data_reports):
            if path.exists():
                store.log_artifact(parent, path)
        store.tag(parent, "ich.cohort", ", ".join(record.get("cohorts", [])))
        store.end(parent, status)  # first: what follows may fail
        if status != "KILLED" and (said := register_best(store, sweep, parent)):
            print(f"MLflow: {said}")
    except Exception as error:
        log.warning(
            "MLflow cannot be used (%s). The sweep's files are whole; the same command copies "
            "them to MLflow once it can",
            _in_a_line(error),
        )


def register_best(
    store: MlflowStore, sweep: SweepPaths, parent: str | None, promote: bool = False
) -> str:
    """Registers the best run of a sweep as a version of the model `ich`.

    The sweep's name becomes that version's alias. The alias `best` moves to it if there is none
    yet, or if it scores higher than the present one on the very same rows; runs that were scored on
    other rows are not comparable, and only `promote` moves it to them.

    Args:
        store: of the sweep's jobs.
        sweep: its folder; only files are read.
        parent: the sweep's MLflow run, which gets the best run's scores and tags.
        promote: move `best` in any case.

    Returns:
        What was done, in a sentence; empty if no run has a score.
    """
    comparison = load_comparison([sweep], resamples=0)
    rows = max(comparison.sets, key=lambda s: len(s.groups), default=None)
    if rows is None or rows.best is None:
        return ""
    run = max(rows.best.runs, key=lambda r: r.result[f"val_{BY}"] or 0.0)
    run_id = run.paths.read_tracking().get("mlflow_run")
    if not isinstance(run_id, str) or run.predictions is None:
        return ""
    score = run.predictions.metrics[BY]
    tags = {
        "ich.sweep": comparison.name,
        "ich.job": run.name,
        "ich.rows": rows.rows,
        "ich.auc": f"{score:.6f}",
    }
    version = store.register(run_id, tags)
    store.alias(alias_of(tags["ich.sweep"]), version)
    if parent:
        store.tag(parent, "ich.best_job", run.name)
        kept = {f"best/{k}": run.predictions.metrics[k] for k in COMPARED}
        if store.metrics(parent).get(f"best/{BY}") != kept[f"best/{BY}"]:  # a job was added
            steps = store.logged_steps(parent, f"best/{BY}")
            store.log_metrics(parent, dict(kept), len(steps), time.time())
    now = store.tags_of_alias(BEST)
    same = now.get("ich.rows") == rows.rows
    if not (promote or not now or (same and score >= float(now.get("ich.auc", "inf")))):
        why = "scores higher on the same rows" if same else "was scored on other rows"
        return (
            f"{run.name} is version {version} of the model {MODEL}. The alias {BEST} stays with "
            f"{now.get('ich.sweep')}/{now.get('ich.job')}, which {why}; python -m ich.report "
            f"{sweep.root} --promote moves it."
        )
    store.alias(BEST, version)
    return f"{run.name} is version {version} of the model {MODEL}, and its alias {BEST}."


def promote(sweep: SweepPaths) -> str:
    """Moves the alias `best` to the best run of a sweep; says what was done.

    Raises:
        UserError: the sweep is not in MLflow, or MLflow cannot be used.
    """
    record = sweep.read_record()
    configs = [typed(c) for c in record.get("configs", {}).values()]
    if not configs or not all(c.tracking.mlflow for c in configs):
        raise UserError(
            f"{sweep.root} was trained with tracking=none, so MLflow has none of its runs to "
            f"promote. Give its command again with tracking=mlflow."
        )
    try:
        store = MlflowStore(configs[0].tracking)
        said = register_best(store, sweep, record.get("mlflow_run"), promote=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow cannot be used: {_in_a_line(error)}") from None
    if not said:
        raise UserError(
            f"no run of {sweep.root} has finished with a score and a copy in MLflow, so there is "
            f"nothing to promote. Give the sweep's command again to finish it."
        )
    return said


def is_mlflow_name(name: str) -> bool:
    """Whether a name is one that MLflow gives: a run's id, `runs:/ID` or `models:/ich...`."""
    return bool(re.fullmatch(r"[0-9a-f]{32}|(runs|models):/.+", name))


def fetch_run(name: str, cfg: TrackingConfig) -> tuple[Path, RunPaths]:
    """A run's weights and folder, from MLflow; of a store on this machine without copying.

    Args:
        name: a run's id, `runs:/ID`, `models:/ich@ALIAS` or `models:/ich/VERSION`.
        cfg: the store.

    Raises:
        UserError: there is no such run or model, it holds no weights, or MLflow cannot be used.
    """
    uri, _ = _locations(cfg)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():  # MLflow would make one
        raise UserError(
            f"the model is {name!r}, but there is no MLflow database {database.name} here. Go to "
            f"the folder of the sweep, give --tracking-uri (tracking.uri), or give a run's folder "
            f"as the model."
        )
    try:
        folder = MlflowStore(cfg).fetch(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model is {name!r}, which cannot be had from MLflow ({_in_a_line(error)}). "
            f"`make ui` shows the runs and the models that there are, and their aliases."
        ) from None
    run = RunPaths(folder)
    weights = next((p for p in (folder / _WEIGHTS_IN_RUN, run.best) if p.is_file()), None)
    if weights is None:
        raise UserError(
            f"the model is {name!r}, whose MLflow run holds no weights: it has not finished. Give "
            f"its sweep's command again, or take another run."
        )
    return weights, run


def alias_of(name: str) -> str:
    """A sweep's name as an alias: MLflow takes letters, digits, `_` and `-`, and keeps `latest` and
    `v1`, `v2`, ... to itself."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    reserved = alias.lower() in ("latest", BEST) or re.fullmatch(r"[vV]\d+", alias)
    return f"sweep-{alias}" if reserved else alias


def _catch_up(store: MlflowStore, run: RunPaths, parent: str) -> None:
    known = run.read_tracking()
    whole = known.get("complete") and store.exists(str(known.get("mlflow_run")))
    if not whole and run.config.exists():
        RunMirror(load(run.config), run, parent).push()


def _tags(config: Config) -> dict[str, str]:
    """What a run is found by in the UI."""
    return {
        "ich.kind": "job",
        "ich.sweep": config.name,
        "ich.job": config.job,
        "ich.model": config.model.name,
        "ich.protocol": config.protocol.name.value,
        "ich.data": config.data.source.value,
    }


def _summary(result: dict[str, Any]) -> dict[str, float | None]:
    """A finished run's numbers: what its weights score, and what its cohort leaks."""
    plain = ("best_epoch", "minutes", "images_per_s", "params")
    scores = [k for k in result if k.startswith(("accuracy", "auc", "val_"))]
    leak = {f"data/leak_{k}": v for k, v in result["cohort"]["leak"].items()}
    return {**{f"best/{k}": result[k] for k in (*scores, *plain)}, **leak}


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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


if __name__ == "__main__":
    main()

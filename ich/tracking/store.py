"""One MLflow store: its calls, its limits and its quirks. It knows nothing of sweeps and jobs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ich.base.config import TrackingConfig, UserError
from ich.base.files import lock
from ich.base.records import Scores

log = logging.getLogger(__name__)

# Before MLflow is imported, which takes seconds and is left to the functions that need it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow would otherwise retry a dead server for minutes, at every call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
_PARAM_LIMIT = 6000  # of MLflow, characters
_CUT = " ... cut here, whole in config.yaml"
MODEL_FOLDER = "model"  # the served model among a run's artifacts
WEIGHTS_IN_RUN = Path(MODEL_FOLDER, "data", "best.safetensors")  # MLflow's layout
MODEL, BEST = "ich", "best"  # in MLflow's registry: the model's name, and the alias of its best


class MlflowStore:
    """One MLflow tracking store and the experiment in it. Every method raises what MLflow raises.

    Raises:
        UserError: the database file is no SQLite database.
    """

    def __init__(self, cfg: TrackingConfig):
        self.uri, artifacts = resolve_locations(cfg)
        _require_sqlite(self.uri)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # creating tables is no news to the person at the screen
            logging.getLogger(name).setLevel(logging.WARNING)
        # It prints pages about what it also raises.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with _creation_lock(self.uri):
            self.client = MlflowClient(self.uri)
            experiment = self.client.get_experiment_by_name(cfg.experiment)
            self.experiment_id = (
                experiment.experiment_id
                if experiment
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

    def log_metrics(self, run_id: str, metrics: Scores, step: int, when: float) -> None:
        """Logs the finite values at a step and a time (seconds since 1970)."""
        from mlflow.entities import Metric

        # MLflow would store an infinity as 1.8e308; an undefined value is left out instead.
        finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        # MLflow's times are milliseconds.
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
            # Under its own name: without one, its files would lie among the run's.
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
        # A sweep that is given again has the same best run, and that its version already.
        versions = self.client.search_model_versions(f"name = '{MODEL}' and run_id = '{run_id}'")
        if versions:
            version = str(versions[0].version)
            for key, value in tags.items():
                self.client.set_model_version_tag(MODEL, version, key, value)
            return version
        # A run of an earlier version of ich has no model's folder: its artifacts are the version.
        source = self.client.get_run(run_id).info.artifact_uri
        if self.client.list_artifacts(run_id, MODEL_FOLDER):
            source = f"{source}/{MODEL_FOLDER}"
        return str(self.client.create_model_version(MODEL, source, run_id, tags=tags).version)

    def set_alias(self, name: str, version: str) -> None:
        """Names a version of the model `ich`; another that had the name loses it."""
        self.client.set_registered_model_alias(MODEL, name, version)

    def tags_of_alias(self, name: str) -> dict[str, str]:
        """The tags of the version that has this alias; none if there is no such alias."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self.client.get_model_version_by_alias(MODEL, name).tags)
        except MlflowException as error:
            # The first where there is no model yet, the second where it has no such alias.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return {}
            raise

    def fetch(self, name: str) -> Path:
        """The artifacts of a run, or of the run that a registered model's version came from."""
        run_id = name.removeprefix("runs:/").partition("/")[0]
        if name.startswith("models:/"):
            model, separator, alias = name.removeprefix("models:/").partition("@")
            if separator:
                version = self.client.get_model_version_by_alias(model, alias)
            else:
                version = self.client.get_model_version(*model.split("/", 1))
            run_id = version.run_id
        return Path(self.client.download_artifacts(run_id, ""))

    def end(self, run_id: str, status: str) -> None:
        """Ends a run with an MLflow status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def end_running_children(self, parent: str, status: str) -> None:
        """Ends the runs under a sweep that dead processes left RUNNING."""
        # In backticks, since the tag's name holds a dot.
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], query):
            self.end(run.info.run_id, status)


def one_line(error: BaseException | str) -> str:
    """What an error says, short enough for a warning: MLflow's go on for pages."""
    return " ".join(str(error).split())[:300]


def resolve_locations(cfg: TrackingConfig) -> tuple[str, str | None]:
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
    # SQLite makes a database of an empty file.
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

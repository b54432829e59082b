"""One MLflow store: its calls, its limits and its quirks. It knows nothing of sweeps and jobs."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ich.base.config import TrackingConfig, UserError
from ich.base.entry import masked
from ich.base.files import lock
from ich.base.records import Scores
from ich.tracking.places import (
    URI_VARIABLE,
    follow_project,
    is_same_place,
    local_path,
    place_tag,
    resolve_place,
)

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


class MissingDatabaseError(UserError):
    """There is no database where one is to be used that a sweep has made."""


class MlflowStore:
    """One MLflow tracking store and the experiment in it. Every method raises what MLflow raises.

    Args:
        cfg: which store, see `resolve_place`.
        folder: the project's; None is this one.
        must_exist: whether a database that is not there is refused, and not made.

    Raises:
        MissingDatabaseError: see must_exist.
        UserError: the database file is no SQLite database, or MLflow cannot use its place.
    """

    def __init__(self, cfg: TrackingConfig, folder: Path | None = None, must_exist: bool = False):
        self.place = resolve_place(cfg, folder)
        database = self.place.database
        if must_exist and database and not database.is_file():  # MLflow would make one
            raise MissingDatabaseError(f"there is no MLflow database {self.place}")
        _require_sqlite(database)
        try:
            follow_project(self.place)
        except sqlite3.OperationalError as error:
            if "readonly" not in str(error):
                raise
            log.warning("MLflow's database cannot be written, and names an earlier folder")
        from mlflow import MlflowClient
        from mlflow.store.db import utils

        # It would make the folder that the URI names without a look at its escapes. Ours is there.
        utils._make_parent_dirs_if_sqlite = lambda _: None
        for name in ("mlflow", "alembic"):  # creating tables is no news to the person at the screen
            logging.getLogger(name).setLevel(logging.WARNING)
        # It prints pages about what it also raises.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with _creation_lock(database):
            self.client = MlflowClient(self.place.uri)
            # Now, under the lock: the first call makes the tables of a new database.
            self._experiment = self.client.get_experiment_by_name(self.place.experiment)

    @cached_property
    def experiment_id(self) -> str:
        """The experiment's, which is made if there is none.

        Raises:
            UserError: it has been deleted, or keeps its artifacts elsewhere than asked for.
        """
        place, database = self.place, self.place.database
        if self._experiment is None:
            tags = place_tag(database) if database else {}
            with _creation_lock(database):
                # Looked for once more: another process may have been first.
                self._experiment = self.client.get_experiment_by_name(place.experiment)
                if self._experiment is None:
                    made = self.client.create_experiment(place.experiment, place.artifacts, tags)
                    self._experiment = self.client.get_experiment(made)
        experiment = self._experiment
        if experiment.lifecycle_stage != "active":
            variable = f"{URI_VARIABLE}={shlex.quote(masked(place.uri))} "
            raise UserError(
                f"the MLflow experiment {place.experiment!r} at {place} has been deleted, so "
                f"nothing can be copied to it. `{variable}mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}` brings it back with its runs; "
                f"tracking.experiment=NEW takes another."
            )
        location = experiment.artifact_location
        if place.wanted and not is_same_place(location, place.artifacts or ""):
            raise UserError(
                f"tracking.artifacts is {place.wanted!r}, but the MLflow experiment "
                f"{place.experiment!r} at {place} keeps its artifacts in "
                f"{masked(location)}, and no experiment can have two places. "
                f"Leave tracking.artifacts out, or name another with tracking.experiment=NEW."
            )
        if database:
            for key, value in place_tag(database).items():
                if experiment.tags.get(key) != value:
                    self.client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)

    def open_run(self, name: str, tags: dict[str, str], parent: str | None = None) -> str:
        """Starts a run and returns its id."""
        tags = {**tags, "mlflow.runName": name}
        if parent:
            tags["mlflow.parentRunId"] = parent
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def exists(self, run_id: str) -> bool:
        """Whether the experiment has such a run, and it has not been deleted."""
        from mlflow.exceptions import MlflowException

        if self._experiment is None:
            return False
        try:
            info = self.client.get_run(run_id).info
            # A sweep that is given again with another experiment is copied to that one.
            is_here = info.experiment_id == self._experiment.experiment_id
            return is_here and bool(info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def reopen(self, run_id: str) -> None:
        """Sets an ended run to RUNNING again."""
        self.client.update_run(run_id, status="RUNNING")

    def tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def log_cohort(self, run_id: str, data: str, protocol: str, fingerprint: str) -> None:
        """Names a run's rows as its dataset, by where they are from and their fingerprint, without
        a path or a pixel; a second time it changes nothing."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"data": data}), json.dumps({"protocol": protocol})
        dataset = Dataset(data, fingerprint, "ich", source, profile=profile)
        # MLflow has one row per run and dataset, and keeps the first.
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(run_id, [DatasetInput(dataset, context)])

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Logs the parameters that a run lacks; of a value too long for MLflow, its beginning."""
        from mlflow.entities import Param

        logged = self.client.get_run(run_id).data.params
        params = {k: v for k, v in params.items() if k not in logged}
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
        for start in range(0, max(1, len(items)), 1000):  # MLflow's limit per call
            self.client.log_batch(run_id, metrics=items[start : start + 1000])

    def metrics(self, run_id: str) -> dict[str, float]:
        """The latest value of each metric of a run."""
        return dict(self.client.get_run(run_id).data.metrics)

    def logged_steps(self, run_id: str, metric: str) -> set[int]:
        """The steps at which a run has a metric."""
        return {m.step for m in self.client.get_metric_history(run_id, metric)}

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Keeps a file or a folder with a run, the file in a folder of its artifacts if asked."""
        if path.is_dir():
            # Under its own name: without one, its files would lie among the run's.
            self.client.log_artifacts(run_id, str(path), path.name)
        else:
            self.client.log_artifact(run_id, str(path), folder)

    def artifacts(self, run_id: str) -> set[str]:
        """What is kept with a run: its files and folders, and the weights of its model."""
        found = {f.path for f in self.client.list_artifacts(run_id)}
        if MODEL_FOLDER in found:
            weights = WEIGHTS_IN_RUN.parent.as_posix()
            found |= {f.path for f in self.client.list_artifacts(run_id, weights)}
        return found

    def register(self, run_id: str, tags: dict[str, str]) -> str:
        """The version of the model `ich` that is this run's artifacts; made once."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.uri import append_to_uri_path

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
            source = append_to_uri_path(source, MODEL_FOLDER)
        return str(self.client.create_model_version(MODEL, source, run_id, tags=tags).version)

    def set_alias(self, name: str, version: str) -> None:
        """Names a version of the model `ich`; another that had the name loses it."""
        self.client.set_registered_model_alias(MODEL, name, version)

    def version_of_alias(self, name: str) -> tuple[str, dict[str, str]] | None:
        """The version that has this alias, and its tags; None if there is no such alias."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(MODEL, name)
            return str(found.version), dict(found.tags)
        except MlflowException as error:
            # The first where there is no model yet, the second where it has no such alias.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
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
        folder = local_path(self.client.get_run(run_id).info.artifact_uri)
        if folder and not folder.is_dir():
            raise UserError(
                f"the model is {name!r}, whose files are no longer in {folder}. Give its sweep's "
                f"command again, which copies them to MLflow once more."
            )
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


# What an error of MLflow's, or of what it uses, holds, and what mends it; the first one counts.
_REMEDIES = (
    ("Detected out-of-date database schema", "Copy the database, then do as it says"),
    ("Can't locate revision", "A later MLflow made the database: install that one"),
    ("ProxyError", "A proxy was asked for it: name its host in NO_PROXY"),
    ("Failed to resolve", "No machine has that name: check it"),
    ("CERTIFICATE_VERIFY_FAILED", "Name its certificate in MLFLOW_TRACKING_SERVER_CERT_PATH"),
    ("SSLError", "Try http:// instead of https://, or the other way round"),
    ("Connection refused", "Start the server"),
    ("timed out", "Look whether the server runs, and whether a firewall stands between"),
    ("error code 401", "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ("error code 403", "Ask for the right to write there"),
    ("error code 404", "Check the address: what answers is no MLflow server"),
    ("unable to open database file", "Choose a folder that can be written"),
    ("readonly database", "Choose a database that can be written"),
)


def remedy(reason: str) -> str:
    """What mends the cause of an error, as `one_line` has it, in a sentence."""
    found = next((text for sign, text in _REMEDIES if sign in reason), "Mend what it says")
    return f"{found}; or use tracking=none."


def _require_sqlite(database: Path | None) -> None:
    # SQLite makes a database of an empty file.
    if database is None or not database.exists() or database.stat().st_size == 0:
        return
    with database.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise UserError(
                f"the MLflow database {database.name} is no SQLite database. Move it away, or name "
                f"another with tracking.uri=sqlite:///FILE; the sweep's own files do not need it."
            )


@contextmanager
def _creation_lock(database: Path | None) -> Iterator[None]:
    """Two processes that create the tables of one database at once can leave it unusable."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with lock(database.with_name(f".{database.name}.lock")):
        yield

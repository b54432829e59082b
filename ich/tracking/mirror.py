"""A copy of a job's folder in MLflow, made by a thread that the training never waits for.

Metrics go to `metrics.jsonl` first and to MLflow after: the files are the truth, MLflow a view. A
sweep is a parent run and each job a nested run. A job's copy can be made again at any time, and
adds only what is missing. So MLflow may be slow, locked, full or gone: what it missed is there when
the sweep ends, or when the same command is given again.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ich.base.config import Config, UserError, flatten
from ich.base.entry import one_line, public_command
from ich.base.metadata import Metadata, read_metadata
from ich.base.records import FAILED, FINISHED, KILLED, FitResult, Provenance, RunResult
from ich.base.results import RunPaths, SweepPaths
from ich.tracking.store import MODEL_FOLDER, WEIGHTS_IN_RUN, MlflowStore

# One of these every line of the journal has, and it is finite: the second those of the head.
_EVERY_STEP = ("train/lr", "head/lr")
_RETRY_SECONDS = 20
_TAG_LIMIT = 5000  # characters of a value, of MLflow's earliest version that is supported
# Written into every logged model as the module that loads it: models logged before name it too.
_LOADER = "ich.serving"
_SERVED_WITH = ("torch", "timm", "safetensors", "pydicom", "numpy")

log = logging.getLogger(__name__)


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
        # Not in __init__: the import takes seconds, and what cannot be opened now is tried again.
        if self._store is None:
            self._store = MlflowStore(self._config.tracking)
        if not self._run_id:
            self._run_id = self._open(self._store)
        store, run_id, lines = self._store, self._run_id, self._run.read_metrics()
        for line in lines:
            # A step logged twice would stand twice in MLflow.
            if line.step not in self._steps:
                store.log_metrics(run_id, line.metrics, line.step, line.time)
                self._steps.add(line.step)
        if undefined := sorted({k for line in lines for k, v in line.metrics.items() if v is None}):
            store.tag(run_id, "ich.undefined", ", ".join(undefined))
        result = self._run.read_result()
        if result.status in (FINISHED, FAILED, KILLED):
            self._end(store, run_id, result)

    def _open(self, store: MlflowStore) -> str:
        """The run of an earlier process, or a new one with parameters and configuration."""
        earlier = self._run.read_tracking()
        run_id = earlier.mlflow_run
        if run_id and store.exists(run_id):
            self._steps = set().union(*(store.logged_steps(run_id, k) for k in _EVERY_STEP))
            store.reopen(run_id)
        else:
            self._steps = set()
            rows = {"ich.cohort": self._run.read_origin().cohort or "unknown"}
            run_id = store.open_run(self._config.job, run_tags(self._config) | rows, self._parent)
            # Noted before anything is sent: whoever comes next goes on with this run.
            self._run.write_tracking(replace(earlier, mlflow_run=run_id))
            log.info("MLflow: %s, experiment %s", store.place, store.place.experiment)
        # Of an earlier process's run too, which may have been cut short before it had all of them.
        store.log_params(run_id, flatten(self._config))
        store.log_artifact(run_id, self._run.config)
        # A job that goes on has more to copy, however complete its copy was.
        self._run.write_tracking(replace(earlier, mlflow_run=run_id, complete=False))
        # The parent of now: where MLflow's database was deleted, the sweep has opened another.
        if self._parent:
            store.tag(run_id, "mlflow.parentRunId", self._parent)
        sweep = SweepPaths(self._run.root.parent)
        made = source_tags(sweep.read_record().command, self._run.read_provenance())
        for key, value in made.items():
            store.tag(run_id, key, value)
        if cohort := self._run.read_origin().cohort:
            protocol = self._config.protocol.name.value
            store.log_cohort(run_id, self._config.data.source.value, protocol, cohort)
        if earlier.supersedes and store.exists(earlier.supersedes):
            store.tag(earlier.supersedes, "ich.superseded", "true")
        return run_id

    def _end(self, store: MlflowStore, run_id: str, result: RunResult) -> None:
        # Once: at a second push each would stand twice.
        if result.fit and not store.logged_steps(run_id, "best/accuracy"):
            store.log_metrics(run_id, summary_metrics(result.fit), 0, time.time())
        if result.reason:
            store.tag(run_id, "ich.reason", result.reason[:_TAG_LIMIT])
        copy_files(store, run_id, self._run, present=set())  # all: a log has grown since
        store.end(run_id, result.status.upper())
        # Last: a push that was cut short is made again, and adds what is missing.
        self._run.write_tracking(replace(self._run.read_tracking(), complete=True))


def copy_files(store: MlflowStore, run_id: str, run: RunPaths, present: set[str]) -> bool:
    """Keeps a run's files with its MLflow run, but for those that are there by name.

    Returns:
        Whether any was missing.
    """
    files = (run.config, run.predictions, run.log, run.result, run.origin, run.provenance)
    missing = [path for path in files if path.exists() and path.name not in present]
    for path in missing:
        store.log_artifact(run_id, path)
    # In the served model's folder, or, of an earlier version of ich, as it is.
    has_weights = bool({WEIGHTS_IN_RUN.as_posix(), run.best.name} & present)
    if has_weights or not run.best.exists():
        return bool(missing)
    with TemporaryDirectory() as scratch:
        store.log_artifact(run_id, as_mlflow_model(run, Path(scratch) / MODEL_FOLDER))
    return True


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
            # A daemon: a server that hangs must not keep a finished training from ending.
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
        # In this order: the thread looks at it once it is woken.
        self._last = True
        self._news.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("MLflow is slow or away; what it misses is copied when the sweep ends")
        return not self._thread.is_alive()

    def _follow(self) -> None:
        trouble = ""
        while True:
            self._news.wait(_RETRY_SECONDS if trouble else None)
            # Before the push: what comes in meanwhile asks for another.
            self._news.clear()
            last = self._last
            try:
                self._mirror.push()
                trouble = ""
            except Exception as error:  # a tracker must never end a training
                reason = one_line(error)
                if reason != trouble:  # once, however often it is tried
                    log.warning("MLflow cannot be used now (%s); the run's files are whole", reason)
                trouble = reason
            if last:
                return


# --- What the copy consists of -------------------------------------------------------------------


def run_tags(config: Config) -> dict[str, str]:
    """What a run is found by in the UI."""
    return {
        "ich.kind": "job",
        "ich.sweep": config.name,
        "ich.job": config.job,
        "ich.model": config.model.name,
        "ich.protocol": config.protocol.name.value,
        "ich.data": config.data.source.value,
    }


def source_tags(command: str, made_with: Provenance) -> dict[str, str]:
    """What MLflow shows as a run's source and its version, of what is known.

    Args:
        command: of the launch, as its record has it; no path of the machine is left in it.
        made_with: code and packages.
    """
    tags = {}
    if command:
        # MLflow shows a job's source as it stands, and of other types what follows the last slash.
        shown = public_command(command)[:_TAG_LIMIT]
        tags = {"mlflow.source.name": shown, "mlflow.source.type": "JOB"}
    if made_with.git and made_with.git.commit != "unknown":
        tags["mlflow.source.git.commit"] = made_with.git.commit
        tags["mlflow.source.git.dirty"] = str(made_with.git.changed).lower()
    return tags


def summary_metrics(fit: FitResult) -> dict[str, float | None]:
    """A finished run's numbers: what its weights score, and what its cohort leaks."""
    scores = {k: v for k, v in fit.scores.items() if k.startswith(("accuracy", "auc"))}
    validation = {f"val_{k}": v for k, v in fit.val_scores.items()}
    plain = ("auc_top", "best_epoch", "minutes", "images_per_s", "params")
    best = {**scores, **validation, **{k: getattr(fit, k) for k in plain}}
    leak = {f"data/leak_{k}": v for k, v in fit.cohort.leak.items()}
    head: dict[str, float | None] = {}
    if fit.head:
        head = {"head/best_epoch": fit.head.epoch, "head/minutes": fit.head.minutes}
        for kind in ("slice", "smoothed"):
            of_kind = getattr(fit.head, f"{kind}_scores")
            of_kind = {k: v for k, v in of_kind.items() if k.startswith(("accuracy", "auc"))}
            head |= {f"{kind}/{k}": v for k, v in of_kind.items()}
    return {**{f"best/{k}": v for k, v in best.items()}, **leak, **head}


def as_mlflow_model(run: RunPaths, folder: Path) -> Path:
    """A run's best weights as a model that `mlflow models serve` can serve; without pickle or code.

    Args:
        run: one that has weights.
        folder: made here.

    Returns:
        The folder; or the weights as they are, if an earlier version of ich wrote them.
    """
    try:
        metadata = read_metadata(run.best)
    except UserError:
        return run.best
    # docs/use-the-winner.md has the examples that MLflow would warn are missing.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import pyfunc

        # With its requirements given. MLflow would find them out by loading the model in a process
        # of its own, which took 9 s.
        pyfunc.save_model(
            folder,
            loader_module=_LOADER,
            data_path=str(run.best),
            signature=_signature(metadata),
            # Not ich itself: on a package index, that name may be anybody's.
            pip_requirements=[f"{name}=={version(name)}" for name in _SERVED_WITH],
            metadata={"ich": metadata.to_json()},
        )
    return folder


def _signature(metadata: Metadata) -> Any:
    """A row is one slice: a DICOM file in base64, or HU as rows of pixels; where it is seen with
    others, what its series is called."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    with_others = metadata.context != "slice"
    names = ("dicom", "hu", "series") if with_others else ("dicom", "hu")
    # Of any type: what is none of both has a reason of ours in its row. MLflow would refuse the
    # whole request, and rows of both kinds together.
    inputs = [ColSpec(AnyType(), name, required=False) for name in names]
    probabilities = [ColSpec(DataType.double, k, required=False) for k in metadata.labels]
    texts = [ColSpec(DataType.string, k) for k in ("positive", "reason")]
    alone = [ColSpec(DataType.boolean, "alone")] if with_others else []
    return ModelSignature(Schema(inputs), Schema([*probabilities, *texts, *alone]))

"""The registered model: which run becomes a version, which has the alias `best`, and its weights.

`best_run` ranks and `decide_alias` decides, both from values alone; `register_best` does what they
say, and `Registration.describe` tells it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ich.base.config import Config, TrackingConfig, UserError, saved_config
from ich.base.entry import one_line, shell_command
from ich.base.results import RunPaths, SweepPaths
from ich.scoring.comparison import (
    COMPARED_METRICS,
    RANKING_METRIC,
    Comparison,
    load_comparison,
)
from ich.tracking.places import URI_VARIABLE, resolve_place
from ich.tracking.store import (
    BEST,
    MODEL,
    WEIGHTS_IN_RUN,
    MissingDatabaseError,
    MlflowStore,
    remedy,
)


@dataclass(frozen=True)
class VersionTags:
    """What a version of the model says of itself: the sweep and the job it is from, the rows it was
    scored on (`ich.scoring.predictions.Predictions.fingerprint`) and its score there."""

    sweep: str
    job: str
    rows: str
    auc: float

    @staticmethod
    def read(tags: Mapping[str, str]) -> VersionTags:
        """Of a version that whoever made it by hand may have given none of these."""
        sweep, job, rows = (str(tags.get(f"ich.{key}", "")) for key in ("sweep", "job", "rows"))
        # An unknown score is never reached: only a person takes the alias from that version.
        try:
            auc = float(tags["ich.auc"])
        except (KeyError, ValueError):
            auc = math.inf
        return VersionTags(sweep, job, rows, auc)

    def write(self) -> dict[str, str]:
        auc = f"{self.auc:.6f}"
        return {"ich.sweep": self.sweep, "ich.job": self.job, "ich.rows": self.rows, "ich.auc": auc}


@dataclass(frozen=True)
class Candidate:
    """The best run of a sweep. metrics: of its predictions. tags: those it is registered with."""

    paths: RunPaths
    metrics: Mapping[str, float]
    tags: VersionTags


def best_run(comparison: Comparison) -> Candidate | None:
    """The best run on the rows that most settings share; None if no run has a score.

    Of a setting with several seeds it is the one with the best validation: the test rows, where
    there are any, choose the setting alone.
    """
    rows = max(comparison.evaluation_sets, key=lambda s: len(s.settings), default=None)
    if rows is None or rows.best is None:
        return None
    # Undefined (None) where validation has one class only: such a run is the last choice.
    run = max(rows.best.runs, key=lambda r: r.fit.val_scores.get(RANKING_METRIC) or 0.0)
    assert run.predictions is not None  # settings consist of runs that have some
    metrics = run.predictions.metrics
    tags = VersionTags(comparison.name, run.name, rows.fingerprint, metrics[RANKING_METRIC])
    return Candidate(run.paths, metrics, tags)


class AliasMove(Enum):
    """Whether a version gets the alias `best`; a value says of the present one why it keeps it."""

    moved = "gives it away"
    lower = "scores higher on the same rows"
    incomparable = "was scored on other rows"


def decide_alias(new: VersionTags, present: VersionTags | None, promote: bool) -> AliasMove:
    """Whether the alias `best` moves from the version that has it, if any, to a new one.

    It does where both were scored on the very same rows and the new one is no worse. Scores on
    other rows cannot be compared, so only a person moves it there, with `promote`.
    """
    if promote or present is None:
        return AliasMove.moved
    if new.rows != present.rows:
        return AliasMove.incomparable
    # As it is written down: else a run registered again may be lower than itself, rounded up.
    return AliasMove.moved if round(new.auc, 6) >= present.auc else AliasMove.lower


@dataclass(frozen=True)
class Registration:
    """What `register_best` did. version: of the model. present: the one that had the alias `best`,
    if any, and its number. move: what became of it. folder: of the sweep."""

    candidate: VersionTags
    version: str
    present: tuple[str, VersionTags] | None
    move: AliasMove
    folder: Path

    def describe(self) -> str:
        """In a sentence or two."""
        registered = f"{self.candidate.job} is version {self.version} of the model {MODEL}"
        if self.move is AliasMove.moved or self.present is None:
            return f"{registered}, and its alias {BEST}."
        number, tags = self.present
        of = f", {tags.sweep}/{tags.job}" if tags.sweep and tags.job else ""
        command = shell_command("ich", "report", self.folder, "--promote")
        return (
            f"{registered}. The alias {BEST} stays with version {number}{of}, which "
            f"{self.move.value}; {command} moves it."
        )


def register_best(
    store: MlflowStore, sweep: SweepPaths, parent: str | None, promote: bool = False
) -> Registration | None:
    """Registers the best run of a sweep as a version of the model `ich`.

    The sweep's name becomes that version's alias; whether `best` does, `decide_alias` tells.

    Args:
        store: of the sweep's jobs.
        sweep: its folder; only files are read.
        parent: the sweep's MLflow run, which gets the best run's scores and tags.
        promote: move `best` in any case.

    Returns:
        None if no run has a score, or the best one has no MLflow run.
    """
    best = best_run(load_comparison([sweep], resamples=0))
    run_id = best.paths.read_tracking().mlflow_run if best else None
    if best is None or run_id is None or not store.exists(run_id):
        return None
    version = store.register(run_id, best.tags.write())
    store.set_alias(alias_for(best.tags.sweep), version)
    if parent:
        _tag_sweep_run(store, parent, best)
    found = store.version_of_alias(BEST)
    present = (found[0], VersionTags.read(found[1])) if found else None
    move = decide_alias(best.tags, present and present[1], promote)
    if move is AliasMove.moved:
        store.set_alias(BEST, version)
    return Registration(best.tags, version, present, move, sweep.root)


def _tag_sweep_run(store: MlflowStore, parent: str, best: Candidate) -> None:
    """Gives a sweep's MLflow run the name and the scores of its best run."""
    store.tag(parent, "ich.best_job", best.tags.job)
    scores: dict[str, float | None] = {f"best/{k}": best.metrics[k] for k in COMPARED_METRICS}
    key = f"best/{RANKING_METRIC}"
    # A sweep that is given again has the same best; one with more jobs may have another, which
    # is a further step of the same metric.
    if store.metrics(parent).get(key) != scores[key]:
        store.log_metrics(parent, scores, len(store.logged_steps(parent, key)), time.time())


def promote(sweep: SweepPaths) -> str:
    """Moves the alias `best` to the best run of a sweep; says what was done.

    Raises:
        UserError: the sweep is not in MLflow, or MLflow cannot be used.
    """
    record = sweep.read_record()
    configs = [saved_config(c, str(sweep.record)) for c in record.configs.values()]
    if not configs or not all(c.tracking.mlflow for c in configs):
        raise UserError(
            f"{sweep.root} was trained with tracking=none, so MLflow has none of its runs to "
            f"promote. Give its command again with tracking=mlflow."
        )
    place = resolve_place(configs[0].tracking, _project_of(sweep, configs[0]))
    try:
        # Where nothing is, nothing is to be promoted: an empty database would only be left behind.
        store = MlflowStore(configs[0].tracking, _project_of(sweep, configs[0]), must_exist=True)
        registered = register_best(store, sweep, record.mlflow_run, promote=True)
    except MissingDatabaseError as error:
        raise UserError(
            f"{sweep.root} cannot be promoted: {error}. Go to the folder where it was launched, or "
            f"name its store in {URI_VARIABLE}."
        ) from None
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)
        raise UserError(
            f"MLflow at {place} cannot be used: {reason.rstrip('.')}. {remedy(reason)}"
        ) from None
    if registered is None:
        raise UserError(
            f"no run of {sweep.root} has finished with a score and a copy in MLflow at {place}, "
            f"experiment {place.experiment}, so there is nothing to promote. Give the sweep's "
            f"command again to finish it, or name its store in {URI_VARIABLE}."
        )
    return registered.describe()


def _project_of(sweep: SweepPaths, config: Config) -> Path | None:
    """The folder where a sweep was launched, by where its own lies; None if that tells nothing."""
    below = Path(config.sweep.output) / config.name
    root = sweep.root.resolve()
    if below.is_absolute() or ".." in below.parts or root.parts[-len(below.parts) :] != below.parts:
        return None
    return root.parents[len(below.parts) - 1]


def alias_for(name: str) -> str:
    """A sweep's name as an alias: MLflow takes letters, digits, `_` and `-`, and keeps `latest` and
    `v1`, `v2`, ... to itself."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    reserved = alias.lower() in ("latest", BEST) or re.fullmatch(r"[vV]\d+", alias)
    return f"sweep-{alias}" if reserved else alias


# --- Weights by an MLflow name -------------------------------------------------------------------


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
    try:
        folder = MlflowStore(cfg, must_exist=True).fetch(name)
    except MissingDatabaseError as error:
        raise UserError(
            f"the model is {name!r}, but {error}. Go to the folder of the sweep, give "
            f"--tracking-uri (tracking.uri), or give a run's folder as the model."
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model is {name!r}, which cannot be had from MLflow at {resolve_place(cfg)} "
            f"({one_line(error)}). `make ui` shows the runs and the models that there are, and "
            f"their aliases."
        ) from None
    run = RunPaths(folder)
    # In the served model's folder, or beside the config, where earlier versions of ich put them.
    weights = next((p for p in (folder / WEIGHTS_IN_RUN, run.best) if p.is_file()), None)
    if weights is None:
        raise UserError(
            f"the model is {name!r}, whose MLflow run holds no weights: it has not finished. Give "
            f"its sweep's command again, or take another run."
        )
    return weights, run

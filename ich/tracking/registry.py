"""A sweep's MLflow run, the registered model, and weights fetched by an MLflow name."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from ich.base.config import Config, TrackingConfig, UserError, load_config, to_dataclass
from ich.base.results import RunPaths, SweepPaths
from ich.scoring.comparison import COMPARED_METRICS, RANKING_METRIC, load_comparison
from ich.tracking.mirror import RunMirror
from ich.tracking.store import (
    BEST,
    MODEL,
    WEIGHTS_IN_RUN,
    MlflowStore,
    locations,
    one_line,
    run_tags,
)

log = logging.getLogger(__name__)


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
        reason = one_line(error)
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
    earlier = sweep.read_record().mlflow_run
    try:
        return _parent_run(MlflowStore(config.tracking), config, earlier)
    except Exception as error:
        log.warning(
            "MLflow cannot be used now (%s); it gets its copy when the sweep ends",
            one_line(error),
        )
        return earlier


def _parent_run(store: MlflowStore, config: Config, earlier: str | None) -> str:
    if earlier and store.exists(earlier):
        store.reopen(earlier)
        # The folder is locked, so what a killed sweep left RUNNING runs no more.
        store.end_running_children(earlier, "KILLED")
        return earlier
    tags = {k: v for k, v in run_tags(config).items() if k not in ("ich.job", "ich.model")}
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
    if not any(c["tracking"]["mlflow"] for c in sweep.read_record().configs.values()):
        return
    command = [sys.executable, "-m", "ich.tracking.registry", str(sweep.root), status]
    try:
        subprocess.run(command, timeout=seconds, start_new_session=True, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        log.warning("MLflow is slow or away; the next launch copies what it misses")


def main() -> None:
    """`python -m ich.tracking.registry SWEEP_DIR STATUS`: `close_sweep_run`, here and now."""
    sweep, status = SweepPaths(Path(sys.argv[1])), sys.argv[2]
    record = sweep.read_record()
    config = to_dataclass(next(iter(record.configs.values())))
    try:
        store = MlflowStore(config.tracking)
        parent = record.mlflow_run
        if not (parent and store.exists(parent)):
            parent = _parent_run(store, config, None)
            sweep.write_record(replace(record, mlflow_run=parent))
        for job in record.jobs:
            _catch_up(store, sweep.run(job), parent)
        store.end_running_children(parent, "KILLED")
        data_reports = [sweep.data(key) for key in record.cohorts]
        tables = (sweep.csv, sweep.markdown, sweep.latex, sweep.metrics, sweep.page)
        for path in (*tables, sweep.record, sweep.figures, *data_reports):
            if path.exists():
                store.log_artifact(parent, path)
        store.tag(parent, "ich.cohort", ", ".join(record.cohorts))
        store.end(parent, status)  # first: what follows may fail
        if status != "KILLED" and (said := register_best(store, sweep, parent)):
            print(f"MLflow: {said}")
    except Exception as error:
        log.warning(
            "MLflow cannot be used (%s). The sweep's files are whole; the same command copies "
            "them to MLflow once it can",
            one_line(error),
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
    rows = max(comparison.evaluation_sets, key=lambda s: len(s.settings), default=None)
    if rows is None or rows.best is None:
        return ""
    run = max(rows.best.runs, key=lambda r: r.fit.val_scores[RANKING_METRIC] or 0.0)
    run_id = run.paths.read_tracking().mlflow_run
    if run_id is None or run.predictions is None:
        return ""
    score = run.predictions.metrics[RANKING_METRIC]
    tags = {
        "ich.sweep": comparison.name,
        "ich.job": run.name,
        "ich.rows": rows.fingerprint,
        "ich.auc": f"{score:.6f}",
    }
    version = store.register(run_id, tags)
    store.alias(alias_for(tags["ich.sweep"]), version)
    if parent:
        store.tag(parent, "ich.best_job", run.name)
        kept = {f"best/{k}": run.predictions.metrics[k] for k in COMPARED_METRICS}
        if (
            store.metrics(parent).get(f"best/{RANKING_METRIC}") != kept[f"best/{RANKING_METRIC}"]
        ):  # a job was added
            steps = store.logged_steps(parent, f"best/{RANKING_METRIC}")
            store.log_metrics(parent, dict(kept), len(steps), time.time())
    now = store.tags_of_alias(BEST)
    same = now.get("ich.rows") == rows.fingerprint
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
    configs = [to_dataclass(c) for c in record.configs.values()]
    if not configs or not all(c.tracking.mlflow for c in configs):
        raise UserError(
            f"{sweep.root} was trained with tracking=none, so MLflow has none of its runs to "
            f"promote. Give its command again with tracking=mlflow."
        )
    try:
        store = MlflowStore(configs[0].tracking)
        said = register_best(store, sweep, record.mlflow_run, promote=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow cannot be used: {one_line(error)}") from None
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
    uri, _ = locations(cfg)
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
            f"the model is {name!r}, which cannot be had from MLflow ({one_line(error)}). "
            f"`make ui` shows the runs and the models that there are, and their aliases."
        ) from None
    run = RunPaths(folder)
    weights = next((p for p in (folder / WEIGHTS_IN_RUN, run.best) if p.is_file()), None)
    if weights is None:
        raise UserError(
            f"the model is {name!r}, whose MLflow run holds no weights: it has not finished. Give "
            f"its sweep's command again, or take another run."
        )
    return weights, run


def alias_for(name: str) -> str:
    """A sweep's name as an alias: MLflow takes letters, digits, `_` and `-`, and keeps `latest` and
    `v1`, `v2`, ... to itself."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    reserved = alias.lower() in ("latest", BEST) or re.fullmatch(r"[vV]\d+", alias)
    return f"sweep-{alias}" if reserved else alias


def _catch_up(store: MlflowStore, run: RunPaths, parent: str) -> None:
    known = run.read_tracking()
    whole = known.complete and known.mlflow_run and store.exists(known.mlflow_run)
    if not whole and run.config.exists():
        RunMirror(load_config(run.config), run, parent).push()


if __name__ == "__main__":
    main()

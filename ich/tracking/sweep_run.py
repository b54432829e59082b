"""A sweep's MLflow run, the parent of its jobs' runs: opened at its start, completed at its end.

It knows when MLflow is asked for something; what a job's copy consists of is the mirror's, and what
becomes of the best run the registry's.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from ich.base.config import (
    Config,
    TrackingConfig,
    UserError,
    load_config,
    saved_config,
    select_value,
)
from ich.base.entry import masked, one_line, print_warnings
from ich.base.files import DamagedError, tell_damaged
from ich.base.processes import watch_supervisor
from ich.base.results import RunPaths, SweepPaths
from ich.base.terminal import print_line
from ich.tracking.mirror import RunMirror, copy_files, run_tags
from ich.tracking.places import resolve_place
from ich.tracking.registry import register_best
from ich.tracking.store import MlflowStore, remedy
from ich.tracking.sweep_report import copy_report

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
    place = resolve_place(config.tracking)
    try:
        _ = MlflowStore(config.tracking).experiment_id
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error).replace("<database_uri>", shlex.quote(masked(place.uri)))
        if "database is locked" not in reason:
            raise UserError(
                f"MLflow at {place} cannot be used: {reason.rstrip('.')}. {remedy(reason)}"
            ) from None
    _say_once(f"MLflow: {place}, experiment {place.experiment}")


@cache  # an optimizing sweeper launches in batches
def _say_once(text: str) -> None:
    print_line(text)


def open_sweep_run(config: Config, sweep: SweepPaths) -> str | None:
    """The sweep's MLflow run: the one of an earlier launch in this folder, or a new one."""
    if not config.tracking.mlflow:
        return None
    earlier = sweep.read_record().mlflow_run
    try:
        return _open_parent(MlflowStore(config.tracking), config, earlier)
    except Exception as error:
        log.warning(
            "MLflow cannot be used now (%s); it gets its copy when the sweep ends",
            one_line(error),
        )
        return earlier


def _open_parent(store: MlflowStore, config: Config, earlier: str | None) -> str:
    if earlier and store.exists(earlier):
        store.reopen(earlier)
        # The folder is locked, so what a killed sweep left RUNNING runs no more.
        store.end_running_children(earlier, "KILLED")
        return earlier
    # Of a job's tags those that all jobs of the sweep share.
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
    configs = sweep.read_record().configs.values()
    if not any(select_value(config, "tracking.mlflow") for config in configs):
        return
    words = [str(sweep.root), status, str(os.getpid())]
    command = [sys.executable, "-m", "ich.tracking.sweep_run", *words]
    try:
        # In a session of its own, which Ctrl-C at the terminal does not reach.
        subprocess.run(command, timeout=seconds, start_new_session=True, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        log.warning("MLflow is slow or away; the next launch copies what it misses")


def close_in_this_process(sweep: SweepPaths, status: str) -> None:
    """What `close_sweep_run` starts a process for."""
    record = sweep.read_record()
    # Any job's will do: the jobs of a sweep share its store.
    try:
        config = saved_config(next(iter(record.configs.values())), str(sweep.record))
        store = MlflowStore(config.tracking)
        parent = record.mlflow_run
        # MLflow was away when the sweep was opened, or its database has been deleted since.
        if not (parent and store.exists(parent)):
            parent = _open_parent(store, config, None)
            sweep.write_record(replace(record, mlflow_run=parent))
        for job in record.jobs:
            _catch_up(store, sweep.run(job), config.tracking, parent)
        # Once all are copied, what is still RUNNING has no process left that could end it.
        store.end_running_children(parent, "KILLED")
        copy_report(store, parent, sweep)
        store.end(parent, status)  # first: what follows may fail
        if status != "KILLED" and (registered := register_best(store, sweep, parent)):
            print_line(f"MLflow: {registered.describe()}")
    except Exception as error:
        log.warning(
            "MLflow cannot be used (%s). The sweep's files are whole; the same command copies "
            "them to MLflow once it can",
            one_line(error),
        )


def _catch_up(store: MlflowStore, run: RunPaths, tracking: TrackingConfig, parent: str) -> None:
    copy = run.read_tracking()
    if copy.complete and copy.mlflow_run and store.exists(copy.mlflow_run):
        # Its records are whole; its files may have been deleted, or not been moved along.
        if copy_files(store, copy.mlflow_run, run, store.artifacts(copy.mlflow_run)):
            log.warning("%s had no files in MLflow any more: they are copied again", run.root.name)
        return
    try:
        # Into the store of the launch: a run's record may be of somebody else's.
        config = replace(load_config(run.config), tracking=tracking)
    except FileNotFoundError:
        return
    except DamagedError as error:  # which costs this run's copy, and no other's
        tell_damaged(f"{error}: MLflow has no copy of it")
        return
    RunMirror(config, run, parent).push()


if __name__ == "__main__":
    watch_supervisor(int(sys.argv[3]))
    print_warnings()
    close_in_this_process(SweepPaths(Path(sys.argv[1])), sys.argv[2])

"""Everything that happens before the first job of a sweep starts.

All jobs are checked together: ranges, names, weights. Then the data are prepared once, for all of
them. What is wrong in the eighth job is said here, and not after seven trainings.
"""

from __future__ import annotations

import fcntl
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ich import data
from ich.config import Config, Source, UserError, image_size, validate
from ich.data_report import write_data_report
from ich.results import SweepPaths, write_json
from ich.tracking import open_store


def check_jobs(configs: Sequence[Config]) -> None:
    """Checks all jobs of a sweep.

    Raises:
        UserError: a value out of range, two jobs with one folder, or weights that cannot be had.
    """
    for config in configs:
        validate(config)
        if config.data.root is not None or config.data.source is not Source.phantom:
            data.open_store(config.data)  # said before weights are downloaded
    twice = [job for job, n in Counter(c.job for c in configs).items() if n > 1]
    if twice:
        raise UserError(
            f"the job {twice[0]!r} stands {Counter(c.job for c in configs)[twice[0]]} "
            f"times in this command. Name each value once."
        )
    # Imported here: torch takes seconds, which a typo need not wait for.
    from ich.model import check_architecture, ensure_weights

    for c in {repr((c.model, c.data.image_size, c.windows)): c for c in configs}.values():
        check_architecture(c.model, len(c.windows.channels), image_size(c))
        ensure_weights(c.model)


def open_sweep(configs: Sequence[Config], report: data.Report | None = None) -> SweepPaths:
    """Checks the jobs, prepares their data, and records the launch in `sweep.json`.

    Args:
        configs: the jobs, in the order of the table.
        report: progress of the preparation.

    Returns:
        The sweep's folder; its record names the jobs and the MLflow parent run.

    Raises:
        UserError: see `check_jobs` and `ich.data.load_dataset`.
    """
    check_jobs(configs)
    open_store(configs[0].tracking, required=True)
    first = configs[0]
    sweep = SweepPaths(Path(first.sweep.output) / first.name)
    cohorts = {repr((c.data, c.protocol)): c for c in configs}.values()
    prepared = [(config, data.prepare(config, report)) for config in cohorts]
    for _, done in prepared:
        done.require_rows()
    earlier, cohorts_before = _hold(sweep)
    for config, done in prepared:
        write_data_report(config, done, sweep.data(done.key))
    parent = _open_parent(first, sweep)
    write_json(
        sweep.record,
        {
            "name": first.name,
            "jobs": list(dict.fromkeys([*earlier, *(c.job for c in configs)])),
            "cohorts": list(dict.fromkeys([*cohorts_before, *(d.key for _, d in prepared)])),
            "mlflow_run": parent,
            "started": time.strftime("%Y-%m-%d %H:%M"),
            "command": _command(),
        },
    )
    return sweep


_held: dict[Path, IO[str]] = {}


def _hold(sweep: SweepPaths) -> tuple[list[str], list[str]]:
    """Makes the sweep's folder and keeps it for this process; returns the jobs and cohorts of
    earlier batches.

    Raises:
        UserError: another process runs a sweep in it.
    """
    if sweep.root in _held:
        record = sweep.read_record()
        return list(record["jobs"]), list(record["cohorts"])
    sweep.root.mkdir(parents=True, exist_ok=True)
    handle = (sweep.root / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(
            f"another sweep is running in {sweep.root}. Wait for it, or give this one a folder of "
            f"its own with name=NAME."
        ) from None
    _held[sweep.root] = handle
    return [], []


def _command() -> str:
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"ich.{module}", *sys.argv[1:]])


def _open_parent(config: Config, sweep: SweepPaths) -> str | None:
    """The sweep's MLflow run: the one of an earlier launch in this folder, or a new one."""
    store = open_store(config.tracking, required=True)
    if store is None:
        return None
    earlier = sweep.read_record().get("mlflow_run")
    if isinstance(earlier, str) and store.reopen(earlier):
        # The folder is locked, so what a killed sweep left RUNNING runs no more.
        store.end_running_children(earlier, "KILLED")
        return earlier
    tags = {
        "ich.sweep": config.name,
        "ich.kind": "sweep",
        "ich.protocol": config.protocol.name.value,
        "ich.data": config.data.source.value,
    }
    return store.open_run(config.name, tags)


def close_sweep(sweep: SweepPaths, config: Config, ok: bool) -> None:
    """Keeps the table and figures on the sweep's MLflow run, and ends it."""
    record = sweep.read_record()
    store, parent = open_store(config.tracking), record.get("mlflow_run")
    if store is None or not isinstance(parent, str):
        return
    data_reports = [sweep.data(key) for key in record.get("cohorts", [])]
    for path in (sweep.csv, sweep.markdown, sweep.record, sweep.figures, *data_reports):
        if path.exists():
            store.log_artifact(parent, path)
    store.end(parent, "FINISHED" if ok else "FAILED")

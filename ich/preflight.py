"""Everything that happens before the first job of a sweep starts.

All jobs are checked together: ranges, names, weights. Then the data are prepared once, for all of
them. What is wrong in the eighth job is said here, and not after seven trainings.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ich.config import Config, UserError, validate
from ich.data import Report, load_dataset
from ich.results import SweepPaths, write_json
from ich.tracking import open_store


def check_jobs(configs: Sequence[Config]) -> None:
    """Checks all jobs of a sweep.

    Raises:
        UserError: a value out of range, two jobs with one folder, or weights that cannot be had.
    """
    for config in configs:
        validate(config)
    twice = [job for job, n in Counter(c.job for c in configs).items() if n > 1]
    if twice:
        raise UserError(
            f"the job {twice[0]!r} stands {Counter(c.job for c in configs)[twice[0]]} "
            f"times in this command. Name each value once."
        )
    from ich.model import ensure_weights  # torch takes seconds, which a typo need not wait for

    for model in {repr(c.model): c.model for c in configs}.values():
        ensure_weights(model)


def open_sweep(configs: Sequence[Config], report: Report | None = None) -> SweepPaths:
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
    for config in {repr((c.data, c.protocol)): c for c in configs}.values():
        load_dataset(config, report)
    first = configs[0]
    sweep = SweepPaths(Path(first.sweep.output) / first.name)
    sweep.root.mkdir(parents=True, exist_ok=True)
    parent = _open_parent(first, sweep)
    write_json(
        sweep.record,
        {
            "name": first.name,
            "jobs": [c.job for c in configs],
            "mlflow_run": parent,
            "started": time.strftime("%Y-%m-%d %H:%M"),
            "command": _command(),
        },
    )
    return sweep


def _command() -> str:
    module = Path(sys.argv[0]).stem
    return " ".join(["python", "-m", f"ich.{module}", *sys.argv[1:]])


def _open_parent(config: Config, sweep: SweepPaths) -> str | None:
    """The sweep's MLflow run: the one of an earlier launch in this folder, or a new one."""
    store = open_store(config.tracking)
    if store is None:
        return None
    earlier = sweep.read_record().get("mlflow_run")
    if isinstance(earlier, str) and store.reopen(earlier):
        return earlier
    tags = {
        "ich.sweep": config.name,
        "ich.kind": "sweep",
        "ich.protocol": config.protocol.name,
        "ich.data": config.data.source.value,
    }
    return store.open_run(config.name, tags)


def close_sweep(sweep: SweepPaths, config: Config, ok: bool) -> None:
    """Keeps the table and figures on the sweep's MLflow run, and ends it."""
    store, parent = open_store(config.tracking), sweep.read_record().get("mlflow_run")
    if store is None or not isinstance(parent, str):
        return
    for path in (sweep.csv, sweep.markdown, sweep.record, sweep.figures):
        if path.exists():
            store.log_artifact(parent, path)
    store.end(parent, "FINISHED" if ok else "FAILED")

"""One training as a child process: its crash ends neither the sweep nor the table.

The child writes to its own log. Whatever becomes of it (an exception, `sys.exit`, a signal, the
time limit) turns into a result file with a reason, and the caller goes on to the next job.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from ich.config import Config, to_yaml
from ich.results import FAILED, FINISHED, KILLED, RunPaths
from ich.tracking import open_store

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 20  # between SIGTERM and SIGKILL


def run_job(
    config: Config, run: RunPaths, parent: str | None, watch: Callable[[], None]
) -> dict[str, object]:
    """Trains one job in a child process and returns its result, which is always written.

    A folder that already holds this very job, finished, is left as it is; one that holds a
    checkpoint of it goes on from there, whatever ended it; any other earlier run of the job is
    moved to `superseded/`.

    Args:
        config: the job.
        run: its folder.
        parent: the sweep's MLflow run.
        watch: called several times a second while the child runs.
    """
    if run.is_finished(config):
        return run.read_result()
    if run.is_resumable(config):
        run.result.unlink(missing_ok=True)
    else:
        run.supersede()
    run.root.mkdir(parents=True, exist_ok=True)
    run.config.write_text(to_yaml(config))
    command = [sys.executable, "-m", "ich.train", str(run.root)]
    if parent:
        command += ["--parent", parent]
    try:
        reason = supervise(command, run, config.sweep.time_limit, watch)
        died = not run.result.exists()
    except JobTimeoutError as error:
        reason, died = str(error), run.read_result()["status"] != FINISHED
    if died:
        _write_death(config, run, parent, reason)
    return run.read_result()


class JobTimeoutError(Exception):
    """A job exceeded its time limit and has been ended."""


def supervise(
    command: list[str], run: RunPaths, time_limit: float | None, watch: Callable[[], None]
) -> str:
    """Runs a command with its output in the run's log; returns how it ended, in words.

    A time limit (minutes) or an interrupt of this process ends the child, first with SIGTERM.

    Raises:
        JobTimeoutError: the time limit was exceeded.
    """
    deadline = time.monotonic() + time_limit * 60 if time_limit else float("inf")
    with run.log.open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    _stop(child)
                    raise JobTimeoutError(f"exceeded its time limit of {time_limit:g} minutes")
                watch()
                time.sleep(_POLL_SECONDS)
        finally:
            _stop(child)
        watch()
    return describe_exit(child.returncode)


def describe_exit(code: int) -> str:
    """An exit code or signal in words."""
    if code >= 0:
        return f"exited with code {code} without a result"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _die_with_parent() -> None:
    """Linux: the child gets SIGTERM when this process is gone, even by SIGKILL."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _write_death(config: Config, run: RunPaths, parent: str | None, reason: str) -> None:
    """The result of a child that could not write its own, and the end of its MLflow run."""
    status = KILLED if reason.startswith("ended by SIGTERM") else FAILED
    run.progress.unlink(missing_ok=True)
    mlflow_run = run.mlflow_run()
    run.write_result(
        {
            "status": status,
            "reason": reason,
            "job": config.job,
            "model": config.model.name,
            "mlflow_run": mlflow_run,
        }
    )
    store = open_store(config.tracking)
    if store is not None and mlflow_run:
        store.end(mlflow_run, status.upper())
    elif store is not None and parent:
        store.end_running_children(parent, status.upper(), config.job)

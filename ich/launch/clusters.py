"""Jobs that Ray or submitit (Slurm) place in other processes, perhaps on other machines.

What the launching process and such a job have in common is the sweep's folder. There the jobs'
progress is followed, and there an interrupt is written down for jobs that no signal of this process
reaches. A job whose process or machine was lost ends as a row of the table; Hydra's launchers
for both would raise at the first such job, and forget the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ich.base.config import Config, UserError
from ich.base.processes import GRACE_SECONDS, lock_run, signals_ignored
from ich.base.results import RunPaths, SweepPaths
from ich.base.terminal import Board

# Hydra plug-in -> the config of ours that uses it, and the extra of this package that installs it.
_PLUGINS = {
    "hydra_plugins.hydra_ray_launcher": ("hydra/launcher=ich_ray", "ray"),
    "hydra_plugins.hydra_submitit_launcher": ("hydra/launcher=ich_slurm", "slurm"),
    "hydra_plugins.hydra_optuna_sweeper": ("hydra/sweeper=ich_optuna", "optuna"),
}
_POLL_SECONDS = 0.5
T = TypeVar("T")


def _plugin(target: str) -> str:
    return ".".join(target.split(".")[:2])


def missing_extra(target: str) -> str | None:
    """What to say if the plug-in of a `_target_` is one of the optional ones and not installed."""
    plugin = _plugin(target)
    if plugin not in _PLUGINS or find_spec(plugin):
        return None
    option, extra = _PLUGINS[plugin]
    return f"{option} needs a package that is not installed: pip install 'ich[{extra}]'"


def is_elsewhere(target: str) -> bool:
    """Whether a launcher's jobs run in processes that do not print to this terminal."""
    return _PLUGINS.get(_plugin(target), ("", ""))[1] in ("ray", "slurm")


def share_of_cores() -> dict[str, str]:
    """Threads of a job to which Slurm gave some of a machine's cores; Ray sets this itself."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), cores) if cores else {}


class Interruption(threading.Event):
    """Set when the launch was interrupted, which a job elsewhere learns from the sweep's folder."""

    def __init__(self, sweep: SweepPaths):
        super().__init__()
        self._sweep = sweep

    def is_set(self) -> bool:
        return self._sweep.is_interrupted()


@contextlib.contextmanager
def ending_jobs(runs: Sequence[RunPaths], sweep: SweepPaths) -> Iterator[None]:
    """Ends the jobs of a launch, wherever they run, when an exception ends the launch."""
    try:
        yield
    except BaseException:
        sweep.interrupt()
        end = time.monotonic() + 2 * GRACE_SECONDS
        with signals_ignored():
            for run in (run for run in runs if run.lock.exists()):
                # Held by its training until that has ended.
                with contextlib.suppress(BlockingIOError), lock_run(run, end - time.monotonic()):
                    pass
        raise


@contextlib.contextmanager
def collecting(target: str, lost: Callable[[str], T]) -> Iterator[None]:
    """While Hydra's launcher for Ray or submitit works: a job that raises, or whose process is
    lost, has a result like any other.

    Args:
        target: the launcher.
        lost: from a reason, what the launcher returns for such a job.
    """
    name = _PLUGINS.get(_plugin(target), ("", ""))[1]
    if name == "ray":
        with _collecting_from_ray(lost):
            yield
    elif name == "slurm":
        with _collecting_from_submitit(lost):
            yield
    else:
        yield


@contextlib.contextmanager
def _collecting_from_ray(lost: Callable[[str], T]) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    get, on_sigterm = ray.get, signal.getsignal(signal.SIGTERM)

    def get_or_lose(job: Any) -> Any:
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has put its own in place
        try:
            return get(job)
        except SystemExit:  # of that handler, but Ray forgets the status
            if callable(on_sigterm):
                on_sigterm(signal.SIGTERM, None)
            raise
        except ray.exceptions.RayError as error:
            return lost(f"its process was lost ({type(error).__name__} of Ray)")

    ray.get = get_or_lose
    try:
        yield
    finally:
        ray.get = get


@contextlib.contextmanager
def _collecting_from_submitit(lost: Callable[[str], T]) -> Iterator[None]:
    import submitit

    map_array = submitit.AutoExecutor.map_array
    jobs: list[Any] = []

    def submit(executor: Any, *args: Any) -> list[_Submitted]:
        jobs.extend(map_array(executor, *args))
        return [_Submitted(job, lost) for job in jobs]

    submitit.AutoExecutor.map_array = submit
    try:
        yield
    except BaseException as error:
        for job in jobs:
            if isinstance(job, submitit.SlurmJob):  # it may wait in the queue
                job.cancel(check=False)
        if isinstance(error, RuntimeError):  # of submitit, since its jobs' results raise nothing
            raise UserError(f"Slurm did not take the jobs: {_in_a_line(error)}") from None
        raise
    finally:
        submitit.AutoExecutor.map_array = map_array


class _Submitted:
    """A job of submitit whose results never raise."""

    def __init__(self, job: Any, lost: Callable[[str], object]):
        self._job, self._lost = job, lost

    def results(self) -> list[object]:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return list(self._job.results())
        except (FailedJobError, UncompletedJobError):
            log = self._job.paths.stderr
            return [self._lost(f"its process was lost (state {self._job.state}); see {log}")]


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class Follower:
    """Shows at the launching terminal what jobs elsewhere write into the sweep's folder."""

    def __init__(self, configs: Sequence[Config], sweep: SweepPaths, board: Board):
        self._configs, self._sweep, self._board = configs, sweep, board
        self._known = {c.job: self._files(c) for c in configs}
        self._first = dict(self._known)
        self._watches: dict[str, Callable[[], None]] = {}

    def _files(self, config: Config) -> tuple[object, object]:
        run = self._sweep.run(config.job)
        return _version(run.progress), _version(run.result)

    def has_result(self, config: Config) -> bool:
        """Whether a job's result is one of this launch."""
        result = self._files(config)[1]
        return result not in (None, self._first[config.job][1])

    def look(self) -> None:
        """Shows the news since the last look."""
        for config in self._configs:
            run, job = self._sweep.run(config.job), config.job
            before, now = self._known[job], self._files(config)
            self._known[job] = now
            if now[0] not in (None, before[0]) and job not in self._watches:
                self._watches[job] = self._board.started(config, run, "")
            if job in self._watches:
                self._watches[job]()
            if now[1] not in (None, before[1]):
                self._watches.pop(job, None)
                self._board.ended(config, run.read_result(), before=False)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Looks again and again, in a thread."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(_POLL_SECONDS):
                with contextlib.suppress(OSError):  # a network file system's bad moment
                    self.look()

        thread = threading.Thread(target=follow, daemon=True, name="follow jobs")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(OSError):
                self.look()


def _version(path: Path) -> tuple[int, int] | None:
    """Changes whenever a file is written anew; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino

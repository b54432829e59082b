"""Launchers for a cluster: `ich_ray` and `ich_slurm`, on the public interfaces of Ray and submitit.

Each job is called in a process of the cluster's engine and trains in a child of that process. A job
whose process or machine is lost becomes a row of the table, as everything else that can happen to
a job; Hydra's plug-ins for both engines raise at the first such job, and forget the others.

Neither library is imported before its launcher is used: they are extras, and take a second or more.
"""

from __future__ import annotations

import contextlib
import os
import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ich.base.config import Config, UserError
from ich.base.entry import one_line
from ich.base.records import Origin
from ich.base.results import SweepPaths
from ich.base.terminal import Board
from ich.launch.composing import ComposedJob
from ich.launch.jobs import VISIBLE, Slot, slurm_thread_limit, thread_limit, write_lost
from ich.launch.launcher import SweepLauncher, check_range
from ich.launch.remote import Follower, ending_jobs
from ich.launch.steps import board_for, prepare, train
from ich.tracking.places import tracking_environment
from ich.training.mode import JOBS_PER_GPU


@dataclass(frozen=True)
class PlacedJob:
    """One job, to be called in a process of the cluster; it is pickled on its way there.

    Args:
        config: the job.
        folder: where the sweep was launched; relative paths of the config start there.
        environment: what the training is given beside the environment of the engine's process.
        tracking: MLflow's variables where it was launched, for both.
    """

    config: Config
    folder: str
    environment: dict[str, str]
    tracking: dict[str, str]

    def __call__(self) -> float | None:
        """Trains; returns the monitored metric, None if the job did not finish."""
        os.chdir(self.folder)
        # Here too, for this process tells MLflow of a training that could not do so itself.
        os.environ.update(self.tracking)
        # What Slurm did give a job is truer than what was asked for.
        slot = Slot(environment=self.environment | slurm_thread_limit())
        # Silent: the launching terminal follows what the training writes into the sweep's folder.
        with Board([], Console(quiet=True)) as board:
            return train(self.config, board, slot)

    def checkpoint(self) -> object:
        """submitit's hook: what a Slurm job that is preempted or out of time does when it is
        queued again, which is the same, from the training's own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class LostJobError(Exception):
    """The process of a job ended without a word from the job."""


Wait = Callable[[], float | None]


class ClusterLauncher(SweepLauncher):
    """Checks all jobs, prepares their data, and has a cluster's engine place them.

    A subclass for an engine says how its settings are checked and how jobs are submitted.
    """

    @abstractmethod
    def check(self) -> None:
        """Refuses settings, before anything is prepared.

        Raises:
            UserError: a setting is out of range, or the engine does not know it.
        """

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What a training is given beside the environment of the engine's process."""

    @abstractmethod
    def submitted(self, calls: Sequence[PlacedJob]) -> AbstractContextManager[list[Wait]]:
        """Gives jobs to the engine, and takes back those still waiting if an exception leaves.

        Returns:
            For each job what waits for its score, and raises LostJobError if it is lost.

        Raises:
            UserError: the engine is not there, or does not take them.
        """

    def placed(self, job: ComposedJob) -> PlacedJob:
        """A job as it goes to a process of the cluster."""
        own = self.environment | dict(job.composed.hydra.job.env_set)
        return PlacedJob(job.config, str(Path.cwd()), own, tracking_environment())

    def launch_jobs(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        configs, calls = [job.config for job in jobs], [self.placed(job) for job in jobs]
        self.check()
        sweep = prepare(configs)
        # These are left in reverse. When an exception ends the launch, running jobs are first asked
        # to end, and have time for a checkpoint; then the engine takes back what still waits, and
        # the follower shows the last news.
        with ExitStack() as stack:
            board = stack.enter_context(board_for(*configs))
            follower = Follower(configs, sweep, board)
            stack.enter_context(follower.following())
            waits = stack.enter_context(self.submitted(calls))
            stack.enter_context(ending_jobs([sweep.run(c.job) for c in configs], sweep))
            # All of them now: the engine tells nobody here when it starts one.
            for job in jobs:
                self.on_start(job)
            return [
                self.on_end(job, _score_of(job.config, wait, sweep, follower))
                for job, wait in zip(jobs, waits, strict=True)
            ]


def _score_of(config: Config, wait: Wait, sweep: SweepPaths, follower: Follower) -> float | None:
    """Waits for a job; a lost one gets its row in the table."""
    try:
        return wait()
    except LostJobError as error:
        record, run = sweep.read_record(), sweep.run(config.job)
        origin, parent = record.origins.get(config.job, Origin()), record.mlflow_run
        write_lost(config, run, origin, parent, str(error), lambda: follower.has_result(config))
        return None


class RayLauncher(ClusterLauncher):
    """Places each job as a task of Ray.

    Args:
        ray: `init`, which goes to `ray.init`, and `remote`, what each job gets, to `ray.remote`.
    """

    def __init__(self, ray: DictConfig) -> None:
        # Plain values with nothing left to resolve: neither engine knows OmegaConf's nodes.
        settings: Any = OmegaConf.to_container(ray, resolve=True)
        self.init, self.remote = settings["init"] or {}, settings["remote"] or {}

    @property
    def environment(self) -> dict[str, str]:
        # Ray sets the threads to a job's cores. It hides GPUs from a job that asked for none only
        # in earlier versions.
        gpus = self.remote.get("num_gpus")
        if not gpus:
            return {VISIBLE: ""}
        return {JOBS_PER_GPU: str(max(1, round(1 / gpus)))}

    def check(self) -> None:
        # Ray reports on its use unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        try:
            # Without a setting, ray.remote is not to be called.
            decorate = ray.remote(**self.remote) if self.remote else ray.remote
            self.function = decorate(_call)
        except (ValueError, TypeError) as error:
            raise UserError(f"hydra.launcher.ray.remote: {one_line(error)}") from None

    @contextlib.contextmanager
    def submitted(self, calls: Sequence[PlacedJob]) -> Iterator[list[Wait]]:
        self._start()
        # Futures, not `ray.get`: that forgets the exit status of a signal that arrives while it
        # waits. Nothing is to be taken back from Ray: jobs that wait return at once when the
        # launch was interrupted, and Ray drops what is left with this process.
        futures = [self.function.remote(call).future() for call in calls]
        yield [partial(_wait_for_ray, future) for future in futures]

    def _start(self) -> None:
        import ray

        if ray.is_initialized():  # an earlier batch of this process
            return
        # ray.init puts a handler of its own there.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**self.init)
        except SystemExit as end:  # ray.init's own handler exits with the signal's bare number
            code = 128 + signal.SIGTERM if end.code == signal.SIGTERM else end.code
            raise SystemExit(code) from None
        except (ValueError, TypeError, RuntimeError, ConnectionError) as error:
            raise UserError(f"Ray did not start: {one_line(error)}") from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)


def _call(job: PlacedJob) -> float | None:
    return job()


def _wait_for_ray(future: Any) -> float | None:
    from ray.exceptions import RayError, RayTaskError

    try:
        score: float | None = future.result()
    # First, for it is a RayError too: the process lived, and raised.
    except RayTaskError as error:
        cause = f"{type(error.cause).__name__}: {one_line(error.cause)}"
        raise LostJobError(f"its process failed ({cause})") from error
    except RayError as error:
        raise LostJobError(f"its process was lost ({type(error).__name__} of Ray)") from error
    return score


# Checked here: sbatch would refuse them only once the data have been prepared.
_AT_LEAST = {
    "timeout_min": 1,
    "gpus_per_node": 0,
    "cpus_per_task": 1,
    "mem_gb": 0,
    "signal_delay_s": 0,
    "max_num_timeout": 0,
    "array_parallelism": 1,
}
# Names that submitit has for every cluster; sbatch's others have `slurm_` in front.
_GENERIC = (
    *("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node"),
    *("tasks_per_node", "stderr_to_stdout"),
)


class SlurmLauncher(ClusterLauncher):
    """Places each job as a Slurm job of submitit's, or as a process on this machine.

    Args:
        submitit_folder: where submitit keeps what goes to a Slurm job and what it printed.
        cluster: `slurm`, or `local` for processes of this machine.
        settings: submitit's, most of which become sbatch's; null leaves one out.
    """

    def __init__(self, submitit_folder: str, cluster: str = "slurm", **settings: Any) -> None:
        self.folder, self.cluster = submitit_folder, cluster
        plain: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
        self.settings: dict[str, Any] = {k: v for k, v in plain.items() if v is not None}

    @property
    def environment(self) -> dict[str, str]:
        # Of what Slurm gives, and where there is no Slurm to give it.
        return thread_limit(self.settings.get("cpus_per_task"))

    def check(self) -> None:
        if self.cluster not in ("slurm", "local"):
            raise UserError(
                f"hydra.launcher.cluster is {self.cluster!r}, but must be slurm or local."
            )
        for key, low in _AT_LEAST.items():
            check_range(key, self.settings.get(key, low), low)
        for key in ("nodes", "tasks_per_node"):  # each task would train the same job
            check_range(key, self.settings.get(key, 1), 1, 1)
        # Names and types are submitit's to check. It does so for whatever cluster; this one needs
        # neither Slurm nor a folder.
        self._executor("debug")

    def _executor(self, cluster: str, **options: Any) -> Any:
        """submitit's executor with our settings.

        Raises:
            UserError: a setting has a name or a type that sbatch does not take.
        """
        import submitit

        # max_num_timeout is submitit's own, not sbatch's: `_submit` gives it to the executor.
        settings = {k: v for k, v in self.settings.items() if k != "max_num_timeout"}
        executor = submitit.AutoExecutor(self.folder, cluster, **options)
        try:
            executor.update_parameters(
                **{k if k in _GENERIC else f"slurm_{k}": v for k, v in settings.items()}
            )
        # submitit's errors for a value of a wrong type and for a name it does not know.
        except (AssertionError, NameError) as error:
            raise UserError(f"hydra.launcher: {one_line(error)}") from None
        return executor

    def _submit(self, calls: Sequence[PlacedJob]) -> list[Any]:
        """submitit's jobs, as one array: sbatch is called once, and array_parallelism holds."""
        times = {f"{self.cluster}_max_num_timeout": self.settings.get("max_num_timeout", 0)}
        try:
            return list(self._executor(self.cluster, **times).submit_array(calls))
        # As on a machine without Slurm.
        except RuntimeError as error:
            engine = "Slurm" if self.cluster == "slurm" else "submitit"
            raise UserError(f"{engine} did not take the jobs: {one_line(error)}") from None

    @contextlib.contextmanager
    def submitted(self, calls: Sequence[PlacedJob]) -> Iterator[list[Wait]]:
        from submitit import SlurmJob

        jobs = self._submit(calls)
        try:
            yield [partial(_wait_for_submitit, job) for job in jobs]
        except BaseException:
            # A Slurm job may wait in the queue. A process of this machine is not to be ended so:
            # that would leave its training no time for a checkpoint.
            for job in (job for job in jobs if isinstance(job, SlurmJob)):
                job.cancel(check=False)
            raise


def _wait_for_submitit(job: Any) -> float | None:
    from submitit.core.utils import FailedJobError

    # Waits until the job has ended, and gives None for one that returned.
    error, log = job.exception(), job.paths.stderr
    if isinstance(error, FailedJobError):  # its process lived, and raised
        raise LostJobError(f"its process failed ({_last_of_trace(str(error))}); see {log}")
    if error:
        raise LostJobError(f"its process was lost (state {job.state}); see {log}")
    score: float | None = job.result()
    return score


def _last_of_trace(text: str) -> str:
    """What was raised, of submitit's text: a traceback between two ruled lines, and where its logs
    are."""
    trace = text.split("\n----------------------\n")[1:2] or [text]
    return one_line(trace[0].strip().splitlines()[-1])

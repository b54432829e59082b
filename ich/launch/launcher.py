"""Hydra launchers: every job of a launch is composed and checked before the first one starts.

Hydra's own launchers start the first job before they have looked at the second. Here all jobs are
composed and checked, and their data prepared once, whichever launcher then places them: `local` in
slots on this machine, `ich_ray` and `ich_slurm` (`ich.launch.clusters`) in processes of a cluster,
or any other launcher of Hydra's, wrapped (`CheckFirst`).
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ich.base.config import Device, UserError
from ich.launch.command import Carried
from ich.launch.composing import ComposedJob, compose_jobs
from ich.launch.jobs import Slot, cpu_slots, gpu_slots, gpus_of, run_in_slots, visible_gpus
from ich.launch.remote import ending_jobs
from ich.launch.sharing import AUTO, shared_slots
from ich.launch.steps import board_for, plan, prepare, train

_OURS = "hydra_plugins.ich_launcher."
_LOCAL = f"{_OURS}LocalLauncher"
_CLUSTERS = (f"{_OURS}RayLauncher", f"{_OURS}SlurmLauncher")
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Beginning of a `_target_` -> what it imports, the option that chose it, our extra that installs it
_EXTRAS = {
    _CLUSTERS[0]: ("ray", "hydra/launcher=ich_ray", "ray"),
    _CLUSTERS[1]: ("submitit", "hydra/launcher=ich_slurm", "slurm"),
    "hydra_plugins.hydra_optuna_sweeper.": (
        *("hydra_plugins.hydra_optuna_sweeper", "hydra/sweeper=ich_optuna", "optuna"),
    ),
}


class SweepLauncher(Launcher):
    """Composes all jobs of a launch before any of them is placed.

    A job that an optimizing sweeper's sampler asks for twice in a batch is run once.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        requested = [tuple(overrides) for overrides in job_overrides]
        # A user who names a value twice is told so instead.
        by_user = _target(self.config.hydra.sweeper) == _BASIC_SWEEPER
        unique = requested if by_user else list(dict.fromkeys(requested))
        done = self.launch_jobs(compose_jobs(self.context, self.config, unique, initial_job_idx))
        return done if by_user else [done[unique.index(overrides)] for overrides in requested]

    @abstractmethod
    def launch_jobs(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        """Checks jobs, no two of which are the same, and runs them."""

    # Hydra's `run_job` would call the task function here. Jobs of ours run in other processes, from
    # their typed config alone, so callbacks are called and results wrapped on this side.

    def on_start(self, job: ComposedJob) -> None:
        """Tells Hydra's callbacks that a job starts."""
        self.context.callbacks.on_job_start(config=job.composed, task_function=self.task)

    def on_end(self, job: ComposedJob, score: float | None) -> JobReturn:
        """What Hydra's callbacks and sweepers get of a job, whatever became of it.

        Args:
            job: the job.
            score: its monitored metric; None if it did not finish.
        """
        # As Hydra's `run_job` would fill it.
        done, composed = JobReturn(), job.composed
        done.overrides = OmegaConf.to_container(composed.hydra.overrides.task)  # type: ignore[assignment]
        done.hydra_cfg = OmegaConf.create({"hydra": composed.hydra})
        task_items = {k: v for k, v in composed.items_ex(resolve=False) if k != "hydra"}
        done.cfg = OmegaConf.create(task_items)
        done.working_dir = str(Path.cwd())
        # Never FAILED: Hydra's sweepers would raise at the first, and forget the others.
        done.return_value, done.status = score, JobStatus.COMPLETED
        self.context.callbacks.on_job_end(config=composed, job_return=done)
        return done


def check_range(
    key: str, value: object, low: float, high: float = float("inf"), word: str = ""
) -> None:
    """Refuses a launcher's setting that is no number from `low` to `high`; with a word, neither
    that nor a whole number.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, int if word else int | float) and low <= value <= high:
        return
    if word and value == word:
        return
    allowed = f"from {low} to {high}" if high < float("inf") else f"at least {low}"
    allowed = f"{low}" if low == high else allowed
    allowed += f", or {word}" if word else ""
    raise UserError(f"hydra.launcher.{key} is {value}, but must be {allowed}.")


class LocalLauncher(SweepLauncher):
    """Checks all jobs, prepares their data, and runs them in slots on this machine.

    Args:
        gpus: how many of the visible GPUs are used; null takes all, 0 none.
        jobs_per_gpu: how many jobs share one; `auto`: as many as fit and pay.
        cpu_jobs: how many jobs run at once where there is no GPU; they share the cores.
    """

    def __init__(
        self, gpus: int | None = None, jobs_per_gpu: int | str = 1, cpu_jobs: int = 1
    ) -> None:
        self.gpus, self.jobs_per_gpu, self.cpu_jobs = gpus, jobs_per_gpu, cpu_jobs

    def launch_jobs(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        # First: a setting out of range is refused before data are prepared.
        slots, configs = self.slots(jobs), [job.config for job in jobs]
        sweep = prepare(configs)
        stop, lock = threading.Event(), threading.Lock()

        def work(job: ComposedJob, slot: Slot) -> JobReturn:
            with lock:  # callbacks know nothing of threads
                self.on_start(job)
            score = train(job.config, board, slot, stop)
            with lock:
                return self.on_end(job, score)

        with contextlib.ExitStack() as stack:
            if self.jobs_per_gpu == AUTO and (gpus := gpus_of(slots)):
                slots = stack.enter_context(shared_slots(configs, sweep, gpus))
            board = stack.enter_context(board_for(*configs))
            return run_in_slots(work, jobs, slots, stop)

    def slots(self, jobs: Sequence[ComposedJob]) -> list[Slot]:
        """The places for these jobs on this machine; one on each GPU where `auto` is to say how
        many.

        Raises:
            UserError: a setting is out of range.
        """
        check_range("jobs_per_gpu", self.jobs_per_gpu, 1, 64, AUTO)
        check_range("cpu_jobs", self.cpu_jobs, 1, 64)
        # To look for GPUs imports torch, which takes seconds that jobs on the CPU need not wait.
        wanted = any(job.config.train.device is not Device.cpu for job in jobs)
        gpus = visible_gpus() if wanted and self.gpus != 0 else []
        if self.gpus is not None and (gpus or self.gpus < 0):
            check_range("gpus", self.gpus, 0, len(gpus))
        if gpus:
            at_once = self.jobs_per_gpu if isinstance(self.jobs_per_gpu, int) else 1
            return gpu_slots(gpus[: self.gpus], at_once)
        if any(job.config.train.device is Device.cuda for job in jobs):
            hidden = "hydra.launcher.gpus is 0" if self.gpus == 0 else "no GPU is visible"
            raise UserError(
                f"train.device is cuda, but {hidden}. Set it to auto or cpu, or see to "
                f"CUDA_VISIBLE_DEVICES and hydra.launcher.gpus."
            )
        return cpu_slots(self.cpu_jobs)


class CheckedLauncher(SweepLauncher):
    """Checks all jobs and prepares their data before another launcher, not of ours, places them.

    Args:
        wrapped: the `_target_` of that launcher. Its settings stay in its config, where `setup`
            finds them: Hydra refuses to instantiate what names a plugin within a plugin.
    """

    def __init__(self, wrapped: str, **_: Any) -> None:
        self.wrapped = wrapped

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        config = config.copy()
        with read_write(config), open_dict(config):
            del config.hydra.launcher.wrapped
            config.hydra.launcher._target_ = self.wrapped
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def launch_jobs(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        sweep = prepare([job.config for job in jobs])
        # The other launcher composes each job again, perhaps on another machine, where nothing
        # tells what the sweep varies, and so not what the job is called.
        named = [
            [*job.overrides, f"name={job.config.name}", f"job='{job.config.job}'"] for job in jobs
        ]
        with ending_jobs([sweep.run(job.config.job) for job in jobs], sweep):
            first: int = jobs[0].composed.hydra.job.num
            done: Sequence[JobReturn] = self.launcher.launch(named, first)
        return done


class PlanLauncher(SweepLauncher):
    """Says what a launch would do, and does nothing: `sweep.plan=true`.

    Args:
        wrapped: the `_target_` of the launcher that would place the jobs.
        settings: its settings.
    """

    def __init__(self, wrapped: str, **settings: Any) -> None:
        self.wrapped, self.settings = wrapped, settings

    def launch_jobs(self, jobs: Sequence[ComposedJob]) -> Sequence[JobReturn]:
        gpus: list[str] = []
        if self.wrapped == _LOCAL:
            gpus = gpus_of(LocalLauncher(**self.settings).slots(jobs))
        plan([job.config for job in jobs], gpus, self.settings.get("jobs_per_gpu", 1))
        # An optimizing sweeper would ask for results before it can say what comes next.
        raise SystemExit(0)


class CheckFirst(Callback):
    """Wraps whatever launcher was chosen, if it is not one of ours, and plans if that is asked.

    What it refuses is carried past Hydra, which would only warn of an exception in a callback.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        # Without -m, Hydra would run the one job here and say nothing.
        if _target(config.hydra.launcher) in _CLUSTERS:
            raise Carried(
                UserError("only a sweep's jobs are given to a launcher. Add -m, for one job too.")
            )
        if config.sweep.plan:
            self._write_nothing(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        launcher, sweeper = _target(config.hydra.launcher), _target(config.hydra.sweeper)
        for target in (launcher, sweeper):
            if missing := missing_extra(target):
                raise Carried(UserError(missing))
        if config.sweep.plan:
            self._write_nothing(config, "sweep")
            _wrap(config, f"{_OURS}PlanLauncher")
            return
        if sweeper != _BASIC_SWEEPER:  # its own results belong to the sweep's
            with read_write(config):
                config.hydra.sweep.dir = f"{config.sweep.output}/{config.name}"
        if not launcher.startswith(_OURS):
            _wrap(config, f"{_OURS}CheckedLauncher")

    def _write_nothing(self, config: DictConfig, mode: str) -> None:
        """Hydra notes the command in a folder: in one that is gone afterwards."""
        # Held by this object, so that the folder goes when the process ends.
        self._scratch = TemporaryDirectory(prefix="ich-plan-")
        with read_write(config):
            config.hydra[mode].dir = self._scratch.name


def missing_extra(target: str) -> str | None:
    """What to say if a `_target_` needs one of our extras that is not installed."""
    for beginning, (package, option, extra) in _EXTRAS.items():
        if target.startswith(beginning) and not find_spec(package):
            return f"{option} needs a package that is not installed: pip install 'ich[{extra}]'"
    return None


def _target(node: DictConfig | str) -> str:
    if isinstance(node, DictConfig):
        return str(node.get("_target_", ""))
    raise Carried(
        UserError(f"a launcher or sweeper is chosen with a slash: hydra/launcher={node}.")
    )


def _wrap(config: DictConfig, wrapper: str) -> None:
    """Puts one of our launchers in the place of the chosen one, and leaves it its settings."""
    # A plain dict, with its interpolations as they stand: a launcher's own schema takes no new key.
    settings: Any = OmegaConf.to_container(config.hydra.launcher)
    with read_write(config), open_dict(config):
        config.hydra.launcher = settings | {
            "_target_": wrapper,
            "wrapped": _target(config.hydra.launcher),
        }

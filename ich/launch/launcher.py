"""Hydra launchers and the resolvers that name a sweep's and a job's folder.

Hydra's own launchers start the first job before they have looked at the second. Here all jobs of a
launch are composed and checked, and their data prepared once, whichever launcher then places them:
`local` in slots on this machine, or any other, wrapped (`CheckFirst`). Each job is supervised as a
child process (`ich.launch.jobs`), so none can end the sweep.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from ich.base.config import Config, Device, Monitor, to_dataclass
from ich.base.entry import without_traceback
from ich.base.naming import job_name, sweep_name
from ich.base.records import FAILED, RunResult
from ich.base.results import State, SweepPaths
from ich.base.terminal import Board, Terminal, console
from ich.launch import clusters
from ich.launch.jobs import (
    VISIBLE,
    Slot,
    cpu_slots,
    gpu_slots,
    run_in_slots,
    run_job,
    visible_gpus,
    write_lost,
)
from ich.launch.preflight import open_sweep

# The sweeps this process launched. `ich.sweep.main` closes them, whatever became of the jobs.
launched: list[SweepPaths] = []
_OURS = "hydra_plugins.ich_launcher."
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class OnceLauncher(Launcher):
    """Runs a job once that an optimizing sweeper's sampler asks for twice in a batch."""

    config: DictConfig

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        asked = [tuple(overrides) for overrides in job_overrides]
        # A user who names a value twice is told so instead.
        by_user = _target(self.config.hydra.sweeper) == _BASIC_SWEEPER
        jobs = asked if by_user else list(dict.fromkeys(asked))
        done = self.launch_jobs(jobs, initial_job_idx)
        return done if by_user else [done[jobs.index(job)] for job in asked]

    @abstractmethod
    def launch_jobs(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Checks jobs, no two of which are the same, and runs them."""


class LocalLauncher(OnceLauncher):
    """Checks all jobs, prepares their data, and runs them in slots on this machine.

    Args:
        gpus: how many of the visible GPUs are used; null takes all, 0 none.
        jobs_per_gpu: how many jobs share one.
        cpu_jobs: how many jobs run at once where there is no GPU; they share the cores.
    """

    def __init__(self, gpus: int | None = None, jobs_per_gpu: int = 1, cpu_jobs: int = 1) -> None:
        self.gpus, self.jobs_per_gpu, self.cpu_jobs = gpus, jobs_per_gpu, cpu_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch_jobs(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        jobs = compose_jobs(self.context, self.config, job_overrides, initial_job_idx)
        configs = [without_hydra(job) for job in jobs]
        slots = self.slots(configs)
        sweep = prepare(configs)
        stop, lock = threading.Event(), threading.Lock()

        def work(number: int, slot: Slot) -> JobReturn:
            return self._run(jobs[number], configs[number], slot, stop, lock, board)

        with Board(sweep.read_record().jobs) as board:
            return run_in_slots(work, range(len(jobs)), slots, stop)

    def slots(self, configs: Sequence[Config]) -> list[Slot]:
        """The places for these jobs on this machine.

        Raises:
            CompactHydraException: a setting is out of range.
        """
        self._check()
        wanted = any(c.train.device is not Device.cpu for c in configs)
        gpus = visible_gpus() if wanted and self.gpus != 0 else []
        if gpus:
            return gpu_slots(gpus[: self.gpus], self.jobs_per_gpu)
        return cpu_slots(self.cpu_jobs)

    def _check(self) -> None:
        values = {"jobs_per_gpu": self.jobs_per_gpu, "cpu_jobs": self.cpu_jobs}
        for key, value in values.items():
            if not 1 <= value <= 64:
                raise CompactHydraException(
                    f"ich: hydra.launcher.{key} is {value}, but must be from 1 to 64."
                )

    def _run(
        self,
        job: DictConfig,
        config: Config,
        slot: Slot,
        stop: threading.Event,
        lock: threading.Lock,
        board: Board,
    ) -> JobReturn:
        """One job, with what Hydra and its callbacks are used to be told of it."""
        done = JobReturn()
        done.overrides = OmegaConf.to_container(job.hydra.overrides.task)  # type: ignore[assignment]
        done.hydra_cfg = OmegaConf.create({"hydra": job.hydra})
        done.cfg = OmegaConf.create({k: v for k, v in job.items_ex(resolve=False) if k != "hydra"})
        done.working_dir = str(Path.cwd())
        with lock:
            self.context.callbacks.on_job_start(config=job, task_function=self.task)
        done.return_value = train(config, board, slot, stop)
        done.status = JobStatus.COMPLETED
        with lock:
            self.context.callbacks.on_job_end(config=job, job_return=done)
        return done


class CheckedLauncher(OnceLauncher):
    """Checks all jobs and prepares their data before another launcher places them."""

    # Its config. Not in ours: Hydra refuses to instantiate what names a plugin within a plugin.
    inner: DictConfig

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config.copy()
        with read_write(self.config), open_dict(self.config):
            self.config.hydra.launcher = self.inner
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=self.config
        )

    def launch_jobs(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        jobs = compose_jobs(self.context, self.config, job_overrides, initial_job_idx)
        configs = [without_hydra(job) for job in jobs]
        sweep = prepare(configs)
        # A job on another machine cannot know what the sweep varies, and so not what it is called.
        named = [
            [*overrides, f"name={job.name}", f"job='{job.job}'"]
            for overrides, job in zip(job_overrides, jobs, strict=True)
        ]
        with without_traceback():
            return self._launch(named, initial_job_idx, configs, sweep)

    def _launch(
        self,
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
        configs: Sequence[Config],
        sweep: SweepPaths,
    ) -> Sequence[JobReturn]:
        target = str(self.inner._target_)
        with ExitStack() as stack:
            board = stack.enter_context(Board(sweep.read_record().jobs))
            follower = clusters.Follower(configs, sweep, board)
            if clusters.is_elsewhere(target):
                stack.enter_context(follower.following())
            stack.enter_context(clusters.collecting(target, LostJob))
            stack.enter_context(clusters.ending_jobs([sweep.run(c.job) for c in configs], sweep))
            done: Sequence[JobReturn] = self.launcher.launch(job_overrides, initial_job_idx)
            for config, job in zip(configs, done, strict=True):
                if isinstance(job, LostJob) and not follower.has_result(config):
                    job.record(config, sweep)
        return done


class LostJob(JobReturn):
    """What another launcher returns for a job whose process was lost."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason, self.status = reason, JobStatus.COMPLETED

    def record(self, config: Config, sweep: SweepPaths) -> None:
        """Gives the job its row in the table."""
        record, run = sweep.read_record(), sweep.run(config.job)
        write_lost(config, run, record.origins[config.job], record.mlflow_run, self.reason)


class PlanLauncher(Launcher):
    """Says what a launch would do, and does nothing: `sweep.plan=true`."""

    # The config of the launcher that would place the jobs, see `CheckedLauncher`.
    inner: DictConfig

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        jobs = compose_jobs(self.context, self.config, job_overrides, initial_job_idx)
        configs = [without_hydra(job) for job in jobs]
        gpus = 1
        if str(self.inner._target_) == f"{_OURS}LocalLauncher":
            settings = {str(k): v for k, v in self.inner.items() if k != "_target_"}
            gpus = len(
                {slot.environment.get(VISIBLE) for slot in LocalLauncher(**settings).slots(configs)}
            )
        plan(configs, gpus)
        # An optimizing sweeper would ask for results before it can say what comes next.
        raise SystemExit(0)


class CheckFirst(Callback):
    """Wraps whatever launcher was chosen, if it is not one of ours, and plans if that is asked.

    Exits where it refuses: of an exception in a callback, Hydra would only warn.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if clusters.is_elsewhere(_target(config.hydra.launcher)):
            sys.exit("ich: only a sweep's jobs are given to a launcher. Add -m, for one job too.")
        if config.sweep.plan:
            self._write_nothing(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        chosen, sweeper = config.hydra.launcher, config.hydra.sweeper
        for target in (_target(chosen), _target(sweeper)):
            if missing := clusters.missing_extra(target):
                sys.exit(f"ich: {missing}")
        if config.sweep.plan:
            self._write_nothing(config, "sweep")
            PlanLauncher.inner = chosen.copy()
            with read_write(config), open_dict(config):
                config.hydra.launcher = {"_target_": f"{_OURS}PlanLauncher"}
            return
        if _target(sweeper) != _BASIC_SWEEPER:  # its own results belong to the sweep's
            with read_write(config):
                config.hydra.sweep.dir = f"{config.sweep.output}/{config.name}"
        if not _target(chosen).startswith(_OURS):
            CheckedLauncher.inner = chosen.copy()
            with read_write(config), open_dict(config):
                config.hydra.launcher = {"_target_": f"{_OURS}CheckedLauncher"}

    def _write_nothing(self, config: DictConfig, mode: str) -> None:
        """Hydra notes the command in a folder: in one that is gone afterwards."""
        self._scratch = TemporaryDirectory(prefix="ich-plan-")
        with read_write(config):
            config.hydra[mode].dir = self._scratch.name


def _target(node: DictConfig) -> str:
    return str(node.get("_target_", ""))


def compose_jobs(
    context: HydraContext,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[DictConfig]:
    """The composed config of every job of a batch, each with its fixed name and folder."""
    swept = swept_keys(config.hydra)
    jobs = []
    for index, overrides in enumerate(job_overrides, start=initial_job_idx):
        job = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id, job.hydra.job.num = str(index), index
            # Fixed here: seen from inside one job, nothing tells what the sweep varies.
            job.name = str(config.name)
            job.job = job_name(job.hydra.overrides.task, swept, job.model.name)
        jobs.append(job)
    return jobs


def prepare(configs: Sequence[Config]) -> SweepPaths:
    """Opens the sweep of these jobs with a progress display; a user's mistake is one paragraph."""
    with without_traceback(), Terminal().preparing() as report:
        sweep, jobs = open_sweep(configs, report)
    if sweep not in launched:
        launched.append(sweep)
    other = [job.config.job for job in jobs if job.is_of_other_code]
    Terminal().opened(sweep, [job.state for job in jobs], other)
    return sweep


def plan(configs: Sequence[Config], at_once: int = 1) -> None:
    """Prints what a launch of these jobs would do, over so many processors; starts nothing."""
    with without_traceback():
        from ich.launch.plan import describe_plan, make_plan

        with Terminal().preparing() as report:
            made = make_plan(configs, report)
    headings, rows, sentences = describe_plan(made, at_once)
    place = SweepPaths(Path(configs[0].sweep.output) / configs[0].name).root
    Terminal().tables(f"Plan of {place} (nothing is started)", [(headings, rows)], sentences)


def train(
    config: Config, board: Board, slot: Slot | None = None, stop: threading.Event | None = None
) -> float | None:
    """Runs one job of an opened sweep; returns the monitored metric, None if it did not finish.

    Raises:
        CompactHydraException: the sweep's folder is not to be seen from here.
    """
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    record, run = sweep.read_record(), sweep.run(config.job)
    if config.job not in record.origins:
        raise CompactHydraException(
            f"ich: {sweep.root} does not know the job {config.job!r}. A job on another machine "
            f"needs the launching folder at the same place, on a file system that both share."
        )
    if sweep.stopped.exists():
        return None
    slot = slot or Slot(environment=clusters.share_of_cores())
    stop = stop or clusters.Interruption(sweep)
    origin = record.origins[config.job]
    before = run.state(config, origin) is State.done
    watch = board.started(config, run, slot.name) if not before else lambda: None
    try:
        result = run_job(config, run, origin, record.mlflow_run, watch, slot, stop)
    except OSError as error:  # a full disk, mostly; the other jobs may have better luck
        result = RunResult(FAILED, f"its folder cannot be used: {error}")
    board.ended(config, result, before)
    if result.status == FAILED and config.sweep.on_failure.value == "stop":
        sweep.stop_after(config.job)
    return result.fit.val_scores[config.train.monitor.value] if result.fit else None


def board_for(config: Config) -> Board:
    """What a job that another launcher started shows, unless the launching process shows it."""
    jobs = SweepPaths(Path(config.sweep.output) / config.name).read_record().jobs
    silent = clusters.is_elsewhere(_target(HydraConfig.get().launcher))
    return Board(jobs, Console(quiet=True) if silent else console)


def enter() -> None:
    """Called by a job that a launcher has started, maybe in another process on another machine:
    goes to the folder where the sweep was launched, so that relative paths mean the same."""
    register_resolvers()
    launched_in = HydraConfig.get().runtime.cwd
    if Path(launched_in) != Path.cwd():
        os.chdir(launched_in)


def without_hydra(job: DictConfig) -> Config:
    """The typed config of a composed job."""
    plain = OmegaConf.create({k: v for k, v in OmegaConf.to_container(job).items() if k != "hydra"})  # type: ignore[union-attr]
    return to_dataclass(plain)


def swept_keys(hydra_cfg: Any) -> set[str]:
    """The keys a launch varies: sweep overrides, and the sweeper's own parameters."""
    parsed = OverridesParser.create().parse_overrides(list(hydra_cfg.overrides.task))
    params = hydra_cfg.sweeper.get("params") or {}
    return {o.get_key_element() for o in parsed if o.is_sweep_override()} | set(params)


def _hydra_cfg(root: DictConfig) -> Any:
    """Hydra's own node: in the config while Hydra composes, in its singleton inside a job."""
    return root.hydra if "hydra" in root else HydraConfig.get()


def _sweep_name(*, _root_: DictConfig) -> str:
    hydra_cfg = _hydra_cfg(_root_)
    choices = hydra_cfg.runtime.choices
    base = choices.get("experiment") or choices["data"]
    return sweep_name(hydra_cfg.overrides.task, swept_keys(hydra_cfg), str(base))


def _job_name(*, _root_: DictConfig) -> str:
    hydra_cfg = _hydra_cfg(_root_)
    return job_name(hydra_cfg.overrides.task, swept_keys(hydra_cfg), str(_root_.model.name))


def _direction(*, _root_: DictConfig) -> str:
    return "minimize" if _root_.train.monitor == Monitor.log_loss else "maximize"


def register_resolvers() -> None:
    """Makes `${ich.sweep_name:}`, `${ich.job_name:}` and `${ich.direction:}` known."""
    OmegaConf.register_new_resolver("ich.direction", _direction, replace=True)
    OmegaConf.register_new_resolver("ich.sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("ich.job_name", _job_name, replace=True)

"""Hydra launcher `local`, and the resolvers that name a sweep's and a job's folder.

Hydra's basic launcher starts the first job before it has looked at the second. This one composes
and checks all of them, prepares their data once, and then runs them one after another; each job is
a child process (`ich.jobs`), so none can end the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, run_job
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ich.config import Config, UserError, job_name, sweep_name, typed
from ich.preflight import open_sweep
from ich.results import SweepPaths
from ich.terminal import Terminal

# The sweep this process launched. `ich.sweep.main` closes it, whatever became of the jobs.
launched: list[tuple[SweepPaths, Config]] = []


class LocalLauncher(Launcher):
    """Checks all jobs, prepares their data, and runs them one after another on this machine."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        jobs = [self._compose(o, initial_job_idx + i) for i, o in enumerate(job_overrides)]
        prepare([without_hydra(job) for job in jobs])
        return [
            run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=job,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            for job in jobs
        ]

    def _compose(self, overrides: Sequence[str], index: int) -> DictConfig:
        swept = swept_keys(self.config.hydra)
        job = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(job):
            job.hydra.job.id, job.hydra.job.num = str(index), index
            # Fixed here: seen from inside one job, nothing tells what the sweep varies.
            job.name = str(self.config.name)
            job.job = job_name(job.hydra.overrides.task, swept, job.model.name)
        return job


def prepare(configs: Sequence[Config]) -> SweepPaths:
    """Opens the sweep of these jobs with a progress display; a user's mistake is one paragraph."""
    with Terminal().preparing() as report:
        try:
            sweep = open_sweep(configs, report)
        except UserError as error:
            raise CompactHydraException(f"ich: {error}") from None
        except OSError as error:
            raise CompactHydraException(f"ich: a folder or file cannot be used: {error}") from None
    if sweep not in [s for s, _ in launched]:
        launched.append((sweep, configs[0]))
    done = sum(sweep.run(c.job).is_finished(c) for c in configs)
    Terminal().opened(sweep, len(configs), done)
    return sweep


def without_hydra(job: DictConfig) -> Config:
    """The typed config of a composed job."""
    plain = OmegaConf.create({k: v for k, v in OmegaConf.to_container(job).items() if k != "hydra"})  # type: ignore[union-attr]
    return typed(plain)


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


def register_resolvers() -> None:
    """Makes `${ich.sweep_name:}` and `${ich.job_name:}` known."""
    OmegaConf.register_new_resolver("ich.sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("ich.job_name", _job_name, replace=True)

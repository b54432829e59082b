"""From a command to its jobs: their composed configs, and the names of the sweep and of each job.

The only place that knows what a sweep varies; a job, seen alone, does not show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from ich.base.config import Config, Monitor, to_dataclass
from ich.base.naming import job_name, sweep_name


@dataclass(frozen=True)
class ComposedJob:
    """One job of a launch.

    Args:
        overrides: what tells it from the others, as the sweeper gave them.
        composed: its config with Hydra's own node, as callbacks get it.
        config: the same, typed and without Hydra's node.
    """

    overrides: list[str]
    composed: DictConfig
    config: Config


def compose_jobs(
    context: HydraContext,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[ComposedJob]:
    """Composes every job of a batch, each with its fixed name and folder."""
    swept = swept_keys(config.hydra)
    jobs = []
    for index, overrides in enumerate(job_overrides, start=initial_job_idx):
        composed = context.config_loader.load_sweep_config(config, list(overrides))
        # As Hydra's launchers number a job before they run it: folders and callbacks ask for it.
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(index), index
            # Fixed here: seen from inside one job, nothing tells what the sweep varies.
            composed.name = str(config.name)
            composed.job = job_name(composed.hydra.overrides.task, swept, composed.model.name)
        jobs.append(ComposedJob(list(overrides), composed, without_hydra(composed)))
    return jobs


def without_hydra(composed: DictConfig) -> Config:
    """The typed config of a composed job."""
    container: Any = OmegaConf.to_container(composed)
    return to_dataclass(OmegaConf.create({k: v for k, v in container.items() if k != "hydra"}))


def swept_keys(hydra_cfg: Any) -> set[str]:
    """The keys a launch varies: sweep overrides, and the sweeper's own parameters."""
    # On the command line (`model=a,b`), or in hydra.sweeper.params, where experiments have theirs.
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
    # `replace`: a process that composes several times, as the benchmark's, comes here again.
    OmegaConf.register_new_resolver("ich.direction", _direction, replace=True)
    OmegaConf.register_new_resolver("ich.sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("ich.job_name", _job_name, replace=True)

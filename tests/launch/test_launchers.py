"""Launchers without an engine: what they refuse, and what becomes of their settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from sweeps import SMALL

from ich.base.config import CONF_DIR, Config, UserError, register_schemas
from ich.base.records import Origin, RunResult
from ich.base.results import RunPaths, State, SweepPaths
from ich.launch.clusters import LostJobError, PlacedJob, RayLauncher, SlurmLauncher
from ich.launch.composing import ComposedJob, register_resolvers
from ich.launch.jobs import write_lost
from ich.launch.launcher import CheckedLauncher, CheckFirst, PlanLauncher, missing_extra


def compose_hydra(*overrides: str) -> DictConfig:
    """Hydra's own part of a composed config."""
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True).hydra


def settings(*overrides: str) -> dict[str, Any]:
    """A launcher's settings, as Hydra would give them to it."""
    node: Any = OmegaConf.to_container(compose_hydra(*overrides).launcher, resolve=True)
    return {k: v for k, v in node.items() if k != "_target_"}


def slurm(*overrides: str) -> SlurmLauncher:
    return SlurmLauncher(**settings("hydra/launcher=ich_slurm", *overrides))


def ray(*overrides: str) -> RayLauncher:
    chosen = settings("hydra/launcher=ich_ray", *overrides)
    return RayLauncher(OmegaConf.create(chosen["ray"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster=cloud", "hydra.launcher.cluster is 'cloud', but must be slurm or local."),
        ("nodes=2", "hydra.launcher.nodes is 2, but must be 1."),
        ("tasks_per_node=4", "hydra.launcher.tasks_per_node is 4, but must be 1."),
        ("timeout_min=0", "hydra.launcher.timeout_min is 0, but must be at least 1."),
        ("array_parallelism=x", "hydra.launcher.array_parallelism is x, but must be at least 1."),
        ("cpus_per_task=1.5", 'hydra.launcher: Parameter "cpus_per_task" expected type'),
        ("+qos=long", None),
        ("+quality=long", "hydra.launcher: Unknown argument 'quality'"),
        ("gpus_per_node=null", None),
    ],
)
def test_what_slurm_would_not_take_is_said_before_anything_is_prepared(
    setting: str, message: str | None
) -> None:
    plus = "+" if setting.startswith("+") else ""
    launcher = slurm(f"{plus}hydra.launcher.{setting.lstrip('+')}")
    if message is None:
        launcher.check()
        return
    with pytest.raises(UserError) as raised:
        launcher.check()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_training_has_the_threads_of_its_cores_and_no_gpu_that_it_did_not_ask_for() -> None:
    assert slurm().environment == {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    assert slurm("hydra.launcher.cpus_per_task=null").environment == {}
    assert ray().environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert ray("hydra.launcher.ray.remote.num_gpus=0.5").environment == {"ICH_JOBS_PER_GPU": "2"}


def test_a_job_that_cannot_begin_is_lost_with_its_reason(
    tmp_path: Path, composed: Callable[..., Config]
) -> None:
    """As on a machine where the launching folder is not to be seen."""
    launcher = SlurmLauncher(str(tmp_path / "%j"), "local", timeout_min=5)
    call = PlacedJob(composed(), str(tmp_path / "elsewhere"), {}, {})
    with launcher.submitted([call]) as waits, pytest.raises(LostJobError) as raised:
        waits[0]()
    assert "its process failed (FileNotFoundError: " in str(raised.value)
    log = Path(str(raised.value).split("see ")[1])
    assert "elsewhere" in log.read_text()


def test_a_job_on_a_cluster_is_told_mlflows_variables(
    composed: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of Ray's does not inherit them, and would have made a database of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stroke")
    cfg = OmegaConf.create({"hydra": {"job": {"env_set": {}}}})
    placed = ray().placed(ComposedJob([], cfg, composed()))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    seen: list[str | None] = []

    def train(*_: object) -> None:
        seen.append(os.environ.get("MLFLOW_EXPERIMENT_NAME"))

    monkeypatch.setattr("ich.launch.clusters.train", train)
    placed()
    assert seen == ["stroke"]


def test_slurm_that_is_not_there_is_said_in_a_sentence(
    tmp_path: Path, composed: Callable[..., Config], phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # on a Slurm site it would be found
    monkeypatch.setattr("ich.launch.steps.launched", [])
    locks: dict[Path, IO[str]] = {}  # else open until the tests' process ends
    monkeypatch.setattr("ich.launch.preflight._locks", locks)
    config = composed(*SMALL, f'data.root="{phantom}"', "tracking=none")
    hydra = OmegaConf.create({"hydra": {"job": {"env_set": {}}}})
    job = ComposedJob([], hydra, config)
    with pytest.raises(UserError, match="Slurm did not take the jobs: Could not detect"):
        SlurmLauncher(str(tmp_path / "%j")).launch_jobs([job])
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    assert [r.status for r in sweep.read_results()] == ["not started"]
    locks[sweep.root.absolute()].close()


@pytest.mark.parametrize(
    ("option", "extra", "package"),
    [
        ("hydra/launcher=ich_ray", "ray", "ray"),
        ("hydra/launcher=ich_slurm", "slurm", "submitit"),
        ("hydra/sweeper=ich_optuna", "optuna", "hydra_plugins.hydra_optuna_sweeper"),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, option: str, extra: str, package: str
) -> None:
    chosen = compose_hydra(option)
    target = chosen.sweeper._target_ if "sweeper" in option else chosen.launcher._target_
    assert missing_extra(target) is None
    monkeypatch.setitem(sys.modules, package, None)
    message = f"{option} needs a package that is not installed: pip install 'ich[{extra}]'"
    assert missing_extra(target) == message


def test_a_lost_process_does_not_undo_a_finished_run(
    tmp_path: Path, composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunPaths(tmp_path / "job")
    run.root.mkdir()
    run.write_result(RunResult("finished"))
    before = run.result.read_text()
    monkeypatch.setattr(RunPaths, "state", lambda *_: State.done)
    write_lost(composed(), run, Origin(), None, "its process was lost", lambda: False)
    assert run.result.read_text() == before


def test_what_an_orphaned_training_wrote_counts(
    tmp_path: Path, composed: Callable[..., Config]
) -> None:
    run = RunPaths(tmp_path / "job")
    run.root.mkdir()
    run.write_result(RunResult("killed", "ended by SIGTERM or an interrupt"))
    write_lost(composed("tracking=none"), run, Origin(), None, "its process was lost", lambda: True)
    assert run.read_result().status == "killed"
    write_lost(composed("tracking=none"), run, Origin(), None, "it was lost", lambda: False)
    assert (run.read_result().status, run.read_result().reason) == ("failed", "it was lost")


# Launchers that are not ours


def chosen(**launcher: object) -> DictConfig:
    hydra = {
        "launcher": {"_target_": "hydra_plugins.other.Launcher", **launcher},
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
        "sweep": {"dir": "d"},
    }
    return OmegaConf.create({"hydra": hydra, "sweep": {"plan": False}})


def test_another_launcher_gets_its_own_config_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen(n_jobs=3, folder="${hydra.sweep.dir}/x", twice="${.n_jobs}")
    before = config.hydra.launcher.copy()
    CheckFirst().on_multirun_start(config)
    wrapper = config.hydra.launcher
    assert wrapper._target_ == "hydra_plugins.ich_launcher.CheckedLauncher"
    given: dict[str, Any] = {}
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", given.update)
    arguments = {k: v for k, v in wrapper.items() if k != "_target_"}
    CheckedLauncher(**arguments).setup(hydra_context=None, task_function=None, config=config)  # type: ignore[arg-type]
    assert given["config"].hydra.launcher == before
    assert given["config"].hydra.launcher.folder == "d/x"


def test_a_plan_knows_the_launcher_in_whose_place_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CheckFirst, "_write_nothing", lambda *_: None)
    config = chosen()
    config.hydra.launcher = {"_target_": "hydra_plugins.ich_launcher.LocalLauncher", "gpus": 2}
    config.sweep.plan = True
    CheckFirst().on_multirun_start(config)
    assert config.hydra.launcher._target_ == "hydra_plugins.ich_launcher.PlanLauncher"
    launcher = PlanLauncher(**{k: v for k, v in config.hydra.launcher.items() if k[0] != "_"})
    assert (launcher.wrapped, launcher.settings) == (
        *("hydra_plugins.ich_launcher.LocalLauncher", {"gpus": 2}),
    )

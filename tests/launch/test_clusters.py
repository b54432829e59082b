"""Sweeps under Ray, submitit and Optuna, for real: slow, `make test-faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import run_module
from sweeps import SMALL, Folder, wait_for

from ich.base.results import SweepPaths

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LAUNCHERS = {
    "ray": ["hydra/launcher=ich_ray", "hydra.launcher.ray.init.num_cpus=2"],
    "submitit": [
        *("hydra/launcher=ich_slurm", "hydra.launcher.cluster=local"),
        "hydra.launcher.cpus_per_task=1",
    ],
}


@pytest.fixture(params=LAUNCHERS)
def cluster(folder: Folder, request: pytest.FixtureRequest) -> Folder:
    """A folder whose sweeps run under Ray or submitit on this machine."""
    folder.launcher = LAUNCHERS[request.param]
    return folder


def training(folder: Folder, seed: int) -> tuple[int, int]:
    """The process that trains a job, and the one that supervises it, which the engine started."""
    for process, words in folder.processes().items():
        if "ich.train" in words and words[3].endswith(folder.job(seed)):
            return process, int(words[words.index("--watched-by") + 1])
    raise AssertionError("it does not run")


def has_checkpoint(folder: Folder, seed: int) -> bool:
    return any(folder.of(seed).root.glob("checkpoint-*.ich"))


def test_killed_jobs_are_rows_of_the_table_and_go_on_later(cluster: Folder) -> None:
    """One training is killed, and of another the engine's process too, as when a machine fails."""
    process = cluster.start(3, sabotage={0: ("SIGKILL", 40), 1: ("slow", 0)})
    wait_for(lambda: has_checkpoint(cluster, 1), 240)
    child, supervisor = training(cluster, 1)
    os.kill(supervisor, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    table = cluster.table()
    assert process.returncode == 1, output
    assert table["job"].tolist() == [cluster.job(n) for n in range(3)]
    assert table["status"].tolist() == ["failed", "failed", "finished"], output
    assert table["reason"][0] == "ended by SIGKILL (out of memory?)"
    assert "its process was lost" in table["reason"][1]
    assert "Traceback" not in output
    assert f"{cluster.job(2)} epoch 3/3" in output
    wait_for(lambda: not cluster.processes(), 30)
    healthy = cluster.digests(2)
    assert cluster.of(2).read_result().fit.device == "CPU, 1 threads"

    status, output = cluster.run(3)
    assert status == 0, output
    assert set(cluster.table()["status"]) == {"finished"}
    assert [cluster.of(n).read_result().fit.resumed for n in range(3)] == [1, 1, 0]
    assert cluster.digests(2) == healthy
    wait_for(lambda: not cluster.processes(), 30)
    assert sorted(p.name for p in cluster.root.iterdir()) == [
        *(".ich-cache", ".mlflow.db.lock", "mlartifacts", "mlflow.db", "multirun_reports"),
    ]
    assert [p.name for p in (cluster.root / "multirun_reports").iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("launcher", "how", "status"),
    [("ray", signal.SIGTERM, 143), ("submitit", signal.SIGINT, 130)],
)
def test_an_interrupted_sweep_ends_its_jobs_and_goes_on_later(
    folder: Folder, launcher: str, how: signal.Signals, status: int
) -> None:
    folder.launcher = [*LAUNCHERS[launcher], "tracking=none"]
    process = folder.start(2, sabotage=dict.fromkeys(range(2), ("slow", 0)))
    wait_for(lambda: has_checkpoint(folder, 0), 240)
    begin = time.monotonic()
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 40
    assert process.returncode == status, output
    assert "Traceback" not in output
    wait_for(lambda: not folder.processes(), 30)
    assert folder.table()["status"][0] == "killed"
    assert "finished" not in set(folder.table()["status"])
    status, output = folder.run(2)
    assert status == 0, output
    assert folder.of(0).read_result().fit.resumed == 1


def test_rays_jobs_have_a_thread_for_each_of_their_cores(folder: Folder) -> None:
    two = "hydra.launcher.ray.remote.num_cpus=2"
    folder.launcher = [*LAUNCHERS["ray"], two, "tracking=none"]
    status, output = folder.run(2, "train.epochs=1")
    assert status == 0, output
    assert folder.of(0).read_result().fit.device == "CPU, 2 threads"


def test_a_preempted_job_is_queued_again_and_goes_on(folder: Folder) -> None:
    """Slurm's signal before preemption or the time limit reaches every process of a job."""
    folder.launcher = [*LAUNCHERS["submitit"], "tracking=none"]
    process = folder.start(2, sabotage={0: ("slow", 0)})
    wait_for(lambda: has_checkpoint(folder, 0), 240)
    for pid in training(folder, 0):
        os.kill(pid, signal.SIGUSR2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert folder.of(0).read_result().fit.resumed == 1


def test_slurm_that_is_not_there_is_said_in_a_sentence(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder.root))  # on a Slurm site it would be found
    folder.launcher = ["hydra/launcher=ich_slurm", "tracking=none"]
    status, output = folder.run(2)
    assert status == 1
    assert "ich: Slurm did not take the jobs: Could not detect" in output
    assert "Traceback" not in output
    assert folder.table()["status"].tolist() == ["not started"] * 2


# Optuna


def optimize(folder: Folder, *overrides: str) -> tuple[int, str, pd.DataFrame]:
    """Three trials over learning rate and augmentation; exit status, output, rows of the table."""
    own = ("name=s", "model=mobilenet_v2", folder.data, *SMALL, "train.epochs=1", "tracking=none")
    trials = ("hydra/sweeper=ich_optuna", "hydra.sweeper.n_trials=3")
    space = ("optimizer.lr=tag(log, interval(1e-5, 1e-2))", "augment.hflip=choice(0, 0.25)")
    given = ("-m", *own, *trials, *space, *overrides)
    done = run_module("sweep", *given, cwd=folder.root, timeout=580)
    return done.returncode, done.stdout + done.stderr, folder.table()


def best(sweep: SweepPaths) -> dict[str, object]:
    return yaml.safe_load((sweep.root / "optimization_results.yaml").read_text())


def test_optuna_finds_the_best_row_and_runs_no_trial_twice(folder: Folder) -> None:
    status, output, table = optimize(folder, "train.monitor=auc")
    assert status == 0, output
    assert table["status"].tolist() == ["finished"] * 3
    assert best(folder.sweep)["best_value"] == pytest.approx(table["val_auc"].max(), abs=1e-6)
    row = table["job"][table["val_auc"].idxmax()]
    for key, value in best(folder.sweep)["best_params"].items():
        assert f"{key}={value}" in row
    weights = {p: p.stat().st_mtime_ns for p in folder.sweep.root.glob("*/best.safetensors")}
    assert len(weights) == 3
    again, output, same = optimize(folder, "train.monitor=auc")
    assert again == 0, output
    assert output.count("was finished before") == 3
    assert same["job"].tolist() == table["job"].tolist()
    assert weights == {
        p: p.stat().st_mtime_ns for p in folder.sweep.root.glob("*/best.safetensors")
    }


def test_optuna_minimizes_the_log_loss_and_survives_a_failed_trial(folder: Folder) -> None:
    """A sampler that asks for the same job twice in a batch runs it once."""
    space = ("optimizer.lr=choice(1e-3)", "optimizer.weight_decay=choice(0, 1e39)")
    jobs = ("hydra.sweeper.n_jobs=3", "hydra.launcher.cpu_jobs=2")
    status, output, table = optimize(folder, "train.monitor=log_loss", *jobs, *space)
    assert status == 1, output
    assert sorted(table["status"].unique()) == ["failed", "finished"]
    losses = [
        folder.sweep.run(job).read_result().fit.val_scores["log_loss"]
        for job in table["job"][table["status"] == "finished"]
    ]
    assert best(folder.sweep)["best_value"] == min(losses)


# What is said without the extras


ABSENT = """import sys; sys.modules[sys.argv.pop(1)] = None
from ich.sweep import main; sys.exit(main())"""


@pytest.mark.parametrize(
    ("option", "extra", "package"),
    [
        ("hydra/launcher=ich_ray", "ray", "ray"),
        ("hydra/launcher=ich_slurm", "slurm", "submitit"),
        ("hydra/sweeper=ich_optuna", "optuna", "hydra_plugins.hydra_optuna_sweeper"),
    ],
)
def test_a_missing_extra_is_named(tmp_path: Path, option: str, extra: str, package: str) -> None:
    command = [sys.executable, "-c", ABSENT, package, "-m", option]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    message = f"ich: {option} needs a package that is not installed: pip install 'ich[{extra}]'"
    assert message in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "multirun_reports").exists()


def test_a_cluster_is_not_asked_for_in_vain(tmp_path: Path) -> None:
    """Without -m, Hydra would run the one job here and say nothing."""
    done = run_module("sweep", "hydra/launcher=ich_slurm", "model=mobilenet_v2", cwd=tmp_path)
    assert done.returncode == 2
    assert "Add -m" in done.stderr
    assert not (tmp_path / "multirun_reports").exists()

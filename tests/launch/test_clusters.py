"""Sweeps under Ray, submitit and Optuna, for real: slow, `make test-faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import run_module
from sweeps import SMALL, Folder, wait_for

from ich.base.results import SweepPaths

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def training(folder: Folder, seed: int) -> tuple[int, int]:
    """The process that trains a job, and the one that supervises it, which the engine started."""
    for process, words in folder.processes().items():
        if "ich.train" in words and words[3].endswith(folder.job(seed)):
            return process, int(words[words.index("--watched-by") + 1])
    raise AssertionError("it does not run")


def is_training(folder: Folder, seed: int) -> bool:
    """Whether a job's process of this launch has come to its steps."""
    return folder.of(seed).progress.exists()


def launch_until_interrupted(folder: Folder, how: signal.Signals) -> str:
    """Four jobs. One training is killed, and of another the engine's process too, as when a machine
    fails; the third finishes, and during the fourth a signal ends the sweep. Its output."""
    process = folder.start(4, sabotage={0: ("SIGKILL", 40), 1: ("slow", 0.3), 3: ("slow", 2)})
    wait_for(lambda: any(folder.of(1).root.glob("checkpoint-*.ich")), 240)
    child, supervisor = training(folder, 1)
    os.kill(supervisor, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: all(folder.of(n).result.exists() for n in (0, 1, 2)), 240)
    wait_for(lambda: is_training(folder, 3), 240)
    process.send_signal(how)
    wait_for(lambda: not folder.trainings(), 40)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + how, output
    wait_for(lambda: not folder.processes(), 30)
    table = folder.table()
    assert table["job"].tolist() == [folder.job(n) for n in range(4)]
    assert table["status"].tolist() == ["failed", "failed", "finished", "killed"], output
    assert table["reason"][0] == "ended by SIGKILL (out of memory?)"
    assert "its process was lost" in table["reason"][1]
    assert folder.of(2).read_result().fit.device == "CPU, 1 threads"
    return output


def check_finished(folder: Folder, resumed: list[int], healthy: object) -> None:
    """Every job has finished, from its checkpoint; the one that had is as it was."""
    assert set(folder.table()["status"]) == {"finished"}
    assert [folder.of(n).read_result().fit.resumed for n in range(4)] == resumed
    assert folder.digests(2) == healthy
    wait_for(lambda: not folder.processes(), 30)
    assert sorted(p.name for p in folder.root.iterdir()) == [
        *(".ich-cache", ".mlflow.db.lock", "mlartifacts", "mlflow.db", "multirun_reports"),
    ]
    assert [p.name for p in (folder.root / "multirun_reports").iterdir()] == ["s"]


def test_jobs_of_ray_that_are_lost_killed_or_interrupted_go_on_later(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second launch gives each job two cores, which are two threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it would count for more than Ray's own
    folder.launcher = ["hydra/launcher=ich_ray", "hydra.launcher.ray.init.num_cpus=2"]
    output = launch_until_interrupted(folder, signal.SIGTERM)
    assert f"{folder.job(2)} epoch 3/3" in output
    assert "Traceback" not in output
    healthy = folder.digests(2)
    status, output = folder.run(4, "hydra.launcher.ray.remote.num_cpus=2")
    assert status == 0, output
    check_finished(folder, [1, 1, 0, 1], healthy)
    assert {folder.of(n).read_result().fit.device for n in (0, 1, 3)} == {"CPU, 2 threads"}


def test_jobs_of_submitit_that_are_lost_killed_or_interrupted_go_on_later(folder: Folder) -> None:
    """In the second launch one is preempted: Slurm's signal, which also comes before the time
    limit, reaches every process of a job, which is queued again."""
    folder.launcher = [
        *("hydra/launcher=ich_slurm", "hydra.launcher.cluster=local"),
        "hydra.launcher.cpus_per_task=1",
    ]
    output = launch_until_interrupted(folder, signal.SIGINT)
    assert f"{folder.job(2)} epoch 3/3" in output
    assert "Traceback" not in output
    healthy = folder.digests(2)
    process = folder.start(4, sabotage={3: ("slow", 0.3)})
    wait_for(lambda: is_training(folder, 3), 240)
    for pid in training(folder, 3):
        os.kill(pid, signal.SIGUSR2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    check_finished(folder, [1, 1, 0, 2], healthy)


# Optuna


def optimize(folder: Folder, *overrides: str) -> tuple[int, str, pd.DataFrame]:
    """Trials over learning rate and augmentation; exit status, output, rows of the table."""
    own = ("name=s", "model=mobilenet_v2", folder.data, *SMALL, "train.epochs=1", "tracking=none")
    trials = ("hydra/sweeper=ich_optuna", "hydra.sweeper.n_trials=2")
    space = ("optimizer.lr=tag(log, interval(1e-5, 1e-2))", "augment.hflip=choice(0, 0.25)")
    given = ("-m", *own, *trials, *space, *overrides)
    done = run_module("sweep", *given, cwd=folder.root, timeout=580)
    return done.returncode, done.stdout + done.stderr, folder.table()


def best(sweep: SweepPaths) -> dict[str, object]:
    return yaml.safe_load((sweep.root / "optimization_results.yaml").read_text())


def test_optuna_finds_the_best_row_and_runs_no_trial_twice(folder: Folder) -> None:
    status, output, table = optimize(folder, "train.monitor=auc")
    assert status == 0, output
    assert table["status"].tolist() == ["finished"] * 2
    assert best(folder.sweep)["best_value"] == pytest.approx(table["val_auc"].max(), abs=1e-6)
    row = table["job"][table["val_auc"].idxmax()]
    for key, value in best(folder.sweep)["best_params"].items():
        assert f"{key}={value}" in row
    weights = {p: p.stat().st_mtime_ns for p in folder.sweep.root.glob("*/best.safetensors")}
    assert len(weights) == 2
    again, output, same = optimize(folder, "train.monitor=auc")
    assert again == 0, output
    assert output.count("was finished before") == 2
    assert same["job"].tolist() == table["job"].tolist()
    assert weights == {
        p: p.stat().st_mtime_ns for p in folder.sweep.root.glob("*/best.safetensors")
    }


def test_optuna_minimizes_the_log_loss_and_survives_a_failed_trial(folder: Folder) -> None:
    """A sampler that asks for the same job twice in a batch runs it once."""
    space = ("optimizer.lr=choice(1e-3)", "optimizer.weight_decay=choice(0, 1e39)")
    jobs = ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "hydra.launcher.cpu_jobs=2")
    status, output, table = optimize(folder, "train.monitor=log_loss", *jobs, *space)
    assert status == 1, output
    assert sorted(table["status"].unique()) == ["failed", "finished"]
    losses = [
        folder.sweep.run(job).read_result().fit.val_scores["log_loss"]
        for job in table["job"][table["status"] == "finished"]
    ]
    assert best(folder.sweep)["best_value"] == min(losses)


# What is said without the extras


ABSENT = """import sys; sys.modules["ray"] = None
from ich.sweep import main; sys.exit(main())"""


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ABSENT, "-m", "hydra/launcher=ich_ray"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    message = "hydra/launcher=ich_ray needs a package that is not installed: pip install 'ich[ray]'"
    assert f"ich: {message}" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "multirun_reports").exists()


def test_a_cluster_is_not_asked_for_in_vain(tmp_path: Path) -> None:
    """Without -m, Hydra would run the one job here and say nothing."""
    done = run_module("sweep", "hydra/launcher=ich_slurm", "model=mobilenet_v2", cwd=tmp_path)
    assert done.returncode == 2
    assert "Add -m" in done.stderr
    assert not (tmp_path / "multirun_reports").exists()

"""A training that is killed goes on bit for bit; damaged checkpoints are found; none is code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import start_module
from safetensors.torch import load
from sweeps import SMALL, saboteur, wait_for

from ich.base.config import Config, to_yaml
from ich.base.records import ComputeMode, FitResult, Origin
from ich.base.results import RunPaths
from ich.data.cohorts import cohort_keys
from ich.data.dataset import load_dataset
from ich.launch.jobs import run_job
from ich.tracking.journal import Journal
from ich.training.checkpoint import Checkpoint, Generations
from ich.training.fit import Terminated, fit
from ich.training.mode import CHANNELS_LAST
from ich.training.saving import resume_training
from ich.training.trainer import Trainer

Compose = Callable[..., Config]


def quiet(*_: object) -> None:
    pass


class Killed(BaseException):
    """Like SIGKILL: nothing in the training knows it, so nothing is saved because of it."""


OWN = ("tracking=none", "train.threads=1", "model=mobilenet_v2", *SMALL, "train.batch_size=4")


@pytest.fixture(scope="module")
def trained(
    compose_in: Compose, phantom: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, RunPaths, FitResult]:
    """An undisturbed run, as which others are to end: its config, its folder, its result."""
    folder = tmp_path_factory.mktemp("whole")
    of = (f'data.root="{phantom}"', "scheduler=cosine", "optimizer.lr=3e-3")
    config, run = compose_in(folder, *OWN, *of), RunPaths(folder / "run")
    load_dataset(config)
    return config, run, run_until(config, run, None)


@pytest.fixture
def config(trained: tuple[Config, RunPaths, FitResult]) -> Config:
    return deepcopy(trained[0])


@pytest.fixture
def whole(trained: tuple[Config, RunPaths, FitResult]) -> RunPaths:
    return trained[1]


@pytest.fixture
def copied(whole: RunPaths, tmp_path: Path) -> RunPaths:
    """As the undisturbed run is, with the checkpoints of its last two epochs."""
    return RunPaths(shutil.copytree(whole.root, tmp_path / "copied"))


def run_until(config: Config, run: RunPaths, stop: Callable[[str, int], None] | None) -> FitResult:
    """One process's share of a training: `stop` is called at every step and may raise."""
    run.root.mkdir(parents=True, exist_ok=True)
    return fit(config, run, Journal(run.metrics), lambda *step: stop(*step[:2]) if stop else None)


def final(run: RunPaths) -> dict[str, torch.Tensor]:
    found = Generations(run.root).read()
    assert found is not None
    return found.tensors


def assert_same(run: RunPaths, other: RunPaths) -> None:
    a, b = final(run), final(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert run.best.read_bytes() == other.best.read_bytes()
    with np.load(run.predictions) as x, np.load(other.predictions) as y:
        for name in x.files:
            assert (x[name] == y[name]).all()
    quantities = ("train/loss", "train/lr", "val/auc", "val/accuracy")
    rows = [
        [(line.step, *(line.metrics[k] for k in quantities)) for line in r.read_metrics()]
        for r in (run, other)
    ]
    assert rows[0] == rows[1]


@pytest.mark.faults
def test_killed_at_twenty_random_steps_the_weights_are_those_of_an_undisturbed_run(
    trained: tuple[Config, RunPaths, FitResult], config: Config, tmp_path: Path
) -> None:
    """FAULTS 32. One training, ended twenty times: asked to stop, or killed without a word."""
    (_, whole, straight), broken = trained, RunPaths(tmp_path / "broken")
    draw = random.Random(0)
    kills, phases = 0, set()
    config.train.checkpoint_minutes = 1e-9  # after every step
    result = None
    while result is None:
        left = draw.randint(2, 11) if kills < 20 else 10**9
        kind = draw.choice([Terminated, Killed])

        def stop(phase: str, _: int, kind: type[BaseException] = kind) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                phases.add(phase)
                raise kind

        torch.manual_seed(kills)  # whatever this process did before must not matter
        try:
            result = run_until(config, broken, stop)
        except (Terminated, Killed):
            kills += 1
    assert kills == 20
    assert phases >= {"training", "validating"}
    assert_same(whole, broken)
    changing = {k: getattr(result, k) for k in ("minutes", "images_per_s", "resumed")}
    assert replace(straight, **changing) == result
    assert 1 < result.resumed <= 20  # one killed before its first step leaves no trace


@pytest.mark.faults
def test_a_kill_between_two_checkpoints_repeats_the_steps_since(
    config: Config, whole: RunPaths, tmp_path: Path
) -> None:
    """Without a save in between, the epoch begins again, and its best weights with it."""
    broken = RunPaths(tmp_path / "broken")
    config.train.checkpoint_minutes = 1e9
    seen = 0

    def stop(phase: str, epoch: int) -> None:
        nonlocal seen
        seen += phase == "training" and epoch == 2
        if seen == 5:
            raise Killed

    with pytest.raises(Killed):
        run_until(config, broken, stop)
    broken.best.write_bytes(b"of an epoch that the checkpoint has not reached")
    with broken.metrics.open("a") as journal:
        journal.write(json.dumps({"step": 3, "time": 0.0, "train/loss": 9.0}) + '\n{"st')
    result = run_until(config, broken, None)
    assert result.resumed == 1
    assert_same(whole, broken)


@pytest.mark.faults
def test_a_training_on_neighbours_goes_on_bit_for_bit(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    config = composed(*OWN, f'data.root="{phantom}"', "protocol=sound", "context=neighbours")
    load_dataset(config)
    whole, broken = RunPaths(tmp_path / "whole"), RunPaths(tmp_path / "broken")
    run_until(config, whole, None)
    seen = 0

    def stop(phase: str, epoch: int) -> None:
        nonlocal seen
        seen += phase == "training"
        if seen == 3:
            raise Terminated

    with pytest.raises(Terminated):
        run_until(config, broken, stop)
    assert run_until(config, broken, None).resumed == 1
    assert_same(whole, broken)


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(
    config: Config,
    whole: RunPaths,
    copied: RunPaths,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """FAULTS 33."""
    newest = max(copied.root.glob("checkpoint-*.ich"), key=lambda p: p.stat().st_mtime_ns)
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    newest.write_bytes(data[: {"cut": len(data) // 2, "flip": len(data), "empty": 0}[damage]])
    before = Generations(copied.root).read()
    assert before is not None
    assert before.facts["progress"]["epoch"] == 3  # two epochs done
    assert newest.name in caplog.text
    assert "cannot be used: it is" in caplog.text
    assert run_until(config, copied, None).resumed == 1
    assert_same(whole, copied)


@pytest.mark.faults
def test_with_both_generations_damaged_the_training_starts_anew(
    config: Config, whole: RunPaths, copied: RunPaths
) -> None:
    for path in copied.root.glob("checkpoint-*.ich"):
        path.write_bytes(b"x")
    assert run_until(config, copied, None).resumed == 0
    assert_same(whole, copied)


def test_another_cohorts_checkpoint_is_not_gone_on_from(config: Config, copied: RunPaths) -> None:
    config.protocol.seed += 1
    load_dataset(config)
    assert run_until(config, copied, None).resumed == 0


def test_a_checkpoint_that_carries_code_is_not_executed(tmp_path: Path) -> None:
    """FAULTS 34."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "checkpoint-a.ich").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "checkpoint-b.ich")
    assert Generations(tmp_path).read() is None
    assert not (tmp_path / "executed").exists()


def test_two_generations_are_kept_and_a_full_disk_takes_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations = Generations(tmp_path)
    for n in range(4):
        generations.write(Checkpoint({"n": torch.tensor(n)}, {"order": [n]}))
    assert len(list(tmp_path.iterdir())) == 2

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        generations.write(Checkpoint({"n": torch.tensor(9)}, {"order": [9]}))
    found = Generations(tmp_path).read()
    assert found is not None
    assert found.tensors["n"] == 3
    generations.drop()
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_back_freezes_no_generation(tmp_path: Path) -> None:
    generations = Generations(tmp_path)
    for n in range(6):
        generations.write(Checkpoint({"n": torch.tensor(n)}, {"order": [n]}))
        newest = max(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (1000 - n, 1000 - n))
    kept = sorted(load(path.read_bytes()[48:])["n"].item() for path in tmp_path.iterdir())
    assert kept == [4, 5]
    again = Generations(tmp_path)  # a process that goes on replaces the older one
    assert again.read().facts["order"] == [5]
    again.write(Checkpoint({"n": torch.tensor(6)}, {"order": [6]}))
    kept = sorted(load(path.read_bytes()[48:])["n"].item() for path in tmp_path.iterdir())
    assert kept == [5, 6]


def more(facts: dict[str, Any], _: dict[str, Any]) -> None:
    facts["progress"]["momentum"] = 1.0


def fewer(facts: dict[str, Any], _: dict[str, Any]) -> None:
    del facts["progress"]["auc_top"]


def no_best(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors["best/logits"]


def other_network(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["state/model/head.weight"] = torch.zeros(3, 3)


def no_schedule(facts: dict[str, Any], _: dict[str, Any]) -> None:
    facts["schedule"] = {"lr": [1.0]}


CHANGES = [more, fewer, no_best, other_network, no_schedule]


def test_a_checkpoint_of_another_version_is_named_and_not_gone_on_from(
    trained: tuple[Config, RunPaths, FitResult],
    config: Config,
    copied: RunPaths,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its fields ended each further start in a TypeError."""
    run, (*_, result) = copied, trained
    good = Generations(run.root).read()
    assert good is not None
    dataset = load_dataset(config)
    mode = ComputeMode("fp32", CHANNELS_LAST)
    trainer = Trainer.build(config, dataset, torch.device("cpu"), mode)
    for change in CHANGES:
        facts, tensors = json.loads(json.dumps(good.facts)), dict(good.tensors)
        change(facts, tensors)
        for _ in range(2):
            Generations(run.root).drop()
            Generations(run.root).write(Checkpoint(tensors, facts))
        journal = Journal(run.metrics)
        state, _ = resume_training(run, trainer, dataset, journal)
        assert (state.resumed, state.epoch) == (0, 1), change
        assert not run.has_checkpoint()
        assert "cannot be used: it is of another version of ich" in caplog.text
        assert "the training starts anew" in caplog.text
        caplog.clear()
    again = run_until(config, run, None)
    assert (again.resumed, again.scores) == (0, result.scores)


@pytest.mark.faults
def test_a_job_process_that_is_ended_and_killed_goes_on_each_time(
    trained: tuple[Config, RunPaths, FitResult], config: Config, tmp_path: Path
) -> None:
    """FAULTS 4 and 8: with real signals, and the supervisor at last."""
    config.train.checkpoint_minutes = 0
    (_, whole, straight), run = trained, RunPaths(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(to_yaml(config))
    origin = Origin(cohort=cohort_keys({"": config})[""], weights="w", code="x")
    run.write_origin(origin)
    assert end_by(signal.SIGTERM, run) == 128 + signal.SIGTERM
    assert run.read_result().status == "killed"
    assert end_by(signal.SIGKILL, run) == -signal.SIGKILL
    result = run_job(config, run, origin, None, quiet)
    assert result.fit is not None, run.log.read_text()
    assert result.fit.resumed == 2
    assert not list(run.root.glob("checkpoint-*"))
    assert run.best.read_bytes() == whole.best.read_bytes()
    assert straight.scores["auc"] == result.fit.scores["auc"]


def end_by(how: signal.Signals, run: RunPaths) -> int:
    """Trains until there is a new checkpoint, sends a signal, and returns the exit status."""

    def checkpoints() -> list[int]:
        return [p.stat().st_mtime_ns for p in run.root.glob("checkpoint-*.ich")]

    before, env = checkpoints(), saboteur({run.root.name: ("slow", 0.3)})
    child = start_module("train", run.root, cwd=run.root, env=env)
    wait_for(lambda: child.poll() is not None or checkpoints() != before)
    child.send_signal(how)
    child.communicate()
    return child.returncode

"""Precision: chosen by timing, written down, and never at the price of the scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import TINY

from ich.base.config import Config, CudaGraph, Precision
from ich.base.provenance import processor
from ich.base.records import ComputeMode, Origin
from ich.base.results import RunPaths
from ich.data.dataset import Split, load_dataset
from ich.tracking.journal import Journal
from ich.training.devices import uses_cuda_graph
from ich.training.fit import fit, select_and_record_mode
from ich.training.graph_check import why_not_compiled, why_not_graphed
from ich.training.mode import pick_fastest, workload_key
from ich.training.timing import (
    Timing,
    random_dataset,
    select_mode,
    select_modes,
    time_training_steps,
)
from ich.training.trainer import Trainer, TrainingState

CPU = torch.device("cpu")


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def small(composed: Callable[..., Config], phantom: Path) -> Callable[..., Config]:
    own = ("model=mobilenet_v2", *TINY, f'data.root="{phantom}"', "train.epochs=1", "tracking=none")
    return partial(composed, *own)


@pytest.fixture
def config(small: Callable[..., Config]) -> Config:
    return small("train.device=cpu")


def test_the_fastest_mode_wins_and_bf16_must_be_worth_it() -> None:
    fp32, bf16, tf32 = (ComputeMode(p, "channels_last") for p in ("fp32", "bf16", "tf32"))
    assert pick_fastest({fp32: 1.0, bf16: 0.95}) == fp32
    assert pick_fastest({fp32: 1.0, bf16: 0.5}) == bf16
    assert pick_fastest({fp32: 1.0, tf32: 0.97}) == fp32
    assert pick_fastest({fp32: 1.0, tf32: 0.9, bf16: 0.88}) == tf32
    graphed = replace(bf16, graph=True)
    assert pick_fastest({fp32: 1.0, bf16: 0.5, graphed: 0.49}) == bf16
    assert pick_fastest({fp32: 1.0, bf16: 0.95, graphed: 0.4}) == graphed  # where eager loses


def test_every_candidate_is_timed_and_random_numbers_are_left_alone(config: Config) -> None:
    fp32, bf16 = (ComputeMode(p, "channels_last") for p in ("fp32", "bf16"))
    seconds = time_training_steps(config, rounds=1).seconds
    assert set(seconds) == {fp32, bf16}
    assert all(0 < s < 60 for s in seconds.values())
    config.train.precision = Precision.bf16
    assert set(time_training_steps(config, rounds=1).seconds) == {bf16}


def test_a_process_chooses_for_each_kind_and_this_one_is_untouched(config: Config) -> None:
    other = replace(config, model=replace(config.model, name="b", timm="efficientnet_b0.ra_in1k"))
    state = torch.get_rng_state()
    found = dict(select_modes([(config, 1000), (other, 1000)]))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(found) == {workload_key(config), workload_key(other)}
    for mode in found.values():
        assert mode.precision in ("fp32", "bf16")
        assert mode.processor == processor()


@pytest.mark.parametrize(
    "other", [{"batch_size": 7}, {"precision": Precision.fp32}, {"graph": CudaGraph.on}]
)
def test_jobs_that_compute_otherwise_are_timed_apart(config: Config, other: dict[str, Any]) -> None:
    changed = replace(config, train=replace(config.train, **other))
    assert workload_key(changed) != workload_key(config)


def test_a_timing_that_dies_leaves_the_choice_to_the_job(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.training.timing.sys.executable", "/bin/false")
    assert dict(select_modes([(config, 0)] * 300)) == {}  # more than a pipe holds


def test_what_was_chosen_here_is_used_again_and_elsewhere_timed_anew(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timing({ComputeMode("bf16", "channels_last"): 0.5}, {})
    monkeypatch.setattr("ich.training.timing.time_training_steps", lambda _: timed)
    here = ComputeMode("fp32", "contiguous", processor())
    assert select_mode(config, here) == here
    assert select_mode(config, replace(here, processor="another")).precision == "bf16"
    assert select_mode(config, None).precision == "bf16"
    assert select_mode(config, None).timed == {"bf16, channels_last": 2.0}
    config.train.precision = Precision.fp32
    assert select_mode(config, None) == ComputeMode("fp32", "channels_last", processor())


def test_a_run_computes_as_it_began(config: Config, tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    begun = ComputeMode("bf16", "contiguous", processor())
    run.write_origin(Origin(cohort="c", mode=begun))
    assert select_and_record_mode(config, run) == begun
    assert run.read_origin() == Origin(cohort="c", mode=begun)
    run.origin.unlink()
    chosen = select_and_record_mode(config, run)  # timed here, and noted
    assert run.read_origin() == Origin(mode=chosen)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_mode_computes_the_same_network(config: Config, precision: str, layout: str) -> None:
    dataset = load_dataset(config)
    reference = Trainer.build(config, dataset, CPU, ComputeMode("fp32", "contiguous"))
    trainer = Trainer.build(config, dataset, CPU, ComputeMode(precision, layout))
    expected = reference.evaluate(dataset.val, 1, quiet)
    got = trainer.evaluate(dataset.val, 1, quiet)
    assert got.dtype == np.float32
    spread = expected.std()
    # bfloat16 keeps 8 bits; over fifty layers that is a few percent of the logits' spread.
    assert np.abs(got - expected).max() < (0.2 * spread if precision == "bf16" else 1e-4)
    if precision == "bf16":
        assert not np.array_equal(got, got.astype(np.float16).astype(np.float32))


def test_a_bf16_run_says_so_and_keeps_float32_weights(config: Config, tmp_path: Path) -> None:
    config.train.precision = Precision.bf16
    run = RunPaths(tmp_path / "run")
    run.root.mkdir()
    load_dataset(config)
    result = fit(config, run, Journal(run.metrics), quiet)
    assert (result.precision, result.layout) == ("bf16", "channels_last")
    dataset = load_dataset(config)
    trainer = Trainer.build(config, dataset, CPU, ComputeMode("bf16", "channels_last"))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_graph_without_a_gpu_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert not uses_cuda_graph(CudaGraph.on, CPU)
    assert "there is no GPU: steps are taken one by one" in caplog.text
    on_gpu = [uses_cuda_graph(choice, torch.device("cuda")) for choice in CudaGraph]
    assert on_gpu == [None, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_graphed_step_does_what_an_eager_one_does(
    small: Callable[..., Config], optimizer: str, precision: str
) -> None:
    config = small(f"optimizer={optimizer}", "train.batch_size=16")
    mode = ComputeMode(precision, "channels_last", graph=True)
    dataset, gpu = random_dataset(config, 2), torch.device("cuda")
    assert why_not_graphed(config, dataset, gpu, mode) == ""


def times(
    monkeypatch: pytest.MonkeyPatch, plain: float, compiled: float, first: float
) -> dict[str, list[ComputeMode]]:
    """Timings of so many seconds per image, and of so many in the first round of what is compiled.
    What was asked for is returned."""
    asked: dict[str, list[ComputeMode]] = {"timed": []}

    def in_turn(*args: Any) -> dict[ComputeMode, float]:
        *_, modes, _, timing = args
        asked["timed"] += modes
        timing.seconds.update({m: compiled if m.compiled else plain for m in modes})
        return dict.fromkeys(modes, first)

    monkeypatch.setattr("ich.training.timing._time_in_turn", in_turn)
    monkeypatch.setattr("ich.training.graph_check.why_not_compiled", lambda *_: "")
    return asked


@pytest.mark.parametrize(
    ("images", "compiled", "estimate"),
    [
        (100_000, True, "takes 40 s and saves 200 s over 100,000 images, +160 s in all: done"),
        (20_000, False, "takes 40 s and saves 40 s over 20,000 images, +0 s in all: not done"),
        (24_000, False, "takes 40 s and saves 48 s over 24,000 images, +8 s in all: not done"),
        (0, False, "takes 40 s and saves 0 s over 0 images, -40 s in all: not done"),
    ],
)
def test_what_is_compiled_saves_more_than_that_takes(
    small: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    compiled: bool,
    estimate: str,
) -> None:
    """By more than a timing's noise: 8 s of 240 are within it."""
    config = small("train.device=cpu", "train.compile=auto", "train.precision=fp32")
    batch = config.train.batch_size
    times(monkeypatch, plain=0.010, compiled=0.008, first=40 + batch * 0.008)
    mode = select_mode(config, None, images)
    assert (mode.compiled, mode.compiling) == (compiled, estimate)
    assert mode.timed == {"fp32, channels_last": 100.0, "fp32, channels_last, compiled": 125.0}


def test_the_choice_to_compile_is_kept_and_is_of_its_epochs(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small("train.device=cpu", "train.compile=auto", "train.precision=fp32")
    asked = times(monkeypatch, plain=0.010, compiled=0.008, first=1.0)
    run = RunPaths(tmp_path)
    begun = select_and_record_mode(config, run, 100_000)
    assert begun.compiled
    assert run.read_origin().mode.compiling == begun.compiling  # type: ignore[union-attr]
    asked["timed"].clear()
    assert select_and_record_mode(config, run, 0) == begun  # as it began, whatever is left
    assert asked["timed"] == []
    longer = replace(config, train=replace(config.train, epochs=20))
    assert workload_key(longer) != workload_key(config)
    for choice in (False, True):  # asked for, it is neither timed nor shared
        config.train.compile = choice
        assert select_mode(config, begun).compiled == choice
        assert select_mode(config, None).compiled == choice
        assert (" compile true" in workload_key(config)) == choice
    assert asked["timed"] == []


def test_what_cannot_be_compiled_says_why_and_is_not(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise FileNotFoundError("no C++ compiler\nand pages of advice")

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = small("train.device=cpu", "train.compile=auto", "train.precision=fp32")
    mode = select_mode(config, None, 10**9)
    assert not mode.compiled
    assert mode.compiling == "cannot be done: FileNotFoundError: no C++ compiler"


@pytest.mark.faults
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_training_goes_on_to_the_bit(small: Callable[..., Config]) -> None:
    """Also where its epochs have a smaller last batch, after which other code could run."""
    # One of timm's for tests: to compile MobileNetV2 takes a minute.
    config = small("train.batch_size=8", "model.timm=test_efficientnet.r160_in1k")
    mode = ComputeMode("fp32", "channels_last", compiled=True)
    random = random_dataset(config, 3)
    columns = {k: v[:19] for k, v in vars(random.train).items() if v is not None}
    split = Split(**columns)
    dataset = replace(random, train=split, val=split)

    def epochs(trainer: Trainer, *numbers: int) -> dict[str, torch.Tensor]:
        for number in numbers:
            trainer.train_one_epoch(TrainingState(epoch=number), quiet)
        return {k: v.clone() for k, v in trainer.tensors().items()}

    trainer = Trainer.build(config, dataset, CPU, mode)
    half, schedule = epochs(trainer, 1), trainer.schedule()
    whole = epochs(trainer, 2)
    torch.compiler.reset()  # as in another process
    resumed = Trainer.build(config, dataset, CPU, mode)
    resumed.restore(half, schedule)
    again = epochs(resumed, 2)
    assert {k: torch.equal(v, again[k]) for k, v in whole.items()} == dict.fromkeys(whole, True)
    assert why_not_compiled(config, random_dataset(config, 2), CPU, mode) == ""

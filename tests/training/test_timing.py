"""Precision: chosen by timing, written down, and never at the price of the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import TINY

from ich.base.config import Config, CudaGraph, Precision
from ich.base.provenance import processor
from ich.base.records import ComputeMode, Origin
from ich.base.results import RunPaths
from ich.data.dataset import load_dataset
from ich.tracking.journal import Journal
from ich.training.devices import uses_cuda_graph
from ich.training.fit import fit, select_and_record_mode
from ich.training.mode import pick_fastest, workload_key
from ich.training.timing import select_mode, select_modes, time_training_steps
from ich.training.trainer import Trainer

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
    seconds = {("fp32", "channels_last"): 1.0, ("bf16", "channels_last"): 0.95}
    assert pick_fastest(seconds, "x") == ComputeMode("fp32", "channels_last", "x")
    seconds[("bf16", "channels_last")] = 0.5
    assert pick_fastest(seconds, "x") == ComputeMode("bf16", "channels_last", "x")
    seconds[("fp32", "contiguous")] = 0.4
    assert pick_fastest(seconds, "x") == ComputeMode("fp32", "contiguous", "x")


def test_every_candidate_is_timed_and_random_numbers_are_left_alone(config: Config) -> None:
    seconds = time_training_steps(config, rounds=1)
    assert set(seconds) == {("fp32", "channels_last"), ("bf16", "channels_last")}
    assert all(0 < s < 60 for s in seconds.values())
    config.train.precision = Precision.bf16
    assert set(time_training_steps(config, rounds=1)) == {("bf16", "channels_last")}


def test_a_process_chooses_for_each_kind_and_this_one_is_untouched(config: Config) -> None:
    other = replace(config, model=replace(config.model, name="b", timm="efficientnet_b0.ra_in1k"))
    state = torch.get_rng_state()
    found = dict(select_modes([config, other]))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(found) == {workload_key(config), workload_key(other)}
    for mode in found.values():
        assert mode.precision in ("fp32", "bf16")
        assert mode.processor == processor()


def test_jobs_of_other_batches_are_timed_apart(config: Config) -> None:
    other = replace(config, train=replace(config.train, batch_size=7))
    assert workload_key(other) != workload_key(config)


def test_a_timing_that_dies_leaves_the_choice_to_the_job(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.training.timing.sys.executable", "/bin/false")
    assert dict(select_modes([config] * 300)) == {}  # more than a pipe holds


def test_what_was_chosen_here_is_used_again_and_elsewhere_timed_anew(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = {("bf16", "channels_last"): 1.0}
    monkeypatch.setattr("ich.training.timing.time_training_steps", lambda _: timed)
    here = ComputeMode("fp32", "contiguous", processor())
    assert select_mode(config, here) == here
    assert select_mode(config, replace(here, processor="another")).precision == "bf16"
    assert select_mode(config, None).precision == "bf16"
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
    assert not uses_cuda_graph(CudaGraph.auto, torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_graphed_step_equals_an_eager_one(small: Callable[..., Config], optimizer: str) -> None:
    """From the same state, over a whole epoch with its smaller last batch."""
    own = (f"optimizer={optimizer}", "scheduler=cosine", "train.precision=fp32")
    states = []
    for graph in ("off", "on"):
        config = small(*own, f"train.graph={graph}")
        dataset = load_dataset(config)
        trainer = Trainer.build(
            config, dataset, torch.device("cuda"), ComputeMode("fp32", "channels_last")
        )
        trainer.time_step()
        states.append({k: v.clone() for k, v in trainer.tensors().items()})
    eager, graphed = states
    assert eager.keys() == graphed.keys()
    for name in eager:
        if not name.startswith("random/"):
            torch.testing.assert_close(graphed[name], eager[name], atol=1e-4, rtol=1e-3)

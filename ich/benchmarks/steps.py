"""A training step, its parts and its bounds, and an epoch of all networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ich.base.config import image_size
from ich.base.records import ComputeMode
from ich.benchmarks import peers
from ich.benchmarks.inputs import phantom_files
from ich.benchmarks.measure import (
    REPORT,
    PartResult,
    RatioRow,
    alternate,
    compare_rates,
    compose_job,
    geometric_mean,
    wait_for_device,
)
from ich.benchmarks.peers import BATCH, Rate
from ich.benchmarks.report import projection
from ich.benchmarks.settings import Settings
from ich.data.dataset import Dataset, load_dataset
from ich.training.devices import configure_cudnn, pick_device
from ich.training.mode import CONTIGUOUS
from ich.training.model import build_model, model_cost
from ich.training.optimizer import build_optimizer
from ich.training.timing import select_mode
from ich.training.trainer import Trainer, TrainingState

_AT_A_TIME = 8  # steps between two looks at the clock on a GPU, which is asked to finish then


# Step


@dataclass(frozen=True)
class _TimedStep:
    """The training step of a network, as it was timed."""

    name: str  # of the network, and the size of its input
    mode: ComputeMode  # that `auto` picked for ours
    plain: str  # precision of the plain side
    gmacs: float  # multiply-adds that the step takes for an image, in 1e9
    rates: dict[str, list[float]]  # images per second by side, and GMAC/s of `product`; by round

    def compare(self, ours: str, plain: str) -> RatioRow:
        return compare_rates(self.rates[ours], self.rates[plain])

    @property
    def report_hours(self) -> float:
        """Of the report's training steps of this network."""
        rows = REPORT["epochs"] * REPORT["train"]
        return rows / statistics.median(self.rates["fed"]) / 3600


def bench_step(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Training steps of batch 32 with fused Adam: ours, in the mode `auto` picks, against float32
    NCHW; ours with its data against ours on one batch that is ready; on a GPU a captured step
    against one that is launched kernel by kernel; and a matrix product's multiply-adds per second
    against ours. The note says how long the training steps of the report's sweep would take.
    """
    for size in settings.image_size:
        steps = [_time_step(model, size, folder, settings) for model in settings.models]
        hours = sum(step.report_hours for step in steps)
        note = projection(hours, settings.models, size, "its training steps alone")
        yield PartResult(_step_rows(steps, size), [note])


def _time_step(model: str, size: int, folder: Path, settings: Settings) -> _TimedStep:
    """Times all sides in turn; they and their memory are gone when the next network comes."""
    config = compose_job(model, size, folder)
    device, dataset = pick_device(config.train.device), load_dataset(config)
    fastest = select_mode(config, None)
    mode, graphed = replace(fastest, graph=False), replace(fastest, graph=True)
    ours = Trainer.build(config, dataset, device, mode)
    in_default = _plain_mode(device)
    plain = Trainer.build(config, dataset, device, in_default)
    seconds = settings.seconds
    sides = {
        "ours": _resident_rate(ours, seconds),
        "plain": _resident_rate(plain, seconds),
        "fed": _fed_rate(ours, seconds),
        "product": _product_rate(device, mode, min(seconds, 1.0)),
    }
    if device.type == "cuda":
        # Whole steps on both sides: a graph holds the resampling too, which `ours` leaves out.
        sides["eager"] = _advance_rate(ours, seconds)
        sides["graph"] = _advance_rate(Trainer.build(config, dataset, device, graphed), seconds)
    # Backward takes two multiply-adds for each forward.
    gmacs = 3e-9 * model_cost(config.model, len(config.windows.channels), size, BATCH).macs
    return _TimedStep(
        f"{model}, {size} px", mode, in_default.precision, gmacs, alternate(sides, settings.rounds)
    )


def _plain_mode(device: torch.device) -> ComputeMode:
    """What torch computes in if nobody asks: on a GPU its convolutions take TF32."""
    return ComputeMode("tf32" if device.type == "cuda" else "fp32", CONTIGUOUS)


def _step_rows(steps: Sequence[_TimedStep], size: int) -> dict[str, RatioRow]:
    """All networks against float32 NCHW, then all with their data, ..., then the means."""
    faster, fed, graph, roof = {}, {}, {}, {}
    for step in steps:
        how = f"step, {step.name}"
        chosen = f"ours ({step.mode.precision}, {step.mode.layout})"
        faster[f"{how}: {chosen} / {step.plain} NCHW"] = step.compare("ours", "plain")
        fed[f"{how}: ours with data / on one resident batch"] = step.compare("fed", "ours")
        if "graph" in step.rates:
            graph[f"{how}: as one graph / eager"] = step.compare("graph", "eager")
        done = [step.gmacs * rate for rate in step.rates["ours"]]
        what = f"roofline, {step.name}, GMAC/s: a matrix product / ours"
        roof[what] = compare_rates(step.rates["product"], done)
    means = {
        f"ours / {steps[0].plain} NCHW": faster,
        "with data / resident": fed,
        "graph / eager": graph,
    }
    summary = {
        f"step, {size} px, geometric mean: {what}": geometric_mean([*rows.values()])
        for what, rows in means.items()
        if rows
    }
    return faster | fed | graph | roof | summary


def _resident_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of steps on one batch that has been made before."""
    batch = next(trainer.train_loader.in_order())
    x = trainer.windows(trainer.resample(batch.hu))

    def step() -> None:
        loss = trainer.loss(trainer.network(x), batch.target)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()

    return _repeated(trainer, step, len(x), seconds)


def _advance_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of whole steps, resampling and windows included, on one resident batch."""
    draws = trainer.resample.draws(0, 1, len(trainer.train_loader.split.row))
    batch = next(trainer.train_loader.epoch(0, 1, draws))
    return _repeated(trainer, lambda: trainer.train_step(batch), len(batch.target), seconds)


def _repeated(trainer: Trainer, step: Callable[[], object], images: int, seconds: float) -> Rate:
    device = trainer.device
    at_a_time = _AT_A_TIME if device.type == "cuda" else 1

    def rate() -> float:
        configure_cudnn(device, trainer.mode)  # the other side's may be set
        trainer.model.train()
        step()  # allocations, and the choice of convolutions, are not counted
        wait_for_device(device)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or steps < 2:
            # To wait for a GPU after each step would leave it idle while Python prepares the next.
            for _ in range(at_a_time):
                step()
            wait_for_device(device)
            steps += at_a_time
        return images * steps / (time.perf_counter() - start)

    return rate


def _fed_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of a training as it is: batches from the cache, always new ones."""

    def rate() -> float:
        configure_cudnn(trainer.device, trainer.mode)
        trainer.model.train()
        draws = trainer.resample.draws(0, 1, len(trainer.train_loader.split.row))
        seen, start = 0, 0.0
        for number, batch in enumerate(trainer.train_loader.epoch(0, 1, draws)):
            if number == 1:  # the first is not counted: it waits for the loader to start
                wait_for_device(trainer.device)
                start = time.perf_counter()
            trainer.train_step(batch)
            seen += len(batch.target) if number else 0
            # As in `_repeated`: a GPU that is waited for at each step runs dry.
            if trainer.device.type == "cuda" and number % _AT_A_TIME:
                continue
            wait_for_device(trainer.device)
            if number > 2 and time.perf_counter() - start > seconds:
                break
        wait_for_device(trainer.device)
        return seen / (time.perf_counter() - start)

    return rate


def _product_rate(device: torch.device, mode: ComputeMode, seconds: float) -> Rate:
    """Multiply-adds per second, in 1e9, of a matrix product in a mode's precision."""
    dtype = torch.bfloat16 if mode.precision == "bf16" else torch.float32
    # On a GPU so large, and so many before the host waits, that launching them is nothing.
    side, at_a_time = (8192, 10) if device.type == "cuda" else (2048, 1)
    a = torch.randn(side, side, device=device, dtype=dtype)

    def rate() -> float:
        torch.backends.cuda.matmul.allow_tf32 = mode.precision == "tf32"
        # The first picks a kernel, and is not counted.
        torch.mm(a, a)
        wait_for_device(device)
        start, products = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(at_a_time):
                torch.mm(a, a)
            wait_for_device(device)
            products += at_a_time
        taken = time.perf_counter() - start
        torch.backends.cuda.matmul.allow_tf32 = False
        return products * side**3 / 1e9 / taken

    return rate


# Sweep


def bench_sweep(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Rows trained per second over an epoch of all networks, one after another: ours against the
    plain way (pydicom in a DataLoader, float32 NCHW, eager). The note says how long the report's
    sweep would take, validation included.
    """
    models, size = settings.models, settings.image_size[0]
    subset = f"data.subset={settings.images / 4000:.3f}"
    trainers = []
    for model in models:
        config = compose_job(model, size, folder, subset)
        dataset, device = load_dataset(config), pick_device(config.train.device)
        mode = select_mode(config, None)
        trainers.append(Trainer.build(config, dataset, device, mode))
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    hours = []
    for _ in range(settings.rounds):
        ours, plain, report = zip(*(_epochs(t, dataset) for t in trainers), strict=True)
        # Of any dataset: the cohort does not depend on the network.
        rows = len(models) * len(dataset.train.row)
        rates["ours"].append(rows / sum(ours))
        rates["plain"].append(rows / sum(plain))
        hours.append(sum(report))
    name = f"sweep, an epoch of {len(models)} networks, {size} px: ours / the plain way"
    note = projection(statistics.median(hours), models, size, "validation included")
    yield PartResult({name: compare_rates(rates["ours"], rates["plain"])}, [note])


def _epochs(trainer: Trainer, dataset: Dataset) -> tuple[float, float, float]:
    """Seconds of an epoch, ours and the plain way's, and hours of the report's training."""
    state, count = TrainingState(), len(dataset.train.row)
    trainer.train_one_epoch(state, lambda *_: None)
    begin = time.perf_counter()
    trainer.evaluate(dataset.val, 1, lambda *_: None)
    evaluated = (time.perf_counter() - begin) / len(dataset.val.row)
    # Per row: the phantom's epoch stands for the report's, which has more rows of both kinds.
    trained = state.epoch_seconds / count
    per_epoch = REPORT["train"] * trained + REPORT["val"] * evaluated
    config = trainer.cfg
    files = phantom_files(config, count)
    # A network of its own, in torch's default layout.
    model = build_model(config.model).to(trainer.device)
    seconds = peers.plain_epoch(
        (files * (1 + count // len(files)))[:count],  # as many files as ours has rows
        image_size(config),
        trainer.device,
        model,
        build_optimizer(config.optimizer, model),
    )
    return state.epoch_seconds, seconds, REPORT["epochs"] * per_epoch / 3600

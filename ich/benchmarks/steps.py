"""A training step, its parts and its bounds, and an epoch of all networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ich.base.config import image_size, input_channels
from ich.base.records import ComputeMode
from ich.benchmarks import peers
from ich.benchmarks.inputs import phantom_files
from ich.benchmarks.measure import (
    REPORT,
    InTurn,
    PartResult,
    RatioRow,
    alternate,
    chosen_mode,
    compare_rates,
    compose_job,
    geometric_mean,
    wait_for_device,
)
from ich.benchmarks.peers import BATCH, Rate
from ich.benchmarks.published import beside_published, projection
from ich.benchmarks.settings import Settings
from ich.data.dataset import Dataset, load_dataset
from ich.training.cuda_graph import GraphedStep
from ich.training.devices import configure_cudnn, pick_device
from ich.training.loader import Batch
from ich.training.mode import CHANNELS_LAST, CONTIGUOUS
from ich.training.model import build_model, model_cost
from ich.training.optimizer import build_optimizer
from ich.training.trainer import Trainer, TrainingState

_AT_A_TIME = 8  # steps between two looks at the clock on a GPU, which is asked to finish then


# Step


@dataclass(frozen=True)
class TimedStep:
    """The training step of a network, as it was timed."""

    model: str
    size: int  # of its input, pixels
    mode: ComputeMode  # that `auto` picked for ours
    plain: str  # precision of the plain side
    gmacs: float  # multiply-adds that the step takes for an image, in 1e9
    rates: dict[str, list[float]]  # images per second by side, and GMAC/s of `product`; by round

    def compare(self, ours: str, plain: str) -> RatioRow:
        """The row of two sides."""
        return compare_rates(self.rates[ours], self.rates[plain])

    @property
    def images_per_s(self) -> float:
        """Of a training, its data included."""
        return statistics.median(self.rates["fed"])

    @property
    def report_hours(self) -> float:
        """Of the report's training steps of this network."""
        return REPORT["epochs"] * REPORT["train"] / self.images_per_s / 3600

    def rows(self) -> dict[str, RatioRow]:
        """Against the plain way, with its data, against a matrix product, and mode against mode."""
        name = f"{self.model}, {self.size} px"
        chosen = f"ours ({self.mode})"
        done = [self.gmacs * rate for rate in self.rates["ours"]]
        product = f"roofline, {name}, GMAC/s: a matrix product / ours"
        rows = {
            f"step, {name}: {chosen} / {self.plain} NCHW": self.compare("ours", "plain"),
            f"step, {name}: {_WITH_DATA}": self.compare("fed", "ours"),
            product: compare_rates(self.rates["product"], done),
        }
        timed = self.mode.timed
        for mode, rate in timed.items():
            if mode != _BASE and _BASE in timed:
                what = f"modes, {name}: {mode} / {_BASE}"
                rows[what] = compare_rates([rate], [timed[_BASE]])
        return rows


_WITH_DATA = "ours with data / on one resident batch"
_BASE = str(ComputeMode("fp32", CHANNELS_LAST))


def bench_step(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Training steps of batch 32 with fused Adam: ours, in the mode `auto` picks, against float32
    NCHW; ours with its data against ours on one batch that is ready; a matrix product's
    multiply-adds per second against ours; and all modes that `auto` timed against eager float32.
    Notes and a table say how long the training steps of the report's sweep would take, beside what
    others publish.
    """
    for size in settings.image_size:
        networks, steps = InTurn("step", settings.models, settings), []
        for step in networks.measure(partial(_time_step, size, folder, settings)):
            steps.append(step)
            why = [f"{step.model}: no graph: {step.mode.reason}."] if step.mode.reason else []
            yield PartResult(step.rows(), why)
        yield networks.remarks
        if not steps:
            continue
        means = {
            f"ours / {steps[0].plain} NCHW": ("ours", "plain"),
            "with data / resident": ("fed", "ours"),
        }
        summary = {
            f"step, {size} px, geometric mean: {what}": geometric_mean(
                [step.compare(*sides) for step in steps]
            )
            for what, sides in means.items()
        }
        models = [step.model for step in steps]
        hours = sum(step.report_hours for step in steps)
        note = projection(hours, models, size, "its training steps alone")
        lines = [(step.model, step.mode, step.images_per_s, step.report_hours) for step in steps]
        title = f"The report's training steps at {size} px, and what others publish"
        yield PartResult(summary, [note], {title: beside_published(lines)})


def _time_step(size: int, folder: Path, settings: Settings, model: str) -> TimedStep:
    """Times all sides in turn; they and their memory are gone when the next network comes."""
    config = compose_job(model, size, folder)
    device, dataset = pick_device(config.train.device), load_dataset(config)
    mode = chosen_mode(config, folder)
    ours = Trainer.build(config, dataset, device, mode)
    in_default = _plain_mode(device)
    plain = Trainer.build(config, dataset, device, in_default)
    seconds = settings.seconds
    sides = {
        "ours": _resident_rate(ours, seconds),
        "plain": _resident_rate(plain, seconds),
        "fed": fed_rate(ours, seconds),
        "product": _product_rate(device, mode, min(seconds, 1.0)),
    }
    # Backward takes two multiply-adds for each forward.
    gmacs = 3e-9 * model_cost(config.model, input_channels(config), size, BATCH).macs
    rates = alternate(sides, settings.rounds)
    return TimedStep(model, size, mode, in_default.precision, gmacs, rates)


def _plain_mode(device: torch.device) -> ComputeMode:
    """What torch computes in if nobody asks: on a GPU its convolutions take TF32."""
    return ComputeMode("tf32" if device.type == "cuda" else "fp32", CONTIGUOUS)


def _resident_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of steps on one batch that has been made before; captured, if the
    trainer's are."""
    batch = next(trainer.batches(TrainingState()))
    x = trainer.windows(trainer.resample(batch.hu, batch.draws))

    def eager_step(batch: Batch) -> torch.Tensor:
        loss = trainer.loss(trainer.network(x), batch.target)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        return loss.detach()

    graphed = GraphedStep(trainer.optimizer, len(x)) if trainer.graphed_step else None

    def step() -> None:
        if graphed:
            graphed(batch, eager_step, trainer.tensors)
        else:
            eager_step(batch)

    return _repeated(trainer, step, len(x), seconds)


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


def fed_rate(trainer: Trainer, seconds: float, steps: int = 2) -> Rate:
    """Images per second of a training as it is: batches from the cache, always new ones; over so
    many seconds and steps at least, or an epoch."""

    def rate() -> float:
        configure_cudnn(trainer.device, trainer.mode)
        trainer.model.train()
        seen, start = 0, 0.0
        for number, batch in enumerate(trainer.batches(TrainingState())):
            if number == 1:  # the first is not counted: it waits for the loader to start
                wait_for_device(trainer.device)
                start = time.perf_counter()
            trainer.train_step(batch)
            seen += len(batch.target) if number else 0
            # As in `_repeated`: a GPU that is waited for at each step runs dry.
            if trainer.device.type == "cuda" and number % _AT_A_TIME:
                continue
            wait_for_device(trainer.device)
            if number > steps and time.perf_counter() - start > seconds:
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
        mode = chosen_mode(config, folder)
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

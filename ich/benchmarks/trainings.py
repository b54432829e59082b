"""The report's own trainings, on a cohort of its size, as far as there is time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ich.base.records import ComputeMode
from ich.benchmarks.measure import (
    REPORT,
    InTurn,
    PartResult,
    chosen_mode,
    compose_job,
    wait_for_device,
)
from ich.benchmarks.peers import BATCH
from ich.benchmarks.published import projection
from ich.benchmarks.settings import Settings
from ich.benchmarks.steps import fed_rate
from ich.data.dataset import Split, load_dataset
from ich.training.devices import pick_device
from ich.training.trainer import Trainer, TrainingState

# Steps of a network that are timed at least: on a GPU, where that is seconds, and elsewhere.
_LEAST_STEPS = {"cuda": 300, "cpu": 3}


class _Training(NamedTuple):
    model: str
    mode: ComputeMode
    what: str  # was measured: a whole epoch, or so many steps
    trained: float  # rows per second
    validated: float  # likewise

    @property
    def hours(self) -> float:
        """Of all the report's epochs."""
        epoch = REPORT["train"] / self.trained + REPORT["val"] / self.validated
        return REPORT["epochs"] * epoch / 3600


def bench_report(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Trainings of the report's networks on a cohort of its 77,482 rows, which repeat the phantom's
    slices, one network after another in one process, without checkpoints: a whole epoch and its
    validation where there is time for it, else a part of both, and the table says which. So the
    hours of ten epochs are extrapolated, from an epoch or from less."""
    size = max(settings.image_size)
    title = f"The report's trainings at {size} px on a cohort of its size"
    headings = ["network", "in", "measured", "training, rows per s", "validation, rows per s"]
    lines = [[*headings, "the report's, minutes"]]
    networks, done = InTurn("report", settings.models, settings), list[_Training]()
    for training in networks.measure(partial(_train, size, folder, settings)):
        rates = [f"{rate:,.1f}" for rate in (training.trained, training.validated)]
        minutes = f"{60 * training.hours:,.1f}"
        lines.append([training.model, str(training.mode), training.what, *rates, minutes])
        done.append(training)
        yield PartResult(tables={title: lines})
    yield networks.remarks
    if done:
        hours, models = sum(t.hours for t in done), [t.model for t in done]
        what = "validation included, on a cohort of its size"
        yield PartResult(notes=[projection(hours, models, size, what)])


def _train(size: int, folder: Path, settings: Settings, model: str) -> _Training:
    left = settings.seconds_left / (len(settings.models) - settings.models.index(model))
    begin = time.perf_counter()
    config = compose_job(model, size, folder)
    device, dataset = pick_device(config.train.device), load_dataset(config)
    mode = chosen_mode(config, folder)
    train, val = _repeated(dataset.train, REPORT["train"]), _repeated(dataset.val, REPORT["val"])
    trainer = Trainer.build(config, replace(dataset, train=train, val=val), device, mode)
    least = _LEAST_STEPS[device.type]
    trained = fed_rate(trainer, settings.seconds, least)()
    epoch = REPORT["train"] / trained
    # Validation takes less than the half of a training's time for a row, and a sixth of the rows.
    if 1.1 * epoch < left - (time.perf_counter() - begin):
        state = TrainingState()
        trainer.train_one_epoch(state, lambda *_: None)
        trained, what = REPORT["train"] / state.epoch_seconds, "a whole epoch"
    else:
        what = f"{max(least, round(settings.seconds * trained / BATCH)):,} steps"
        val = _repeated(val, least * BATCH)
    trainer.evaluate(_repeated(val, 4 * BATCH), 1, lambda *_: None)  # picks algorithms
    wait_for_device(device)
    begin = time.perf_counter()
    rows = len(trainer.evaluate(val, 1, lambda *_: None))
    return _Training(model, mode, what, trained, rows / (time.perf_counter() - begin))


def _repeated(split: Split, rows: int) -> Split:
    """So many rows, the same again and again; or the first so many."""
    index = np.arange(rows) % len(split.row)
    columns = {field.name: getattr(split, field.name) for field in fields(split)}
    return replace(split, **{k: v[index] for k, v in columns.items() if v is not None})

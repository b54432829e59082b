"""Trainings on a pretended GPU (`../shared/gpu/emulate.sh`): host code is real, kernels do nothing.

Prints a line of JSON for each case, with the calls of one epoch. Run by tests/training/test_gpu.py.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ich.base.records import ComputeMode
from ich.benchmarks.measure import compose_job
from ich.benchmarks.settings import Settings
from ich.benchmarks.steps import bench_step
from ich.benchmarks.trainings import bench_report
from ich.data.dataset import Split
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import PhantomSpec
from ich.training import graph_check
from ich.training import trainer as trainer_module
from ich.training.timing import random_dataset, time_training_steps
from ich.training.trainer import Trainer, TrainingState

BATCH = 4
GPU = torch.device("cuda")
torch.backends.cudnn.enabled = False  # there is none
# Numbers mean nothing here, and need not be finite.
trainer_module._require_finite = lambda *_: None  # type: ignore[assignment]
graph_check.why_not_graphed = lambda *_: ""  # type: ignore[assignment]
library = ctypes.CDLL(os.environ["ICH_FAKE_CUDA"])
library.fake_report.restype = ctypes.c_char_p


def build(folder: Path, rows: int, *overrides: str, graph: bool = False) -> Trainer:
    """A training of `rows` rows in batches of four, at 64 pixels."""
    own = (f"train.batch_size={BATCH}", "scheduler=cosine", *overrides)
    config = compose_job("mobilenet_v2", 64, folder, *own)
    row = np.arange(rows) % BATCH
    target = np.random.default_rng(0).integers(0, 2, (rows, 6)).astype(np.float32)
    split = Split(row.astype(str), row, target, row, row)
    dataset = replace(random_dataset(config), train=split, val=split)
    mode = ComputeMode("fp32", "channels_last", graph=graph or "train.graph=on" in overrides)
    return Trainer.build(config, dataset, GPU, mode)


def calls() -> tuple[dict[str, int], list[str]]:
    """How often each kind of call was made since `fake_reset`, and what a capture forbids."""
    lines = [line.split("\t") for line in library.fake_report().decode().splitlines()]
    counts = {name: int(count) for name, count, *_ in lines if name != "LOG"}
    return counts, [text for name, text, *_ in lines if name == "LOG"]


def epoch(trainer: Trainer, state: TrainingState) -> tuple[dict[str, int], list[str]]:
    library.fake_reset()
    trainer.train_one_epoch(state, lambda *_: None)
    return calls()


def main(folder: Path) -> None:
    for graph in ("off", "on"):
        for feed in ("resident", "mapped"):
            own = ("loss=weighted_bce", f"train.feed={feed}", f"train.graph={graph}")
            counts = {}
            for rows in (4 * BATCH + 2, 8 * BATCH + 2):
                trainer, state = build(folder, rows, *own), TrainingState()
                _, first = epoch(trainer, state)
                state.next_epoch()
                counts[rows], later = epoch(trainer, state)
            schedule = json.loads(json.dumps(trainer.schedule()))
            trainer.restore({k: v.cpu() for k, v in trainer.tensors().items()}, schedule)
            gc.disable()
            model = weakref.ref(trainer.model)
            del trainer
            print(
                json.dumps(
                    {
                        "case": f"{graph} {feed}",
                        "counts": list(counts.values()),
                        "said": first + later,
                        "freed": model() is None,
                        "rates": schedule["lr"] + schedule["scheduler"]["base_lrs"],
                    }
                )
            )
            gc.enable()
    # Taken up just before the smaller last batch: whole batches are captured, in the next epoch.
    trainer, state = (
        build(folder, 4 * BATCH + 2, "train.graph=on"),
        TrainingState(step=4, losses=torch.zeros(4)),
    )
    epoch(trainer, state)
    state.next_epoch()
    counts_after_tail, _ = epoch(trainer, state)
    print(json.dumps({"case": "tail first", "counts": [counts_after_tail]}))
    # A step that looks at a number cannot be captured.
    trainer, state = build(folder, 2 * BATCH, "train.graph=auto", graph=True), TrainingState()
    plain = trainer.loss
    trainer.loss = lambda logits, target: plain(logits, target) * logits.sum().item()
    epoch(trainer, state)
    print(json.dumps({"case": "failed capture", "why": trainer.not_graphed, "step": state.step}))
    config = compose_job("mobilenet_v2", 64, folder, f"train.batch_size={BATCH}")
    timing = time_training_steps(config, rounds=1)
    modes = {str(mode): mode.memory for mode in timing.seconds}
    print(json.dumps({"case": "timed", "modes": modes, "refused": timing.refused}))
    # What `make check-gpu` measures in its own process.
    write_phantom(folder / "phantom", PhantomSpec(patients=4, seed=1, size=64), workers=1)
    settings = Settings(["mobilenet_v2"], [32], 4, 40, 1, 0.05)
    results = [*bench_step(settings, folder), *bench_report(settings, folder)]
    rows = [name for result in results for name in result.rows]
    tables = [table for result in results for table in result.tables.values()]
    failures = [failure for result in results for failure in result.failures]
    print(json.dumps({"case": "bench", "rows": rows, "tables": tables, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

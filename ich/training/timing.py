"""What a training computes in: precision and memory layout, chosen per network by a short timing.

bfloat16 is several times as fast for some networks on some processors and slower for others; only
a few real steps tell. They are timed once per sweep, before its jobs start and in a process of its
own (`python -m ich.training.timing`), and the choice is written down: a resumed or repeated run
computes as it began. The layout is channels_last, which at batch 32 was never slower for one of the
eight networks; NCHW is what `ich.bench` compares with.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np

from ich.base.config import Config, Precision, saved_config, to_dict
from ich.base.memory import keep_memory
from ich.base.processes import watch_supervisor
from ich.base.provenance import processor
from ich.base.records import CohortSummary, ComputeMode
from ich.data.dataset import Dataset, Split
from ich.training.mode import CHANNELS_LAST, pick_fastest, workload_key

_ROUNDS = 3


def select_modes(configs: Sequence[Config]) -> Iterator[tuple[str, ComputeMode]]:
    """Times each workload among some jobs; yields its key and its mode as they come.

    What cannot be timed is left out: its job decides for itself.
    """
    # In a process of its own: a GPU's memory is free again when it ends, the random state of this
    # one is untouched, and a network that kills its process costs a timing and not the sweep.
    command = [sys.executable, "-m", "ich.training.timing", str(os.getpid())]
    text = json.dumps([to_dict(config) for config in configs])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for send in (lambda: child.stdin.write(text), child.stdin.close):
                with contextlib.suppress(BrokenPipeError):  # it died, and says no more
                    send()
            for line in child.stdout:
                timed = json.loads(line)
                yield timed["workload"], ComputeMode(**timed["mode"])
        finally:
            child.kill()  # also if whoever iterates is interrupted


def select_mode(config: Config, recorded: ComputeMode | None) -> ComputeMode:
    """The mode of a job that is about to train here.

    Args:
        config: the job.
        recorded: what was chosen for it; used if it was timed on a processor like this one.
    """
    # Imported here: torch takes seconds, which a launch with nothing to time need not wait for.
    from ich.training.devices import pick_device

    # Of the device it computes on: a GPU that is hidden from this process does not count.
    here = processor(pick_device(config.train.device).type == "cuda")
    if config.train.precision is not Precision.auto:
        return ComputeMode(config.train.precision.value, CHANNELS_LAST, here)
    # On a cluster of unlike machines, a job may start on another processor than was timed.
    if recorded and recorded.processor == here:
        return recorded
    return pick_fastest(time_training_steps(config), here)


def time_training_steps(config: Config, rounds: int = _ROUNDS) -> dict[tuple[str, str], float]:
    """Seconds per image of a training step, by (precision, layout), timed alternately: of all that
    `auto` may choose from, or of what the config asks for.

    The steps are real ones, on made-up slices and random weights; the first is not counted.
    """
    from ich.training.devices import pick_device
    from ich.training.trainer import Trainer

    # Random weights take as long, and need neither a file nor a network.
    config = replace(config, model=replace(config.model, pretrained=False, weights=None))
    device, dataset = pick_device(config.train.device), random_dataset(config)
    wanted = config.train.precision
    precisions = [Precision.fp32, Precision.bf16] if wanted is Precision.auto else [wanted]
    candidates = [(p.value, CHANNELS_LAST) for p in precisions]
    trainers = {c: Trainer.build(config, dataset, device, ComputeMode(*c)) for c in candidates}
    # The least of the rounds: whatever disturbs a step makes it slower, and never faster.
    best = dict.fromkeys(candidates, float("inf"))
    # In turn, so that whatever else the machine does meets all of them.
    for round_ in range(rounds + 1):
        for candidate, trainer in trainers.items():
            seconds = trainer.time_step()
            if round_ > 0:  # the first step allocates, and on a GPU picks its algorithms
                best[candidate] = min(best[candidate], seconds / config.train.batch_size)
    return best


def random_dataset(cfg: Config) -> Dataset:
    """One batch of random slices, int16 HU, with random labels, for timing steps."""
    batch, size = cfg.train.batch_size, cfg.data.cache_size
    rng = np.random.default_rng(0)
    # Six as in RSNA 2019, where nothing is named: the columns are known only from the data.
    labels = tuple(cfg.data.label_columns or "abcdef")
    hu = rng.integers(-1024, 1024, (batch, size, size), dtype=np.int16)
    target = rng.integers(0, 2, (batch, len(labels))).astype(np.float32)
    row = np.arange(batch)
    split = Split(row.astype(str), row, target, row, row)
    summary = CohortSummary(steps={}, rates={}, scored="val", leak={})
    return Dataset(hu, labels, split, split, None, summary)


def main(supervisor: int) -> None:
    """Reads jobs from standard input and writes a line of JSON for each.

    Args:
        supervisor: id of the process without which this one ends.
    """
    watch_supervisor(supervisor)
    keep_memory()  # as the trainings do
    for values in json.load(sys.stdin):
        config = saved_config(values, "a job to time")
        mode = select_mode(config, None)
        print(json.dumps({"workload": workload_key(config), "mode": asdict(mode)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

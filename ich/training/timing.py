"""What a training computes in, chosen per network by a short timing: precision, memory layout, and
whether a step is one CUDA graph.

bfloat16 is several times as fast for some networks on some processors and slower for others; only
a few real steps tell. They are timed once per sweep, before its jobs start and in a process of its
own (`python -m ich.training.timing`), and the choice is written down: a resumed or repeated run
computes as it began. The layout is channels_last, which at batch 32 was never slower for one of the
eight networks; NCHW is what `ich.bench` compares with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ich.base.config import Config, CudaGraph, Precision, saved_config, to_dict
from ich.base.memory import keep_memory
from ich.base.processes import watch_supervisor
from ich.base.provenance import processor
from ich.base.records import CohortSummary, ComputeMode
from ich.data.dataset import Dataset, Split
from ich.training.mode import CHANNELS_LAST, pick_fastest, workload_key

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_ROUNDS = 3
_GPU_STEPS = 20  # in a round, after which the host waits once, as at the end of an epoch


def select_modes(configs: Sequence[Config]) -> Iterator[tuple[str, ComputeMode]]:
    """Times each workload among some jobs; yields its key and its mode as they come.

    What cannot be timed is left out: its job decides for itself.
    """
    # In a process of its own: a GPU's memory is free again when it ends, the random state of this
    # one is untouched, and a network that kills its process costs a timing and not the sweep.
    command = [sys.executable, "-m", "ich.training.timing", str(os.getpid())]
    text = json.dumps([to_dict(config) for config in configs])
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for send in (lambda: child.stdin.write(text), child.stdin.close):
                with contextlib.suppress(BrokenPipeError):  # it died, and says no more
                    send()
            for line in child.stdout:
                timed = json.loads(line)
                mode = ComputeMode.from_json(timed["mode"])
                assert mode is not None
                yield timed["workload"], mode
            if status := child.wait():
                said.seek(0)
                last = (said.read().strip().splitlines() or ["it says nothing"])[-1]
                log.warning("timing ended with status %d (%s): jobs time themselves", status, last)
        finally:
            child.kill()  # also if whoever iterates is interrupted


def select_mode(config: Config, recorded: ComputeMode | None) -> ComputeMode:
    """The mode of a job that is about to train here.

    Args:
        config: the job.
        recorded: what was chosen for it; used if it was timed on a processor like this one.
    """
    # Imported here: torch takes seconds, which a launch with nothing to time need not wait for.
    from ich.training.devices import pick_device, uses_cuda_graph

    device = pick_device(config.train.device)
    # Of the device it computes on: a GPU that is hidden from this process does not count.
    here = processor(device.type == "cuda")
    precision, graph = config.train.precision, uses_cuda_graph(config.train.graph, device)
    # On a cluster of unlike machines, a job may start on another processor than was timed.
    if recorded and recorded.processor == here:
        asked = recorded.precision if precision is Precision.auto else precision.value
        if recorded.precision == asked:
            return recorded if graph is None else replace(recorded, graph=graph)
    if precision is not Precision.auto and graph is not None:
        return ComputeMode(precision.value, CHANNELS_LAST, here, graph)
    return _fastest_mode(config, device, here)


def _fastest_mode(config: Config, device: torch.device, here: str) -> ComputeMode:
    """The fastest mode; a graphed one only if its steps do what eager ones do."""
    from ich.training.graph_check import why_not_graphed

    seconds, refused = time_training_steps(config)
    timed = {str(mode): round(1 / s, 1) for mode, s in seconds.items()}
    mode = pick_fastest(seconds)
    while mode.graph and config.train.graph is CudaGraph.auto:
        why = why_not_graphed(_with_random_weights(config), random_dataset(config, 2), device, mode)
        if not why:
            break
        refused[mode.precision] = why
        del seconds[mode]
        mode = pick_fastest(seconds)
    graphed = replace(mode, graph=True)
    if not mode.graph and graphed in seconds:
        gain = seconds[mode] / seconds[graphed]
        refused[mode.precision] = f"one graph per step is {gain:.2f} times as fast"
    reason = refused.get(mode.precision, "")
    return replace(mode, processor=here, timed=timed, reason=reason)


class Timing(NamedTuple):
    """seconds: per image, of each mode. refused: why a precision's steps are not graphed."""

    seconds: dict[ComputeMode, float]
    refused: dict[str, str]


def time_training_steps(config: Config, rounds: int = _ROUNDS) -> Timing:
    """Times a training step in all modes that `auto` may choose from, or in what the config asks
    for: real steps, on made-up slices and random weights, of which the first are not counted."""
    import torch

    from ich.training.devices import pick_device, uses_cuda_graph

    device = pick_device(config.train.device)
    on_gpu = device.type == "cuda"
    graph, wanted = uses_cuda_graph(config.train.graph, device), config.train.precision
    precisions = [Precision.fp32, Precision.bf16, *([Precision.tf32] if on_gpu else [])]
    modes = [
        ComputeMode(precision.value, CHANNELS_LAST, graph=graphed)
        for precision in (precisions if wanted is Precision.auto else [wanted])
        for graphed in ((False, True) if graph is None else (graph,))
    ]
    dataset = random_dataset(config, _GPU_STEPS if on_gpu else 1)
    timing = Timing({}, {})
    # On a CPU in turn, so that whatever else the machine does meets all of them; on a GPU one after
    # another, for its memory may hold no more.
    full = None
    for together in [[mode] for mode in modes] if on_gpu else [modes]:
        try:
            _time_in_turn(_with_random_weights(config), dataset, device, together, rounds, timing)
        except torch.OutOfMemoryError as error:
            full = error.with_traceback(None)  # which would hold all that did not fit
            timing.refused.update({m.precision: "there is no memory for a graph" for m in together})
    if full and not timing.seconds:  # no mode fits
        raise full
    return timing


def _time_in_turn(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    modes: Sequence[ComputeMode],
    rounds: int,
    timing: Timing,
) -> None:
    """Adds modes to a timing.

    Raises:
        torch.OutOfMemoryError: a GPU has no memory for one.
    """
    import torch

    from ich.training.trainer import Trainer

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    # The least of the rounds: whatever disturbs a step makes it slower, and never faster.
    best = dict.fromkeys(modes, float("inf"))
    trainers = {mode: Trainer.build(config, dataset, device, mode) for mode in modes}
    for round_ in range(rounds + 1):
        for mode, trainer in trainers.items():
            seconds = trainer.time_epoch()
            if round_ > 0:  # the first allocates, and on a GPU picks its algorithms
                best[mode] = min(best[mode], seconds / len(dataset.train.row))
    memory = torch.cuda.max_memory_reserved(device) if on_gpu else 0
    for mode, trainer in trainers.items():
        if trainer.not_graphed:
            timing.refused[mode.precision] = trainer.not_graphed
        else:
            timing.seconds[replace(mode, memory=memory)] = best[mode]


def _with_random_weights(config: Config) -> Config:
    """They take as long, and need neither a file nor a network."""
    return replace(config, model=replace(config.model, pretrained=False, weights=None))


def random_dataset(cfg: Config, steps: int = 1) -> Dataset:
    """So many batches from one of random slices, int16 HU, with random labels."""
    batch, size = cfg.train.batch_size, cfg.data.cache_size
    rng = np.random.default_rng(0)
    # Six as in RSNA 2019, where nothing is named: the columns are known only from the data.
    labels = tuple(cfg.data.label_columns or "abcdef")
    hu = rng.integers(-1024, 1024, (batch, size, size), dtype=np.int16)
    target = rng.integers(0, 2, (steps * batch, len(labels))).astype(np.float32)
    row = np.tile(np.arange(batch), steps)
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

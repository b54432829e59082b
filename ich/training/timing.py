"""What a training computes in, chosen per network by a short timing: precision, memory layout,
whether a step is one CUDA graph, and whether the network is compiled.

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

from ich.base.config import (
    Config,
    CudaGraph,
    Precision,
    saved_config,
    slices_shown,
    to_dict,
)
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
_COMPILE_GAIN = 0.05  # of the training's time, which compiling must save in all
_GPU_STEPS = 20  # in a round, after which the host waits once, as at the end of an epoch


def select_modes(jobs: Sequence[tuple[Config, int]]) -> Iterator[tuple[str, ComputeMode]]:
    """Times each workload among some jobs; yields its key and its mode as they come.

    What cannot be timed is left out: its job decides for itself.

    Args:
        jobs: the config of each, and how many images it trains on, in all epochs together.
    """
    # In a process of its own: a GPU's memory is free again when it ends, the random state of this
    # one is untouched, and a network that kills its process costs a timing and not the sweep.
    command = [sys.executable, "-m", "ich.training.timing", str(os.getpid())]
    text = json.dumps([(to_dict(config), images) for config, images in jobs])
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


def select_mode(config: Config, recorded: ComputeMode | None, images: int = 0) -> ComputeMode:
    """The mode of a job that is about to train here.

    Args:
        config: the job.
        recorded: what was chosen for it; used if it was timed on a processor like this one.
        images: that it trains on, in all epochs together: what compiling must be worth its time
            for.
    """
    # Imported here: torch takes seconds, which a launch with nothing to time need not wait for.
    from ich.training.devices import pick_device, uses_cuda_graph

    device = pick_device(config.train.device)
    # Of the device it computes on: a GPU that is hidden from this process does not count.
    here = processor(device.type == "cuda")
    precision, graph = config.train.precision, uses_cuda_graph(config.train.graph, device)
    # None if that is still to be found out.
    compiled = None if config.train.compile == "auto" else config.train.compile is True
    # On a cluster of unlike machines, a job may start on another processor than was timed.
    if recorded and recorded.processor == here:
        asked = recorded.precision if precision is Precision.auto else precision.value
        if recorded.precision == asked:
            return replace(
                recorded,
                graph=recorded.graph if graph is None else graph,
                compiled=recorded.compiled if compiled is None else compiled,
            )
    if precision is not Precision.auto and graph is not None and compiled is not None:
        return ComputeMode(precision.value, CHANNELS_LAST, here, graph, compiled=compiled)
    mode = _fastest_mode(config, device, here)
    return mode if compiled is not None else _if_worth_compiling(config, device, mode, images)


def _fastest_mode(config: Config, device: torch.device, here: str) -> ComputeMode:
    """The fastest mode; a graphed one only if its steps do what eager ones do."""
    from ich.training.graph_check import why_not_graphed

    seconds, refused = time_training_steps(config)
    timed = {str(mode): round(1 / s, 1) for mode, s in seconds.items()}
    mode = pick_fastest(seconds)
    while mode.graph and config.train.graph is CudaGraph.auto:
        why = why_not_graphed(with_random_weights(config), random_dataset(config, 2), device, mode)
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


def _if_worth_compiling(
    config: Config, device: torch.device, mode: ComputeMode, images: int
) -> ComputeMode:
    """The mode, compiled if that saves more time over so many images than it takes; with what it
    takes and saves, or why it cannot be done."""
    import torch

    from ich.training.graph_check import why_not_compiled

    compiled, random = replace(mode, compiled=True), with_random_weights(config)
    timing, on_gpu = Timing({}, {}), device.type == "cuda"
    data = random_dataset(config, _GPU_STEPS if on_gpu else 1)
    # Again beside it, as a machine may have become busier, but on a GPU, where nothing else runs
    # and the two may not fit together.
    together = [[mode], [compiled]] if on_gpu else [[mode, compiled]]
    try:
        torch.compiler.reset()  # it gives up on code that it has compiled for several networks
        first: dict[ComputeMode, float] = {}
        for modes in together:
            first |= _time_in_turn(random, data, device, modes, _ROUNDS, timing)
        torch.compiler.reset()
        why = timing.refused.get(mode.precision, "")
        why = why or why_not_compiled(random, random_dataset(config, 2), device, compiled)
    except Exception as error:  # as different as compilers; without one on the machine, its absence
        why = f"cannot be done: {type(error).__name__}: {(str(error).split(chr(10)) or [''])[0]}"
    if why:
        return replace(mode, compiling=why)
    plain, seconds = timing.seconds[mode], timing.seconds[compiled]
    takes = first[compiled] - seconds * len(data.train.row)
    saves = (plain - seconds) * images
    # Of more than a timing's noise.
    worth = saves - takes > _COMPILE_GAIN * plain * images
    (memory,) = (m.memory for m in timing.seconds if m.compiled)
    return replace(
        compiled if worth else mode,
        memory=memory if worth else mode.memory,
        compiling=f"takes {takes:.0f} s and saves {saves:.0f} s over {images:,} images, "
        f"{saves - takes:+.0f} s in all: {'done' if worth else 'not done'}",
        # What the estimate rests on: both as they were timed side by side.
        timed=mode.timed | {str(m): round(1 / s, 1) for m, s in timing.seconds.items()},
    )


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
    compiled = config.train.compile is True
    precisions = [Precision.fp32, Precision.bf16, *([Precision.tf32] if on_gpu else [])]
    modes = [
        ComputeMode(precision.value, CHANNELS_LAST, graph=graphed, compiled=compiled)
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
            _time_in_turn(with_random_weights(config), dataset, device, together, rounds, timing)
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
) -> dict[ComputeMode, float]:
    """Adds modes to a timing; returns the seconds of the first round of each, which is not in it:
    it allocates, compiles, and on a GPU picks algorithms.

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
    best, first = dict.fromkeys(modes, float("inf")), {}
    trainers = {mode: Trainer.build(config, dataset, device, mode) for mode in modes}
    for round_ in range(rounds + 1):
        for mode, trainer in trainers.items():
            seconds = trainer.time_epoch()
            if round_ == 0:
                first[mode] = seconds
            else:
                best[mode] = min(best[mode], seconds / len(dataset.train.row))
    memory = torch.cuda.max_memory_reserved(device) if on_gpu else 0
    for mode, trainer in trainers.items():
        if trainer.not_graphed:
            timing.refused[mode.precision] = trainer.not_graphed
        else:
            timing.seconds[replace(mode, memory=memory)] = best[mode]
    return first


def with_random_weights(config: Config) -> Config:
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
    around = None
    if (slices := slices_shown(cfg)) > 1:
        around = (row[:, None] + np.arange(slices)) % batch
    split = Split(row.astype(str), row, target, row, row, around)
    summary = CohortSummary(steps={}, rates={}, scored="val", leak={})
    return Dataset(hu, labels, split, split, None, summary)


def main(supervisor: int) -> None:
    """Reads jobs from standard input and writes a line of JSON for each.

    Args:
        supervisor: id of the process without which this one ends.
    """
    watch_supervisor(supervisor)
    keep_memory()  # as the trainings do
    for values, images in json.load(sys.stdin):
        config = saved_config(values, "a job to time")
        mode = select_mode(config, None, images)
        print(json.dumps({"workload": workload_key(config), "mode": asdict(mode)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

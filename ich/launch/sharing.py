"""How many jobs share a GPU, where that is left to ich: as many as fit its memory and pay.

They fit by what the jobs that need most were timed to need. They pay as long as twice as many at
once take at least 1.1 times as many images a second, measured at the launch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ich.base.config import Config, CudaGraph, Precision
from ich.base.progress import StageCallback
from ich.base.provenance import nvidia_smi
from ich.base.records import ComputeMode
from ich.base.results import State, SweepPaths
from ich.base.terminal import Terminal
from ich.base.workers import available_cores
from ich.launch.jobs import VISIBLE, Slot, gpu_slots
from ich.launch.mps import multi_process_service
from ich.launch.side_by_side import AT_ONCE, Kind, measure, pick_number
from ich.training.mode import CHANNELS_LAST, workload_key

AUTO = "auto"


class Fit(NamedTuple):
    """most: of `AT_ONCE`, how many jobs at once each GPU holds; why: what keeps them from being
    more, in words."""

    most: int
    why: str


@contextlib.contextmanager
def shared_slots(
    configs: Sequence[Config], sweep: SweepPaths, gpus: Sequence[str]
) -> Iterator[list[Slot]]:
    """Slots on GPUs for the jobs that are left of an opened sweep, as many on each as pay, with MPS
    for as long as they are used. What was decided and why is said, and is in the sweep's record.

    Args:
        configs: the jobs.
        sweep: their folder.
        gpus: by their names for CUDA_VISIBLE_DEVICES.
    """
    origins = sweep.read_record().origins
    todo = [
        (c, origins[c.job].mode)
        for c in configs
        if sweep.run(c.job).state(c, origins[c.job]) is not State.done
    ]
    fit = jobs_that_fit(todo, gpus)
    with contextlib.ExitStack() as stack:
        slots, said = gpu_slots(gpus, 1), f"1 job on each GPU: {fit.why}"
        if fit.most > 1:
            uuids = {gpu: uuid for gpu, (uuid, _) in _known(gpus).items()}
            found, how = stack.enter_context(multi_process_service([*uuids.values()]))
            with Terminal().preparing() as report:
                number, why = _number_that_pays(todo, fit.most, uuids[gpus[0]], found, report)
            said = f"{number} on each GPU, {how}: {why}; {fit.why}"
            if number == 1:
                stack.close()
            else:
                slots = [
                    replace(slot, environment=own | {VISIBLE: uuids[own[VISIBLE]]} | found)
                    for slot in gpu_slots(gpus, number)
                    for own in [slot.environment]
                ]
        Terminal().say(f"hydra.launcher.jobs_per_gpu=auto: {said}.")
        sweep.write_record(replace(sweep.read_record(), sharing=said))
        yield slots


def jobs_that_fit(todo: Sequence[tuple[Config, ComputeMode | None]], gpus: Sequence[str]) -> Fit:
    """How many jobs at once each of these GPUs and this machine hold.

    Args:
        todo: the jobs that are left, and in what they compute, where that is known.
        gpus: by their names for CUDA_VISIBLE_DEVICES.
    """
    waiting = -(-len(todo) // len(gpus))
    if waiting < 2:
        return Fit(1, f"jobs left: {len(todo)}, GPUs: {len(gpus)}")
    free = [memory for _, memory in _known(gpus).values()]
    if not all(free):
        return Fit(1, "nvidia-smi does not say how much of its memory is free")
    from ich.training.devices import training_bytes

    # Any two may meet, also two of the largest. Without named columns the labels are known only
    # once they are read: RSNA 2019 has six.
    needed = max(
        training_bytes(c, len(c.data.label_columns or range(6)), _mode(c, mode)) for c, mode in todo
    )
    fitting, cores = min(free) // needed, available_cores() // len(gpus)
    most = max(n for n in AT_ONCE if n <= max(1, min(waiting, fitting, cores)))
    return Fit(
        most,
        f"{min(free) / 1e9:.1f} GB of its memory are free and a job needs up to "
        f"{needed / 1e9:.1f}, {waiting} are waiting, and {cores} cores are for it",
    )


def describe_sharing(
    configs: Sequence[Config], sweep: SweepPaths, gpus: Sequence[str], jobs_per_gpu: int | str
) -> str:
    """What a plan says of how the jobs that are left are placed; empty where none shares a GPU."""
    if not gpus or jobs_per_gpu == 1 or not configs:
        return ""
    if jobs_per_gpu != AUTO:
        return f"Sharing: {jobs_per_gpu} jobs at once on each GPU."
    modes = sweep.read_record().modes
    fit = jobs_that_fit([(c, modes.get(workload_key(c))) for c in configs], gpus)
    up_to = "up to " if fit.most > 1 else ""
    measured = " What pays is measured at the launch." if up_to else ""
    return f"Sharing: {up_to}{fit.most} on each GPU: {fit.why}.{measured}"


def _mode(config: Config, mode: ComputeMode | None) -> ComputeMode:
    """What a job computes in; without a timing, what it asks for."""
    asked = config.train.precision
    precision = "fp32" if asked is Precision.auto else asked.value
    return mode or ComputeMode(precision, CHANNELS_LAST, graph=config.train.graph is CudaGraph.on)


def _known(gpus: Sequence[str]) -> dict[str, tuple[str, int]]:
    """UUID and free bytes of GPUs, by their names for CUDA_VISIBLE_DEVICES: numbers, or UUIDs that
    may be cut short. What nvidia-smi does not tell is "" and 0, as of a part of a GPU (MIG)."""
    told = {}
    for line in nvidia_smi("index,uuid,memory.free"):
        index, uuid, free = (part.strip() for part in line.split(","))
        mib = free.removesuffix(" MiB")
        told[index] = told[uuid] = uuid, int(mib) << 20 if mib.isdigit() else 0
    return {
        gpu: next(
            (v for k, v in told.items() if k == gpu or (gpu[:4] == "GPU-" and k.startswith(gpu))),
            ("", 0),
        )
        for gpu in gpus
    }


# Of a sweep's batches, which an optimizing sweeper launches one after another.
_measured: dict[tuple[object, ...], tuple[dict[int, float], str]] = {}


def _number_that_pays(
    todo: Sequence[tuple[Config, ComputeMode | None]],
    most: int,
    gpu: str,
    environment: dict[str, str],
    report: StageCallback,
) -> tuple[int, str]:
    """How many jobs at once pay on a GPU, and in words why."""
    counts = Counter(workload_key(config) for config, _ in todo)
    kinds = {
        key: Kind(config, _mode(config, mode), counts[key])
        for config, mode in todo
        if (key := workload_key(config))
    }
    measured_as = most, *counts
    if measured_as not in _measured:
        (slot, *_) = gpu_slots([gpu], most)
        _measured[measured_as] = measure(
            [*kinds.values()],
            most,
            slot.environment | environment,
            lambda done, total: report("measuring jobs side by side", done, total),
        )
    seconds, died = _measured[measured_as]
    if 1 not in seconds:
        return 1, f"what measures them ended ({died})"
    gains = [f"{n} take {seconds[1] / s:.2f} times the images of one" for n, s in seconds.items()]
    words = ", ".join(gains[1:]) or "two at once could not be measured"
    return pick_number(seconds), f"{words}{f' (more ended: {died})' if died else ''}"

"""What a training computes in: precision and memory layout."""

from __future__ import annotations

from ich.base.config import Config, CudaGraph, Device, Precision, image_size, input_channels
from ich.base.provenance import nvidia_smi
from ich.base.records import ComputeMode

# What a precision must be faster by: bfloat16 keeps 8 bits of a number and TF32 11, and that must
# be worth it, and more than a timing's noise. A graph must be worth its memory.
_GAIN = {Precision.bf16.value: 1.1, Precision.tf32.value: 1.05}
_GRAPH_GAIN = 1.05

JOBS_PER_GPU = "ICH_JOBS_PER_GPU"  # environment of a job: how many share the GPU that it sees
CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"


def workload_key(config: Config) -> str:
    """Jobs with the same key compute in one mode: the same network, input, batch and device.

    Seeds of one network could not be compared otherwise. The batch is in it, for what is faster
    depends on it: channels_last was no faster for ResNet50 at 16 images, and 6 % faster at 32.
    """
    channels, batch = input_channels(config), config.train.batch_size
    # A sweep's record has modes by this text: another form would have earlier sweeps timed again.
    shape = f"{batch}x{channels}x{image_size(config)}"
    key = f"{config.model.timm} {shape} {config.train.device.value}"
    # What was asked for by name is no choice that others share.
    precision, graph = config.train.precision, config.train.graph
    asked = [] if precision is Precision.auto else [precision.value]
    asked += [] if graph is CudaGraph.auto else [f"graph {graph.value}"]
    # Whether to compile depends on how much there is to train.
    if config.train.compile:
        epochs = f" over {config.train.epochs} epochs" if config.train.compile == "auto" else ""
        asked.append(f"compile {str(config.train.compile).lower()}{epochs}")
    return " ".join([key, *asked])


def is_timed(config: Config) -> bool:
    """Whether the job's mode is found by timing."""
    train = config.train
    if train.precision is Precision.auto or train.compile == "auto":
        return True
    may_be_graphed = train.graph is CudaGraph.auto and train.device is not Device.cpu
    return may_be_graphed and bool(nvidia_smi("name"))


def pick_fastest(seconds: dict[ComputeMode, float]) -> ComputeMode:
    """The mode with the fewest seconds per image; one of fewer bits, or a graph, only if that is
    worth it."""

    def cost(mode: ComputeMode) -> float:
        gain = _GAIN.get(mode.precision, 1.0) * (_GRAPH_GAIN if mode.graph else 1)
        return seconds[mode] * gain

    return min(seconds, key=cost)

"""What a training computes in: precision and memory layout."""

from __future__ import annotations

from ich.base.config import Config, Precision, image_size
from ich.base.records import ComputeMode

# bfloat16 keeps 8 bits of a number. It must be worth that, and more than a timing's noise.
_BF16_GAIN = 1.1

CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"


def workload_key(config: Config) -> str:
    """Jobs with the same key compute in one mode: the same network, input, batch and device.

    Seeds of one network could not be compared otherwise. The batch is in it, for what is faster
    depends on it: channels_last was no faster for ResNet50 at 16 images, and 6 % faster at 32.
    """
    channels, batch = len(config.windows.channels), config.train.batch_size
    # A sweep's record has modes by this text: another form would have earlier sweeps timed again.
    shape = f"{batch}x{channels}x{image_size(config)}"
    return f"{config.model.timm} {shape} {config.train.device.value}"


def pick_fastest(seconds: dict[tuple[str, str], float], processor: str) -> ComputeMode:
    """The mode with the shortest step; bf16 only if it is worth its 8 bits.

    Args:
        seconds: per (precision, layout).
        processor: they were measured on.
    """
    cost = {k: s * (_BF16_GAIN if k[0] == Precision.bf16.value else 1) for k, s in seconds.items()}
    precision, layout = min(cost, key=cost.__getitem__)
    return ComputeMode(precision, layout, processor)

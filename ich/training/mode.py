"""What a training computes in: precision and memory layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ich.base.config import Config, Precision, image_size

log = logging.getLogger(__name__)
# bfloat16 keeps 8 bits of a number. It must be worth that, and more than a timing's noise.
_WORTH = 1.1

CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"


@dataclass(frozen=True)
class ComputeMode:
    """precision: bf16, fp32 or tf32. layout: channels_last or contiguous. processor: timed on."""

    precision: str
    layout: str
    processor: str = ""


def workload_key(config: Config) -> str:
    """Jobs of one kind compute alike: the same network, input and batch, on one sort of device."""
    channels, batch = len(config.windows.channels), config.train.batch_size
    shape = f"{batch}x{channels}x{image_size(config)}"
    return f"{config.model.timm} {shape} {config.train.device.value}"


def pick_fastest(seconds: dict[tuple[str, str], float], here: str) -> ComputeMode:
    """The mode with the shortest step; bf16 only if it is worth its 8 bits.

    Args:
        seconds: per (precision, layout).
        here: the processor they were measured on.
    """
    cost = {k: s * (_WORTH if k[0] == Precision.bf16.value else 1) for k, s in seconds.items()}
    precision, layout = min(cost, key=cost.__getitem__)
    return ComputeMode(precision, layout, here)

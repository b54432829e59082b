"""What a benchmark may be asked for; light, for the help and the completion of its options."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

# In this order, whatever the order of their names: tables of two runs are compared by eye, and a
# machine's time limit costs what comes last.
PARTS = (
    *("tests", "demo", "prepare", "step", "input", "slots", "sweep", "predict", "evaluate"),
    *("report", "start", "memory", "busy", "intervals"),
)
# What there is to know of a machine with a GPU, the most important first.
GPU_PARTS = ("tests", "demo", "step", "input", "slots", "predict", "evaluate", "report")
# The others are of a GPU, or whole commands.
DEFAULT_PARTS = tuple(p for p in PARTS if p not in ("tests", "demo", "slots", "evaluate", "report"))
MODELS = (
    "vgg16",
    "resnet50",
    "inception_v3",
    "mobilenet_v2",
    "xception",
    "efficientnet_b0",
    "efficientnet_b2",
    "efficientnet_b3",
)


@dataclass(frozen=True)
class Settings:
    """What is measured and how long; the options of `ich bench`.

    until: when a part should have ended, by `time.monotonic`; it then measures fewer networks, or
    fewer steps. limit: when it is ended.
    """

    models: Sequence[str]
    image_size: Sequence[int]  # sides of the networks' input, pixels
    patients: int  # of the phantom, 512 x 512
    images: int  # files that the loaders and loops of others read
    rounds: int  # alternations of the two sides
    seconds: float  # length of one timing of a training step
    until: float = math.inf
    limit: float = math.inf

    @property
    def seconds_left(self) -> float:
        """Until a part should have ended."""
        return self.until - time.monotonic()

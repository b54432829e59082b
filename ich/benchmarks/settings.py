"""What a benchmark may be asked for; light, for the help and the completion of its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARTS = ("prepare", "input", "step", "sweep", "predict", "start", "memory", "busy", "intervals")
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
    """What is measured and how long; the options of `ich bench`."""

    models: Sequence[str]
    image_size: Sequence[int]  # sides of the networks' input, pixels
    patients: int  # of the phantom, 512 x 512
    images: int  # files that the loaders and loops of others read
    rounds: int  # alternations of the two sides
    seconds: float  # length of one timing of a training step

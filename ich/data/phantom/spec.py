"""What a phantom is made from, and one slice of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
LABELS = (*SUBTYPES, "any")

GENERATOR_VERSION = 1
"""Raised whenever the pixels of a given spec change: an older folder is then another phantom."""

MIN_AREA_MM2 = 40.0
"""A subtype is rendered and labelled in a slice from this area on, else neither. 40 mm2 is a
disk 7 mm across: about six pixels when 240 mm of field are shown at 96 px, near the least that
a reader, or a network at the demo's input size, can tell from noise of 5 HU."""

HU_AIR, HU_MIN, HU_MAX = -1000.0, -1024, 3071
PADDING_SIGNED = -2000  # raw value outside the field of view, as in the RSNA set
RESCALE_INTERCEPT = -1024
PLANES = (-0.25, 0.25)  # sub-planes averaged per slice, in slice thicknesses: partial volume
GRID_MM = 3.0  # voxel of the random fields; their shortest wavelength is 9 mm

FloatArray = npt.NDArray[np.float32]
Vector = Sequence[float] | npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PhantomSpec:
    """What is simulated. `prevalence` is the probability that a patient bleeds at all."""

    patients: int = 96
    seed: int = 0
    size: int = 256
    prevalence: float = 0.7

    def __post_init__(self) -> None:
        require_int("patients", self.patients, 1, 100_000)
        require_int("seed", self.seed, 0, 2**63 - 1)
        require_int("size", self.size, 64, 1024)
        if not isinstance(self.prevalence, int | float) or not 0 <= self.prevalence <= 1:
            raise ValueError(f"prevalence={self.prevalence!r} must be a number from 0 to 1.")


@dataclass(frozen=True)
class PhantomSlice:
    """One slice. `hu` int16 [H, W], -1024 outside the field of view; `masks` bool [H, W]."""

    image_id: str
    hu: npt.NDArray[np.int16]
    masks: dict[str, BoolArray]
    labels: dict[str, int]
    z_mm: float


def require_int(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be an integer from {least} to {most}.")

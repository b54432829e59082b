"""Synthetic head CT: what a phantom is, what it is made from, and one slice of it.

The sweep of eight CNNs needs labelled slices. This package makes them from nothing, so that the
demo, the tests and a laptop without the real download run the same code as the real set. From
first to last:

    spec        settings, constants, and the slice that comes out
    anatomy     one patient's head, and how it lies in the scanner, as numbers drawn at random
    bleeds      where bleeds arise and how large they are, by subtype
    tissue      the head's solids at the points of a plane: bone, brain, fluid spaces, in HU
    rendering   a slice: blood where there is room for it, two planes, noise, int16
    files       the folder: DICOM files and labels as RSNA has them, all or nothing
    figure      example slices as a picture

What is simulated. Each patient is a set of closed-form solids in millimetres (head frame: x to
the patient's left, y to the back, z up, origin near the foramina of Monro): vault with two
tables and diploe, skull base as a height map of the three fossae, scalp, face, orbits and
sinuses; sulci as the zero level set of a random field on the brain's surface, cortical ribbon,
deep nuclei, ventricles, cisterns, Sylvian fissures, falx, tentorium, cerebellum; and what
imitates blood (calcified choroid plexus and pineal, basal ganglia calcification, dense falx and
venous sinuses). Bleeds are solids too, placed and shaped as Figure 1 of the report says: epidural
lentiform, subdural crescent, subarachnoid along sulci and cisterns, intraventricular in the
ventricles with a level, intraparenchymal rounded with a dark rim; they push the brain aside. A
slice averages two planes inside its thickness, then gets cupping, blur and correlated noise.

HU: air -1000, fat -100..-50, CSF 0..15, white matter 25..32, grey matter 35..42, muscle 45..60,
acute blood 50..80, diploe 300..900, cortical bone 1000..1900: textbook ranges (Bushberg et al.,
The Essential Physics of Medical Imaging, 3rd ed. 2012, ch. 10; Osborn's Brain, 2nd ed. 2017).
The noise, 3..6 HU in the brain, is that of a routine 5 mm head protocol.

The files follow the RSNA set: both encodings (16-bit signed with padding -2000, Explicit VR;
12-bit unsigned, Implicit VR), pseudonymous ids, no names, no dates. None of it is patient data,
and nothing learned from it says anything about a patient.

The same spec gives the same pixels, on any number of processes: every random number comes from
the seed and the patient's number, and is drawn in a fixed order. Who adds a draw, or moves one,
changes every pixel after it, and raises GENERATOR_VERSION.
"""

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

# The coordinates of all pixels are the bulk of the work: float32 halves it, at 1e-5 mm.
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
    """Raises ValueError, naming the parameter and what is allowed, unless it is in the range."""
    # bool is an int to Python: seed=True would be seed=1
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be an integer from {least} to {most}.")

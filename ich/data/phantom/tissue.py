"""Synthetic head CT: whole studies in the layout of the RSNA 2019 hemorrhage data set.

The sweep of eight CNNs needs labelled slices; this module makes them from nothing, so that the
demo, the tests and a laptop without the real download run the same code as the real set.

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

Run:  python -m ich.phantom OUT --patients 96 --seed 0 --figure phantom.png
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scipy import fft
from scipy.ndimage import gaussian_filter, map_coordinates

from ich.pool import available_cores, run_parallel

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
        _check_int("patients", self.patients, 1, 100_000)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_int("size", self.size, 64, 1024)
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


# --- What is drawn once per patient ------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """One patient's head. Lengths in mm, angles in radians, densities in HU."""

    axes: tuple[float, float, float]  # half width, half length, height of the cranial cavity
    egg: float  # how much wider the head is behind than in front
    box: float  # departure of the outline from an ellipse
    waves: npt.NDArray[np.float64]  # [n, 7]: wave vector, phase, displacement of a smooth warp
    bone: float  # mean thickness of the vault
    scalp: float
    atrophy: float  # 0 young and full .. 1 old and shrunken
    gap: float  # subarachnoid space over the convexity
    sulcus: float  # half width of a sulcus
    ventricle: float  # scale of the ventricles
    ventricle_skew: float  # left-right difference of that scale
    density: dict[str, float]  # HU of grey, white, csf, cerebellum, falx, sinus, diploe, cortex
    calcified: dict[str, tuple[float, float]]  # site: radius in mm, HU
    sulci: FloatArray = field(repr=False)  # signed distance to the nearest sulcus, on a grid
    texture: FloatArray = field(repr=False)  # unit-variance field, 20 mm wavelength, on a grid
    floor: FloatArray = field(repr=False)  # [2, y, x] height of the skull base and its slope


@dataclass(frozen=True)
class Bleed:
    """One bleed: a solid in the head frame, mm."""

    subtype: str
    pattern: str
    center: npt.NDArray[np.float64]  # [3]
    radii: npt.NDArray[np.float64]  # [3]
    side: int  # -1 right, +1 left
    thickness: float  # extra-axial: depth under the bone; intraventricular: level; else swelling
    hu: float


@dataclass(frozen=True)
class Scanner:
    """One acquisition."""

    fov: float  # mm
    spacing: float  # between slices, mm
    slices: int
    table_z: float  # table position of the first slice, mm
    first_z: float  # of the first slice, in the head frame
    gantry: float  # tilt
    rotation: npt.NDArray[np.float64]  # [3, 3], scanner to head
    shift: tuple[float, float]
    noise: float  # HU in the brain
    cutoff: float  # of the kernel, cycles per mm
    blur: float  # mm
    sharpen: float
    cupping: float  # HU next to the bone
    offset: float  # calibration, HU
    holder: str
    window: tuple[str, str] | tuple[list[str], list[str]]
    signed: bool


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a head: size, shape, age, densities, calcifications and its sulcal pattern."""
    scale = rng.normal(1.0, 0.035)
    axes = (66 * scale * rng.normal(1, 0.03), 83 * scale * rng.normal(1, 0.025), 76 * scale)
    atrophy = float(rng.beta(1.3, 1.9))
    return Anatomy(
        axes=axes,
        egg=rng.uniform(0.04, 0.11),
        box=rng.uniform(0.02, 0.10),
        waves=_draw_waves(rng),
        bone=rng.uniform(4.5, 7.5),
        scalp=rng.uniform(3.5, 7.0),
        atrophy=atrophy,
        gap=0.3 + 2.2 * atrophy * rng.uniform(0.6, 1.2),
        sulcus=0.45 + 1.0 * atrophy * rng.uniform(0.7, 1.2),
        ventricle=0.72 + 0.75 * atrophy + rng.normal(0, 0.1),
        ventricle_skew=rng.normal(0, 0.08),
        density=_draw_density(rng),
        calcified=_draw_calcified(rng, atrophy),
        sulci=_signed_distance(_random_field(rng, 21.0, 0.16)),
        texture=_random_field(rng, 20.0, 0.4),
        floor=_skull_base(rng, scale),
    )


def _draw_waves(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """[6, 7]: long plane waves that bend the head, so that no two outlines are alike."""
    direction = rng.normal(size=(6, 3))
    length = rng.uniform(90, 170, (6, 1)) * np.linalg.norm(direction, axis=1, keepdims=True)
    push = rng.normal(0, 1.1, (6, 3)) * [1, 1, 0.6]
    return np.hstack([2 * np.pi / length * direction, rng.uniform(0, 2 * np.pi, (6, 1)), push])


def _draw_density(rng: np.random.Generator) -> dict[str, float]:
    white = rng.uniform(26, 30)
    grey = white + rng.uniform(6, 9)
    return {
        "white": white, "grey": grey, "csf": rng.uniform(3, 9), "cerebellum": grey - 1.0,
        "falx": rng.uniform(42, 58), "sinus": rng.uniform(46, 62),
        "diploe": rng.uniform(350, 850), "cortex": rng.uniform(1200, 1900),
    }  # fmt: skip


def _draw_calcified(rng: np.random.Generator, atrophy: float) -> dict[str, tuple[float, float]]:
    """Calcifications are benign and common with age: what a detector must not call blood."""
    odds = {"pineal": 0.6, "choroid_left": 0.6, "choroid_right": 0.6, "pallidum": 0.12,
            "falx": 0.2}  # fmt: skip
    sites = {}
    for site, chance in odds.items():
        present, radius, hu = rng.random(), rng.uniform(1.6, 4.0), rng.uniform(75, 320)
        if present < chance * (0.5 + atrophy):
            sites[site] = (radius, hu if site != "pallidum" else min(hu, 95.0))
    return sites


def _random_field(rng: np.random.Generator, wavelength: float, band: float) -> FloatArray:
    """Periodic, unit-variance, band-limited Gaussian field [64, 72, 64] (x, y, z), GRID_MM."""
    shape = (64, 72, 64)
    freq = np.meshgrid(*(np.fft.fftfreq(n, GRID_MM) for n in shape[:2]),
                       np.fft.rfftfreq(shape[2], GRID_MM), indexing="ij")  # fmt: skip
    k = np.sqrt(sum(f * f for f in freq)) * wavelength
    gain = np.exp(-0.5 * ((k - 1) / band) ** 2).astype(np.float32)
    white = rng.standard_normal(shape, dtype=np.float32)
    values = fft.irfftn(fft.rfftn(white) * gain, s=shape)
    return np.asarray(values / values.std(), np.float32)


def _signed_distance(values: FloatArray) -> FloatArray:
    """First-order signed distance (mm) to the zero level set of a field."""
    slope = np.sqrt(sum(np.square(g) for g in np.gradient(values, GRID_MM)))
    return np.asarray(values / (slope + 0.35 * slope.mean()), np.float32)


def _skull_base(rng: np.random.Generator, scale: float) -> FloatArray:
    """[2, 240, 200] at 1 mm: height of the floor of the three fossae, and its slope correction.

    Bowls are sunk into a plane at the level of the sphenoid wings: the anterior fossa is
    shallow, the middle fossae hold the temporal lobes, the posterior one reaches the foramen
    magnum. What stays up between them are sphenoid wings, sella and petrous ridges.
    """
    y, x = np.mgrid[-120:120, -100:100].astype(np.float32) / scale
    side, wobble = np.abs(x), rng.uniform(-2, 2, 6)
    ridge = -20 - 6 * np.exp(-((x / 18) ** 2)) + 1.5 * np.sin(x / 9 + wobble[5]) * np.sin(y / 11)
    crest = y - 4 - 0.5 * side  # distance behind the petrous ridge
    bowls = [  # center x, y, radii x, y, bottom, steepness, reach
        (0, 42 + wobble[0], 62, 44, -62 + wobble[1], 3.0, (crest - 1) / 7),
        (0, 22, 14, 24, -72, 4.0, np.ones_like(x)),
        (46, -6 + wobble[2], 30, 29, -42 + wobble[3], 3.0, (-crest - 1) / 8),
        (0, -64, 70, 38, -25 + wobble[4], 3.0, np.ones_like(x)),
        (0, -62, 10, 28, -31, 2.0, np.ones_like(x)),
    ]
    floor = ridge
    for cx, cy, rx, ry, bottom, power, reach in bowls:
        r = np.hypot((side - cx) / rx, (y - cy) / ry)
        sunk = np.clip(1 - r**power, 0, None) ** 0.7 * np.clip(reach, 0, 1)
        floor = np.minimum(floor, ridge + (bottom - ridge) * sunk)
    floor = gaussian_filter(floor * scale, 1.5)
    gy, gx = np.gradient(floor)
    return np.stack([floor, 1 / np.sqrt(1 + gx**2 + gy**2)]).astype(np.float32)


def draw_scanner(rng: np.random.Generator, anatomy: Anatomy, patient: int) -> Scanner:
    """Draw an acquisition: geometry, noise, kernel, encoding (encodings take turns)."""
    spacing = rng.uniform(4.7, 5.6)
    first_z = rng.uniform(-58, -42)
    top = anatomy.axes[2] + anatomy.bone + anatomy.scalp + rng.uniform(-12, 0)
    windows = (("30", "80"), ("40", "80"), (["00036", "00036"], ["00080", "00080"]),
               (["00040", "00060"], ["00080", "00360"]), ("40", "100"))  # fmt: skip
    sharp = rng.random()
    return Scanner(
        fov=rng.uniform(225, 252),
        spacing=spacing,
        slices=int(np.clip(math.ceil((top - first_z) / spacing), 20, 40)),
        table_z=round(rng.uniform(40, 150), 3),
        first_z=first_z,
        gantry=math.radians(rng.uniform(5, 18)) if rng.random() < 0.4 else 0.0,
        rotation=_rotation(*np.radians(rng.normal(0, (4.0, 3.0, 6.0)))),
        shift=(rng.normal(0, 5), rng.normal(-6, 5)),
        noise=rng.uniform(3.0, 5.5) * (0.8 + 0.4 * sharp),
        cutoff=0.30 + 0.2 * sharp,
        blur=0.85 - 0.35 * sharp,
        sharpen=0.5 * sharp,
        cupping=rng.uniform(2, 8),
        offset=rng.normal(0, 1.2),
        holder=str(rng.choice(["arc", "bars", "none"], p=[0.55, 0.2, 0.25])),
        window=windows[rng.integers(len(windows))],
        signed=patient % 2 == 0,
    )


def _rotation(pitch: float, roll: float, yaw: float) -> npt.NDArray[np.float64]:
    """[3, 3]: rotations about x (nod), y (lean), z (turn)."""
    cx, sx, cy, sy, cz, sz = (f(a) for a in (pitch, roll, yaw) for f in (math.cos, math.sin))
    nod = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    lean = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(turn @ lean @ nod)


# --- Bleeds: where they arise ------------------------------------------------------------------

TRAUMA = {"epidural": 0.80, "subdural": 0.60, "subarachnoid": 0.32, "intraparenchymal": 0.60}
SPONTANEOUS = {"intraparenchymal": 0.75, "intraventricular": 0.70, "subarachnoid": 0.50,
               "subdural": 0.28}  # fmt: skip


def draw_bleeds(rng: np.random.Generator, anatomy: Anatomy, prevalence: float) -> list[Bleed]:
    """Draw a patient's bleeds: none, or those of an injury or of a spontaneous hemorrhage."""
    if rng.random() >= prevalence:
        return []
    trauma = rng.random() < 0.55
    odds = TRAUMA if trauma else SPONTANEOUS
    side = int(rng.choice([-1, 1]))
    chosen = [s for s in odds if rng.random() < odds[s]] or [str(rng.choice(list(odds)))]
    bleeds: list[Bleed] = []
    for subtype in chosen:
        bleeds += _DRAW[subtype](rng, anatomy, side, trauma)
        if trauma:
            side = -side  # contrecoup: the next injury lies opposite
    return bleeds


def _surface_point(anatomy: Anatomy, direction: Sequence[float]) -> npt.NDArray[np.float64]:
    """[3] point of the inner table in a direction from the head's origin, mm."""
    u = np.asarray(direction, float)
    return np.asarray(u / np.sqrt(np.sum((u / np.asarray(anatomy.axes)) ** 2)))


def _draw_epidural(rng: np.random.Generator, a: Anatomy, side: int, _: bool) -> list[Bleed]:
    """Lens under the temporal, parietal or frontal squama: short, so that no suture is crossed."""
    ahead = float(rng.choice([rng.uniform(-0.15, 0.45), rng.uniform(-0.8, -0.6)], p=[0.75, 0.25]))
    center = _surface_point(a, (side, ahead, rng.uniform(-0.1, 0.7)))
    radius = rng.uniform(24, 35)
    # The skull's own curvature takes radius^2 / 2R of the depth: beyond it the lens bulges.
    depth = radius**2 / 150 + rng.uniform(2, 14)
    return [Bleed("epidural", "lens", center, np.full(3, radius), side, depth, rng.uniform(53, 76))]


def _draw_subdural(rng: np.random.Generator, a: Anatomy, side: int, _: bool) -> list[Bleed]:
    """Crescent over a hemisphere; sometimes along falx and tentorium, alone or besides."""
    hu, depth = rng.uniform(50, 72), rng.uniform(4, 14)
    center = _surface_point(a, (side, rng.uniform(-0.5, 0.6), rng.uniform(0.1, 0.6)))
    radii = np.array([1.0, rng.uniform(50, 80), rng.uniform(38, 58)])
    crescent = Bleed("subdural", "crescent", center, radii, side, depth, hu)
    middle = np.array([0.0, rng.uniform(-40, 50), 30.0])
    reach = np.array([1.0, rng.uniform(30, 60), 45.0])
    along = Bleed("subdural", "falx", middle, reach, side, rng.uniform(3, 6), hu)
    which = rng.random()
    return [crescent] if which < 0.7 else [along] if which < 0.8 else [crescent, along]


def _draw_subarachnoid(
    rng: np.random.Generator, a: Anatomy, side: int, trauma: bool
) -> list[Bleed]:
    """Basal cisterns and fissures after an aneurysm, sulci of one convexity after an injury."""
    hu, swelling = rng.uniform(50, 70), rng.uniform(0.5, 1.5)
    if trauma or rng.random() < 0.25:
        center = 0.9 * _surface_point(a, (side, rng.uniform(-0.7, 0.9), rng.uniform(0.1, 1.2)))
        return [
            Bleed("subarachnoid", "convexity", center, rng.uniform(26, 46, 3), side, swelling, hu)
        ]
    center = np.array([side * rng.uniform(0, 18), -8.0, -16.0])
    radii = np.array([rng.uniform(42, 66), rng.uniform(36, 60), rng.uniform(24, 42)])
    return [Bleed("subarachnoid", "basal", center, radii, side, swelling, hu)]


def _draw_intraventricular(rng: np.random.Generator, a: Anatomy, side: int, _: bool) -> list[Bleed]:
    """Sediment with a level in the occipital horns, or a cast of a ventricle."""
    pattern = str(rng.choice(["layer", "cast", "both"], p=[0.5, 0.25, 0.25]))
    level = rng.uniform(26, 46)
    return [
        Bleed(
            "intraventricular", pattern, np.zeros(3), np.ones(3), side, level, rng.uniform(52, 76)
        )
    ]


def _draw_intraparenchymal(
    rng: np.random.Generator, a: Anatomy, side: int, trauma: bool
) -> list[Bleed]:
    """Contusions at the frontal base and temporal pole; else basal ganglia, lobes, cerebellum."""
    sites = {"frontal": (22, -56, -6), "temporal": (45, -14, -24), "putamen": (27, -5, 5),
             "thalamus": (13, 8, 5), "lobar": (0, 0, 0), "cerebellum": (22, 50, -36)}  # fmt: skip
    odds = [0.4, 0.35, 0, 0, 0.25, 0] if trauma else [0, 0, 0.35, 0.2, 0.33, 0.12]
    site = str(rng.choice(list(sites), p=odds))
    center = np.array(sites[site], float) * [side, 1, 1]
    if site == "lobar":
        center = rng.uniform(0.55, 0.7) * _surface_point(
            a, (side, rng.uniform(-1.2, 1.2), rng.uniform(0.1, 1))
        )
    size = rng.uniform(6, 11) if site in ("thalamus", "cerebellum") else rng.uniform(6, 24)
    radii = size * rng.uniform(0.75, 1.25, 3)
    center = center + rng.normal(0, 2.5, 3)
    return [
        Bleed("intraparenchymal", site, center, radii, side, rng.uniform(3, 7), rng.uniform(54, 78))
    ]


_DRAW: dict[str, Callable[[np.random.Generator, Anatomy, int, bool], list[Bleed]]] = {
    "epidural": _draw_epidural,
    "intraparenchymal": _draw_intraparenchymal,
    "intraventricular": _draw_intraventricular,
    "subarachnoid": _draw_subarachnoid,
    "subdural": _draw_subdural,
}


# --- Solids in a plane -------------------------------------------------------------------------
# Every function below takes flat float32 arrays [n] over the pixels that matter; distances are
# in mm, positive inside.


@dataclass
class Points:
    """Flat coordinates [n], mm, head frame; `down` is gravity's (scanner y)."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    down: FloatArray

    def take(self, keep: BoolArray) -> Points:
        return Points(self.x[keep], self.y[keep], self.z[keep], self.down[keep])


def _soft(distance: npt.NDArray[Any], width: float = 1.0) -> FloatArray:
    """Occupancy 0..1 of a solid from the distance (mm) inside it, over an edge of `width` mm."""
    return np.asarray(np.clip(distance / np.float32(width) + 0.5, 0, 1), np.float32)


def _ellipsoid(p: Points, center: Vector, radii: Vector) -> FloatArray:
    """Distance inside an ellipsoid, first order, mm."""
    (cx, cy, cz), (rx, ry, rz) = center, radii
    q = np.sqrt(((p.x - cx) / rx) ** 2 + ((p.y - cy) / ry) ** 2 + ((p.z - cz) / rz) ** 2)
    return np.asarray((1 - q) * min(rx, ry, rz), np.float32)


def _sample(grid: FloatArray, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
    """Trilinear value of a periodic GRID_MM field at points in mm."""
    at = np.stack([x, y, z]) / np.float32(GRID_MM) + np.float32(200)
    at %= np.array(grid.shape, np.float32)[:, None]
    return np.asarray(map_coordinates(grid, at, order=1, mode="grid-wrap", output=np.float32))


def _vault(a: Anatomy, p: Points) -> tuple[FloatArray, FloatArray]:
    """Depth (mm) under the inner table of the vault, and the ellipsoid's radius q (1 on it)."""
    ax, ay, az = a.axes
    x = p.x / (ax * (1 + a.egg * np.clip(p.y / ay, -1.2, 1.2)))
    y, z = p.y / ay, p.z / np.where(p.z > 0, az, 1.45 * az).astype(np.float32)
    square = x * x + y * y + z * z + np.float32(1e-6)
    q = np.sqrt(square - 4 * a.box * (x * y) ** 2 / square)
    slope = np.sqrt((x / ax) ** 2 + (y / ay) ** 2 + (z / az) ** 2) / q
    return np.asarray((1 - q) / slope, np.float32), np.asarray(q, np.float32)


def _above_base(a: Anatomy, p: Points) -> FloatArray:
    """Distance (mm) above the floor of the skull base."""
    at = np.stack([p.y + 120, p.x + 100])
    height = map_coordinates(a.floor[0], at, order=1, mode="nearest", output=np.float32)
    slope = map_coordinates(a.floor[1], at, order=1, mode="nearest", output=np.float32)
    return np.asarray((p.z - height) * slope)


def _paint(hu: FloatArray, inside: FloatArray, value: float | FloatArray) -> None:
    """Blend `value` into `hu` where `inside` (occupancy 0..1) says so, in place."""
    hu += inside * (value - hu)


# Face and base, mirrored: center, radii (mm), HU; drawn in this order.
FACE = (
    ((33, -60, -38), (21, 30, 20), 900.0), ((33, -62, -38), (18, 30, 17), -85.0),
    ((0, -58, -40), (15, 30, 19), 700.0), ((34, -76, -38), (12.5, 12.5, 12.5), 45.0),
    ((34, -76, -38), (11.3, 11.3, 11.3), 9.0), ((34, -85.5, -38), (4.5, 2.2, 4.5), 85.0),
    ((25, -52, -37), (2.6, 16, 2.6), 35.0), ((21, -62, -38), (1.8, 14, 5), 50.0),
    ((46, -60, -38), (1.8, 12, 5), 50.0), ((29, -60, -68), (18, 22, 18), 800.0),
    ((29, -60, -68), (15, 19, 15.5), -950.0), ((66, -40, -52), (3, 22, 4.5), 1100.0),
    ((50, -16, -74), (4, 13, 24), 1300.0), ((17, 26, -70), (9, 11, 9), 900.0),
    ((52, 24, -40), (14, 18, 18), 1200.0), ((34, 14, -36), (20, 9, 11), 1500.0),
    ((64, 12, -46), (14, 3.5, 3.5), -950.0), ((0, -20, -42), (15, 16, 13), 800.0),
    ((0, -20, -42), (12, 13, 9.5), -950.0),
)  # fmt: skip
CELLS = (
    ((0, -60, -42), (11, 27, 16)),
    ((0, -66, -66), (12, 28, 16)),
    ((53, 28, -42), (11, 15, 15)),
)


def _face(a: Anatomy, p: Points, hu: FloatArray, rough: FloatArray) -> None:
    """Paint orbits, sinuses, petrous and mastoid bone below the skull base, in place."""
    near = (p.z < -15) & (p.z > -100)
    if not near.any():
        return
    sub, value, cells = p.take(near), hu[near], rough[near]
    half = Points(np.abs(sub.x), sub.y, sub.z, sub.down)
    for center, radii, density in FACE:
        if np.abs(half.z - center[2]).min() < radii[2]:
            inside = _ellipsoid(half, center, radii) + (
                0.12 * min(radii) * cells if radii[0] != radii[1] else 0
            )
            _paint(value, _soft(inside), density)
    for center, radii in CELLS:  # air cells between thin septa of bone or mucosa
        air = np.where(np.abs(cells) < 0.3, 250.0, -900.0).astype(np.float32)
        _paint(value, _soft(_ellipsoid(half, center, radii)), air)
    hu[near] = value


def _outside_brain(a: Anatomy, p: Points, depth: FloatArray, rough: FloatArray) -> FloatArray:
    """HU [n] of everything but the cavity's content; `depth` is the distance inside the cavity."""
    thickness = _bone_thickness(a, p, rough)
    vault, _ = _vault(a, p)
    face = _ellipsoid(p, (0, -36, -68), (72, 79, 62)) * np.float32(1.1)
    skin = np.maximum(vault + thickness + a.scalp, face)
    below = depth + thickness  # distance inside the outer table
    tissue = np.where(rough > 0.7 - 0.01 * (p.z + 20), -85.0, 55.0).astype(np.float32)
    rim = _soft(skin - 2.5)
    hu = np.full(p.x.shape, np.float32(48))
    _paint(hu, rim, -80.0)
    _paint(hu, _soft(skin - 1.0 - 0.75 * a.scalp, 2.0), tissue)
    _face(a, p, hu, rough)
    _paint(hu, _soft(below), _bone(a, below / thickness))
    sinus = _ellipsoid(
        Points(np.abs(p.x), p.y, p.z, p.down), (8, -a.axes[1] - 4, -16), (11, 2.8, 11)
    )
    _paint(hu, _soft(sinus) * (depth < -1.0), -950.0)
    _paint(hu, 1 - _soft(skin), HU_AIR)
    return hu


def _bone_thickness(a: Anatomy, p: Points, rough: FloatArray) -> FloatArray:
    """Thickness (mm) of the skull: thin at the temporal squama, thick at forehead and inion."""
    ax, ay, _ = a.axes
    squama = np.exp(-(((p.z + 8) / 25) ** 2) - (p.y / 35) ** 2) * _soft(
        np.abs(p.x) - 0.7 * ax, 20.0
    )
    inion = np.exp(-(((p.z + 18) / 14) ** 2) - (p.x / 14) ** 2) * (p.y > 0.5 * ay)
    brow = np.exp(-(((p.z + 16) / 14) ** 2) - (p.x / 26) ** 2) * (p.y < -0.6 * ay)
    vault = a.bone * (1 + 0.04 * rough - 0.4 * squama) + 5 * inion + 6 * brow
    roof = _soft(-p.y - 22, 12.0) * _soft(-18 - p.z, 6.0) * (np.hypot(p.x / ax, p.y / ay) < 0.93)
    return np.asarray(vault * (1 - roof) + 2.5 * roof, np.float32)  # orbital roofs are thin


def _bone(a: Anatomy, fraction: FloatArray) -> FloatArray:
    """HU across the skull: dense outer (0) and inner (1) tables, spongy diploe between."""
    middle = np.clip(1.35 - 3.2 * np.abs(fraction - 0.5), 0, 1)
    return np.asarray(a.density["cortex"] + middle * (a.density["diploe"] - a.density["cortex"]))


# Lateral ventricle, one side: capsules (start, end, radius at either), mm. Frontal horn, its
# root, body, atrium, occipital horn, temporal horn in two pieces.
LATERAL = (
    ((15, -42, 2), (7, -20, 7), 4.4, 5.2), ((14, -40, 8), (8, -19, 10), 3.6, 4.6),
    ((8, -20, 9), (8, -4, 16), 5.0, 5.4), ((8, -4, 16), (14, 18, 18), 5.4, 6.0),
    ((14, 18, 18), (25, 34, 8), 6.0, 7.2), ((25, 34, 8), (26, 57, 2), 7.0, 2.8),
    ((25, 34, 6), (35, 16, -14), 5.6, 2.4), ((35, 16, -14), (31, -4, -25), 2.4, 2.6),
)  # fmt: skip


def _capsule(
    p: Points, start: Sequence[float], end: Sequence[float], r0: float, r1: float
) -> FloatArray:
    """Distance inside a tapering capsule, mm."""
    d = np.subtract(end, start).astype(np.float32)
    x, y, z = p.x - start[0], p.y - start[1], p.z - start[2]
    t = np.clip((x * d[0] + y * d[1] + z * d[2]) / float(d @ d), 0, 1)
    gap = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
    return np.asarray(r0 + t * (r1 - r0) - gap, np.float32)


def _ventricles(a: Anatomy, p: Points) -> dict[str, FloatArray]:
    """Distance (mm) inside the lateral, third and fourth ventricles."""
    out = {k: np.full(p.x.shape, np.float32(-9)) for k in ("lateral", "third", "fourth")}
    near = (np.abs(p.x) < 50) & (np.abs(p.y) < 78) & (p.z > -56) & (p.z < 42)
    if not near.any():
        return out
    q = p.take(near)
    scale = (a.ventricle * (1 + a.ventricle_skew * np.sign(q.x))).astype(np.float32)
    half = Points(np.abs(q.x), q.y, q.z, q.down)
    lateral = np.full(q.x.shape, np.float32(-9))
    for start, end, r0, r1 in LATERAL:
        lateral = np.maximum(lateral, _capsule(half, start, end, r0, r1) + 5 * (scale - 1))
    out["lateral"][near] = np.minimum(lateral, half.x - 0.8)  # septum pellucidum
    width = 1.2 + 2.2 * max(a.ventricle - 0.6, 0.1)
    out["third"][near] = _ellipsoid(q, (0, -3, -4), (width, 14, 11))
    fourth = np.minimum(
        _ellipsoid(q, (0, 35, -37), (8 * a.ventricle + 2, 6, 11)), 0.9 * (q.y - 30) + 1
    )
    out["fourth"][near] = fourth
    return out


def _cisterns(a: Anatomy, p: Points, rough: FloatArray) -> FloatArray:
    """Distance (mm) inside the basal cisterns and the Sylvian and interhemispheric fissures."""
    side, swell = np.abs(p.x), a.atrophy
    bend = 2.5 * rough
    star = (
        1.5 * np.cos(5 * np.arctan2(p.x, -p.y - 9)) + 1.5 * rough
    )  # the suprasellar cistern has five points
    inner = _ellipsoid(p, (0, -9, -19), (12 + 4 * swell, 10 + 2 * swell, 8)) + star
    ring = 0.7 + 1.3 * swell + 0.5 * rough - np.abs(_ellipsoid(p, (0, 8, -12), (18, 15, 13)))
    ring = np.where((p.y > 3 - 0.2 * side) & (p.z < 0), ring, -9)  # ambient
    inner = np.maximum(inner, ring)
    inner = np.maximum(inner, _ellipsoid(p, (0, 25, -3), (10 + 4 * swell, 3 + 2 * swell, 6)))
    inner = np.maximum(inner, _ellipsoid(p, (0, 72, -54), (10, 7, 13)))  # cisterna magna
    inner = np.maximum(inner, _ellipsoid(p, (0, 5, -38), (15, 4, 18)) - 0.5)  # prepontine
    inner = np.maximum(inner, _ellipsoid(p, (0, 26, -62), (14, 13, 16)))  # about the medulla
    width = (0.6 + 1.9 * swell) * (1 + 0.45 * rough)
    stem = width - np.abs(p.y + 17 - 0.3 * (side - 40) + bend - 0.25 * p.z)
    stem = np.minimum(stem, np.minimum(side - 38, 16 - np.abs(p.z + 2)))
    insula = width - 0.15 * np.abs(p.y) / 10 - np.abs(side - 38.5 - bend + 0.004 * (p.y + 2) ** 2)
    insula = np.minimum(insula, np.minimum(18 - np.abs(p.y + 1), 15 - np.abs(p.z - 3)))
    cleft = 0.5 + 1.4 * swell - side - 0.3 * np.clip(p.z - 20, 0, 20) / 20
    callosal = np.maximum(
        _ellipsoid(p, (0, 2, 0), (20, 33, 32)), _ellipsoid(p, (0, -4, 14), (20, 43, 13))
    )
    cleft = np.minimum(cleft, np.maximum(-callosal, p.z - 26))
    cleft = np.where((p.z > -24) & (_tentorium(p) > 0), cleft, -9)
    return np.asarray(np.maximum(np.maximum(inner, stem), np.maximum(insula, cleft)), np.float32)


def _tentorium(p: Points) -> FloatArray:
    """Height (mm) above the tentorium; behind the incisura only."""
    roof = 4 - 0.62 * np.hypot(p.x, 0.75 * (p.y - 22)) + 0.0015 * p.x**2
    return np.asarray((p.z - roof) * 0.85, np.float32)


# Deep grey nuclei and brain stem, mirrored: center, radii (mm), grey fraction.
NUCLEI = (
    ((15, -26, 6), (5, 9, 10), 1.0), ((26, -5, 3), (7.5, 16, 11), 0.85),
    ((11, 6, 5), (8.5, 14, 9), 0.9), ((0, 9, -14), (15, 13, 11), 0.35),
    ((0, 18, -38), (15, 12, 16), 0.3), ((0, 26, -64), (8, 7, 16), 0.35),
)  # fmt: skip


@dataclass
class Brain:
    """Content of the cavity at points [n]: HU without blood and the spaces blood can take."""

    anatomy: Anatomy
    hu: FloatArray
    ventricle: FloatArray  # occupancy
    vents: dict[str, FloatArray]  # distance inside each ventricle
    subarachnoid: FloatArray  # occupancy
    depth: FloatArray  # under the brain's surface, mm
    above_tentorium: FloatArray
    at: Points  # where the tissue would lie without mass effect


def _displace(p: Points, bleeds: Sequence[Bleed]) -> Points:
    """Where the tissue at `p` lay before the bleeds pushed it: their mass effect."""
    x, y, z = p.x, p.y, p.z
    for b in bleeds:
        if b.subtype not in ("epidural", "subdural", "intraparenchymal") or b.pattern == "falx":
            continue
        dx, dy, dz = (p.x - b.center[0], p.y - b.center[1], p.z - b.center[2])
        square = dx * dx + dy * dy + dz * dz
        if b.subtype == "intraparenchymal":
            push = -0.35 * np.exp(-square / (2 * (1.3 * b.radii.mean()) ** 2))
            x, y, z = x + push * dx, y + push * dy, z + push * dz
        else:
            u = b.center / np.linalg.norm(b.center)
            push = 0.65 * b.thickness * np.exp(-square / (2 * 50.0**2))
            x, y, z = x + push * u[0], y + push * u[1], z + push * u[2]
    x, y, z = (np.asarray(v, np.float32) for v in (x, y, z))
    return Points(x, y, z, p.down)


def _extra_axial(p: Points, rough: FloatArray, b: Bleed) -> FloatArray:
    """Thickness (mm) of an epidural or subdural bleed under the inner table at each point."""
    dx, dy, dz = (p.x - b.center[0], p.y - b.center[1], p.z - b.center[2])
    if b.subtype == "epidural":
        u = b.center / np.linalg.norm(b.center)
        along = dx * u[0] + dy * u[1] + dz * u[2]
        reach = (dx * dx + dy * dy + dz * dz - along * along) / b.radii[0] ** 2
        reach = np.where(along > -b.radii[0], reach, 9)  # not on the far side of the head
        return np.asarray(b.thickness * (1 - reach), np.float32)
    reach = (dy / b.radii[1]) ** 2 + (dz / b.radii[2]) ** 2
    inward = np.clip(b.side * p.x / 10, 0, 1)  # ends at the falx
    held = b.thickness * np.clip(1 - reach**2 + 0.12 * rough, 0, None) * inward
    return np.asarray(np.where(held > 1, held, -1), np.float32)


def _brain(
    a: Anatomy, p: Points, wall: FloatArray, rough: FloatArray, bleeds: Sequence[Bleed]
) -> Brain:
    """The content of the cavity at `p`; `wall` is the distance (mm) to the nearest bone."""
    at = _displace(p, bleeds)
    _, q = _vault(a, at)
    depth = wall  # the surface stays at the bone, but for what a bleed holds off
    swell = np.zeros_like(wall)
    for b in bleeds:
        if b.pattern in ("lens", "crescent"):
            held = np.clip(_extra_axial(p, rough, b), 0, None)
            depth = np.minimum(depth, _vault(a, p)[0] - held)
        if b.subtype == "subarachnoid":
            swell += b.thickness * _soft(_subarachnoid_reach(at, rough, b), 0.3)
    tent = _tentorium(at)
    below = (tent < 0) & (at.y > 2)
    q = np.maximum(q, 0.75)  # deeper, rays converge
    near = np.power(q, -0.82) * np.where(below, 2.1, 1.0)  # same place on the surface, any depth
    sulcus = np.abs(_sample(a.sulci, at.x * near, at.y * near, at.z * near)) * np.where(
        below, 0.5, q
    )
    limit = np.where(below, 30, 14 + 5 * rough)
    width = (
        np.where(below, 0.2 + 0.4 * a.atrophy, a.sulcus)
        + 0.6 * swell
        - 0.04 * np.clip(depth, 0, 20)
    )
    cleft = np.minimum(width - sulcus, limit - depth)
    vents = _ventricles(a, at)
    cistern = _cisterns(a, at, rough) + 0.6 * swell
    surface = np.maximum(a.gap + 0.5 * swell - depth, np.maximum(cleft, cistern))
    space = np.maximum(_soft(surface, 1.2), 0)
    ventricle = _soft(np.maximum(np.maximum(vents["lateral"], vents["third"]), vents["fourth"]))
    space = space * (1 - ventricle)
    grey = _grey(a, at, -surface, below)
    hu = a.density["white"] + grey * (a.density["grey"] - a.density["white"])
    hu = np.asarray(hu + 0.8 * rough - _petrous_shadow(at), np.float32)
    _paint(hu, np.maximum(space, ventricle), a.density["csf"])
    _membranes(a, at, hu, wall, tent)
    _calcify(a, at, hu)
    return Brain(a, hu, ventricle, vents, space, depth, tent, at)


def _petrous_shadow(p: Points) -> FloatArray:
    """HU lost between the petrous bones to beam hardening (Hounsfield's bar)."""
    return np.asarray(6 * np.exp(-(((p.y - 14) / 7) ** 2) - ((p.z + 38) / 9) ** 2), np.float32)


def _grey(a: Anatomy, p: Points, from_csf: FloatArray, below: BoolArray) -> FloatArray:
    """Fraction 0..1 of grey matter; `from_csf` is the distance (mm) to the nearest sulcus."""
    grey = _soft(np.float32(3.2) - from_csf, 1.5)
    grey = np.where(below, np.float32(0.75), grey).astype(np.float32)
    half = Points(np.abs(p.x), p.y, p.z, p.down)
    for center, radii, fraction in NUCLEI:
        if p.z.size and np.abs(p.z - center[2]).min() < radii[2]:
            _paint(grey, _soft(_ellipsoid(half, center, radii), 2.0), fraction)
    return grey


def _membranes(a: Anatomy, p: Points, hu: FloatArray, wall: FloatArray, tent: FloatArray) -> None:
    """Paint falx, tentorium and venous sinuses (all a little denser than brain), in place."""
    side = np.abs(p.x)
    reach = np.where(p.z > 26, 60.0, np.where(p.y > 0, 34.0, 20.0))
    falx = np.minimum(0.8 - side, reach - wall)
    falx = np.where((p.z > -8) & (tent > 0), falx, -9)
    sheet = np.where(p.y > 18, 0.7 - np.abs(tent), -9)
    sheet = np.minimum(sheet, p.z + 34)
    _paint(hu, _soft(np.maximum(falx, sheet).astype(np.float32), 1.5), a.density["falx"])
    sagittal = np.where(p.z > -16, 4.0 - side - 0.7 * wall, -9)
    transverse = np.where(p.y > 30, np.minimum(3.5 - np.abs(p.z + 20), 4 - wall), -9)
    _paint(hu, _soft(np.maximum(sagittal, transverse).astype(np.float32), 1.5), a.density["sinus"])


def _calcify(a: Anatomy, p: Points, hu: FloatArray) -> None:
    """Paint calcifications, in place."""
    where = {"pineal": (0, 18, 1), "choroid_left": (24, 35, 9), "choroid_right": (-24, 35, 9),
             "pallidum": (19, -4, 2), "falx": (0, -45, 40)}  # fmt: skip
    for site, (radius, density) in a.calcified.items():
        q = Points(np.abs(p.x), p.y, p.z, p.down) if site == "pallidum" else p
        if p.z.size and np.abs(p.z - where[site][2]).min() < radius + 2:
            radii = (radius, 1.3 * radius, 1.3 * radius)
            _paint(hu, _soft(_ellipsoid(q, where[site], radii), 1.5), density)


# --- Blood in the spaces that can hold it ------------------------------------------------------


def _subarachnoid_reach(p: Points, rough: FloatArray, b: Bleed) -> FloatArray:
    """> 0 where subarachnoid blood spreads, patchy; unitless."""
    dx, dy, dz = ((v - c) / r for v, c, r in zip((p.x, p.y, p.z), b.center, b.radii, strict=True))
    return np.asarray(1 - np.sqrt(dx * dx + dy * dy + dz * dz) + 0.17 * rough, np.float32)


def _occupancy(
    b: Bleed, p: Points, brain: Brain, wall: FloatArray, rough: FloatArray
) -> FloatArray:
    """Occupancy 0..1 of one bleed at points [n]."""
    if b.pattern == "falx":
        return _along_falx(b, brain.at, wall, rough)
    if b.subtype in ("epidural", "subdural"):
        under = _extra_axial(p, rough, b) - _vault(brain.anatomy, p)[0]
        if b.subtype == "subdural":  # the hemispheres' subdural space ends at the tentorium
            under = np.minimum(under, brain.above_tentorium)
        return _soft(np.minimum(under, wall + 1), 1.2)
    if b.subtype == "subarachnoid":
        return brain.subarachnoid * _soft(_subarachnoid_reach(brain.at, rough, b), 0.35)
    if b.subtype == "intraventricular":
        return brain.ventricle * _ventricular_fill(b, p, brain, rough)
    inside = _ellipsoid(p, b.center, b.radii) + 0.11 * b.radii.min() * rough
    return np.asarray(_soft(np.minimum(inside, brain.depth - 1.5), 1.5) * (1 - brain.ventricle))


def _along_falx(b: Bleed, p: Points, wall: FloatArray, rough: FloatArray) -> FloatArray:
    """Subdural blood on one side of the falx: a thin band beside the midline."""
    reach = 1 - ((p.y - b.center[1]) / b.radii[1]) ** 2
    band = b.thickness * np.clip(reach + 0.2 * rough, 0, 1.2) - b.side * p.x
    limit = np.where(p.z > 26, 60, 30) - wall
    inside = np.minimum(np.minimum(band, b.side * p.x), np.minimum(limit, p.z - 4))
    return _soft(np.asarray(inside, np.float32), 1.2)


def _ventricular_fill(b: Bleed, p: Points, brain: Brain, rough: FloatArray) -> FloatArray:
    """0..1: sediment below a level that is horizontal for the scanner, or a cast of one side."""
    layer = _soft(p.down - np.float32(b.thickness), 1.5)
    cast = (b.side * brain.at.x > -0.5) | (brain.vents["third"] > -1) | (brain.vents["fourth"] > -1)
    cast = cast & (rough > -1.2)
    if b.pattern == "layer":
        return layer
    fill = cast.astype(np.float32)
    return fill if b.pattern == "cast" else np.maximum(fill, layer)


def _edema(b: Bleed, p: Points, brain: Brain, rough: FloatArray) -> None:
    """Darken the tissue about an intraparenchymal bleed, in place."""
    inside = _ellipsoid(p, b.center, b.radii + b.thickness) + 0.12 * b.radii.min() * rough
    tissue = _soft(inside, 3.0) * (1 - brain.subarachnoid) * (1 - brain.ventricle)
    brain.hu -= 13 * tissue * _soft(brain.depth - 3, 2.0)


def _blood(
    bleeds: Sequence[Bleed], p: Points, brain: Brain, wall: FloatArray, rough: FloatArray
) -> dict[str, FloatArray]:
    """Occupancy [n] per subtype present; together at most 1, the first named wins."""
    free = np.ones_like(wall)
    out: dict[str, FloatArray] = {}
    for subtype in ("epidural", "subdural", "intraventricular", "intraparenchymal", "subarachnoid"):
        for b in (b for b in bleeds if b.subtype == subtype):
            share = _occupancy(b, p, brain, wall, rough) * free
            free = free - share
            out[subtype] = out.get(subtype, np.float32(0)) + share
    return out


# --- A slice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """Everything drawn for one patient."""

    anatomy: Anatomy
    scanner: Scanner
    bleeds: list[Bleed]
    noise: np.random.Generator


def draw_patient(spec: PhantomSpec, patient: int) -> Patient:
    """Draw a patient from `[seed, patient]` alone: independent of how many others there are."""
    seeds = np.random.SeedSequence([spec.seed, patient]).spawn(4)
    rngs = [np.random.Generator(np.random.PCG64(s)) for s in seeds]
    anatomy = draw_anatomy(rngs[0])
    bleeds = draw_bleeds(rngs[2], anatomy, spec.prevalence)
    return Patient(anatomy, draw_scanner(rngs[1], anatomy, patient), bleeds, rngs[3])


def count_slices(spec: PhantomSpec) -> int:
    """How many slices `write_phantom` writes; nothing is rendered."""
    return sum(draw_patient(spec, n).scanner.slices for n in range(spec.patients))


def _plane(s: Scanner, size: int, index: int, offset: float) -> Points:
    """Head coordinates [size * size] of slice `index`, moved by `offset` thicknesses."""
    pixel = s.fov / size
    step = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(pixel)
    z = s.first_z + (index + offset) * s.spacing
    down = np.repeat(step * math.cos(s.gantry), size).astype(np.float32)
    up = np.repeat(np.float32(z) - step * math.sin(s.gantry), size).astype(np.float32)
    across = np.tile(step, size) - np.float32(s.shift[0])
    down = down - np.float32(s.shift[1])
    r = s.rotation.astype(np.float32)
    x, y, z_head = (r[i, 0] * across + r[i, 1] * down + r[i, 2] * up for i in range(3))
    return Points(x, y, z_head, down)


def _warp(a: Anatomy, p: Points) -> Points:
    """Bend the head's coordinates by the patient's smooth waves."""
    x, y, z = p.x.copy(), p.y.copy(), p.z.copy()
    for kx, ky, kz, phase, dx, dy, dz in a.waves.astype(np.float32):
        wave = np.sin(kx * p.x + ky * p.y + kz * p.z + phase)
        x += dx * wave
        y += dy * wave
        z += dz * wave
    return Points(x, y, z, p.down)


def _render_plane(
    who: Patient, size: int, index: int, offset: float
) -> tuple[FloatArray, dict[str, FloatArray], FloatArray]:
    """HU without blood, blood occupancies and depth under the bone of one plane, [size, size]."""
    a, plane = who.anatomy, _plane(who.scanner, size, index, offset)
    reach = (
        (plane.x / 84) ** 2
        + (np.minimum(plane.y, 0) / 118) ** 2
        + (np.maximum(plane.y, 0) / 106) ** 2
    )
    near = reach < 1
    p = _warp(a, plane.take(near))
    hu, depth = np.full(size * size, np.float32(HU_AIR)), np.full(size * size, np.float32(-99))
    rough = _sample(a.texture, p.x, p.y, p.z)
    vault, _ = _vault(a, p)
    wall = np.minimum(vault, _above_base(a, p))
    inside = wall > -1
    outer = wall < 1
    value = np.zeros_like(wall)
    value[outer] = _outside_brain(a, p.take(outer), wall[outer], rough[outer])
    blood: dict[str, FloatArray] = {}
    if inside.any():
        q, w, t = p.take(inside), wall[inside], rough[inside]
        brain = _brain(a, q, w, t, who.bleeds)
        for b in (b for b in who.bleeds if b.subtype == "intraparenchymal"):
            _edema(b, q, brain, t)
        share = _soft(w)
        value[inside] += share * (brain.hu - value[inside])
        where = np.flatnonzero(near)[inside]
        for subtype, alpha in _blood(who.bleeds, q, brain, w, t).items():
            blood[subtype] = np.zeros(size * size, np.float32)
            blood[subtype][where] = alpha * share
    hu[near], depth[near] = value, wall
    shape = (size, size)
    return hu.reshape(shape), {k: v.reshape(shape) for k, v in blood.items()}, depth.reshape(shape)


def _render(
    who: Patient, size: int, index: int
) -> tuple[FloatArray, dict[str, BoolArray], FloatArray]:
    """Ideal HU with blood, the masks, and the depth under the bone, [size, size]."""
    planes = [_render_plane(who, size, index, offset) for offset in PLANES]
    hu = np.asarray(np.mean([p[0] for p in planes], axis=0), np.float32)
    depth = planes[0][2]
    least = MIN_AREA_MM2 / (who.scanner.fov / size) ** 2  # pixels
    masks = {k: np.zeros((size, size), np.bool_) for k in SUBTYPES}
    for subtype in {b.subtype: None for b in who.bleeds}:
        empty = np.zeros((size, size), np.float32)
        shares = [p[1].get(subtype, empty) for p in planes]
        alpha = np.asarray(np.mean(shares, axis=0), np.float32)
        mask = np.asarray(alpha > 0.5)
        if mask.sum() >= least:
            masks[subtype] = mask
            density = next(b.hu for b in who.bleeds if b.subtype == subtype)
            _paint(hu, alpha, density)
    return hu, masks, depth


def _inside_fov(size: int) -> BoolArray:
    """[size, size] bool: the reconstruction circle."""
    axis = np.square(np.arange(size) - (size - 1) / 2)
    return np.asarray(axis[:, None] + axis[None, :] <= (size / 2) ** 2)


def _noise(s: Scanner, size: int, rng: np.random.Generator) -> FloatArray:
    """[size, size] unit-variance noise with the spectrum of filtered back projection."""
    pixel = s.fov / size
    fy, fx = np.fft.fftfreq(size, pixel)[:, None], np.fft.rfftfreq(size, pixel)[None, :]
    f = np.hypot(fy, fx).astype(np.float32)
    gain = (f + np.float32(0.02)) * np.exp(-np.square(f / np.float32(s.cutoff)))
    white = rng.standard_normal((size, size), dtype=np.float32)
    values = fft.irfft2(fft.rfft2(white) * gain, s=(size, size))
    return np.asarray(values / values.std(), np.float32)


def _acquire(who: Patient, hu: FloatArray, depth: FloatArray, index: int) -> npt.NDArray[np.int16]:
    """What the scanner makes of ideal HU [size, size]: cupping, holder, blur, noise, int16."""
    s, size = who.scanner, hu.shape[0]
    pixel = s.fov / size
    _holder(s, hu)
    hu += np.where(depth > 0, s.cupping * np.exp(-np.clip(depth, 0, 60) / 7), 0) + s.offset
    hu = gaussian_filter(hu, s.blur / pixel, mode="nearest")
    if s.sharpen > 0.1:  # a sharp kernel overshoots at edges
        hu += s.sharpen * (
            np.clip(hu, -200, 400) - gaussian_filter(np.clip(hu, -200, 400), 1.2 / pixel)
        )
    level = s.noise * (0.75 + 0.4 * _soft(depth, 30.0))
    hu += level * _noise(s, size, who.noise)
    hu = np.where(_inside_fov(size), np.clip(np.rint(hu), HU_MIN, HU_MAX), HU_MIN)
    return hu.astype(np.int16)


def _holder(s: Scanner, hu: FloatArray) -> None:
    """Paint the head holder behind the head, in place, where there is air."""
    if s.holder == "none":
        return
    size = hu.shape[0]
    step = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(s.fov / size)
    y, x = step[:, None], step[None, :]
    if s.holder == "arc":
        shell = 2.0 - np.abs(np.hypot(x, y + 5) - 114)
        shell = np.where((y > 40) & (np.abs(x) < 85), shell, -9)
    else:
        shell = np.where(np.abs(y - 45) < 28, 1.5 - np.abs(np.abs(x) - 103), -9)
    _paint(hu, _soft(np.asarray(shell, np.float32)) * (hu < -700), 160.0)


def simulate_study(spec: PhantomSpec, patient: int) -> Iterator[PhantomSlice]:
    """Yield a patient's slices from base to vertex. Pure: the same arguments, the same pixels."""
    who = draw_patient(spec, patient)
    for index in range(who.scanner.slices):
        hu, masks, depth = _render(who, spec.size, index)
        labels = {k: int(masks[k].any()) for k in SUBTYPES}
        labels["any"] = int(any(labels.values()))
        z = round(who.scanner.table_z + index * who.scanner.spacing, 3)
        pixels = _acquire(who, hu, depth, index)
        yield PhantomSlice(
            _identifier(spec.seed, patient * 64 + index, 9), pixels, masks, labels, z
        )


def _identifier(seed: int, number: int, digits: int) -> str:
    """`ID_` + hex digits: a bijection of `number` for a given seed, so ids never collide."""
    bits = 4 * digits
    mask = (1 << bits) - 1
    value = (number + seed * 0x9E3779B97F4A7C15) & mask
    for factor in (0xD6E8FEB86659FD93, 0xA0761D6478BD642F):
        value = (value * factor) & mask  # odd: a bijection
        value ^= value >> (bits // 2)  # so is this
    return f"ID_{value:0{digits}x}"


# --- Files -------------------------------------------------------------------------------------


def _dataset(who: Scanner, ids: dict[str, str], s: PhantomSlice) -> Dataset:
    """The DICOM header and pixels of one slice, with the elements RSNA kept."""
    size = s.hu.shape[0]
    pixel = f"{who.fov / size:.6f}"
    raw = s.hu.astype(np.int32) - RESCALE_INTERCEPT
    if who.signed:
        raw = np.where(_inside_fov(size), raw, PADDING_SIGNED)
    corner = -(size - 1) / 2 * who.fov / size
    c, t = math.cos(who.gantry), math.sin(who.gantry)
    d = Dataset()
    d.SOPInstanceUID, d.Modality, d.PatientID = s.image_id, "CT", ids["patient"]
    d.StudyInstanceUID, d.SeriesInstanceUID, d.StudyID = ids["study"], ids["series"], ""
    d.ImagePositionPatient = [f"{v:.6f}" for v in (corner, corner * c, s.z_mm - corner * t)]
    d.ImageOrientationPatient = [f"{v:.6f}" for v in (1, 0, 0, 0, c, -t)]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns, d.PixelSpacing = size, size, [pixel, pixel]
    d.BitsAllocated, d.BitsStored = 16, 16 if who.signed else 12
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(who.signed)
    d.WindowCenter, d.WindowWidth = who.window
    d.RescaleIntercept, d.RescaleSlope = str(RESCALE_INTERCEPT), "1"
    d.add_new("PixelData", "OW", raw.astype("<i2" if who.signed else "<u2").tobytes())
    return d


def _save(path: Path, d: Dataset, signed: bool) -> None:
    """Write one dataset as a DICOM file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"2.25.{int(str(d.SOPInstanceUID)[3:], 16)}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if signed else ImplicitVRLittleEndian
    d.file_meta, d.preamble = meta, b"\0" * 128
    d.save_as(path, enforce_file_format=False)


def _write_study(job: tuple[PhantomSpec, int, Path]) -> list[tuple[str, dict[str, int]]]:
    """Write one patient's files; the labels of its slices. Runs in a worker process."""
    spec, patient, folder = job
    scanner = draw_patient(spec, patient).scanner
    digits = {"patient": 8, "study": 10, "series": 10}
    ids = {k: _identifier(spec.seed + i, patient, n) for i, (k, n) in enumerate(digits.items(), 1)}
    rows = []
    with pydicom.config.disable_value_validation():  # `ID_...` is no valid UID, and is RSNA's
        for s in simulate_study(spec, patient):
            _save(folder / f"{s.image_id}.dcm", _dataset(scanner, ids, s), scanner.signed)
            rows.append((s.image_id, s.labels))
    return rows


def _write_studies(
    spec: PhantomSpec, folder: Path, workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, dict[str, int]]:
    """Write all patients; labels by image id."""
    rows: dict[str, dict[str, int]] = {}
    jobs = [(spec, patient, folder) for patient in range(spec.patients)]
    for done, study in enumerate(run_parallel(_write_study, jobs, workers), 1):
        rows.update(study)
        if progress is not None:
            progress(done, spec.patients)
    return rows


def _write_labels(path: Path, rows: dict[str, dict[str, int]]) -> None:
    """RSNA's long CSV: six rows per image."""
    lines = ["ID,Label"]
    lines += [f"{i}_{k},{rows[i][k]}" for i in sorted(rows) for k in LABELS]
    path.write_text("\n".join(lines) + "\n", encoding="ascii", newline="\n")


def _describe(spec: PhantomSpec) -> dict[str, Any]:
    return {"generator": "ich.phantom", "version": GENERATOR_VERSION, "spec": asdict(spec)}


def _is_built(out: Path, spec: PhantomSpec) -> bool:
    """True if `out` holds this phantom, False if there is nothing; else FileExistsError."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "phantom.json").read_text(encoding="utf-8"))
        found = {k: found[k] for k in _describe(spec)}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{out} exists and is no phantom (it has no readable phantom.json): nothing was"
            " written. Choose another folder."
        ) from None
    if found != _describe(spec):
        raise FileExistsError(
            f"{out} holds another phantom ({found['spec']}, generator version"
            f" {found['version']}), not {asdict(spec)}, version {GENERATOR_VERSION}: nothing was"
            f" written. Choose another folder, or remove it with: rm -r {out}"
        )
    return True


def _make_parent(out: Path) -> None:
    """Make the folder that is to hold `out`, or say at once that nothing can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror} ({error.filename}).") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {out}: no permission to write in {out.parent}.")


def write_phantom(
    out: Path,
    spec: PhantomSpec,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the phantom in the RSNA layout: all of it or nothing. Returns `out`.

    An equal phantom at `out` is left as it is; anything else there is a FileExistsError.
    """
    out = Path(out)
    if workers is not None:
        _check_int("workers", workers, 1, 1024)
    if _is_built(out, spec):
        return out
    _make_parent(out)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        images = temporary / "stage_2_train"
        images.mkdir()
        count = min(workers or available_cores(), spec.patients)
        rows = _write_studies(spec, images, count, progress)
        _write_labels(temporary / "stage_2_train.csv", rows)
        about = json.dumps({**_describe(spec), "slices": len(rows)}, indent=2) + "\n"
        (temporary / "phantom.json").write_text(about, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(out)
    except OSError:
        if not _is_built(out, spec):  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def ensure_phantom(
    out: Path, spec: PhantomSpec, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The phantom at `out`, made at first use; of two processes one builds, the other waits."""
    out = Path(out)
    if _is_built(out, spec):
        return out
    _make_parent(out)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a crash
        return write_phantom(out, spec, progress=progress)


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be an integer from {least} to {most}.")


# --- Figure and command ------------------------------------------------------------------------

FIGURE_PATIENTS = 40  # looked through, at most, for a good example of each subtype
WINDOWS = (("brain 40/80", 40, 80), ("subdural 80/200", 80, 200), ("soft tissue 40/380", 40, 380))


def _window(hu: npt.NDArray[np.int16], center: float, width: float) -> FloatArray:
    """HU [H, W] to 0..1."""
    values = (hu.astype(np.float32) - np.float32(center - width / 2)) / np.float32(width)
    return np.asarray(np.clip(values, 0, 1))


def choose_examples(spec: PhantomSpec) -> dict[str, PhantomSlice]:
    """One slice per subtype, with few other labels and a sizeable bleed, and a healthy one."""
    best: dict[str, tuple[float, PhantomSlice]] = {}
    for patient in range(min(spec.patients, FIGURE_PATIENTS)):
        for s in simulate_study(spec, patient):
            present = [k for k in SUBTYPES if s.labels[k]]
            brain = float(((s.hu > 10) & (s.hu < 60)).mean())
            scores = {
                k: brain * float(s.masks[k].mean()) ** 0.5 / len(present) ** 2 for k in present
            }
            for name, score in (scores or {"healthy": brain}).items():
                if name not in best or score > best[name][0]:
                    best[name] = (score, s)
    order = (*SUBTYPES, "healthy")
    return {k: best[k][1] for k in order if k in best}


def draw_figure(spec: PhantomSpec, path: Path) -> None:
    """Draw examples in the three windows, their RGB composition and the masks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    examples = choose_examples(spec)
    side = 1.9
    figure = Figure(figsize=(5 * side + 0.6, len(examples) * side + 0.35), facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(examples), 5, squeeze=False,
        gridspec_kw={"wspace": 0.02, "hspace": 0.02, "left": 0.06, "right": 1, "bottom": 0,
                     "top": 0.97},
    )  # fmt: skip
    for row, s in zip(grid, examples.values(), strict=True):
        panels = [_window(s.hu, center, width) for _, center, width in WINDOWS]
        for axes, panel in zip(row, [*panels, np.dstack(panels), panels[0]], strict=True):
            axes.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            margin = 0.06 * spec.size  # of air
            limits = (margin, spec.size - margin)
            axes.set(xticks=[], yticks=[], xlim=limits, ylim=limits[::-1])
            axes.spines[:].set_visible(False)
        _draw_contours(row[-1], s)
        name = "\n".join(k for k in SUBTYPES if s.labels[k]) or "no hemorrhage"
        row[0].set_ylabel(name, color="white", fontsize=9)
    for axes, title in zip(
        grid[0], [*(w[0] for w in WINDOWS), "the three as RGB", "mask"], strict=True
    ):
        axes.set_title(title, color="white", fontsize=9, pad=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=1200 / (5 * side + 0.6), facecolor="black")


def _draw_contours(axes: Any, s: PhantomSlice) -> None:
    """Outline each subtype's mask in its colour."""
    colours = dict(
        zip(SUBTYPES, ("#ff8c42", "#ff4d6d", "#4cc9f0", "#b5e48c", "#ffd60a"), strict=True)
    )
    for subtype, mask in s.masks.items():
        if mask.any():
            axes.contour(mask, levels=[0.5], colors=[colours[subtype]], linewidths=1.0)


def _parser() -> argparse.ArgumentParser:
    default = PhantomSpec()
    parser = argparse.ArgumentParser(
        prog="python -m ich.phantom", description="Write synthetic head CT in the RSNA layout."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--patients", type=int, default=default.patients, metavar="N")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S")
    parser.add_argument("--size", type=int, default=default.size, help="rows and columns")
    parser.add_argument("--prevalence", type=float, default=default.prevalence,
                        help="probability that a patient bleeds")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw examples")
    return parser


def _summarize(out: Path) -> str:
    """Slices and label rates, read back from the CSV."""
    lines = (out / "stage_2_train.csv").read_text(encoding="ascii").split()[1:]
    positive = {k: sum(line.endswith(f"_{k},1") for line in lines) for k in LABELS}
    slices = len(lines) // len(LABELS)
    rates = ", ".join(f"{k} {100 * n / slices:.1f} %" for k, n in positive.items())
    return f"{slices} slices in {out}\npositive: {rates}"


def _show_progress(done: int, patients: int) -> None:
    end = "\n" if done == patients else ""
    print(f"\rpatients {done}/{patients}", end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a phantom from the command line; 0, or 2 after a user's mistake."""
    args = _parser().parse_args(argv)
    try:
        spec = PhantomSpec(args.patients, args.seed, args.size, args.prevalence)
        write_phantom(args.out, spec, args.workers, _show_progress)
        if args.figure is not None:
            draw_figure(spec, args.figure)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summarize(args.out))
    if args.figure is not None:
        print(f"figure: {args.figure}")
    print(f"next: python -m ich.sweep experiment=demo data.root={args.out}")
    return 0


if __name__ == "__main__":
    # Workers look their function up by module: it must be `ich.phantom`, not `__main__`.
    from ich.phantom import main as _main

    sys.exit(_main())

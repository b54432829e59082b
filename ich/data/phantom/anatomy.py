"""What is drawn once per patient: the head, and how it lies in the scanner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.ndimage import gaussian_filter

from ich.data.phantom.spec import GRID_MM, FloatArray


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
        "white": white,
        "grey": grey,
        "csf": rng.uniform(3, 9),
        "cerebellum": grey - 1.0,
        # A falx and sinuses as dense as clotted blood are common, and no bleed.
        "falx": rng.uniform(42, 58),
        "sinus": rng.uniform(46, 62),
        "diploe": rng.uniform(350, 850),
        "cortex": rng.uniform(1200, 1900),
    }


def _draw_calcified(rng: np.random.Generator, atrophy: float) -> dict[str, tuple[float, float]]:
    """Calcifications are benign and common with age: what a detector must not call blood."""
    glands = {"pineal": 0.6, "choroid_left": 0.6, "choroid_right": 0.6}
    odds = {**glands, "pallidum": 0.12, "falx": 0.2}
    sites = {}
    for site, chance in odds.items():
        # Drawn whether present or not, so that one site's chance moves no other draw.
        present, radius, hu = rng.random(), rng.uniform(1.6, 4.0), rng.uniform(75, 320)
        if present < chance * (0.5 + atrophy):
            # Calcified basal ganglia are faint: the closest of these to a small bleed.
            sites[site] = (radius, hu if site != "pallidum" else min(hu, 95.0))
    return sites


def _random_field(rng: np.random.Generator, wavelength: float, band: float) -> FloatArray:
    """Periodic, unit-variance, band-limited Gaussian field [64, 72, 64] (x, y, z), GRID_MM."""
    shape = (64, 72, 64)
    axes = (*(np.fft.fftfreq(n, GRID_MM) for n in shape[:2]), np.fft.rfftfreq(shape[2], GRID_MM))
    freq = np.meshgrid(*axes, indexing="ij")
    k = np.sqrt(sum(f * f for f in freq)) * wavelength
    gain = np.exp(-0.5 * ((k - 1) / band) ** 2).astype(np.float32)
    white = rng.standard_normal(shape, dtype=np.float32)
    values = fft.irfftn(fft.rfftn(white) * gain, s=shape)
    return np.asarray(values / values.std(), np.float32)


def _signed_distance(values: FloatArray) -> FloatArray:
    """First-order signed distance (mm) to the zero level set of a field."""
    slope = np.sqrt(sum(np.square(g) for g in np.gradient(values, GRID_MM)))
    # Never divided by a slope near 0, where the field is flat.
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


# Center and width, one or several, as RSNA's headers hold them: leading zeros included.
WINDOWS = (
    ("30", "80"),
    ("40", "80"),
    (["00036", "00036"], ["00080", "00080"]),
    (["00040", "00060"], ["00080", "00360"]),
    ("40", "100"),
)


def draw_scanner(rng: np.random.Generator, anatomy: Anatomy, patient: int) -> Scanner:
    """Draw an acquisition: geometry, noise, kernel, encoding (encodings take turns)."""
    spacing = rng.uniform(4.7, 5.6)
    first_z = rng.uniform(-58, -42)
    top = anatomy.axes[2] + anatomy.bone + anatomy.scalp + rng.uniform(-12, 0)
    sharp = rng.random()  # 0 soft .. 1 sharp kernel: a sharp one resolves more, and is noisier
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
        window=WINDOWS[rng.integers(len(WINDOWS))],
        signed=patient % 2 == 0,
    )


def _rotation(pitch: float, roll: float, yaw: float) -> npt.NDArray[np.float64]:
    """[3, 3]: rotations about x (nod), y (lean), z (turn)."""
    cx, sx, cy, sy, cz, sz = (f(a) for a in (pitch, roll, yaw) for f in (math.cos, math.sin))
    nod = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    lean = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(turn @ lean @ nod)

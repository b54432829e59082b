"""A slice of a patient: blood in the spaces that hold it, two planes, noise, acquisition.

As in `tissue`: `a` is the patient's Anatomy, `p` the Points of a plane, `b` a Bleed, `wall` the
distance (mm) to the nearest bone, `rough` the texture at the points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.ndimage import gaussian_filter

from ich.data.phantom.anatomy import Anatomy, Scanner, draw_anatomy, draw_scanner
from ich.data.phantom.bleeds import Bleed, draw_bleeds
from ich.data.phantom.spec import (
    HU_AIR,
    HU_MAX,
    HU_MIN,
    MIN_AREA_MM2,
    PLANES,
    SUBTYPES,
    BoolArray,
    FloatArray,
    PhantomSlice,
    PhantomSpec,
)
from ich.data.phantom.tissue import (
    Brain,
    Points,
    above_base,
    brain_hu,
    ellipsoid,
    extra_axial,
    outside_brain,
    paint,
    sample_grid,
    soft_edge,
    subarachnoid_reach,
    vault_distances,
)

# Blood in the spaces that can hold it


def _occupancy(
    b: Bleed, p: Points, brain: Brain, wall: FloatArray, rough: FloatArray
) -> FloatArray:
    """Occupancy 0..1 of one bleed at points [n]."""
    if b.pattern == "falx":
        return _along_falx(b, brain.at, wall, rough)
    if b.subtype in ("epidural", "subdural"):
        under = extra_axial(p, rough, b) - vault_distances(brain.anatomy, p)[0]
        if b.subtype == "subdural":  # the hemispheres' subdural space ends at the tentorium
            under = np.minimum(under, brain.above_tentorium)
        return soft_edge(np.minimum(under, wall + 1), 1.2)
    if b.subtype == "subarachnoid":
        return brain.subarachnoid * soft_edge(subarachnoid_reach(brain.at, rough, b), 0.35)
    if b.subtype == "intraventricular":
        return brain.ventricle * _ventricular_fill(b, p, brain, rough)
    inside = ellipsoid(p, b.center, b.radii) + 0.11 * b.radii.min() * rough
    return np.asarray(soft_edge(np.minimum(inside, brain.depth - 1.5), 1.5) * (1 - brain.ventricle))


def _along_falx(b: Bleed, p: Points, wall: FloatArray, rough: FloatArray) -> FloatArray:
    """Subdural blood on one side of the falx: a thin band beside the midline."""
    reach = 1 - ((p.y - b.center[1]) / b.radii[1]) ** 2
    band = b.thickness * np.clip(reach + 0.2 * rough, 0, 1.2) - b.side * p.x
    limit = np.where(p.z > 26, 60, 30) - wall
    inside = np.minimum(np.minimum(band, b.side * p.x), np.minimum(limit, p.z - 4))
    return soft_edge(np.asarray(inside, np.float32), 1.2)


def _ventricular_fill(b: Bleed, p: Points, brain: Brain, rough: FloatArray) -> FloatArray:
    """0..1: sediment below a level that is horizontal for the scanner, or a cast of one side."""
    layer = soft_edge(p.down - np.float32(b.thickness), 1.5)
    cast = (b.side * brain.at.x > -0.5) | (brain.vents["third"] > -1) | (brain.vents["fourth"] > -1)
    cast = cast & (rough > -1.2)
    if b.pattern == "layer":
        return layer
    fill = cast.astype(np.float32)
    return fill if b.pattern == "cast" else np.maximum(fill, layer)


def _edema(b: Bleed, p: Points, brain: Brain, rough: FloatArray) -> None:
    """Darken the tissue about an intraparenchymal bleed, in place."""
    inside = ellipsoid(p, b.center, b.radii + b.thickness) + 0.12 * b.radii.min() * rough
    tissue = soft_edge(inside, 3.0) * (1 - brain.subarachnoid) * (1 - brain.ventricle)
    brain.hu -= 13 * tissue * soft_edge(brain.depth - 3, 2.0)


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


# A slice


@dataclass(frozen=True)
class Patient:
    """Everything drawn for one patient."""

    anatomy: Anatomy
    scanner: Scanner
    bleeds: list[Bleed]
    noise: np.random.Generator


def draw_patient(spec: PhantomSpec, number: int) -> Patient:
    """Draw a patient from `[seed, number]` alone: independent of how many others there are."""
    # A stream for each part: another prevalence gives the same heads, with other bleeds.
    seeds = np.random.SeedSequence([spec.seed, number]).spawn(4)
    rngs = [np.random.Generator(np.random.PCG64(s)) for s in seeds]
    anatomy = draw_anatomy(rngs[0])
    bleeds = draw_bleeds(rngs[2], anatomy, spec.prevalence)
    return Patient(anatomy, draw_scanner(rngs[1], anatomy, number), bleeds, rngs[3])


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
    patient: Patient, size: int, index: int, offset: float
) -> tuple[FloatArray, dict[str, FloatArray], FloatArray]:
    """HU without blood, blood occupancies and depth under the bone of one plane, [size, size]."""
    a, plane = patient.anatomy, _plane(patient.scanner, size, index, offset)
    # Only what lies in this ellipse, which holds any head, is computed; the rest is air.
    reach = (
        (plane.x / 84) ** 2
        + (np.minimum(plane.y, 0) / 118) ** 2
        + (np.maximum(plane.y, 0) / 106) ** 2
    )
    near = reach < 1
    p = _warp(a, plane.take(near))
    hu, depth = np.full(size * size, np.float32(HU_AIR)), np.full(size * size, np.float32(-99))
    rough = sample_grid(a.texture, p.x, p.y, p.z)
    vault, _ = vault_distances(a, p)
    wall = np.minimum(vault, above_base(a, p))
    inside = wall > -1
    outer = wall < 1
    value = np.zeros_like(wall)
    value[outer] = outside_brain(a, p.take(outer), wall[outer], rough[outer])
    blood: dict[str, FloatArray] = {}
    if inside.any():
        q, w, t = p.take(inside), wall[inside], rough[inside]
        brain = brain_hu(a, q, w, t, patient.bleeds)
        for b in (b for b in patient.bleeds if b.subtype == "intraparenchymal"):
            _edema(b, q, brain, t)
        share = soft_edge(w)
        value[inside] += share * (brain.hu - value[inside])
        where = np.flatnonzero(near)[inside]
        for subtype, alpha in _blood(patient.bleeds, q, brain, w, t).items():
            blood[subtype] = np.zeros(size * size, np.float32)
            blood[subtype][where] = alpha * share
    hu[near], depth[near] = value, wall
    shape = (size, size)
    return hu.reshape(shape), {k: v.reshape(shape) for k, v in blood.items()}, depth.reshape(shape)


def _render(
    patient: Patient, size: int, index: int
) -> tuple[FloatArray, dict[str, BoolArray], FloatArray]:
    """Ideal HU with blood, the masks, and the depth under the bone, [size, size]."""
    planes = [_render_plane(patient, size, index, offset) for offset in PLANES]
    hu = np.asarray(np.mean([p[0] for p in planes], axis=0), np.float32)
    depth = planes[0][2]
    least = MIN_AREA_MM2 / (patient.scanner.fov / size) ** 2  # pixels
    masks = {k: np.zeros((size, size), np.bool_) for k in SUBTYPES}
    for subtype in {b.subtype: None for b in patient.bleeds}:  # a dict: in the order drawn
        empty = np.zeros((size, size), np.float32)
        shares = [p[1].get(subtype, empty) for p in planes]
        alpha = np.asarray(np.mean(shares, axis=0), np.float32)
        mask = np.asarray(alpha > 0.5)
        if mask.sum() >= least:
            # Below the area it is neither painted nor labelled: a label never stands for blood
            # that nobody could see, and no blood is without its label.
            masks[subtype] = mask
            density = next(b.hu for b in patient.bleeds if b.subtype == subtype)
            paint(hu, alpha, density)
    return hu, masks, depth


def inside_fov(size: int) -> BoolArray:
    """[size, size] bool: the reconstruction circle."""
    axis = np.square(np.arange(size) - (size - 1) / 2)
    return np.asarray(axis[:, None] + axis[None, :] <= (size / 2) ** 2)


def _noise(s: Scanner, size: int, rng: np.random.Generator) -> FloatArray:
    """[size, size] unit-variance noise with the spectrum of filtered back projection."""
    pixel = s.fov / size
    fy, fx = np.fft.fftfreq(size, pixel)[:, None], np.fft.rfftfreq(size, pixel)[None, :]
    f = np.hypot(fy, fx).astype(np.float32)
    # A ramp, which is what filtered back projection makes of white noise (Riederer et al., Phys.
    # Med. Biol. 1978), times the kernel's roll-off.
    gain = (f + np.float32(0.02)) * np.exp(-np.square(f / np.float32(s.cutoff)))
    white = rng.standard_normal((size, size), dtype=np.float32)
    values = fft.irfft2(fft.rfft2(white) * gain, s=(size, size))
    return np.asarray(values / values.std(), np.float32)


def _acquire(
    patient: Patient, hu: FloatArray, depth: FloatArray, index: int
) -> npt.NDArray[np.int16]:
    """What the scanner makes of ideal HU [size, size]: cupping, holder, blur, noise, int16."""
    s, size = patient.scanner, hu.shape[0]
    pixel = s.fov / size
    _holder(s, hu)
    hu += np.where(depth > 0, s.cupping * np.exp(-np.clip(depth, 0, 60) / 7), 0) + s.offset
    hu = gaussian_filter(hu, s.blur / pixel, mode="nearest")
    if s.sharpen > 0.1:  # a sharp kernel overshoots at edges
        hu += s.sharpen * (
            np.clip(hu, -200, 400) - gaussian_filter(np.clip(hu, -200, 400), 1.2 / pixel)
        )
    level = s.noise * (0.75 + 0.4 * soft_edge(depth, 30.0))
    hu += level * _noise(s, size, patient.noise)
    hu = np.where(inside_fov(size), np.clip(np.rint(hu), HU_MIN, HU_MAX), HU_MIN)
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
    paint(hu, soft_edge(np.asarray(shell, np.float32)) * (hu < -700), 160.0)


def simulate_study(spec: PhantomSpec, number: int) -> Iterator[PhantomSlice]:
    """Yield a patient's slices from base to vertex. Pure: the same arguments, the same pixels."""
    patient = draw_patient(spec, number)
    for index in range(patient.scanner.slices):
        hu, masks, depth = _render(patient, spec.size, index)
        labels = {k: int(masks[k].any()) for k in SUBTYPES}
        labels["any"] = int(any(labels.values()))
        z = round(patient.scanner.table_z + index * patient.scanner.spacing, 3)
        pixels = _acquire(patient, hu, depth, index)
        image_id = identifier(spec.seed, number * 64 + index, 9)  # a study has 40 slices at most
        yield PhantomSlice(image_id, pixels, masks, labels, z)


def identifier(seed: int, number: int, digits: int) -> str:
    """`ID_` + hex digits: a bijection of `number` for a given seed, so ids never collide."""
    bits = 4 * digits
    mask = (1 << bits) - 1
    value = (number + seed * 0x9E3779B97F4A7C15) & mask
    for factor in (0xD6E8FEB86659FD93, 0xA0761D6478BD642F):
        value = (value * factor) & mask  # odd: a bijection
        value ^= value >> (bits // 2)  # so is this
    return f"ID_{value:0{digits}x}"

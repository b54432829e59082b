"""Solids in a plane: bone, brain, fluid spaces, in HU.

Every function takes flat float32 arrays [n] over the pixels that matter; distances are in mm,
positive inside. Throughout, `a` is the patient's Anatomy, `p` the Points, `b` a Bleed, and
`rough` the patient's texture at the points (unit variance), since no edge in a head is smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

from ich.data.phantom.anatomy import Anatomy
from ich.data.phantom.bleeds import Bleed
from ich.data.phantom.spec import GRID_MM, HU_AIR, BoolArray, FloatArray, Vector


@dataclass
class Points:
    """Flat coordinates [n], mm, head frame; `down` is gravity's (scanner y)."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    down: FloatArray

    def take(self, keep: BoolArray) -> Points:
        return Points(self.x[keep], self.y[keep], self.z[keep], self.down[keep])


def soft_edge(distance: npt.NDArray[Any], width: float = 1.0) -> FloatArray:
    """Occupancy 0..1 of a solid from the distance (mm) inside it, over an edge of `width` mm."""
    return np.asarray(np.clip(distance / np.float32(width) + 0.5, 0, 1), np.float32)


def ellipsoid(p: Points, center: Vector, radii: Vector) -> FloatArray:
    """Distance inside an ellipsoid, first order, mm."""
    (cx, cy, cz), (rx, ry, rz) = center, radii
    q = np.sqrt(((p.x - cx) / rx) ** 2 + ((p.y - cy) / ry) ** 2 + ((p.z - cz) / rz) ** 2)
    return np.asarray((1 - q) * min(rx, ry, rz), np.float32)


def sample_grid(grid: FloatArray, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
    """Trilinear value of a periodic GRID_MM field at points in mm."""
    at = np.stack([x, y, z]) / np.float32(GRID_MM) + np.float32(200)
    at %= np.array(grid.shape, np.float32)[:, None]
    return np.asarray(map_coordinates(grid, at, order=1, mode="grid-wrap", output=np.float32))


def vault_distances(a: Anatomy, p: Points) -> tuple[FloatArray, FloatArray]:
    """Depth (mm) under the inner table of the vault, and the ellipsoid's radius q (1 on it)."""
    ax, ay, az = a.axes
    x = p.x / (ax * (1 + a.egg * np.clip(p.y / ay, -1.2, 1.2)))
    y, z = p.y / ay, p.z / np.where(p.z > 0, az, 1.45 * az).astype(np.float32)
    square = x * x + y * y + z * z + np.float32(1e-6)
    q = np.sqrt(square - 4 * a.box * (x * y) ** 2 / square)
    slope = np.sqrt((x / ax) ** 2 + (y / ay) ** 2 + (z / az) ** 2) / q
    return np.asarray((1 - q) / slope, np.float32), np.asarray(q, np.float32)


def above_base(a: Anatomy, p: Points) -> FloatArray:
    """Distance (mm) above the floor of the skull base."""
    at = np.stack([p.y + 120, p.x + 100])
    height = map_coordinates(a.floor[0], at, order=1, mode="nearest", output=np.float32)
    slope = map_coordinates(a.floor[1], at, order=1, mode="nearest", output=np.float32)
    return np.asarray((p.z - height) * slope)


def paint(hu: FloatArray, inside: FloatArray, value: float | FloatArray) -> None:
    """Blend `value` into `hu` where `inside` (occupancy 0..1) says so, in place."""
    hu += inside * (value - hu)


# Face and base, mirrored: center, radii (mm), HU. The order counts: each is painted over those
# before it, so that a wall comes before what it holds.
FACE = (
    ((33, -60, -38), (21, 30, 20), 900.0),  # walls of the orbit
    ((33, -62, -38), (18, 30, 17), -85.0),  # its fat
    ((0, -58, -40), (15, 30, 19), 700.0),  # ethmoid and nose
    ((34, -76, -38), (12.5, 12.5, 12.5), 45.0),  # coat of the eye
    ((34, -76, -38), (11.3, 11.3, 11.3), 9.0),  # vitreous body
    ((34, -85.5, -38), (4.5, 2.2, 4.5), 85.0),  # lens
    ((25, -52, -37), (2.6, 16, 2.6), 35.0),  # optic nerve
    ((21, -62, -38), (1.8, 14, 5), 50.0),  # medial rectus
    ((46, -60, -38), (1.8, 12, 5), 50.0),  # lateral rectus
    ((29, -60, -68), (18, 22, 18), 800.0),  # maxilla
    ((29, -60, -68), (15, 19, 15.5), -950.0),  # maxillary sinus
    ((66, -40, -52), (3, 22, 4.5), 1100.0),  # zygomatic arch
    ((50, -16, -74), (4, 13, 24), 1300.0),  # ramus of the mandible
    ((17, 26, -70), (9, 11, 9), 900.0),  # occipital condyle
    ((52, 24, -40), (14, 18, 18), 1200.0),  # mastoid
    ((34, 14, -36), (20, 9, 11), 1500.0),  # petrous bone
    ((64, 12, -46), (14, 3.5, 3.5), -950.0),  # ear canal
    ((0, -20, -42), (15, 16, 13), 800.0),  # body of the sphenoid
    ((0, -20, -42), (12, 13, 9.5), -950.0),  # sphenoid sinus
)
CELLS = (
    ((0, -60, -42), (11, 27, 16)),  # of the ethmoid
    ((0, -66, -66), (12, 28, 16)),  # nasal cavity
    ((53, 28, -42), (11, 15, 15)),  # of the mastoid
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
            inside = ellipsoid(half, center, radii) + (
                0.12 * min(radii) * cells if radii[0] != radii[1] else 0
            )
            paint(value, soft_edge(inside), density)
    for center, radii in CELLS:  # air cells between thin septa of bone or mucosa
        air = np.where(np.abs(cells) < 0.3, 250.0, -900.0).astype(np.float32)
        paint(value, soft_edge(ellipsoid(half, center, radii)), air)
    hu[near] = value


def outside_brain(a: Anatomy, p: Points, depth: FloatArray, rough: FloatArray) -> FloatArray:
    """HU [n] of everything but the cavity's content; `depth` is the distance inside the cavity."""
    thickness = _bone_thickness(a, p, rough)
    vault, _ = vault_distances(a, p)
    face = ellipsoid(p, (0, -36, -68), (72, 79, 62)) * np.float32(1.1)
    skin = np.maximum(vault + thickness + a.scalp, face)
    below = depth + thickness  # distance inside the outer table
    tissue = np.where(rough > 0.7 - 0.01 * (p.z + 20), -85.0, 55.0).astype(np.float32)
    rim = soft_edge(skin - 2.5)
    hu = np.full(p.x.shape, np.float32(48))
    paint(hu, rim, -80.0)
    paint(hu, soft_edge(skin - 1.0 - 0.75 * a.scalp, 2.0), tissue)
    _face(a, p, hu, rough)
    paint(hu, soft_edge(below), _bone(a, below / thickness))
    sinus = ellipsoid(
        Points(np.abs(p.x), p.y, p.z, p.down), (8, -a.axes[1] - 4, -16), (11, 2.8, 11)
    )
    paint(hu, soft_edge(sinus) * (depth < -1.0), -950.0)
    paint(hu, 1 - soft_edge(skin), HU_AIR)
    return hu


def _bone_thickness(a: Anatomy, p: Points, rough: FloatArray) -> FloatArray:
    """Thickness (mm) of the skull: thin at the temporal squama, thick at forehead and inion."""
    ax, ay, _ = a.axes
    squama = np.exp(-(((p.z + 8) / 25) ** 2) - (p.y / 35) ** 2) * soft_edge(
        np.abs(p.x) - 0.7 * ax, 20.0
    )
    inion = np.exp(-(((p.z + 18) / 14) ** 2) - (p.x / 14) ** 2) * (p.y > 0.5 * ay)
    brow = np.exp(-(((p.z + 16) / 14) ** 2) - (p.x / 26) ** 2) * (p.y < -0.6 * ay)
    vault = a.bone * (1 + 0.04 * rough - 0.4 * squama) + 5 * inion + 6 * brow
    roof = (
        soft_edge(-p.y - 22, 12.0)
        * soft_edge(-18 - p.z, 6.0)
        * (np.hypot(p.x / ax, p.y / ay) < 0.93)
    )
    return np.asarray(vault * (1 - roof) + 2.5 * roof, np.float32)  # orbital roofs are thin


def _bone(a: Anatomy, fraction: FloatArray) -> FloatArray:
    """HU across the skull: dense outer (0) and inner (1) tables, spongy diploe between."""
    middle = np.clip(1.35 - 3.2 * np.abs(fraction - 0.5), 0, 1)
    return np.asarray(a.density["cortex"] + middle * (a.density["diploe"] - a.density["cortex"]))


# Lateral ventricle, one side: capsules (start, end, radius at either), mm.
LATERAL = (
    ((15, -42, 2), (7, -20, 7), 4.4, 5.2),  # frontal horn
    ((14, -40, 8), (8, -19, 10), 3.6, 4.6),  # its roof
    ((8, -20, 9), (8, -4, 16), 5.0, 5.4),  # body
    ((8, -4, 16), (14, 18, 18), 5.4, 6.0),
    ((14, 18, 18), (25, 34, 8), 6.0, 7.2),  # atrium
    ((25, 34, 8), (26, 57, 2), 7.0, 2.8),  # occipital horn
    ((25, 34, 6), (35, 16, -14), 5.6, 2.4),  # temporal horn
    ((35, 16, -14), (31, -4, -25), 2.4, 2.6),
)


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
    out["third"][near] = ellipsoid(q, (0, -3, -4), (width, 14, 11))
    fourth = np.minimum(
        ellipsoid(q, (0, 35, -37), (8 * a.ventricle + 2, 6, 11)), 0.9 * (q.y - 30) + 1
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
    inner = ellipsoid(p, (0, -9, -19), (12 + 4 * swell, 10 + 2 * swell, 8)) + star
    ring = 0.7 + 1.3 * swell + 0.5 * rough - np.abs(ellipsoid(p, (0, 8, -12), (18, 15, 13)))
    ring = np.where((p.y > 3 - 0.2 * side) & (p.z < 0), ring, -9)  # ambient
    inner = np.maximum(inner, ring)
    inner = np.maximum(inner, ellipsoid(p, (0, 25, -3), (10 + 4 * swell, 3 + 2 * swell, 6)))
    inner = np.maximum(inner, ellipsoid(p, (0, 72, -54), (10, 7, 13)))  # cisterna magna
    inner = np.maximum(inner, ellipsoid(p, (0, 5, -38), (15, 4, 18)) - 0.5)  # prepontine
    inner = np.maximum(inner, ellipsoid(p, (0, 26, -62), (14, 13, 16)))  # about the medulla
    width = (0.6 + 1.9 * swell) * (1 + 0.45 * rough)
    stem = width - np.abs(p.y + 17 - 0.3 * (side - 40) + bend - 0.25 * p.z)
    stem = np.minimum(stem, np.minimum(side - 38, 16 - np.abs(p.z + 2)))
    insula = width - 0.15 * np.abs(p.y) / 10 - np.abs(side - 38.5 - bend + 0.004 * (p.y + 2) ** 2)
    insula = np.minimum(insula, np.minimum(18 - np.abs(p.y + 1), 15 - np.abs(p.z - 3)))
    cleft = 0.5 + 1.4 * swell - side - 0.3 * np.clip(p.z - 20, 0, 20) / 20
    callosal = np.maximum(
        ellipsoid(p, (0, 2, 0), (20, 33, 32)), ellipsoid(p, (0, -4, 14), (20, 43, 13))
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
    ((15, -26, 6), (5, 9, 10), 1.0),  # head of the caudate
    ((26, -5, 3), (7.5, 16, 11), 0.85),  # putamen and pallidum
    ((11, 6, 5), (8.5, 14, 9), 0.9),  # thalamus
    ((0, 9, -14), (15, 13, 11), 0.35),  # midbrain
    ((0, 18, -38), (15, 12, 16), 0.3),  # pons
    ((0, 26, -64), (8, 7, 16), 0.35),  # medulla
)


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


def extra_axial(p: Points, rough: FloatArray, b: Bleed) -> FloatArray:
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


def brain_hu(
    a: Anatomy, p: Points, wall: FloatArray, rough: FloatArray, bleeds: Sequence[Bleed]
) -> Brain:
    """The content of the cavity at `p`; `wall` is the distance (mm) to the nearest bone."""
    at = _displace(p, bleeds)
    _, q = vault_distances(a, at)
    depth = wall  # the surface stays at the bone, but for what a bleed holds off
    swell = np.zeros_like(wall)
    for b in bleeds:
        if b.pattern in ("lens", "crescent"):
            held = np.clip(extra_axial(p, rough, b), 0, None)
            depth = np.minimum(depth, vault_distances(a, p)[0] - held)
        if b.subtype == "subarachnoid":
            swell += b.thickness * soft_edge(subarachnoid_reach(at, rough, b), 0.3)
    tent = _tentorium(at)
    below = (tent < 0) & (at.y > 2)
    q = np.maximum(q, 0.75)  # deeper, rays converge
    near = np.power(q, -0.82) * np.where(below, 2.1, 1.0)  # same place on the surface, any depth
    sulcus = np.abs(sample_grid(a.sulci, at.x * near, at.y * near, at.z * near)) * np.where(
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
    space = np.maximum(soft_edge(surface, 1.2), 0)
    ventricle = soft_edge(np.maximum(np.maximum(vents["lateral"], vents["third"]), vents["fourth"]))
    space = space * (1 - ventricle)
    grey = _grey(a, at, -surface, below)
    hu = a.density["white"] + grey * (a.density["grey"] - a.density["white"])
    hu = np.asarray(hu + 0.8 * rough - _petrous_shadow(at), np.float32)
    paint(hu, np.maximum(space, ventricle), a.density["csf"])
    _membranes(a, at, hu, wall, tent)
    _calcify(a, at, hu)
    return Brain(a, hu, ventricle, vents, space, depth, tent, at)


def _petrous_shadow(p: Points) -> FloatArray:
    """HU lost between the petrous bones to beam hardening (Hounsfield's bar)."""
    return np.asarray(6 * np.exp(-(((p.y - 14) / 7) ** 2) - ((p.z + 38) / 9) ** 2), np.float32)


def _grey(a: Anatomy, p: Points, from_csf: FloatArray, below: BoolArray) -> FloatArray:
    """Fraction 0..1 of grey matter; `from_csf` is the distance (mm) to the nearest sulcus."""
    grey = soft_edge(np.float32(3.2) - from_csf, 1.5)
    grey = np.where(below, np.float32(0.75), grey).astype(np.float32)
    half = Points(np.abs(p.x), p.y, p.z, p.down)
    for center, radii, fraction in NUCLEI:
        if p.z.size and np.abs(p.z - center[2]).min() < radii[2]:
            paint(grey, soft_edge(ellipsoid(half, center, radii), 2.0), fraction)
    return grey


def _membranes(a: Anatomy, p: Points, hu: FloatArray, wall: FloatArray, tent: FloatArray) -> None:
    """Paint falx, tentorium and venous sinuses (all a little denser than brain), in place."""
    side = np.abs(p.x)
    reach = np.where(p.z > 26, 60.0, np.where(p.y > 0, 34.0, 20.0))
    falx = np.minimum(0.8 - side, reach - wall)
    falx = np.where((p.z > -8) & (tent > 0), falx, -9)
    sheet = np.where(p.y > 18, 0.7 - np.abs(tent), -9)
    sheet = np.minimum(sheet, p.z + 34)
    paint(hu, soft_edge(np.maximum(falx, sheet).astype(np.float32), 1.5), a.density["falx"])
    sagittal = np.where(p.z > -16, 4.0 - side - 0.7 * wall, -9)
    transverse = np.where(p.y > 30, np.minimum(3.5 - np.abs(p.z + 20), 4 - wall), -9)
    paint(
        hu, soft_edge(np.maximum(sagittal, transverse).astype(np.float32), 1.5), a.density["sinus"]
    )


CALCIFIED = {
    "pineal": (0, 18, 1),
    "choroid_left": (24, 35, 9),
    "choroid_right": (-24, 35, 9),
    "pallidum": (19, -4, 2),  # of both sides
    "falx": (0, -45, 40),
}


def _calcify(a: Anatomy, p: Points, hu: FloatArray) -> None:
    """Paint calcifications, in place."""
    for site, (radius, density) in a.calcified.items():
        q = Points(np.abs(p.x), p.y, p.z, p.down) if site == "pallidum" else p
        if p.z.size and np.abs(p.z - CALCIFIED[site][2]).min() < radius + 2:
            radii = (radius, 1.3 * radius, 1.3 * radius)
            paint(hu, soft_edge(ellipsoid(q, CALCIFIED[site], radii), 1.5), density)


def subarachnoid_reach(p: Points, rough: FloatArray, b: Bleed) -> FloatArray:
    """> 0 where subarachnoid blood spreads, patchy; unitless."""
    dx, dy, dz = ((v - c) / r for v, c, r in zip((p.x, p.y, p.z), b.center, b.radii, strict=True))
    return np.asarray(1 - np.sqrt(dx * dx + dy * dy + dz * dz) + 0.17 * rough, np.float32)

"""Where bleeds arise and how large they are, by subtype.

`a` is the patient's Anatomy. Every function of a subtype takes the same arguments, used or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ich.data.phantom.anatomy import Anatomy


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


# The chance of each subtype in a patient who bleeds, in the order in which they are drawn; several
# may come together, as they do in patients.
TRAUMA = {"epidural": 0.80, "subdural": 0.60, "subarachnoid": 0.32, "intraparenchymal": 0.60}
SPONTANEOUS = {
    "intraparenchymal": 0.75,
    "intraventricular": 0.70,
    "subarachnoid": 0.50,
    "subdural": 0.28,
}


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
        radii = rng.uniform(26, 46, 3)
        return [Bleed("subarachnoid", "convexity", center, radii, side, swelling, hu)]
    center = np.array([side * rng.uniform(0, 18), -8.0, -16.0])
    radii = np.array([rng.uniform(42, 66), rng.uniform(36, 60), rng.uniform(24, 42)])
    return [Bleed("subarachnoid", "basal", center, radii, side, swelling, hu)]


def _draw_intraventricular(rng: np.random.Generator, a: Anatomy, side: int, _: bool) -> list[Bleed]:
    """Sediment with a level in the occipital horns, or a cast of a ventricle."""
    pattern = str(rng.choice(["layer", "cast", "both"], p=[0.5, 0.25, 0.25]))
    level = rng.uniform(26, 46)
    hu = rng.uniform(52, 76)
    return [Bleed("intraventricular", pattern, np.zeros(3), np.ones(3), side, level, hu)]


# Center on the left, mm; share of the bleeds after an injury, and of spontaneous ones.
SITES = {
    "frontal": ((22, -56, -6), 0.4, 0),
    "temporal": ((45, -14, -24), 0.35, 0),
    "putamen": ((27, -5, 5), 0, 0.35),
    "thalamus": ((13, 8, 5), 0, 0.2),
    "lobar": ((0, 0, 0), 0.25, 0.33),  # anywhere under the convexity: drawn
    "cerebellum": ((22, 50, -36), 0, 0.12),
}


def _draw_intraparenchymal(
    rng: np.random.Generator, a: Anatomy, side: int, trauma: bool
) -> list[Bleed]:
    """Contusions at the frontal base and temporal pole; else basal ganglia, lobes, cerebellum."""
    odds = [injury if trauma else spontaneous for _, injury, spontaneous in SITES.values()]
    site = str(rng.choice(list(SITES), p=odds))
    center = np.array(SITES[site][0], float) * [side, 1, 1]
    if site == "lobar":
        center = rng.uniform(0.55, 0.7) * _surface_point(
            a, (side, rng.uniform(-1.2, 1.2), rng.uniform(0.1, 1))
        )
    size = rng.uniform(6, 11) if site in ("thalamus", "cerebellum") else rng.uniform(6, 24)
    radii = size * rng.uniform(0.75, 1.25, 3)
    center = center + rng.normal(0, 2.5, 3)
    edema, hu = rng.uniform(3, 7), rng.uniform(54, 78)
    return [Bleed("intraparenchymal", site, center, radii, side, edema, hu)]


_DRAW: dict[str, Callable[[np.random.Generator, Anatomy, int, bool], list[Bleed]]] = {
    "epidural": _draw_epidural,
    "intraparenchymal": _draw_intraparenchymal,
    "intraventricular": _draw_intraventricular,
    "subarachnoid": _draw_subarachnoid,
    "subdural": _draw_subdural,
}

"""Slices of a cohort to look at: which ones, how they look through CT windows, and their HU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ich.base.config import WindowConfig
from ich.data.dicom import HU_MAX, HU_MIN
from ich.data.protocol import Cohort

if TYPE_CHECKING:
    from ich.data.cache import Cache

SAMPLED = 500  # slices in the histogram, at most: a large cache is never read as a whole
CANDIDATES = 64  # slices looked at for one picture of the montage, at most
TISSUE = (0, 80)  # HU: the report's brain window, where brain and blood lie
NEGATIVE = "negative"  # the montage's row without any label


def distinct_images(cohort: Cohort) -> pd.DataFrame:
    """One row per image, in an order that depends on nothing but the ids."""
    rows = cohort.rows[["image_id", *cohort.labels]]
    return rows.drop_duplicates("image_id").sort_values("image_id", ignore_index=True)


def hu_counts(cohort: Cohort, cache: Cache, seed: int) -> tuple[np.ndarray, int]:
    """Pixels at each HU from HU_MIN to HU_MAX, int64 [4096], over a seeded sample of slices.

    Returns:
        The counts, and how many slices of the cohort were sampled, at most SAMPLED.
    """
    ids = cohort.rows["image_id"].unique()
    # Sorted: the sample depends on which slices there are, and not on the order of the rows.
    rows = np.sort(np.fromiter((cache.row[i] for i in ids if i in cache.row), np.int64))
    # A stream of its own: the protocol draws its cohort from [seed] and [seed, 1].
    picked = np.random.default_rng([seed, 2]).permutation(rows)[:SAMPLED].astype(int)
    counts = np.zeros(HU_MAX - HU_MIN + 1, np.int64)
    for row in np.sort(picked):  # in the order of the file, which may be larger than memory
        hu = np.clip(cache.hu[row], HU_MIN, HU_MAX).astype(np.int64)
        counts += np.bincount((hu - HU_MIN).ravel(), minlength=len(counts))
    return counts, len(picked)


def choose_examples(cohort: Cohort, cache: Cache, any_label: str | None) -> list[tuple[str, str]]:
    """(label, image id) of one positive slice per label, and of a negative one; what there is.

    Among the decoded slices with the fewest other labels, that with the most tissue of up to
    CANDIDATES, evenly spread over the ids. A slice is not shown twice if there is another.

    Args:
        cohort: whose images are looked through.
        cache: their slices.
        any_label: the label that others imply; it does not count as another label.
    """
    images = distinct_images(cohort)
    images = images[[i in cache.row for i in images["image_id"]]]
    target = images[list(cohort.labels)].to_numpy(bool)
    ids = images["image_id"].array
    labels = target[:, [k != any_label for k in cohort.labels]].sum(1)
    candidates = {k: np.flatnonzero(target[:, n]) for n, k in enumerate(cohort.labels)}
    candidates[NEGATIVE] = np.flatnonzero(~target.any(1))
    chosen: list[tuple[str, str]] = []
    for name, rows in candidates.items():
        # `initial`, since a label may have no decoded slice at all.
        fewest = rows[labels[rows] == labels[rows].min(initial=len(cohort.labels))]
        used = {i for _, i in chosen}
        fresh = [i for i in ids[fewest] if i not in used] or list(ids[fewest])
        # Neighbours by id often come from one study, so candidates are spread over all ids.
        spread = np.unique(np.linspace(0, len(fresh) - 1, CANDIDATES).round().astype(int))
        # Of no candidates too, linspace has a number: `if fresh`.
        shares = {fresh[k]: _tissue(cache.hu[cache.row[fresh[k]]]) for k in spread if fresh}
        if shares:
            chosen.append((name, max(shares, key=shares.__getitem__)))
    return chosen


def _tissue(hu: np.ndarray) -> float:
    """The share of a slice's pixels that is brain or blood, by HU."""
    return float(((hu >= TISSUE[0]) & (hu <= TISSUE[1])).mean())


def apply_windows(hu: np.ndarray, windows: Sequence[WindowConfig]) -> list[np.ndarray]:
    """int16 HU [S, S] -> float32 in 0..1: one [S, S] per window; of several also an [S, S, 3].

    As `transforms.CTWindows` does for a batch. With two windows blue stays dark.
    """
    low = [w.center - w.width / 2 for w in windows]
    grey = [
        np.clip((hu.astype(np.float32) - b) / w.width, 0, 1).astype(np.float32)
        for b, w in zip(low, windows, strict=True)
    ]
    if len(grey) < 2:
        return grey
    return [*grey, np.dstack([*grey, np.zeros_like(grey[0])][:3])]

"""Manifest -> cohort: which images are trained on, how often, and which ones score.

`report` is what the report did (its section 3.2): every epidural-positive image stands
`epidural_times` times, a stratified subset of these rows is taken, and the subset is split. Copies
of one image and slices of one patient therefore fall on both sides; the cohort carries the share of
validation rows whose image also stands in training, and every table shows it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich.config import ProtocolConfig, UserError
from ich.manifest import LABELS

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Cohort:
    """The rows of a training, and how they came about.

    rows: one per appearance of an image: the manifest's columns, `repeat` (0 for the original) and
        `split` (`train` or `val`). Repeats share one decoded slice.
    steps: counts, in order: images, oversampled, subset, train, val.
    """

    rows: pd.DataFrame
    steps: dict[str, int]

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split, in order."""
        return self.rows[self.rows["split"] == name]

    def summary(self) -> dict[str, Any]:
        """Counts, label rates per split, and the leak: what tables and trackers show."""
        train, val = self.split(TRAIN), self.split(VAL)
        sides = {TRAIN: train, VAL: val}
        rates = {n: rows[list(LABELS)].mean().round(4).to_dict() for n, rows in sides.items()}
        leak = float(val["image_id"].isin(set(train["image_id"])).mean())
        return {**self.steps, "rates": rates, "leak_images": round(leak, 4)}


def apply_protocol(manifest: pd.DataFrame, cfg: ProtocolConfig, subset: float) -> Cohort:
    """The report's protocol, in its order.

    Args:
        manifest: one row per image, with the six label columns.
        cfg: `epidural_times`, `val_fraction` and the seed of both random choices.
        subset: share of the rows that is kept, in (0, 1].

    Raises:
        UserError: too few rows are left to split.
    """
    rows = oversample(manifest, "epidural", cfg.epidural_times)
    steps = {"images": len(manifest), "oversampled": len(rows)}
    if subset < 1:
        rows = rows.iloc[_stratified_pick(rows, subset, cfg.seed)[1]]
    steps["subset"] = len(rows)
    train, val = _stratified_pick(rows, cfg.val_fraction, cfg.seed)
    split = np.full(len(rows), TRAIN, dtype=object)
    split[val] = VAL
    steps |= {TRAIN: len(train), VAL: len(val)}
    return Cohort(rows.assign(split=split).reset_index(drop=True), steps)


def oversample(manifest: pd.DataFrame, label: str, times: int) -> pd.DataFrame:
    """Every image positive for `label` stands `times` times; copies follow at the end."""
    positive = manifest[manifest[label] == 1]
    copies = [positive.assign(repeat=k) for k in range(1, times)]
    return pd.concat([manifest.assign(repeat=0), *copies], ignore_index=True)


def _stratified_pick(
    rows: pd.DataFrame, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of a stratified `fraction` of the rows, both ascending."""
    picked = round(len(rows) * fraction)
    if not 1 <= picked < len(rows):
        raise UserError(
            f"{len(rows)} rows leave {picked} after taking a share of {fraction}; at least one row "
            f"must be on either side. Raise data.subset, or give more labelled slices."
        )
    # Imported here: with scikit-learn it takes a second that a job, whose cohort is made, can save.
    from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

    splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    target = rows[list(LABELS)].to_numpy()
    with warnings.catch_warnings():
        # numpy warns about a 0/0 inside when a label has no positive; the split is still right.
        warnings.simplefilter("ignore", RuntimeWarning)
        rest, pick = next(splitter.split(target, target))
    return np.sort(rest), np.sort(pick)

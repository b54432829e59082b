"""The one path from a data config to slices and targets: cohort, cache, splits.

Data sets differ in where their files and labels come from, and in nothing after the manifest.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ich.base.config import Config, ContextName, EvaluateConfig, UserError
from ich.base.files import DamagedError
from ich.base.memory import return_memory
from ich.base.progress import StageCallback, stage
from ich.base.records import CohortSummary
from ich.data.cache import Cache, build_cache, read_cache
from ich.data.cache_folder import CacheFolder
from ich.data.cohorts import CohortConfig, cohort_files, load_cohort, open_store, read_cohort
from ich.data.order import Sequences, check_order, load_order, order_slices
from ich.data.patients import KEYS
from ich.data.protocol import TEST, TRAIN, VAL, Cohort


@dataclass(frozen=True)
class Split:
    """One side of the cohort.

    image_id: str [N]. row: int64 [N], positions in the cache. target: float32 [N, L].
    patient, study: int64 [N], the same number for the same one throughout the cohort, -1 if
    unknown. around: int64 [N, 3], positions of the slices before, at and after, where the network
    sees these too.
    """

    image_id: np.ndarray
    row: np.ndarray
    target: np.ndarray
    patient: np.ndarray
    study: np.ndarray
    around: np.ndarray | None = None

    @property
    def shown(self) -> np.ndarray:
        """Positions in the cache of what the network sees of each row, int64 [N] or [N, 3]."""
        return self.row if self.around is None else self.around


@dataclass(frozen=True)
class Dataset:
    """What a training reads: HU of all slices, the splits, and how they came about.

    hu: int16 [N, S, S], HU. labels: the L names. test: None where the protocol has no test set.
    sequences: the order of the slices; None with context=slice, which asks for none.
    """

    hu: np.ndarray
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    summary: CohortSummary
    sequences: Sequences | None = None


@dataclass(frozen=True)
class Prepared:
    """A cohort whose slices are decoded; images in quarantine have left it.

    wanted: the cohort before the quarantine. key: the cohort's fingerprint. sequences: as in
    `Dataset`.
    """

    cohort: Cohort
    wanted: Cohort
    cache: Cache
    key: str
    sequences: Sequences | None

    def require_rows(self) -> None:
        """Refuses a cohort that cannot be trained or scored.

        Raises:
            UserError: the quarantine took every slice of a split.
        """
        for name in self.wanted.splits:
            # Without its test set the cohort would be scored on validation (`Cohort.scored`).
            if name not in self.cohort.splits:
                raise UserError(f"no slice is left in the {name} set after the quarantine.")

    def summary(self) -> CohortSummary:
        """The cohort's summary, with its fingerprint and what became of its files."""
        lost, folder = len(self.cache.quarantine), self.cache.folder.name
        return replace(self.cohort.summary(), quarantined=lost, cohort=self.key, cache=folder)


def load_dataset(
    cfg: Config, report: StageCallback | None = None, build: bool = True, key: str = ""
) -> Dataset:
    """Everything up to decoded slices; what is already on disk is not made again.

    Args:
        cfg: a job.
        report: progress.
        build: decode what is missing; without, as in a job of a prepared sweep, no slice is looked
            up in the data set itself.
        key: the fingerprint of the cohort where it is known, as in a job of a prepared sweep: its
            labels and files are then not looked at either.

    Raises:
        UserError: bad labels, missing files, or too many slices that cannot be decoded.
    """
    prepared = prepare(cfg, report, build, key)
    prepared.require_rows()
    cohort, cache = prepared.cohort, prepared.cache
    # Before it is split: the same patient has the same number on every side.
    rows = cohort.rows.assign(**{key: number_keys(cohort.rows[key]) for key in KEYS})
    sides = {n: _split(rows[rows["split"] == n], cohort.labels, cache) for n in cohort.splits}
    if cfg.context.name is ContextName.neighbours:
        assert prepared.sequences is not None
        around = prepared.sequences.neighbours
        sides = {n: replace(side, around=around(side.row)) for n, side in sides.items()}
    summary = replace(prepared.summary(), protocol=cfg.protocol.name.value)
    return Dataset(
        hu=cache.hu,
        labels=cohort.labels,
        train=sides[TRAIN],
        val=sides[VAL],
        test=sides.get(TEST),
        summary=summary,
        sequences=prepared.sequences,
    )


def prepare(
    cfg: CohortConfig, report: StageCallback | None = None, build: bool = True, key: str = ""
) -> Prepared:
    """The cohort and its decoded slices; see `load_dataset`."""
    data = cfg.data
    if build:
        cohort, key = _made_cohort(cfg, report, key)
    else:
        # A job of a prepared sweep makes nothing, and a report may be of somebody else's records.
        cohort, key = read_cohort(cfg, key)
    files = cohort_files(cfg, key)
    store = open_store(data, report) if build else None
    context = None if isinstance(cfg, EvaluateConfig) else cfg.context
    order = None
    # Before slices are decoded: a cohort without an order is refused in seconds.
    if context is not None and not context.is_slice:
        order = load_order(data, files, cohort.rows, store, report)
        check_order(order[order["readable"]], context.name.value)
    # Repeats share one decoded slice.
    images = cohort.rows[["image_id", "path"]].drop_duplicates("image_id")
    if store is not None:
        progress = stage(report, "decoding slices")
        wanted = data.cache_size, data.max_quarantine, data.workers
        cache = build_cache(images, store, files.folder, *wanted, progress)
        files.note_slices(CacheFolder(cache.folder, data.cache_size))
    else:
        cache = read_cache(images, files.slices(data.cache_size), files.folder)
    del images
    return_memory()
    # Split first, quarantined after: a bad file moves no other image to another side.
    usable = cohort.without(set(cache.quarantine["image_id"]))
    sequences = None
    if context is not None and order is not None:
        sequences = order_slices(order, cache.row, context.name.value)
    return Prepared(usable, cohort, cache, key, sequences)


def _made_cohort(cfg: CohortConfig, report: StageCallback | None, key: str) -> tuple[Cohort, str]:
    files = cohort_files(cfg, key)
    if key:
        with suppress(FileNotFoundError, DamagedError):  # which `load_cohort` makes, and names
            return files.read(), key
    return load_cohort(cfg, open_store(cfg.data, report), report)


def number_keys(keys: pd.Series) -> np.ndarray:
    """Keys that name nobody -> numbers that mean nothing outside the cohort, -1 for no key."""
    # In order of appearance, so that they tell nothing of the keys themselves.
    codes, _ = pd.factorize(keys)
    return np.where(keys == "", -1, codes)


def _split(rows: pd.DataFrame, labels: tuple[str, ...], cache: Cache) -> Split:
    return Split(
        image_id=rows["image_id"].to_numpy(dtype=str),
        # Every image has one: those that have none left the cohort with the quarantine.
        row=rows["image_id"].map(cache.row).to_numpy(dtype=np.int64),
        target=rows[list(labels)].to_numpy(dtype=np.float32),
        patient=rows["patient"].to_numpy(dtype=np.int64),
        study=rows["study"].to_numpy(dtype=np.int64),
    )

"""The one path from a data config to slices and targets: labels, manifest, cohort, cache.

`data=phantom` and `data=rsna` differ in where the files come from, and in nothing after it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich.cache import Cache, lock, open_cache
from ich.config import Config, DataConfig, Source, UserError
from ich.manifest import LABELS, build_manifest, read_labels, rsna_labels
from ich.phantom import PhantomSpec, ensure_phantom
from ich.protocol import TRAIN, VAL, Cohort, apply_protocol
from ich.store import SliceStore

# Called with (what is done, done, in all).
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Split:
    """One side of the cohort.

    image_id: str [N]. row: int64 [N], positions in the cache. target: float32 [N, 6].
    """

    image_id: np.ndarray
    row: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """What a training reads: HU of all slices, the two splits, and how they came about."""

    hu: np.ndarray
    train: Split
    val: Split
    summary: dict[str, object]


def load_dataset(cfg: Config, report: Report | None = None) -> Dataset:
    """Everything up to decoded slices; what is already on disk is not made again.

    Raises:
        UserError: bad labels, missing files, or too many slices that cannot be decoded.
    """
    store = open_store(cfg.data, report)
    cohort = load_cohort(cfg, store)
    cache = load_cache(cfg.data, cohort, store, report)
    rows = cohort.rows[cohort.rows["image_id"].isin(cache.row.keys())]
    sides = {name: int((rows["split"] == name).sum()) for name in (TRAIN, VAL)}
    kept = Cohort(rows, {**cohort.steps, **sides})
    summary = {**kept.summary(), "quarantined": len(cache.quarantine), "cache": cache.folder.name}
    train, val = (_split(kept.split(name), cache) for name in (TRAIN, VAL))
    if not len(train.row) or not len(val.row):
        raise UserError("no slice is left in training or validation after the quarantine.")
    return Dataset(cache.hu, train, val, summary)


def open_store(cfg: DataConfig, report: Report | None = None) -> SliceStore:
    """The data set's files; the phantom's are made here on first use."""
    if cfg.root is not None:
        return SliceStore.open(cfg.root)
    if cfg.source is not Source.phantom:
        raise UserError(
            "data.root is not set. Give the unpacked RSNA folder or the Kaggle zip with "
            "data.root=PATH, or use data=phantom, which needs no files."
        )
    p = cfg.phantom
    name = f"phantom-p{p.patients}-s{p.seed}-{p.size}-{p.prevalence:g}"
    step = (lambda done, total: report("simulating patients", done, total)) if report else None
    try:
        spec = PhantomSpec(p.patients, p.seed, p.size, p.prevalence)
        return SliceStore(ensure_phantom(Path(cfg.cache_dir) / name, spec, progress=step))
    except (ValueError, FileExistsError, PermissionError) as error:
        raise UserError(f"the phantom of data.phantom cannot be made: {error}") from None


def load_cohort(cfg: Config, store: SliceStore) -> Cohort:
    """The cohort, kept on disk once made: eight jobs would otherwise each split it again."""
    place = Path(cfg.data.cache_dir) / f"cohort-{_cohort_key(cfg, store)}"
    rows_file, steps_file = place.with_suffix(".csv.gz"), place.with_suffix(".json")
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(place.with_suffix(".lock")):
        if not steps_file.exists():
            cohort = _make_cohort(cfg, store)
            cohort.rows.to_csv(rows_file, index=False)
            part = steps_file.with_suffix(".part")
            part.write_text(json.dumps(cohort.steps))
            part.rename(steps_file)
        rows = pd.read_csv(rows_file, keep_default_na=False)
    return Cohort(rows, json.loads(steps_file.read_text()))


def _make_cohort(cfg: Config, store: SliceStore) -> Cohort:
    source, name = _label_source(cfg.data, store)
    labels, repeated = read_labels(source, name)
    manifest = build_manifest(labels, store)
    cohort = apply_protocol(manifest, cfg.protocol, cfg.data.subset)
    return Cohort(cohort.rows, {"repeated_ids": repeated, **cohort.steps})


def _label_source(cfg: DataConfig, store: SliceStore):  # type: ignore[no-untyped-def]
    if cfg.labels is None:
        path = rsna_labels(store)
        return io.BytesIO(store.read(path)), path
    path = Path(cfg.labels)
    if not path.is_file():
        raise UserError(
            f"data.labels is {cfg.labels!r}, which is no file. Give the label CSV, or "
            f"leave it null to take stage_2_train.csv from data.root."
        )
    return path, path.name


def _cohort_key(cfg: Config, store: SliceStore) -> str:
    source, name = _label_source(cfg.data, store)
    if isinstance(source, Path):
        stat = source.stat()
        name = f"{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    parts = [store.identity(), name, repr(cfg.protocol), repr(cfg.data.subset)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def load_cache(
    cfg: DataConfig, cohort: Cohort, store: SliceStore, report: Report | None = None
) -> Cache:
    """The decoded slices of the cohort's images."""
    images = cohort.rows[["image_id", "path"]].drop_duplicates("image_id")
    step = (lambda done, total: report("decoding slices", done, total)) if report else None
    return open_cache(
        images, store, Path(cfg.cache_dir), cfg.cache_size, cfg.max_quarantine, cfg.workers, step
    )


def _split(rows: pd.DataFrame, cache: Cache) -> Split:
    return Split(
        image_id=rows["image_id"].to_numpy(dtype=str),
        row=rows["image_id"].map(cache.row).to_numpy(dtype=np.int64),
        target=rows[list(LABELS)].to_numpy(dtype=np.float32),
    )

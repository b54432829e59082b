"""The one path from a data config to slices and targets: labels, manifest, cohort, cache.

Data sets differ in where their files and labels come from, and in nothing after the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from ich.base.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    PrepareConfig,
    ProtocolName,
    Source,
    UserError,
)
from ich.base.files import lock
from ich.base.records import CohortSummary
from ich.base.workers import return_memory
from ich.data.cache import Cache, build_cache, cache_folder, read_cache, rows_in
from ich.data.manifest import BLOCK, Labels, build_manifest, label_source, read_labels
from ich.data.patients import KEYS, Pseudonyms, read_metadata, scan_headers
from ich.data.phantom.files import ensure_phantom
from ich.data.phantom.rendering import count_slices
from ich.data.phantom.spec import PhantomSpec
from ich.data.protocol import SPLITS, TEST, TRAIN, VAL, Cohort, apply_protocol
from ich.data.store import SliceStore

# Called with (what is done, done, in all).
Report = Callable[[str, int, int], None]
AnyConfig = Config | PrepareConfig | EvaluateConfig


@dataclass(frozen=True)
class Split:
    """One side of the cohort.

    image_id: str [N]. row: int64 [N], positions in the cache. target: float32 [N, L].
    patient, study: int64 [N], the same number for the same one throughout the cohort, -1 if
    unknown.
    """

    image_id: np.ndarray
    row: np.ndarray
    target: np.ndarray
    patient: np.ndarray
    study: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """What a training reads: HU of all slices, the splits, and how they came about.

    hu: int16 [N, S, S], HU. labels: the L names. test: None where the protocol has no test set.
    """

    hu: np.ndarray
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    summary: CohortSummary


@dataclass(frozen=True)
class Prepared:
    """A cohort whose slices are decoded; images in quarantine have left it.

    wanted: the cohort before the quarantine. key: the cohort's fingerprint.
    """

    cohort: Cohort
    wanted: Cohort
    cache: Cache
    key: str

    def require_rows(self) -> None:
        """Refuses a cohort that cannot be trained or scored.

        Raises:
            UserError: the quarantine took every slice of a split.
        """
        for name in self.wanted.splits:
            if name not in self.cohort.splits:
                raise UserError(f"no slice is left in the {name} set after the quarantine.")

    def summary(self) -> CohortSummary:
        """The cohort's summary, with its fingerprint and what became of its files."""
        lost, folder = len(self.cache.quarantine), self.cache.folder.name
        return replace(self.cohort.summary(), quarantined=lost, cohort=self.key, cache=folder)


def load_dataset(cfg: Config, report: Report | None = None, build: bool = True) -> Dataset:
    """Everything up to decoded slices; what is already on disk is not made again.

    Args:
        cfg: a job.
        report: progress.
        build: decode what is missing; without, as in a job of a prepared sweep, nothing is looked
            up in the data set itself.

    Raises:
        UserError: bad labels, missing files, or too many slices that cannot be decoded.
    """
    done = prepare(cfg, report, build)
    done.require_rows()
    cohort, cache = done.cohort, done.cache
    rows = cohort.rows.assign(**{key: numbers(cohort.rows[key]) for key in KEYS})
    sides = {n: _split(rows[rows["split"] == n], cohort.labels, cache) for n in cohort.splits}
    summary = replace(done.summary(), protocol=cfg.protocol.name.value)
    return Dataset(cache.hu, cohort.labels, sides[TRAIN], sides[VAL], sides.get(TEST), summary)


def prepare(cfg: AnyConfig, report: Report | None = None, build: bool = True) -> Prepared:
    """The cohort and its decoded slices; see `load_dataset`."""
    store = open_store(cfg.data, report if build else None)
    assert store is not None
    cohort, key = load_cohort(cfg, store, report)
    images = cohort.rows[["image_id", "path"]].drop_duplicates("image_id")
    data, folder = cfg.data, Path(cfg.data.cache_dir)
    if build:
        cache = build_cache(
            images,
            store,
            folder,
            data.cache_size,
            data.max_quarantine,
            data.workers,
            _step(report, "decoding slices"),
        )
    else:
        cache = read_cache(images, store, folder, data.cache_size)
    del images
    return_memory()
    return Prepared(cohort.without(set(cache.quarantine["image_id"])), cohort, cache, key)


def _step(report: Report | None, what: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: report(what, done, total)) if report else None


def open_store(
    cfg: DataConfig, report: Report | None = None, required: bool = True
) -> SliceStore | None:
    """The data set's files; the phantom's are made here on first use.

    Args:
        cfg: where they are.
        report: progress of making the phantom.
        required: refuse to go on without files; otherwise None is returned.

    Raises:
        UserError: there are none where there should be, or the phantom cannot be made.
    """
    if cfg.root is not None:
        return SliceStore.open(cfg.root)
    if cfg.source is not Source.phantom:
        if not required:
            return None
        raise UserError(
            "data.root is not set. Give the folder or the zip that holds the slices with "
            "data.root=PATH, or use data=phantom, which needs no files."
        )
    step = _step(report, "simulating patients")
    try:
        made = ensure_phantom(phantom_folder(cfg), _phantom_spec(cfg), progress=step)
        return SliceStore(made)
    except (FileExistsError, PermissionError) as error:
        raise UserError(f"the phantom of data.phantom cannot be made: {error}") from None


def load_cohort(
    cfg: AnyConfig, store: SliceStore | None, report: Report | None = None
) -> tuple[Cohort, str]:
    """The cohort and its fingerprint, kept on disk once made: eight jobs would each split again.

    Raises:
        UserError: see `ich.data.manifest`, `ich.data.patients` and `ich.data.protocol`.
    """
    key = _cohort_key(cfg, store)
    place = Path(cfg.data.cache_dir) / f"cohort-{key}"
    rows_file, facts_file = place.with_suffix(".csv.gz"), place.with_suffix(".json")
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(place.with_suffix(".lock")):
        if not facts_file.exists():
            cohort = make_cohort(cfg, store, report)
            cohort.rows.to_csv(rows_file, index=False, compression={"method": "gzip", "mtime": 1})
            facts = {k: v for k, v in asdict(replace(cohort, rows=None)).items() if k != "rows"}  # type: ignore[arg-type]
            part = facts_file.with_suffix(".part")
            part.write_text(json.dumps(facts))
            part.rename(facts_file)
            del cohort
            return_memory()
        text = dict.fromkeys(["image_id", "path", *KEYS, "split"], str)
        with pd.read_csv(rows_file, keep_default_na=False, dtype=text, chunksize=BLOCK) as blocks:
            rows = pd.concat(blocks, ignore_index=True)
        facts = json.loads(facts_file.read_text())
    return_memory()
    return Cohort(rows, tuple(facts.pop("labels")), **facts), key


@dataclass(frozen=True)
class Sizes:
    """How much a cohort holds: rows of each split, distinct images, bytes still to be written.

    is_exact: False where the cohort cannot be known before headers are read or a phantom is made.
    """

    rows: dict[str, int]
    images: int
    new_bytes: int
    is_exact: bool


def cohort_sizes(cfg: AnyConfig) -> Sizes:
    """The sizes of the config's cohort, which need not have been made. Reads labels, but neither
    header nor slice, and writes nothing.

    Raises:
        UserError: the data set is not there, or its labels or the protocol are wrong.
    """
    data, store = cfg.data, _store_as_it_is(cfg.data)
    if store is None:
        return _guess(cfg, count_slices(_phantom_spec(data)))
    place = Path(data.cache_dir) / f"cohort-{_cohort_key(cfg, store)}.csv.gz"
    if place.with_name(place.name.replace(".csv.gz", ".json")).exists():
        rows = pd.read_csv(place, usecols=["image_id", "split"], dtype=str, keep_default_na=False)
    else:
        with TemporaryDirectory() as scratch:  # for the secret of pseudonyms, which nobody needs
            elsewhere = replace(cfg, data=replace(data, cache_dir=scratch))
            manifest, names, _ = _labelled(elsewhere, store)
            manifest = _with_keys(elsewhere.data, manifest, None, None)
        known = (manifest["patient"] != "").any()
        if cfg.protocol.name is ProtocolName.sound and not known:
            return _guess(cfg, len(manifest), store)
        rows = apply_protocol(manifest, names, cfg.protocol, data.subset).rows
    images = rows["image_id"].nunique()
    counts = {name: int((rows["split"] == name).sum()) for name in SPLITS}
    return Sizes(counts, images, _missing_bytes(cfg, images, store), True)


def _guess(cfg: AnyConfig, images: int, store: SliceStore | None = None) -> Sizes:
    """Sizes by the protocol's fractions, without oversampling and undersampling."""
    p, images = cfg.protocol, round(images * cfg.data.subset)
    val, test = round(images * p.val_fraction), round(images * p.test_fraction)
    if p.folds:
        val = test = round(images / p.folds)
    counts = {TRAIN: images - val - test, VAL: val, TEST: test}
    return Sizes(counts, images, _missing_bytes(cfg, images, store), False)


def _missing_bytes(cfg: AnyConfig, images: int, store: SliceStore | None) -> int:
    size, folder = cfg.data.cache_size, Path(cfg.data.cache_dir)
    there = rows_in(cache_folder(store, folder, size), size) if store else 0
    phantom = 0 if store else count_slices(_phantom_spec(cfg.data)) * cfg.data.phantom.size**2
    return 2 * (max(0, images - there) * size * size + phantom)  # int16


def _labelled(
    cfg: AnyConfig, store: SliceStore | None
) -> tuple[pd.DataFrame, tuple[str, ...], int]:
    """The manifest without keys, the names of the labels, and how many ids were repeated."""
    labels = load_labels(cfg.data, store)
    return_memory()
    manifest = build_manifest(labels, store, cfg.data.source)
    return manifest, labels.names, labels.repeated


def labelled_images(
    cfg: AnyConfig, store: SliceStore, report: Report | None = None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Every labelled image once, without protocol: `image_id`, `path`, the labels, and the keys
    `patient` and `study`; and the labels' names. With data.subset below 1, a random part of it."""
    manifest, names, _ = _labelled(cfg, store)
    if cfg.data.subset < 1:
        manifest = manifest.sample(frac=cfg.data.subset, random_state=cfg.protocol.seed)
    manifest = manifest.sort_index().reset_index(drop=True)
    return _with_keys(cfg.data, manifest, store, report), names


def cohort_rows(folder: Path, key: str, here: Path) -> pd.DataFrame | None:
    """The rows of a cohort that was made before: `image_id`, `split`, and the keys `patient` and
    `study`, empty where they were made with another secret than the one here and tell nothing.

    Args:
        folder: the cache folder that it was made in.
        key: its fingerprint.
        here: the cache folder of now.

    Returns:
        None if its file is not on this machine.
    """
    place = folder / f"cohort-{key}.csv.gz"
    if not place.is_file():
        return None
    wanted = ["image_id", *KEYS, "split"]
    rows = pd.read_csv(place, usecols=wanted, dtype=str, keep_default_na=False)
    if Pseudonyms.known(folder) != Pseudonyms.known(here):
        rows[KEYS] = ""
    return rows


def make_cohort(cfg: AnyConfig, store: SliceStore | None, report: Report | None = None) -> Cohort:
    """Labels, manifest and protocol; patients come from metadata, the labels, or headers."""
    manifest, names, repeated = _labelled(cfg, store)
    return_memory()
    sound = cfg.protocol.name is ProtocolName.sound
    manifest = _with_keys(cfg.data, manifest, store if sound else None, report)
    cohort = apply_protocol(manifest, names, cfg.protocol, cfg.data.subset)
    del manifest
    return_memory()
    rows = cohort.rows
    if not sound and (rows["patient"] == "").all():
        # Only the audit needs them: headers of the cohort's files, not of the whole data set.
        rows = _with_keys(cfg.data, rows, store, report)
    return replace(cohort, rows=rows, steps={"repeated_ids": repeated, **cohort.steps})


def load_labels(cfg: DataConfig, store: SliceStore | None) -> Labels:
    """The label CSV that the config names, or the one in the store."""
    path, name = label_source(cfg, store)
    source: Path | io.BytesIO
    if path is None:
        assert store is not None
        source = io.BytesIO(store.read(name))
    else:
        source = path
    return read_labels(source, name, cfg.label_columns, cfg.any_label)


def _with_keys(
    cfg: DataConfig, rows: pd.DataFrame, store: SliceStore | None, report: Report | None
) -> pd.DataFrame:
    """Adds the keys `patient` and `study`, empty where nothing tells them."""
    pseudonyms = Pseudonyms.beside(Path(cfg.cache_dir))
    own = [c if c in rows else None for c in ("patient_id", "study_id")]
    rows = rows.drop(columns=KEYS, errors="ignore")
    if cfg.metadata is not None:
        keys = read_metadata(Path(cfg.metadata), pseudonyms).reindex(rows["image_id"]).fillna("")
    elif own[0] is not None:
        keys = pseudonyms.keys(rows, own)
    elif store is not None:
        step = _step(report, "reading headers")
        paths, folder = rows["path"].tolist(), Path(cfg.cache_dir)
        keys = scan_headers(paths, store, folder, pseudonyms, cfg.workers, step)
        # A file that cannot be read is its own patient: it is quarantined when it is decoded.
        nobody = ~keys.pop("readable").to_numpy()
        del paths
        return_memory()
        keys.loc[nobody, "patient"] = "unreadable:" + rows["image_id"].to_numpy()[nobody]
    else:
        keys = pd.DataFrame("", index=rows.index, columns=KEYS)
    rows = rows.drop(columns=[c for c in own if c])
    return rows.assign(**{k: keys[k].to_numpy() for k in KEYS})


def cohort_key(cfg: AnyConfig) -> str:
    """The fingerprint of the config's cohort, which need not have been made; writes nothing.

    Raises:
        UserError: the data set is not there.
    """
    store = _store_as_it_is(cfg.data)
    return "not made yet" if store is None else _cohort_key(cfg, store)


def is_prepared(cfg: AnyConfig) -> bool:
    """Whether the config's cohort has been made and is still that of the data set; makes nothing.

    Raises:
        UserError: the data set is not there.
    """
    return (Path(cfg.data.cache_dir) / f"cohort-{cohort_key(cfg)}.json").exists()


def _store_as_it_is(cfg: DataConfig) -> SliceStore | None:
    """The data set's files, and None for a phantom that has not been made; it is not made here."""
    if cfg.root is None and cfg.source is Source.phantom:
        root = phantom_folder(cfg)
        return SliceStore(root) if root.is_dir() else None
    return open_store(cfg)


def _phantom_spec(cfg: DataConfig) -> PhantomSpec:
    p = cfg.phantom
    try:
        return PhantomSpec(p.patients, p.seed, p.size, p.prevalence)
    except ValueError as error:
        raise UserError(f"the phantom of data.phantom cannot be made: {error}") from None


def phantom_folder(cfg: DataConfig) -> Path:
    """Where the phantom of these settings is, or will be."""
    p = cfg.phantom
    return Path(cfg.cache_dir) / f"phantom-p{p.patients}-s{p.seed}-{p.size}-{p.prevalence:g}"


def _cohort_key(cfg: AnyConfig, store: SliceStore | None) -> str:
    """Fingerprint of what the cohort depends on: files, labels, metadata, protocol, subset."""
    data = cfg.data
    parts = [store.identity() if store else "", data.source.value, repr(cfg.protocol)]
    parts += [repr((data.label_columns, data.any_label, data.subset))]
    for named in (data.labels, data.metadata):
        if named is not None and (path := Path(named)).is_file():
            stat = path.stat()
            parts.append(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")
        else:
            parts.append(repr(named))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def numbers(keys: pd.Series) -> np.ndarray:
    """Keys that name nobody -> numbers that mean nothing outside the cohort, -1 for no key."""
    codes, _ = pd.factorize(keys)
    return np.where(keys == "", -1, codes)


def _split(rows: pd.DataFrame, labels: tuple[str, ...], cache: Cache) -> Split:
    return Split(
        image_id=rows["image_id"].to_numpy(dtype=str),
        row=rows["image_id"].map(cache.row).to_numpy(dtype=np.int64),
        target=rows[list(labels)].to_numpy(dtype=np.float32),
        patient=rows["patient"].to_numpy(dtype=np.int64),
        study=rows["study"].to_numpy(dtype=np.int64),
    )

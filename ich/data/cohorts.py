"""From a data config to its cohort: files, labels, manifest, protocol; made once and kept on disk.

`find_store` and `open_store` give its files, `load_cohort` gives the cohort; `cohort_sizes` and
`cohort_keys` tell of one that need not have been made. Nothing here decodes a slice. What a cohort
depends on makes its fingerprint, by which every job of a sweep, and every later command, finds it
again: what its labels and files are (`ich.data.content`), and the protocol; not where they lie, nor
since when.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, get_type_hints

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
from ich.base.files import (
    DamagedError,
    lock,
    read_bytes,
    read_json,
    replacing,
    tell_damaged,
    write_text,
)
from ich.base.memory import return_memory
from ich.base.naming import why_unusable
from ich.base.progress import StageCallback, stage
from ich.base.provenance import code_version
from ich.base.records import typed_value
from ich.data.cache_folder import CacheFolder, make_cache_folder
from ich.data.content import DataIdentity, LabelledFiles, digest_of_file, digest_of_listing
from ich.data.manifest import Labels, build_manifest, label_source, read_labels
from ich.data.patients import KEYS, Pseudonyms, keys_of_images, read_metadata, scan_headers
from ich.data.phantom.spec import GENERATOR_VERSION, PhantomSpec
from ich.data.protocol import SPLITS, TEST, TRAIN, VAL, Cohort, apply_protocol
from ich.data.store import SliceStore
from ich.data.tables.reading import BLOCK

CohortConfig = Config | PrepareConfig | EvaluateConfig  # whatever has data and a protocol


def open_store(cfg: DataConfig, report: StageCallback | None = None) -> SliceStore:
    """The data set's files; the phantom's are made here on first use.

    Args:
        cfg: where they are.
        report: progress of making the phantom.

    Raises:
        UserError: there are none where there should be, or the phantom cannot be made.
    """
    store = find_store(cfg, report)
    if store is None:
        raise UserError(
            "data.root is not set. Give the folder or the zip that holds the slices with "
            "data.root=PATH, or use data=phantom, which needs no files."
        )
    return store


def find_store(cfg: DataConfig, report: StageCallback | None = None) -> SliceStore | None:
    """As `open_store`, and None where `data.root` is not set: labels can be had without a slice."""
    if cfg.root is not None:
        return SliceStore.open(cfg.root)
    if cfg.source is not Source.phantom:
        return None
    # Imported here: a tenth of a second that whoever reads a cache need not wait for.
    from ich.data.phantom.files import write_phantom

    make_cache_folder(Path(cfg.cache_dir))
    folder, progress = phantom_folder(cfg), stage(report, "simulating patients")
    try:
        return SliceStore(write_phantom(folder, _phantom_spec(cfg), progress=progress))
    # A full disk, a folder that cannot be written, or that holds something else, which stays.
    except OSError as error:
        raise UserError(f"the phantom of data.phantom cannot be made: {error}") from None


@dataclass(frozen=True)
class CohortFiles:
    """Where a cache folder keeps the cohort of a fingerprint: its rows, and what else is known of
    it, which is written last: a cohort without it has not been made."""

    folder: Path
    key: str

    @property
    def rows(self) -> Path:
        return self.folder / f"cohort-{self.key}.csv.gz"

    @property
    def facts(self) -> Path:
        return self.folder / f"cohort-{self.key}.json"

    @property
    def order(self) -> Path:
        """Of its slices, where somebody has asked for it (`ich.data.order`)."""
        return self.folder / f"cohort-{self.key}-order.csv.gz"

    @property
    def header_facts(self) -> Path:
        """Of its slices, where a report asks for them (`ich.data.subgroups.reading`)."""
        return self.folder / f"cohort-{self.key}-headers.csv.gz"

    @property
    def lock(self) -> Path:
        return self.folder / f"cohort-{self.key}.lock"

    def write(self, cohort: Cohort, data: DataIdentity) -> None:
        # Without a time in the archive, the same cohort is the same file.
        with replacing(self.rows) as part:
            cohort.rows.to_csv(part, index=False, compression={"method": "gzip", "mtime": 1})
        names = [f.name for f in fields(cohort) if f.name != "rows"]
        facts = {name: getattr(cohort, name) for name in names}
        write_text(self.facts, json.dumps(facts | {"data": asdict(data)}))

    def read(self) -> Cohort:
        """
        Raises:
            FileNotFoundError: it has not been made.
            DamagedError: one of its files was cut or edited.
        """
        facts = read_json(self.facts)
        # As text: an id of digits alone, or a patient's, would lose its zeros as a number.
        text = dict.fromkeys(["image_id", "path", *KEYS, "split"], str)
        with self._reading():
            blocks = pd.read_csv(
                self.rows, keep_default_na=False, dtype=text, chunksize=BLOCK, compression="gzip"
            )
            with blocks:
                rows = pd.concat(blocks, ignore_index=True)
            facts.pop("data", None)
            hints = get_type_hints(Cohort)
            known = {k: typed_value(v, hints[k]) for k, v in facts.items()}
            cohort = Cohort(rows, **known)
            if reason := why_unusable(cohort.labels):  # as an earlier version took them
                raise ValueError(f"it has {reason}")
            if not all(rows[k].isin((0, 1)).all() for k in cohort.labels):
                raise ValueError("a label is not 0 or 1")
            counts = rows["split"].value_counts().to_dict()
            if counts != {name: cohort.steps[name] for name in cohort.splits}:
                raise ValueError("it has other rows than were counted")
        return cohort

    def data(self) -> DataIdentity | None:
        """What its data set was; None if nothing tells."""
        try:
            values, hints = read_json(self.facts)["data"], get_type_hints(DataIdentity)
            return DataIdentity(**{k: typed_value(values[k], h) for k, h in hints.items()})
        except (FileNotFoundError, DamagedError, KeyError, TypeError, ValueError):
            return None

    def note_slices(self, slices: CacheFolder) -> None:
        """Notes where its slices are, decoded to one size: a job looks up no file to find them."""
        write_text(self._slices(slices.size), slices.path.name)

    def slices(self, size: int) -> CacheFolder | None:
        """Where its slices are; None if they have not been decoded."""
        try:
            name = read_bytes(self._slices(size)).decode()
            return CacheFolder(self.folder / Path(name).name, size)
        except (FileNotFoundError, DamagedError, ValueError):
            return None

    def _slices(self, size: int) -> Path:
        return self.folder / f"cohort-{self.key}-hu{size}.txt"

    def read_columns(self, *columns: str) -> pd.DataFrame:
        """Some columns of the rows, as text.

        Raises:
            FileNotFoundError, DamagedError: as `read`.
        """
        with self._reading():
            return pd.read_csv(
                self.rows,
                usecols=list(columns),
                dtype=str,
                keep_default_na=False,
                compression="gzip",
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Says of whatever damaged files make of pandas and gzip that they are damaged."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(
                f"the cohort in {self.rows} and {self.facts.name} is damaged ({reason})"
            ) from None


def load_cohort(
    cfg: CohortConfig, store: SliceStore | None, report: StageCallback | None = None
) -> tuple[Cohort, str]:
    """The cohort and its fingerprint, kept on disk once made: eight jobs would each split again.

    Raises:
        UserError: see `ich.data.manifest`, `ich.data.patients` and `ich.data.protocol`.
    """
    data, looked, *labelled = _identify(cfg.data, store)
    files = cohort_files(cfg, _fingerprint(cfg, data))
    make_cache_folder(files.folder)
    with lock(files.lock):
        if looked is not None:
            looked.write()
        try:
            cohort = files.read()
        except (FileNotFoundError, DamagedError) as error:
            if isinstance(error, DamagedError):
                tell_damaged(f"{error}, and is made again")
            # Taken out of the list: what has been read of it makes room for the cohort.
            cohort = make_cohort(cfg, store, labelled.pop() or _labelled(cfg.data, store), report)
            files.write(cohort, data)
            del cohort
            return_memory()
            # From the file also where it has just been made: all jobs see the same.
            cohort = files.read()
        del labelled
    return_memory()
    return cohort, files.key


def cohort_files(cfg: CohortConfig, key: str) -> CohortFiles:
    """Where the cohort of a fingerprint is kept, or will be."""
    return CohortFiles(Path(cfg.data.cache_dir), key)


def read_cohort(cfg: CohortConfig, key: str = "") -> tuple[Cohort, str]:
    """A cohort that has been made, and its fingerprint; writes nothing, not even a lock.

    Args:
        cfg: what it is of.
        key: its fingerprint where it is known: labels and files are then not looked at.

    Raises:
        UserError: it has not been made, or is damaged.
    """
    files = cohort_files(cfg, key or cohort_keys({"": cfg})[""])
    try:
        return files.read(), files.key
    except (FileNotFoundError, DamagedError) as error:
        raise UserError(
            f"the cohort of these settings is not made yet under {files.folder} ({error}). Run "
            f"`ich prepare` with the same data settings first."
        ) from None


@dataclass(frozen=True)
class Sizes:
    """How much a cohort holds: rows of each split, distinct images, bytes still to be written.

    is_exact: False where the cohort cannot be known before headers are read or a phantom is made.
    """

    rows: dict[str, int]
    images: int
    new_bytes: int
    is_exact: bool


def cohort_sizes(cfg: CohortConfig) -> Sizes:
    """The sizes of the config's cohort, which need not have been made. Reads labels, but neither
    header nor slice, and writes nothing.

    Raises:
        UserError: the data set is not there, or its labels or the protocol are wrong.
    """
    data, store = cfg.data, _existing_store(cfg.data)
    if store is None:
        return _guess(cfg, _phantom_slices(data))
    identity, _, labelled = _identify(data, store)
    files = cohort_files(cfg, _fingerprint(cfg, identity))
    try:
        rows = files.read_columns("image_id", "path", "split")
        decoded = _count_decoded(data, store, rows)
    except (FileNotFoundError, DamagedError):
        manifest, names, _ = labelled or _labelled(data, store)
        decoded = _count_decoded(data, store, manifest)
        with TemporaryDirectory() as scratch:  # for the secret of pseudonyms, which nobody needs
            elsewhere = replace(data, cache_dir=scratch)
            manifest = _with_keys(elsewhere, manifest, None, None)
        has_patients = (manifest["patient"] != "").any()
        # Who is whose patient then stands in headers only, which are not read here.
        if cfg.protocol.name is ProtocolName.sound and not has_patients:
            return _guess(cfg, len(manifest), decoded)
        rows = apply_protocol(
            manifest, names, cfg.protocol, data.subset, keeps_patients_whole(cfg)
        ).rows
    images = rows["image_id"].nunique()
    counts = {name: int((rows["split"] == name).sum()) for name in SPLITS}
    return Sizes(counts, images, _missing_bytes(cfg, images, decoded), True)


def _count_decoded(cfg: DataConfig, store: SliceStore, rows: pd.DataFrame) -> int:
    """How many slices there are of a data set, of which these rows are some: an estimate."""
    folder, paths = Path(cfg.cache_dir), rows["path"].tolist()
    (slices, _), *_ = CacheFolder.find(store, paths, folder, cfg.cache_size)
    return slices.count_rows()


def _guess(cfg: CohortConfig, images: int, decoded: int | None = None) -> Sizes:
    """Sizes by the protocol's fractions, without oversampling and undersampling."""
    p, images = cfg.protocol, round(images * cfg.data.subset)
    val, test = round(images * p.val_fraction), round(images * p.test_fraction)
    if p.folds:  # one fold is the test set, another validation
        val = test = round(images / p.folds)
    counts = {TRAIN: images - val - test, VAL: val, TEST: test}
    return Sizes(counts, images, _missing_bytes(cfg, images, decoded), False)


def _missing_bytes(cfg: CohortConfig, images: int, decoded: int | None) -> int:
    """decoded: how many slices there are of the data set; None of a phantom not yet made."""
    size, phantom = cfg.data.cache_size, 0
    if decoded is None:
        phantom = _phantom_slices(cfg.data) * cfg.data.phantom.size**2
    return 2 * (max(0, images - (decoded or 0)) * size * size + phantom)  # int16


class Labelled(NamedTuple):
    """The manifest without keys, the names of the labels, and how many ids were repeated."""

    manifest: pd.DataFrame
    names: tuple[str, ...]
    repeated: int


def _labelled(cfg: DataConfig, store: SliceStore | None) -> Labelled:
    labels = load_labels(cfg, store)
    return_memory()
    try:
        manifest = build_manifest(labels, store, cfg.source)
    except UnicodeEncodeError as error:  # a path that no table can hold
        assert store is not None
        name = error.object.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise UserError(
            f"{store.root} holds bytes that are no UTF-8 in the name {name}. Rename it: "
            f"convmv -f latin1 -t utf8 -r --notest FOLDER does so below a folder."
        ) from None
    return Labelled(manifest, labels.names, labels.repeated)


def labelled_images(
    cfg: CohortConfig, store: SliceStore, report: StageCallback | None = None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Every labelled image once, without protocol: `image_id`, `path`, the labels, and the keys
    `patient` and `study`; and the labels' names. With data.subset below 1, a random part of it."""
    manifest, names, _ = _labelled(cfg.data, store)
    if cfg.data.subset < 1:
        manifest = manifest.sample(frac=cfg.data.subset, random_state=cfg.protocol.seed)
    # `sample` shuffles; rows go back into the label file's order.
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
        None if its file is not on this machine, or damaged.
    """
    files = CohortFiles(folder, key)
    try:
        rows = files.read_columns("image_id", *KEYS, "split")
    except FileNotFoundError:
        return None
    except DamagedError as error:
        tell_damaged(str(error))
        return None
    if Pseudonyms.existing(folder) != Pseudonyms.existing(here):
        # Hashes of another secret match nothing: "nobody is shared" would be a plausible lie.
        rows[KEYS] = ""
    return rows


def make_cohort(
    cfg: CohortConfig,
    store: SliceStore | None,
    labelled: Labelled,
    report: StageCallback | None = None,
) -> Cohort:
    """By the protocol; patients come from metadata, the labels, or headers."""
    manifest, names, repeated = labelled
    del labelled
    return_memory()
    sound = cfg.protocol.name is ProtocolName.sound
    # The report splits images: for it no header has to be read before the cohort is known.
    manifest = _with_keys(cfg.data, manifest, store if sound else None, report)
    whole = keeps_patients_whole(cfg)
    cohort = apply_protocol(manifest, names, cfg.protocol, cfg.data.subset, whole)
    del manifest
    return_memory()
    rows = cohort.rows
    # Only where neither labels nor metadata name a patient: a scan would replace those they name.
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
    cfg: DataConfig, rows: pd.DataFrame, store: SliceStore | None, report: StageCallback | None
) -> pd.DataFrame:
    """Adds the keys `patient` and `study`, empty where nothing tells them."""
    pseudonyms = Pseudonyms.beside(Path(cfg.cache_dir))
    # From the most deliberate to the least: a metadata file, columns of the labels, headers.
    own = [c if c in rows else None for c in ("patient_id", "study_id")]
    rows = rows.drop(columns=KEYS, errors="ignore")
    if cfg.metadata is not None:
        # An image that the file does not name has no key, and `sound` refuses it.
        named = read_metadata(path := Path(cfg.metadata), pseudonyms)
        keys = keys_of_images(named, rows["image_id"].tolist(), path.name)
    elif own[0] is not None:
        keys = pseudonyms.keys(rows, own)
    elif store is not None:
        progress, folder = stage(report, "reading headers"), Path(cfg.cache_dir)
        paths = rows["path"].tolist()
        keys = scan_headers(paths, store, folder, pseudonyms, cfg.workers, progress)
        del paths
        return_memory()
        # A file that cannot be read is its own patient: it is quarantined when it is decoded.
        unreadable = ~keys.pop("readable").to_numpy()
        keys.loc[unreadable, "patient"] = "unreadable:" + rows["image_id"].to_numpy()[unreadable]
    else:
        keys = pd.DataFrame("", index=rows.index, columns=KEYS)
    rows = rows.drop(columns=[c for c in own if c])
    return rows.assign(**{k: keys[k].to_numpy() for k in KEYS})


def cohort_keys(configs: Mapping[str, CohortConfig]) -> dict[str, str]:
    """The fingerprint of each config's cohort, which need not have been made; writes nothing.
    Labels and files are looked at once for configs that differ in their protocol alone.

    Raises:
        UserError: the data set is not there, or its labels are wrong.
    """
    known: dict[str, DataIdentity | None] = {}
    keys = {}
    for name, cfg in configs.items():
        # As far as the labels and files go, of which a subset and a cache size know nothing.
        what = repr(replace(cfg.data, subset=1.0, cache_size=0))
        if what not in known:
            store = _existing_store(cfg.data)
            known[what] = _identify(cfg.data, store)[0] if store else None
        data = known[what]
        keys[name] = NOT_MADE if data is None else _fingerprint(cfg, data)
    return keys


NOT_MADE = "not made yet"  # in the place of the fingerprint, of a phantom


def describe_data_changes(cfg: CohortConfig, before: str, now: str) -> list[str]:
    """What is not as it was in the data, in words, as far as the cache folder tells.

    Args:
        cfg: whose data they are.
        before: the fingerprint of the cohort that was.
        now: of the one that is.
    """
    if len(before) != len(now):
        return ["its data were noted by an earlier version of ich, by place and date"]
    then, here = (cohort_files(cfg, key).data() for key in (before, now))
    found = here.differences(then) if then and here else []
    # The same labels and files, by another protocol or choice of labels, which the config tells.
    return found or ([] if then and here else [f"cohort {before} then, {now} now"])


@dataclass(frozen=True)
class LookedUp:
    """Which files the labels name, kept by what was looked at to know that: to read the RSNA's
    labels takes a good part of a minute, and every launch asks.

    path: where it is kept. listing: of the files that there were (`digest_of_listing`).
    """

    path: Path
    listing: str
    files: LabelledFiles

    @staticmethod
    def read(path: Path, listing: str) -> LookedUp | None:
        """None if other files were there."""
        try:
            values, hints = read_json(path), get_type_hints(LabelledFiles)
            if values["listing"] != listing:
                return None
            files = LabelledFiles(**{k: typed_value(values[k], hints[k]) for k in hints})
        except (FileNotFoundError, DamagedError, ValueError, KeyError):
            return None
        return LookedUp(path, listing, files)

    def write(self) -> None:
        write_text(self.path, json.dumps({"listing": self.listing, **asdict(self.files)}))


def _identify(
    cfg: DataConfig, store: SliceStore | None
) -> tuple[DataIdentity, LookedUp | None, Labelled | None]:
    """What the labels and labelled files are; and what was found out for that, if it was not known:
    to be kept, and the manifest."""
    path, name = label_source(cfg, store)
    if path is not None:
        labels = digest_of_file(path)
    else:
        assert store is not None
        labels = hashlib.sha256(store.read(name)).hexdigest()
    metadata = ""
    # One that is missing is said where it is read.
    if cfg.metadata and (file := Path(cfg.metadata)).is_file():
        metadata = digest_of_file(file)
    if store is None:
        return DataIdentity(labels, metadata, "", 0), None, None
    # With our code, by which names of images are matched with those of files.
    asked = repr((labels, cfg.source.value, cfg.label_columns, cfg.any_label, code_version()))
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    place, listing = Path(cfg.cache_dir) / f"files-{key}.json", digest_of_listing(store)
    looked, new, labelled = LookedUp.read(place, listing), None, None
    if looked is None:
        labelled = _labelled(cfg, store)
        files = LabelledFiles.find(store, labelled.manifest["path"].tolist())
        looked = new = LookedUp(place, listing, files)
    of_files = looked.files.digest(store), looked.files.count
    return DataIdentity(labels, metadata, *of_files), new, labelled


def _existing_store(cfg: DataConfig) -> SliceStore | None:
    """As `open_store`, and None for a phantom that has not been made; it is not made here."""
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


def _phantom_slices(cfg: DataConfig) -> int:
    from ich.data.phantom.rendering import count_slices

    return count_slices(_phantom_spec(cfg))


def phantom_folder(cfg: DataConfig) -> Path:
    """Where the phantom of these settings is, or will be."""
    p = cfg.phantom
    return Path(cfg.cache_dir) / f"phantom-p{p.patients}-s{p.seed}-{p.size}-{p.prevalence:g}"


def keeps_patients_whole(cfg: CohortConfig) -> bool:
    """Whether negatives are dropped by patient: in what needs whole studies, where any are."""
    # What is evaluated has the context of its model; and scored rows are never dropped.
    if isinstance(cfg, EvaluateConfig) or cfg.protocol.negatives_per_positive is None:
        return False
    return not cfg.context.is_slice


def _fingerprint(cfg: CohortConfig, identity: DataIdentity) -> str:
    """Fingerprint of what the cohort depends on: files, labels, metadata, protocol, subset."""
    data = cfg.data
    chosen = data.label_columns, data.any_label, data.subset
    parts = [repr(identity), data.source.value, repr(cfg.protocol), repr(chosen)]
    if data.source is Source.phantom:
        # Another generator draws other pixels into files of the same names and sizes.
        parts.append(str(GENERATOR_VERSION))
    # Only where it is another cohort: the same rows, with or without context, are looked up once.
    if keeps_patients_whole(cfg):
        parts.append("whole patients")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

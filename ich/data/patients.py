"""Which patient and study an image belongs to, as keys that name nobody.

Splits by patient need this before a slice is decoded. It comes from a metadata CSV, or from the
files' headers, read once and kept beside the cache. Identifiers are replaced by keyed hashes
(HMAC-SHA256) the moment they are read; the key is made once, beside the cache, readable by its
owner alone. No split depends on the hashes' values.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import math
import os
import secrets
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.base.files import cut_unfinished_line, lock, naming, tell_damaged
from ich.base.progress import ProgressCallback
from ich.base.workers import run_parallel, worker_count
from ich.data.cache_folder import make_cache_folder
from ich.data.dicom import HEADER_VERSION, DicomError, Keys, read_keys
from ich.data.manifest import IMAGE, PATIENT, STUDY
from ich.data.store import Location, SliceStore, Unreadable, read_dicom
from ich.data.subgroups.facts import FACTS, Facts
from ich.data.tables.names import example, match_by_form
from ich.data.tables.reading import find_column, read_table, tell

_CHUNK = 256  # headers a worker reads at a time
HEADERS_PER_START = 1000  # a process takes about as long to start as this many to read
_KEY_BYTES = 32  # of the secret: as many as SHA-256 gives (RFC 2104, section 3)
_KEY_VALUES = 16  # different bytes among these, at least
_HEAD = 16 << 10  # bytes: a header without private groups has 1 to 4 KB, with them up to 100

KEYS = ["patient", "study"]


@dataclass(frozen=True)
class Pseudonyms:
    """Replaces identifiers by hashes under one secret."""

    secret: bytes

    @staticmethod
    def beside(folder: Path) -> Pseudonyms:
        """The secret of a cache folder, made on first use with mode 0600.

        Raises:
            UserError: it was cut short, or can be guessed.
        """
        make_cache_folder(folder)
        path = folder / ".pseudonym-key"
        with lock(folder / ".pseudonym-key.lock"):
            if not path.exists():
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)  # of a process that was killed here
                # With its mode from the start: nobody else can read it for a moment.
                handle = os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
                    file.flush()
                    # A power cut must not leave an empty key, which anybody could try names with.
                    os.fsync(file.fileno())
                part.rename(path)
                # Nor may it take back the name: what was hashed would match nothing any more.
                directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        return Pseudonyms._read(path)

    @staticmethod
    def existing(folder: Path) -> Pseudonyms | None:
        """The secret of a cache folder, if it has one that can be read.

        Raises:
            UserError: it was cut short, or can be guessed.
        """
        try:
            return Pseudonyms._read(folder / ".pseudonym-key")
        except OSError:
            return None

    @staticmethod
    def _read(path: Path) -> Pseudonyms:
        secret = path.read_bytes()
        if len(secret) < _KEY_BYTES:
            raise UserError(
                f"the key of the pseudonyms, {path}, has {len(secret)} bytes, but must have "
                f"{_KEY_BYTES}: it was cut short, and its pseudonyms could be guessed. Put back a "
                f"whole copy, or remove it to have a new one made; patients then get other "
                f"pseudonyms."
            )
        # As a power cut leaves a file whose bytes were not on the disk yet, or a person a short
        # word over and over. 32 random bytes have fewer than 16 values once in 10^16 times.
        if len(set(secret)) < _KEY_VALUES:
            raise UserError(
                f"the key of the pseudonyms, {path}, is not random: its {len(secret)} bytes have "
                f"{len(set(secret))} values, so its pseudonyms could be guessed. Put back a whole "
                f"copy, or remove it to have a new one made; patients then get other pseudonyms."
            )
        return Pseudonyms(secret)

    def key(self, kind: str, identifier: str) -> str:
        """16 hexadecimal digits; empty for an empty identifier."""
        # DICOM pads values to an even length and a CSV does not: both must give the same key.
        text = identifier.strip()
        if not text:
            return ""
        # With its kind: a patient and a study of the same text do not share a key.
        return hmac.new(self.secret, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()[:16]

    def keys(self, frame: pd.DataFrame, columns: Sequence[str | None]) -> pd.DataFrame:
        """`patient` and `study` keys of identifier columns; a column of None gives empty keys."""
        out = pd.DataFrame(index=frame.index)
        for kind, column in zip(KEYS, columns, strict=True):
            if column is None:
                out[kind] = ""
            else:
                # Each identifier once: a patient has dozens of images.
                known = {v: self.key(kind, v) for v in frame[column].unique()}
                out[kind] = frame[column].map(known)
        return out


def read_metadata(path: Path, pseudonyms: Pseudonyms) -> pd.DataFrame:
    """Reads a CSV that names the patient, and if it can the study, of each image.

    Returns:
        `patient` and `study` keys, indexed by image id.

    Raises:
        UserError: no such file or columns, or an image with two patients or studies.
    """
    if not path.is_file():
        raise UserError(
            f"data.metadata is {str(path)!r}, which is no file. Give a CSV with a column for the "
            f"image and one for the patient, or null to read the files' headers."
        )
    name = f"the metadata file {path.name}"
    frame = read_table(path, name, IMAGE)
    image, patient, study = (find_column(frame, names, name) for names in (IMAGE, PATIENT, STUDY))
    if image is None or patient is None:
        raise UserError(
            f"the metadata file {path.name} must have a column for the image ({', '.join(IMAGE)}) "
            f"and one for the patient ({', '.join(PATIENT)}); {', '.join(STUDY)} is optional. "
            f"Rename its columns."
        )
    keys = pseudonyms.keys(frame, (patient, study)).assign(image_id=frame[image]).drop_duplicates()
    twice = keys.loc[keys["image_id"].duplicated(), "image_id"]
    if len(twice):
        raise UserError(
            f"the metadata file {path.name} gives {len(twice):,} images two patients or studies "
            f"(the first: {', '.join(twice[:3])}). Mend or remove these rows."
        )
    return keys.set_index("image_id")


def keys_of_images(keys: pd.DataFrame, images: list[str], name: str) -> pd.DataFrame:
    """The keys of N images, empty where the metadata do not name one.

    Args:
        keys: of `read_metadata`.
        images: N ids, as the labels have them; what differs from them in form only is the same.
        name: what the metadata are called in messages.

    Raises:
        UserError: they name none of the images, or one of theirs may be two of these.
    """
    known = set(keys.index)
    lost = [image for image in dict.fromkeys(images) if image not in known]
    free = sorted(known.difference(images))
    found, unclear = match_by_form(lost, free, any_folder=True, are_files=False)
    if unclear:
        raise UserError(
            f"the metadata file {name} has {len(unclear):,} images that cannot be told apart by "
            f"their names: {unclear[0]}. Name them as the labels do."
        )
    if found:
        image, other = next(iter(found.items()))
        tell(
            f"the metadata file {name} has {len(found):,} images whose names differ from the "
            f"labels' in form only, as {other!r} and {image!r}: these are taken to be the same"
        )
        keys = pd.concat([keys, keys.loc[list(found.values())].set_axis(list(found))])
    if lost := [image for image in lost if image not in found]:
        like = example(lost[0], free)
        difference = f"The labels name {lost[0]!r}" + (f"; it has {like!r}." if like else ".")
        count = len(set(images))
        if len(lost) == count:
            raise UserError(
                f"the metadata file {name} matched 0 of {count:,} images. {difference} Name the "
                f"images there as the labels do."
            )
        tell(
            f"the metadata file {name} matched {count - len(lost):,} of {count:,} images. "
            f"{difference}"
        )
    return keys.reindex(images).fillna("")


def scan_headers(
    paths: Sequence[str],
    store: SliceStore,
    folder: Path,
    pseudonyms: Pseudonyms,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> pd.DataFrame:
    """Reads the headers of these files, except those read before.

    Args:
        paths: N files of the store; an empty path is no file.
        store: where they lie.
        folder: where all caches are.
        pseudonyms: what replaces identifiers.
        workers: reading processes; None is one per core.
        progress: called with (files done, files in all).

    Returns:
        N rows in the order of `paths`: `patient`, `study` and `series` keys, `position` in mm along
        the normal of the slice (NaN if unknown), `readable`, and the bins of `Facts`; a file that
        is no readable DICOM has empty keys, and is quarantined when slices are decoded.
    """
    wanted = [p for p in dict.fromkeys(paths) if p]
    key = f"{store.root.resolve()}|{HEADER_VERSION}"
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    journal = folder / f"headers-{name}.csv"
    with lock(journal.with_suffix(".lock")):
        scan = _Scan(wanted)
        for line in _read_scan(journal):
            scan.add(*line)
        if missing := scan.outdated(store):
            # Located when due: 750,000 locations at once would take a fifth of a gigabyte.
            jobs = (
                (store.root, store.locate(missing[i : i + _CHUNK]), pseudonyms)
                for i in range(0, len(missing), _CHUNK)
            )
            processes = worker_count(workers, len(missing), HEADERS_PER_START)
            done = len(wanted) - len(missing)
            if progress:
                progress(done, len(wanted))
            with journal.open("a", newline="") as file:
                for lines in run_parallel(_scan_chunk, jobs, processes):
                    with naming(journal):
                        csv.writer(file).writerows(lines)
                        # A scan that is killed goes on from here. A lost line costs one header.
                        file.flush()
                    for read in lines:
                        scan.add(*read)
                    done += len(lines)
                    if progress:
                        progress(done, len(wanted))
    return scan.frame(paths)


class _Scan:
    """What is known of some files, in a few bytes each."""

    def __init__(self, paths: list[str]) -> None:
        self._position = {path: i for i, path in enumerate(paths)}
        # One more, at -1: what is known of no file.
        self._signature = array("q", [hash(_UNKNOWN)]) * (len(paths) + 1)
        self._patient = array("i", [0]) * (len(paths) + 1)
        self._study = array("i", [0]) * (len(paths) + 1)
        self._series = array("i", [0]) * (len(paths) + 1)
        self._place = array("d", [math.nan]) * (len(paths) + 1)
        self._readable = bytearray(len(paths) + 1)
        self._fact = array("i", [0]) * (len(paths) + 1)
        self._keys = {"": 0}
        # Few: the slices of a study share theirs.
        self._facts: dict[tuple[str, ...], int] = {Facts(): 0}

    def add(self, path: str, signature: str, *read: str) -> None:
        """One line of the journal; the last one of a path counts."""
        if (i := self._position.get(path)) is not None:
            keys, (place, readable, *facts) = read[:3], read[3:]
            self._signature[i] = hash(signature)
            for column, key in zip((self._patient, self._study, self._series), keys, strict=True):
                column[i] = self._keys.setdefault(key, len(self._keys))
            self._place[i] = float(place or math.nan)
            self._readable[i] = readable == "1"
            self._fact[i] = self._facts.setdefault(tuple(facts), len(self._facts))

    def outdated(self, store: SliceStore) -> list[str]:
        """The files that were never read, or have changed since."""
        locations = (location for p in self._position for location in store.locate([p]))
        # Not strict: the last signature is of no file.
        return [
            location.path
            for location, signature in zip(locations, self._signature, strict=False)
            if hash(location.signature) != signature
        ]

    def frame(self, paths: Sequence[str]) -> pd.DataFrame:
        at = np.fromiter((self._position.get(p, -1) for p in paths), np.int64, len(paths))
        keys = np.array(list(self._keys), dtype=object)
        columns = {"patient": self._patient, "study": self._study, "series": self._series}
        facts = pd.DataFrame(list(self._facts), columns=list(FACTS)).astype("category")
        facts = facts.iloc[np.frombuffer(self._fact, np.int32)[at]].reset_index(drop=True)
        return pd.DataFrame(
            {
                **{
                    name: pd.array(keys[np.frombuffer(column, np.int32)[at]], dtype="str")
                    for name, column in columns.items()
                },
                "position": np.frombuffer(self._place, np.float64)[at],
                "readable": np.frombuffer(self._readable, np.bool_)[at],
                **facts,
            }
        )


_UNKNOWN = "?"  # the signature of no file
# Of a line of the journal: path, signature, three keys, position, readable, and the facts.
_COLUMNS = 7 + len(FACTS)


def _read_scan(path: Path) -> Iterator[list[str]]:
    """The lines of what was scanned before; one cut off by a crash is left out, and closed, and one
    that is damaged is left out: its file is read again."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        cut_unfinished_line(file)
    with path.open(newline="", encoding="utf-8", errors="replace") as text:
        try:
            for line in csv.reader(text):
                if len(line) == _COLUMNS and "\0" not in line[0] and _is_number(line[5]):
                    yield line
        except csv.Error as error:  # a line of more than 128 KB
            tell_damaged(f"{path} is damaged ({error}): what follows is read from the files again")


def _is_number(text: str) -> bool:
    try:
        return not text or math.isfinite(float(text))
    except ValueError:
        return False


_Job = tuple[Path, list[Location], Pseudonyms]


def _scan_chunk(job: _Job) -> list[tuple[str, ...]]:
    root, files, pseudonyms = job
    lines: list[tuple[str, ...]] = []
    for location in files:
        try:
            read = read_file_keys(root, location)
        except DicomError:
            lines.append((location.path, location.signature, "", "", "", "", "0", *Facts()))
            continue
        # In the process that reads them: identifiers are neither sent back nor written down.
        kinds = (("patient", read.patient), ("study", read.study), ("series", read.series))
        keys = [pseudonyms.key(kind, identifier) for kind, identifier in kinds]
        place = repr(read.position) if math.isfinite(read.position) else ""
        lines.append((location.path, location.signature, *keys, place, "1", *read.facts))
    return lines


def read_file_keys(root: Path, location: Location) -> Keys:
    """What a file says of itself in its beginning if all of it stands there, else in the rest."""
    if location.size > _HEAD:
        try:
            keys = read_keys(read_dicom(root, location, _HEAD))
            if keys.is_complete:
                return keys
        except Unreadable:
            raise
        except DicomError:
            pass  # cut in the middle of a header that is longer
    return read_keys(read_dicom(root, location))

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
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ich.cache import lock
from ich.config import UserError
from ich.dicom import DicomError, read_keys
from ich.manifest import IMAGE, PATIENT, STUDY, first_of, read_csv
from ich.pool import available_cores, run_parallel
from ich.store import Location, SliceStore, read_bytes

_CHUNK = 256  # headers a worker reads at a time
_PER_WORKER = 1000  # a process takes about as long to start as this many headers take to read

KEYS = ["patient", "study"]


@dataclass(frozen=True)
class Pseudonyms:
    """Replaces identifiers by hashes under one secret."""

    secret: bytes

    @staticmethod
    def beside(folder: Path) -> Pseudonyms:
        """The secret of a cache folder, made on first use with mode 0600."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ".pseudonym-key"
        with lock(folder / ".pseudonym-key.lock"):
            if not path.exists():
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)
                handle = os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(secrets.token_bytes(32))
                part.rename(path)
        return Pseudonyms(path.read_bytes())

    def key(self, kind: str, identifier: str) -> str:
        """16 hexadecimal digits; empty for an empty identifier."""
        text = identifier.strip()
        if not text:
            return ""
        return hmac.new(self.secret, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()[:16]

    def keys(self, frame: pd.DataFrame, columns: Sequence[str | None]) -> pd.DataFrame:
        """`patient` and `study` keys of identifier columns; a column of None gives empty keys."""
        out = pd.DataFrame(index=frame.index)
        for kind, column in zip(KEYS, columns, strict=True):
            if column is None:
                out[kind] = ""
            else:
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
    frame = read_csv(path, f"the metadata file {path.name}")
    image, patient, study = (first_of(frame, names) for names in (IMAGE, PATIENT, STUDY))
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


def scan_headers(
    paths: Sequence[str],
    store: SliceStore,
    folder: Path,
    pseudonyms: Pseudonyms,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Reads the headers of these files, except those read before.

    Args:
        paths: files of the store; an empty path is no file.
        store: where they lie.
        folder: the place of all caches.
        pseudonyms: what replaces identifiers.
        workers: reading processes; None is one per core.
        progress: called with (files done, files in all).

    Returns:
        `patient` and `study` keys, and `readable`, indexed by path; a file that is no readable
        DICOM has empty keys, and is quarantined when slices are decoded.
    """
    wanted = [p for p in dict.fromkeys(paths) if p]
    name = hashlib.sha256(str(store.root.resolve()).encode()).hexdigest()[:12]
    place = folder / f"headers-{name}.csv"
    with lock(place.with_suffix(".lock")):
        known = _read_scan(place)
        located = dict(zip(wanted, store.locate(wanted), strict=True))
        missing = [p for p in wanted if known.get(p, _UNKNOWN).signature != located[p].signature]
        if missing:
            jobs = [
                (store.root, [(p, located[p]) for p in missing[i : i + _CHUNK]], pseudonyms)
                for i in range(0, len(missing), _CHUNK)
            ]
            crew = workers or min(available_cores(), -(-len(missing) // _PER_WORKER))
            done = len(wanted) - len(missing)
            with place.open("a", newline="") as file:
                for headers in run_parallel(_scan_chunk, jobs, crew):
                    csv.writer(file).writerows(
                        (h.path, h.signature, h.patient, h.study, int(h.readable)) for h in headers
                    )
                    file.flush()
                    known |= {h.path: h for h in headers}
                    done += len(headers)
                    if progress:
                        progress(done, len(wanted))
    rows = [known[p] for p in wanted]
    return pd.DataFrame(
        {
            "patient": [h.patient for h in rows],
            "study": [h.study for h in rows],
            "readable": [h.readable for h in rows],
        },
        index=pd.Index(wanted, name="path"),
    )


@dataclass(frozen=True, slots=True)
class _Header:
    path: str
    signature: str
    patient: str
    study: str
    readable: bool


_UNKNOWN = _Header("", "?", "", "", False)


def _read_scan(place: Path) -> dict[str, _Header]:
    """What was scanned before; a line cut off by a crash is left out, and closed."""
    if not place.exists():
        return {}
    with place.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
    return {h.path: h for h in _parse_scan(data[:whole].decode())}


def _parse_scan(text: str) -> Iterator[_Header]:
    for path, signature, patient, study, readable in csv.reader(text.splitlines()):
        yield _Header(path, signature, patient, study, readable == "1")


_Job = tuple[Path, list[tuple[str, Location]], Pseudonyms]


def _scan_chunk(job: _Job) -> list[_Header]:
    root, files, pseudonyms = job
    headers = []
    for path, location in files:
        try:
            patient, study = read_keys(read_bytes(root, location))
        except DicomError:
            headers.append(_Header(path, location.signature, "", "", False))
            continue
        keys = pseudonyms.key("patient", patient), pseudonyms.key("study", study)
        headers.append(_Header(path, location.signature, *keys, True))
    return headers

"""What a data set is: the names, sizes and bytes of its files, not where they lie or since when.

A sweep's own outputs, a `.DS_Store`, a `touch`, a copy, another mount: none of them changes that.
Of a zip the directory has a CRC-32 for each member. To read each file of a folder would take hours,
so 64 of them stand for the bytes of all: another export under the same names is told apart by them,
and a single file whose bytes changed under the same name and size by `prepare verify=true`, which
reads all. pandas is not imported here: reading processes import this.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path

from isal import isal_zlib

from ich.base.workers import run_parallel, worker_count
from ich.data.dicom import DicomError
from ich.data.store import Location, SliceStore, read_bytes, read_raw_directory

NOT_READ = -1  # in the place of a CRC-32: the file could not be read
_SAMPLE = 64  # files of a folder whose bytes are looked at
_BLOCK = 4096  # files located together
_CHUNK = 64  # files a process reads at a time
_FILES_PER_START = 1000  # a process takes about as long to start as this many to read


@dataclass(frozen=True)
class DataIdentity:
    """What the labels and files of a data set are; texts are SHA-256, empty for nothing.

    labels, metadata: of the bytes of the label CSV and of the metadata CSV. files: of the names
    (relative to the root) and sizes of the labelled files, and of what is known of their bytes.
    count: of these files.
    """

    labels: str
    metadata: str
    files: str
    count: int

    def differences(self, before: DataIdentity) -> list[str]:
        """What is not as it was, in words."""
        found = []
        if self.labels != before.labels:
            found.append("the label CSV has other bytes")
        if self.metadata != before.metadata:
            found.append("the metadata CSV is another one")
        if self.count != before.count:
            found.append(f"{before.count:,} labelled files then, {self.count:,} now")
        elif self.files != before.files:
            found.append("labelled files have other names, sizes or bytes")
        return found


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class LabelledFiles:
    """The labelled files of a data set. names: SHA-256 of their names, sizes and, in a zip, CRCs.
    count: of them. sample: paths of those in a folder whose bytes count too."""

    names: str
    count: int
    sample: tuple[str, ...]

    @staticmethod
    def find(store: SliceStore, paths: Sequence[str]) -> LabelledFiles:
        """Looks at these files' names and sizes; a path that is empty is none."""
        there = sorted({path for path in paths if path})
        digest = hashlib.sha256()
        for start in range(0, len(there), _BLOCK):
            for location in store.locate(there[start : start + _BLOCK]):
                crc = location.stamp if store.is_zip else ""
                digest.update(f"{location.size} {crc} ".encode() + _name(location.path) + b"\n")
        sample = () if store.is_zip else tuple(_sample(there))
        return LabelledFiles(digest.hexdigest(), len(there), sample)

    def digest(self, store: SliceStore) -> str:
        """SHA-256 of what they are; reads the bytes of the sample."""
        crcs = list(sample_crcs(store, self.sample).values())
        return hashlib.sha256(f"{self.names} {crcs}".encode()).hexdigest()


def digest_of_listing(store: SliceStore) -> str:
    """SHA-256 of the names and sizes of all files of a data set, or of a zip's whole directory: the
    labelled ones are the same as long as this and the labels are. Takes a look, and no more."""
    digest = hashlib.sha256()
    if store.is_zip:
        for block in read_raw_directory(store.root):
            digest.update(block)
        return digest.hexdigest()
    for start in range(0, len(store.paths), _BLOCK):
        for location in store.locate(store.paths[start : start + _BLOCK]):
            digest.update(f"{location.size} ".encode() + os.fsencode(location.path) + b"\n")
    return digest.hexdigest()


def _name(path: str) -> bytes:
    # A file system may give a name back in another normal form than it was written in.
    return os.fsencode(path if path.isascii() else unicodedata.normalize("NFC", path))


def sample_crcs(store: SliceStore, paths: Sequence[str]) -> dict[str, int]:
    """CRC-32 of the bytes of at most 64 of these files, by path."""
    locations = store.locate(_sample(paths))
    return {location.path: content_crc(store.root, location) for location in locations}


def _sample(paths: Iterable[str]) -> list[str]:
    # By a hash of the name, so that of a data set that grows mostly the same are looked at.
    names = {path for path in paths if path}
    return nsmallest(_SAMPLE, names, key=lambda p: (zlib.crc32(_name(p)), p))


def content_crc(root: Path, location: Location) -> int:
    """CRC-32 of a file's bytes, of a zip's member by its directory; `NOT_READ` if it can't be."""
    if location.offset >= 0:
        return location.stamp
    try:
        return isal_zlib.crc32(read_bytes(root, location))
    except DicomError:
        return NOT_READ


def read_crcs(
    store: SliceStore, paths: Sequence[str], workers: int | None = None
) -> Iterator[tuple[Location, int]]:
    """Each file's place, and the CRC-32 of its bytes, in the order of completion."""
    jobs = (
        (store.root, store.locate(paths[start : start + _CHUNK]))
        for start in range(0, len(paths), _CHUNK)
    )
    for batch in run_parallel(_crcs_of, jobs, worker_count(workers, len(paths), _FILES_PER_START)):
        yield from batch


def _crcs_of(job: tuple[Path, list[Location]]) -> list[tuple[Location, int]]:
    root, locations = job
    return [(location, content_crc(root, location)) for location in locations]

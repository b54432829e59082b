"""The folder of a cache, and its journal: which row of the slices is whose, and what failed.

`index.csv` is only appended to, and the last line of a path counts. So whatever ends a build, what
stands there is true, and nothing has to be put right but a last line that was cut.

A folder belongs to a data set by what that is, and not by where it lies (`CacheFolder.find`):
beside each slice stands the CRC-32 of the file that it was decoded from. A file whose date has
changed is read, and decoded again only if its bytes are others.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ich.base.config import UserError
from ich.base.files import cut_unfinished_line, read_json
from ich.data.content import NOT_READ, sample_crcs
from ich.data.decode import DECODER_VERSION, DecodeResult
from ich.data.store import Location, SliceStore

FAILED = -1  # row of a file that cannot be decoded
UNKNOWN = -2  # row of a file of which the journal says nothing, or whose slice was found damaged

_COLUMNS = ("row", "path", "signature", "checksum", "reason", "crc")
_BLOCK = 4096  # files looked at together
_SYNC_SECONDS = 0.5  # a killed build loses what it decoded in about this time
_CODECS = ("pylibjpeg", "libjpeg", "openjpeg", "jpeg_ls", "gdcm", "PIL")
_AGAIN = "again"  # signature of a file that could not be read: the next build tries it again


def make_cache_folder(folder: Path) -> None:
    """Makes the folder of all caches, which only its owner may look into: beside slices and cohorts
    it holds the key of the pseudonyms. One that is there already stays as open as it is.

    Raises:
        UserError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Hydra makes one of its own in it before anything of ours runs.
        if {entry.name for entry in os.scandir(folder)} <= {"hydra"}:
            folder.chmod(0o700)
        elif not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}). Set "
            f"data.cache_dir (or --cache-dir) to a folder that can be written, or go to one of "
            f"your own."
        ) from None


@dataclass(frozen=True)
class CacheFolder:
    """Where the slices of one data set lie at one size.

    path: the folder. size: S, the side of a slice, pixels.
    """

    path: Path
    size: int

    @staticmethod
    def find(
        store: SliceStore, paths: Sequence[str], folder: Path, size: int
    ) -> list[tuple[CacheFolder, list[str]]]:
        """Where slices of these files may be, of all caches in `folder`; the last one is their own,
        which may not be there yet. Changes with the decoder's version.

        Returns:
            Of each, which paths are known to have had other bytes: their slices are stale. First
            the one that has slices of the same bytes, wherever they lay when they were decoded.
        """
        sample, root = sample_crcs(store, paths), str(store.root.resolve())
        key = os.fsencode(f"{root}|{sample}|{size}|{DECODER_VERSION}")
        beginning = f"hu{size}-v{DECODER_VERSION}-"
        own = CacheFolder(folder / f"{beginning}{hashlib.sha256(key).hexdigest()[:12]}", size)
        best, rank = (own, list[str]()), (0, False)
        for index in sorted(folder.glob(f"{beginning}*/index.csv")):
            found = CacheFolder(index.parent, size)
            crcs = {line[1]: line[5] for line in found.lines() if line[1] in sample}
            known = [path for path in crcs if NOT_READ not in (crcs[path], sample[path])]
            stale = [path for path in known if crcs[path] != sample[path]]
            equal, here = len(known) - len(stale), found.is_of(store)
            # Few other bytes are files that were mended where they lie.
            if (equal, here) > rank and (not stale or (here and len(stale) < equal)):
                best, rank = (found, stale), (equal, here)
        return [best] if best[0] == own else [best, (own, [])]

    def is_of(self, store: SliceStore) -> bool:
        """Whether the files lay there when the cache was last built."""
        try:
            root = read_json(self.path / "meta.json").get("root")
        except OSError:  # it is not there, or damaged
            return False
        return bool(root == str(store.root.resolve()))

    @property
    def slices(self) -> Path:
        return self.path / "hu.i16"

    @property
    def index(self) -> Path:
        return self.path / "index.csv"

    @property
    def lock(self) -> Path:
        # Beside the folder, so that removing a damaged one takes no lock away.
        return self.path.with_name(f"{self.path.name}.lock")

    @property
    def slice_bytes(self) -> int:
        return self.size * self.size * 2  # int16

    def count_rows(self) -> int:
        """How many slices the file has room for; 0 for a cache that is not there."""
        return self.slices.stat().st_size // self.slice_bytes if self.slices.exists() else 0

    def mend_index(self) -> None:
        """Drops a last line that a killed build has left unfinished; writes the heading."""
        with self.index.open("a+b") as file:
            if cut_unfinished_line(file) == 0:
                file.write((",".join(_COLUMNS) + "\n").encode())

    def append(self, lines: Iterable[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        with self.index.open("ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[tuple[int, str, str, int, str, int]]:
        """Row, path, signature, checksum, reason and CRC of every whole line, in order."""
        try:
            with self.index.open(newline="", encoding="utf-8") as file:
                # A build that goes on meanwhile, or was killed, may leave the last line unfinished.
                reader = csv.reader(line for line in file if line.endswith("\n"))
                next(reader, None)
                for row, path, signature, value, reason, crc in reader:
                    yield int(row), path, signature, int(value), reason, int(crc)
        except FileNotFoundError:
            return
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"the index of the decoded slices, {self.index}, is damaged ({error}). Remove the "
                f"folder {self.path} and prepare again."
            ) from None

    def entries(self, paths: list[str]) -> Entries:
        """What the journal says of these paths."""
        # Machine words and codes, not Python objects: a cohort may have 750,000 paths.
        position = {path: i for i, path in enumerate(paths)}
        rows, signatures = array("q", [UNKNOWN]) * len(paths), array("q", [0]) * len(paths)
        checksums, crcs = array("Q", [0]) * len(paths), array("q", [NOT_READ]) * len(paths)
        codes, used = array("i", [0]) * len(paths), array("q")
        reasons = {"": 0}
        for row, path, signature, checksum, reason, crc in self.lines():
            used.append(row)
            if (i := position.get(path)) is not None:
                # `hash` has another salt in every process: compared here, and never written down.
                rows[i], signatures[i] = row, hash(signature)
                checksums[i], crcs[i] = checksum, crc
                codes[i] = reasons.setdefault(reason, len(reasons))
        for i, path in enumerate(paths):
            if reason := _unusable(path):
                rows[i], codes[i] = FAILED, reasons.setdefault(reason, len(reasons))
        row_of = np.frombuffer(rows, np.int64).copy()
        row_of[row_of >= self.count_rows()] = UNKNOWN  # the file of slices was cut
        return Entries(
            row=row_of,
            signature=np.frombuffer(signatures, np.int64),
            reason=np.frombuffer(codes, np.int32),
            reasons=list(reasons),
            checksum=np.frombuffer(checksums, np.uint64),
            crc=np.frombuffer(crcs, np.int64),
            used=np.frombuffer(used, np.int64),
        )


@dataclass(frozen=True)
class Entries:
    """What the journal says of N paths, in their order.

    row: int64 [N]; `FAILED` if quarantined, `UNKNOWN` if nothing is known or it was found damaged.
    signature: int64 [N], hashes of the files' signatures. reason: int32 [N], indices of `reasons`.
    checksum: uint64 [N], of the slices. crc: int64 [N], CRC-32 of the files, `NOT_READ` if unknown.
    used: int64, every row that stands in the journal, whatever became of it.
    """

    row: np.ndarray
    signature: np.ndarray
    reason: np.ndarray
    reasons: list[str]
    checksum: np.ndarray
    crc: np.ndarray
    used: np.ndarray

    def outdated(self, paths: list[str], store: SliceStore, stale: set[str]) -> list[int]:
        """Which of the paths are not in the journal, are known to be stale, or have a file of
        another size or date since."""
        todo = []
        for start in range(0, len(paths), _BLOCK):
            block = range(start, min(start + _BLOCK, len(paths)))
            for i, location in zip(block, store.locate([paths[i] for i in block]), strict=True):
                row, signature = self.row[i], location.signature
                now = hash(_journaled_signature(row, signature))
                is_other = row == UNKNOWN or self.signature[i] != now or paths[i] in stale
                if is_other and not _unusable(paths[i]):
                    todo.append(i)
        return todo

    def line(self, i: int, location: Location) -> tuple[object, ...]:
        """A line of the journal that says of a decoded file where or since when it lies now."""
        row, value, crc = int(self.row[i]), int(self.checksum[i]), int(self.crc[i])
        return row, location.path, location.signature, value, "", crc

    def free_rows(self, count: int) -> np.ndarray:
        """`count` rows, ascending, that never stood in the journal: nobody reads them."""
        # Not those of replaced slices either: a training that began before may have them mapped.
        return np.setdiff1d(np.arange(self.used.max(initial=-1) + 1 + count), self.used)[:count]


class JournalWriter:
    """Writes what has been decoded into the journal once it is safe on disk: in the background
    while decoding goes on, and at the end, however it comes about."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        # For reading: syncing a file's data flushes what any process has written to it.
        self._slices = folder.slices.open("rb")
        # One, so that journal lines keep their order and the disk has one sync at a time.
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lines: list[tuple[object, ...]] = []
        self._due = time.monotonic() + _SYNC_SECONDS

    def __enter__(self) -> JournalWriter:
        return self

    def add(self, results: list[DecodeResult]) -> None:
        for s in results:
            signature = _AGAIN if s.again else _journaled_signature(s.row, s.signature)
            self._lines.append((s.row, s.path, signature, s.checksum, s.reason, s.crc))
        # While a sync is under way lines are gathered for the next: decoding never waits for it.
        if time.monotonic() >= self._due and (self._writing is None or self._writing.done()):
            self._wait()
            self._writing = self._thread.submit(self._write, self._lines)
            self._lines = []
            self._due = time.monotonic() + _SYNC_SECONDS

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
            self._write(self._lines)
        finally:
            self._thread.shutdown()
            self._slices.close()

    def _wait(self) -> None:
        if self._writing:
            # Raises what the thread met, such as a full disk.
            self._writing.result()

    def _write(self, lines: list[tuple[object, ...]]) -> None:
        # In this order: a line in the journal says that its slice is on the disk.
        os.fdatasync(self._slices.fileno())
        self._folder.append(lines)


def _unusable(path: str) -> str:
    """Why there is nothing to decode under this path; empty if there may be."""
    if not path:
        return "the file is missing"
    if "\n" in path or "\r" in path:  # a line of the journal would be two
        return "the file's name holds a line break"
    return ""


def _journaled_signature(row: int, signature: str) -> str:
    """With the decoders where a file could not be decoded: with others it is tried again."""
    return signature if row >= 0 else f"{signature}+{' '.join(_importable(_CODECS))}"


@cache
def _importable(names: tuple[str, ...]) -> list[str]:
    # Looked up, not imported: that would load every codec into the building process.
    return [name for name in names if find_spec(name)]

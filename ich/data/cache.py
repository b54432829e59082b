"""Decoded slices on disk: int16 HU `[N, S, S]`, memory-mapped, shared by all jobs of a sweep.

Windows, augmentation and normalization come later, on the device, so a sweep over them decodes
nothing again. A cache belongs to a data root and a size, and grows: a larger cohort decodes only
what is new, a changed file is decoded anew. Its folder holds

    hu.i16          the slices, one after another
    index.csv       the journal: row, path, signature, checksum, reason; only appended to, and the
                    last line of a path counts
    quarantine.csv  image_id and reason of what the latest build could not use
    meta.json       for people

A row counts once it stands in the journal, which is written after the slice is safe on disk, and
is never written again. So whatever ends a build, nothing half-written is ever read, and the next
one goes on. A slice that cannot be decoded is journaled with its reason; too many stop the build.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.base.files import lock
from ich.base.workers import available_cores, return_memory, run_parallel
from ich.data.decode import DECODER_VERSION, Chunk, Decoded, checksum, decode_chunk
from ich.data.store import SliceStore

_CHUNK = 32  # slices a process takes at a time
_SLICES_PER_WORKER = 500  # a process takes about as long to start as this many take to decode
_BLOCK = 4096  # files looked at together
_SYNC_SECONDS = 0.5  # a killed build loses what it decoded in about this time
_COLUMNS = ("row", "path", "signature", "checksum", "reason")
_CODECS = ("pylibjpeg", "libjpeg", "openjpeg", "jpeg_ls", "gdcm", "PIL")
_AGAIN = "again"  # of a slice whose file could not be read: the next build tries again
_UNKNOWN = -2  # row of a slice that `verify_cache` found damaged, or that is not in the journal

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cache:
    """An open cache, for the images asked for.

    hu: int16 read-only memory map [N, S, S], HU; it holds other images' slices too.
    row: image id -> position in `hu`; quarantined images are absent.
    quarantine: `image_id`, `reason`.
    folder: where it lies.
    """

    hu: np.ndarray
    row: dict[str, int]
    quarantine: pd.DataFrame
    folder: Path


def build_cache(
    images: pd.DataFrame,
    store: SliceStore,
    folder: Path,
    size: int,
    max_quarantine: float,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Opens the cache of these images, after decoding those that are new or have changed.

    Args:
        images: distinct images, columns `image_id` and `path` in the store; an empty path is an
            image without a file.
        store: where the files lie.
        folder: the place of all caches.
        size: S, the side of a decoded slice in pixels.
        max_quarantine: the share of images that may be undecodable.
        workers: decoding processes; None is one per core.
        progress: called with (slices done, slices to decode) while building.

    Raises:
        UserError: more than `max_quarantine` of the images cannot be decoded, or the disk is full.
            What has been decoded is kept.
    """
    place = cache_folder(store, folder, size)
    with _disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        with lock(folder / f"{place.name}.lock"):
            _mend_journal(place / "index.csv")
            paths = images["path"].tolist()
            entries = _read_entries(place, size, paths)
            todo = _outdated(paths, entries, store)
            rows = _free_rows(entries.used, len(todo))
            bad = int((np.delete(entries.row, todo) < 0).sum())
            todo_paths = sorted(paths[i] for i in todo)
            del paths, entries, todo  # hundreds of MB in a large cohort
            return_memory()
            if todo_paths:
                allowed = max_quarantine * len(images) - bad
                _decode(store, place, size, todo_paths, rows, allowed, workers, progress)
            del todo_paths
            return_memory()
            cache, absent = _open(images, place, size)
            _publish(cache, store, size)
    check_quarantine(cache.quarantine["reason"].tolist(), len(images), absent, max_quarantine)
    return cache


def read_cache(images: pd.DataFrame, store: SliceStore, folder: Path, size: int) -> Cache:
    """Opens the cache of these images as `build_cache` left it; looks at no file of the store.

    Raises:
        UserError: some of the images are neither cached nor quarantined.
    """
    cache, absent = _open(images, cache_folder(store, folder, size), size)
    if absent:
        raise UserError(
            f"{absent:,} of the {len(images):,} slices are not decoded yet under {cache.folder}. "
            f"Run `python -m ich.prepare` with the same data settings first."
        )
    return cache


def cache_folder(store: SliceStore, folder: Path, size: int) -> Path:
    """Where the slices of this store lie at this size. Changes with the decoder's version."""
    key = f"{store.root.resolve()}|{size}|{DECODER_VERSION}"
    return folder / f"hu{size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def verify_cache(
    store: SliceStore, folder: Path, size: int, progress: Progress | None = None
) -> list[str]:
    """Reads every slice once, in order; the next build decodes the damaged ones again.

    Returns:
        Paths, in the store, of the images whose slice does not match its checksum.

    Raises:
        UserError: there is no such cache.
    """
    place, damaged = cache_folder(store, folder, size), []
    if not (place / "index.csv").exists():
        raise UserError(
            f"no slice of {store.root} has been decoded at {size} pixels under {folder}, so there "
            f"is nothing to verify. Run `python -m ich.prepare` with the same data settings first."
        )
    with _disk_errors(place), lock(folder / f"{place.name}.lock"):
        _mend_journal(place / "index.csv")
        latest = {path: (row, value) for row, path, _, value, _ in _lines(place)}
        entries = sorted((row, value, path) for path, (row, value) in latest.items() if row >= 0)
        del latest
        length = size * size * 2
        with (place / "hu.i16").open("a+b", buffering=0) as slices:
            for done, (row, value, path) in enumerate(entries, 1):
                data = os.pread(slices.fileno(), length, row * length)
                if len(data) != length or checksum(data) != value:
                    damaged.append(path)
                if progress and (done % _CHUNK == 0 or done == len(entries)):
                    progress(done, len(entries))
        _append(place / "index.csv", [(_UNKNOWN, path, "", 0, "") for path in damaged])
    return damaged


# The journal


@dataclass(frozen=True)
class _Entries:
    """What the journal says of some paths, in their order.

    row: int64 [N]; -1 if quarantined, -2 if nothing is known or it was found damaged.
    signature: int64 [N], hashes of the files' signatures. reason: int32 [N], places in `reasons`.
    used: int64, every row that stands in the journal, whatever became of it.
    """

    row: np.ndarray
    signature: np.ndarray
    reason: np.ndarray
    reasons: list[str]
    used: np.ndarray


def _read_entries(place: Path, size: int, paths: list[str]) -> _Entries:
    position = {path: i for i, path in enumerate(paths)}
    rows, signatures = array("q", [_UNKNOWN]) * len(paths), array("q", [0]) * len(paths)
    codes, used = array("i", [0]) * len(paths), array("q")
    reasons = {"": 0}
    for row, path, signature, _, reason in _lines(place):
        used.append(row)
        if (i := position.get(path)) is not None:
            rows[i], signatures[i] = row, hash(signature)
            codes[i] = reasons.setdefault(reason, len(reasons))
    for i, path in enumerate(paths):
        if reason := _unusable(path):
            rows[i], codes[i] = -1, reasons.setdefault(reason, len(reasons))
    row_of = np.frombuffer(rows, np.int64).copy()
    row_of[row_of >= rows_in(place, size)] = _UNKNOWN  # the file of slices was cut
    return _Entries(
        row=row_of,
        signature=np.frombuffer(signatures, np.int64),
        reason=np.frombuffer(codes, np.int32),
        reasons=list(reasons),
        used=np.frombuffer(used, np.int64),
    )


def _lines(place: Path) -> Iterator[tuple[int, str, str, int, str]]:
    """Row, path, signature, checksum and reason of every whole line, in order."""
    index = place / "index.csv"
    try:
        with index.open(newline="", encoding="utf-8") as file:
            # A build that goes on meanwhile, or was killed, may leave the last line unfinished.
            reader = csv.reader(line for line in file if line.endswith("\n"))
            next(reader, None)
            for row, path, signature, value, reason in reader:
                yield int(row), path, signature, int(value), reason
    except FileNotFoundError:
        return
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"the index of the decoded slices, {index}, is damaged ({error}). Remove the folder "
            f"{place} and prepare again."
        ) from None


def rows_in(place: Path, size: int) -> int:
    """How many decoded slices a cache's file has room for; 0 for a cache that is not there."""
    slices = place / "hu.i16"
    return slices.stat().st_size // (size * size * 2) if slices.exists() else 0


def _unusable(path: str) -> str:
    """Why there is nothing to decode under this path; empty if there may be."""
    if not path:
        return "the file is missing"
    if "\n" in path or "\r" in path:
        return "the file's name holds a line break"
    return ""


def _mend_journal(index: Path) -> None:
    """Drops a last line that a killed build has left unfinished; writes the heading."""
    with index.open("a+b") as file:
        end = file.tell()
        start = max(0, end - (1 << 16))  # no line is longer
        file.seek(start)
        whole = start + file.read().rfind(b"\n") + 1
        file.truncate(whole)
        if whole == 0:
            file.write((",".join(_COLUMNS) + "\n").encode())


def _append(index: Path, lines: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    with index.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _free_rows(used: np.ndarray, count: int) -> np.ndarray:
    """`count` rows that never stood in the journal: nobody reads them."""
    return np.setdiff1d(np.arange(used.max(initial=-1) + 1 + count), used)[:count]


def _outdated(paths: list[str], entries: _Entries, store: SliceStore) -> list[int]:
    """Which of the paths are not in the journal, or have had another file since."""
    todo = []
    for start in range(0, len(paths), _BLOCK):
        block = range(start, min(start + _BLOCK, len(paths)))
        for i, location in zip(block, store.locate([paths[i] for i in block]), strict=True):
            row, signature = entries.row[i], location.signature
            now = hash(signature if row >= 0 else _failed(signature))
            if (row == _UNKNOWN or entries.signature[i] != now) and not _unusable(paths[i]):
                todo.append(i)
    return todo


def _failed(signature: str) -> str:
    """The signature of what could not be decoded: with other decoders it is tried again."""
    return f"{signature}+{' '.join(_importable(_CODECS))}"


@cache
def _importable(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find_spec(name)]


# Building


def _decode(
    store: SliceStore,
    place: Path,
    size: int,
    todo: list[str],
    rows: np.ndarray,
    allowed: float,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Decodes `todo` into `rows`; stops when more than `allowed` of them failed."""
    slices = place / "hu.i16"
    _require_space(place, len(todo) * size * size * 2)
    with slices.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for processes that a killed build left behind
        file.truncate(max(file.tell(), (int(rows[-1]) + 1) * size * size * 2))
    chunks = (
        Chunk(
            store.root,
            store.locate(todo[start : start + _CHUNK]),
            rows[start : start + _CHUNK].tolist(),
            str(slices),
            size,
            os.getpid(),
        )
        for start in range(0, len(todo), _CHUNK)
    )
    workers = workers or min(available_cores(), -(-len(todo) // _SLICES_PER_WORKER))
    done = bad = 0
    with _Journal(place) as journal, closing(run_parallel(decode_chunk, chunks, workers)) as parts:
        for part in parts:
            journal.add(part)
            done += len(part)
            bad += sum(decoded.row < 0 for decoded in part)
            if progress:
                progress(done, len(todo))
            if bad > allowed:
                break


class _Journal:
    """Writes what has been decoded into the journal once it is safe on disk: in the background
    while decoding goes on, and at the end, however it comes about."""

    def __init__(self, place: Path) -> None:
        self._index = place / "index.csv"
        self._slices = (place / "hu.i16").open("rb")
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lines: list[tuple[object, ...]] = []
        self._due = time.monotonic() + _SYNC_SECONDS

    def __enter__(self) -> _Journal:
        return self

    def add(self, part: list[Decoded]) -> None:
        for s in part:
            failed = _AGAIN if s.again else _failed(s.signature)
            signature = s.signature if s.row >= 0 else failed
            self._lines.append((s.row, s.path, signature, s.checksum, s.reason))
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
            self._writing.result()

    def _write(self, lines: list[tuple[object, ...]]) -> None:
        os.fdatasync(self._slices.fileno())
        _append(self._index, lines)


def _open(images: pd.DataFrame, place: Path, size: int) -> tuple[Cache, int]:
    """The cache of these images, and of how many of them it knows nothing."""
    entries = _read_entries(place, size, images["path"].tolist())
    return_memory()
    ids, good, bad = images["image_id"], entries.row >= 0, entries.row == -1
    hu = np.zeros((0, size, size), np.int16)
    if count := rows_in(place, size):
        hu = np.memmap(place / "hu.i16", np.int16, "r", shape=(count, size, size))
    reasons = [entries.reasons[code] for code in entries.reason[bad]]
    cache = Cache(
        hu=hu,
        row=dict(zip(ids[good], entries.row[good].tolist(), strict=True)),
        quarantine=pd.DataFrame({"image_id": ids[bad].to_numpy(), "reason": reasons}),
        folder=place,
    )
    return cache, int((entries.row == _UNKNOWN).sum())


def _publish(cache: Cache, store: SliceStore, size: int) -> None:
    """Writes the two files for people."""
    meta = {
        "root": str(store.root.resolve()),
        "size": size,
        "decoder": DECODER_VERSION,
        "slices": len(cache.row),
        "quarantined": len(cache.quarantine),
    }
    texts = {
        "quarantine.csv": cache.quarantine.to_csv(index=False),
        "meta.json": json.dumps(meta, indent=1),
    }
    for name, text in texts.items():
        part = cache.folder / f"{name}.part"
        part.write_text(text)
        part.replace(cache.folder / name)


def _require_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        raise UserError(
            f"the decoded slices need {needed / 1e9:.1f} GB under {place.parent}, where "
            f"{free / 1e9:.1f} GB are free. Set data.cache_dir to a larger disk, or lower "
            f"data.cache_size or data.subset."
        )


def check_quarantine(reasons: list[str], total: int, absent: int, allowed: float) -> None:
    if len(reasons) > allowed * total:
        common = Counter(reasons).most_common(10)
        stopped = f" after {total - absent:,} of them" if absent else ""
        raise UserError(
            f"{len(reasons):,} of {total:,} slices cannot be used, more than data.max_quarantine="
            f"{allowed:g} allows; the decoding stopped{stopped}. The commonest reasons: "
            + "; ".join(f"{text} ({n:,})" for text, n in common)
            + ". Mend data.root, or raise data.max_quarantine to go on without them."
        )


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    """Says in one sentence what a full disk or a killed process means; nothing is lost by them."""
    kept = "What has been decoded is kept: run the same command again to go on."
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"the decoded slices cannot be written to {place} ({error.strerror or error}). "
            + ("Free space there, or set" if full else "Set")
            + f" data.cache_dir to a folder on another disk. {kept}"
        ) from error
    except BrokenProcessPool:
        raise UserError(
            f"a decoding process was killed, probably for want of memory. Set data.workers to a "
            f"smaller number. {kept}"
        ) from None

"""Decoded slices on disk: int16 HU `[N, S, S]`, memory-mapped, shared by all jobs of a sweep.

Windows, augmentation and normalization come later, on the device, so a sweep over them decodes
nothing again. A cache belongs to a data set, wherever that lies, and a size, and grows: a larger
cohort decodes only what is new, a file of other bytes is decoded anew. Its folder holds

    hu.i16          the slices, one after another
    index.csv       the journal: row, path, signature, checksum, reason, CRC-32 of the file; only
                    appended to, and the last line of a path counts
    quarantine.csv  image_id and reason of what the latest build could not use
    meta.json       for people

A row counts once it stands in the journal, which is written after the slice is safe on disk, and
is never written again. So whatever ends a build, nothing half-written is ever read, and the next
one goes on. A slice that cannot be decoded is journaled with its reason; too many stop the build.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import UserError
from ich.base.files import csv_text, lock, write_text
from ich.base.memory import return_memory
from ich.base.progress import ProgressCallback
from ich.base.workers import run_parallel, worker_count
from ich.data.cache_folder import (
    FAILED,
    UNKNOWN,
    CacheFolder,
    JournalWriter,
    make_cache_folder,
)
from ich.data.content import NOT_READ, read_crcs
from ich.data.decode import DECODER_VERSION, DecodeRequest, checksum, decode_to_cache
from ich.data.store import SliceStore

_CHUNK = 32  # slices a process takes at a time
_SLICES_PER_START = 500  # a process takes about as long to start as this many to decode


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
    progress: ProgressCallback | None = None,
) -> Cache:
    """Opens the cache of these images, after decoding those that are new or have changed.

    Args:
        images: distinct images, columns `image_id` and `path` in the store; an empty path is an
            image without a file.
        store: where the files lie.
        folder: where all caches are.
        size: S, the side of a decoded slice in pixels.
        max_quarantine: the share of images that may be undecodable.
        workers: decoding processes; None is one per core.
        progress: called with (slices done, slices to decode) while building.

    Raises:
        UserError: more than `max_quarantine` of the images cannot be decoded, or the disk is full.
            What has been decoded is kept.
    """
    paths = images["path"].tolist()
    make_cache_folder(folder)
    targets = CacheFolder.find(store, paths, folder, size)
    del paths
    for target, stale in targets:
        with _disk_errors(target.path):
            target.path.mkdir(exist_ok=True)
            # One build at a time: which rows are free is read from the journal.
            with lock(target.lock):
                target.mend_index()
                due = _compare(images["path"].tolist(), stale, target, store, workers)
                # A sweep of the data set that it belongs to must not be given another's slices.
                if due.replaced and target != targets[-1][0] and not target.is_of(store):
                    continue
                if due.todo:
                    # Files that failed before, and are the same, count against the limit as well.
                    allowed = max_quarantine * len(images) - due.failed
                    _decode(store, target, due.todo, due.rows, allowed, workers, progress)
                del due
                return_memory()
                cache, absent = _open(images, target)
                _publish(cache, store, size)
        break
    # Last, when what was decoded stands in the journal and every reason in quarantine.csv.
    check_quarantine(cache.quarantine["reason"].tolist(), len(images), absent, max_quarantine)
    return cache


@dataclass(frozen=True)
class _Due:
    """What a build has to do. todo: paths, sorted. rows: int64, of each. failed: images that will
    not be tried again. replaced: files that were decoded before, and have other bytes now."""

    todo: list[str]
    rows: np.ndarray
    failed: int
    replaced: int


def _compare(
    paths: list[str],
    stale: list[str],
    target: CacheFolder,
    store: SliceStore,
    workers: int | None,
) -> _Due:
    """Compares the files with the journal, and notes there which of them have another date and the
    same bytes."""
    entries = target.entries(paths)
    outdated = entries.outdated(paths, store, set(stale))
    # Where these files were decoded before, their bytes tell whether anything but the date is new.
    position = {paths[i]: i for i in outdated if entries.crc[i] != NOT_READ}
    unchanged, lines, replaced = set(), [], 0
    for location, crc in read_crcs(store, list(position), workers):
        i = position[location.path]
        if entries.row[i] >= 0 and crc == entries.crc[i]:
            unchanged.add(i)
            lines.append(entries.line(i, location))
        elif entries.row[i] >= 0:
            replaced += 1
    target.append(lines)
    outdated = [i for i in outdated if i not in unchanged]
    failed = int((np.delete(entries.row, outdated) < 0).sum())
    # Sorted: which row a file gets does not depend on the order of the cohort.
    todo = sorted(paths[i] for i in outdated)
    due = _Due(todo, entries.free_rows(len(todo)), failed, replaced)
    del entries, outdated, position, lines  # hundreds of MB in a large cohort
    return_memory()
    return due


def read_cache(images: pd.DataFrame, target: CacheFolder | None, folder: Path) -> Cache:
    """Opens the cache of these images as `build_cache` left it; looks at no file of the data set.

    Args:
        images: as for `build_cache`.
        target: where it lies; None if nothing tells, for nothing has been decoded.
        folder: where all caches are.

    Raises:
        UserError: some of the images are neither cached nor quarantined.
    """
    cache, absent = _open(images, target) if target else (None, len(images))
    if cache is None or absent:
        raise UserError(
            f"{absent:,} of the {len(images):,} slices are not decoded yet under {folder}. "
            f"Run `ich prepare` with the same data settings first."
        )
    return cache


def verify_cache(
    store: SliceStore,
    target: CacheFolder,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[list[str], list[str]]:
    """Reads every slice once, in order, and then the files that they were decoded from; the next
    build decodes again what is not as it was.

    Returns:
        Paths, in the store, of the images whose slice does not match its checksum; and of those
        whose file has other bytes than when it was decoded.

    Raises:
        UserError: the disk is full.
    """
    damaged, changed = [], []
    with _disk_errors(target.path), lock(target.lock):
        target.mend_index()
        # The last line of a path counts: the rows of replaced files are not checked.
        latest = {path: (row, value, crc) for row, path, _, value, _, crc in target.lines()}
        # By row: the disk is read once from end to end.
        entries = sorted((row, value, path) for path, (row, value, _) in latest.items() if row >= 0)
        crcs = {path: crc for path, (_, _, crc) in latest.items() if crc != NOT_READ}
        del latest
        length, total = target.slice_bytes, len(entries) + len(crcs)

        def tell(done: int) -> None:
            if progress and (done % _CHUNK == 0 or done == total):
                progress(done, total)

        # "a+": where the file is gone, an empty one says of every slice that it is damaged.
        with target.slices.open("a+b", buffering=0) as slices:
            for done, (row, value, path) in enumerate(entries, 1):
                data = os.pread(slices.fileno(), length, row * length)
                if len(data) != length or checksum(data) != value:
                    damaged.append(path)
                tell(done)
        read = read_crcs(store, list(crcs), workers)
        for done, (location, crc) in enumerate(read, len(entries) + 1):
            # One that is gone, or cannot be read, is seen by the build.
            if crc not in (NOT_READ, crcs[location.path]):
                changed.append(location.path)
            tell(done)
        # The row stays as it is: a training may have it mapped. The next build takes another.
        again = dict.fromkeys([*damaged, *changed])
        target.append([(UNKNOWN, path, "", 0, "", NOT_READ) for path in again])
    return damaged, sorted(changed)


def _decode(
    store: SliceStore,
    target: CacheFolder,
    todo: list[str],
    rows: np.ndarray,
    allowed: float,
    workers: int | None,
    progress: ProgressCallback | None,
) -> None:
    """Decodes `todo` into `rows`; stops when more than `allowed` of them failed."""
    # Before the first slice: a disk that fills up midway fails whatever else writes there, too.
    _require_space(target.path, len(todo) * target.slice_bytes)
    with target.slices.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for processes that a killed build left behind
        # Room for all at once, as a hole, for processes fill the rows in any order. Never shorter:
        # rows of other images may follow.
        file.truncate(max(file.tell(), (int(rows[-1]) + 1) * target.slice_bytes))
    # Located when due: all locations of a large cohort at once would take too much memory.
    requests = (
        DecodeRequest(
            store.root,
            store.locate(todo[start : start + _CHUNK]),
            rows[start : start + _CHUNK].tolist(),
            str(target.slices),
            target.size,
            os.getpid(),
        )
        for start in range(0, len(todo), _CHUNK)
    )
    processes = worker_count(workers, len(todo), _SLICES_PER_START)
    done = failed = 0
    if progress:
        progress(done, len(todo))
    # Left in this order: no process decodes any more when the journal is written for the last time.
    with (
        JournalWriter(target) as journal,
        closing(run_parallel(decode_to_cache, requests, processes)) as batches,
    ):
        for results in batches:
            journal.add(results)
            done += len(results)
            failed += sum(result.row < 0 for result in results)
            if progress:
                progress(done, len(todo))
            # At once, not at the end: with a wrong data.root every one of its files would be tried.
            if failed > allowed:
                break


def _open(images: pd.DataFrame, target: CacheFolder) -> tuple[Cache, int]:
    """The cache of these images, and of how many of them it knows nothing."""
    entries, size = target.entries(images["path"].tolist()), target.size
    return_memory()
    ids, good, bad = images["image_id"], entries.row >= 0, entries.row == FAILED
    # An empty file cannot be mapped, and a cohort may be all in quarantine.
    hu = np.zeros((0, size, size), np.int16)
    if count := target.count_rows():
        # Read-only and shared: all jobs of a sweep have the same pages in the system's cache.
        hu = np.memmap(target.slices, np.int16, "r", shape=(count, size, size))
    reasons = [entries.reasons[code] for code in entries.reason[bad]]
    cache = Cache(
        hu=hu,
        row=dict(zip(ids[good], entries.row[good].tolist(), strict=True)),
        quarantine=pd.DataFrame({"image_id": ids[bad].to_numpy(), "reason": reasons}),
        folder=target.path,
    )
    return cache, int((entries.row == UNKNOWN).sum())


def _publish(cache: Cache, store: SliceStore, size: int) -> None:
    """Writes the two files for people."""
    meta = {
        "root": str(store.root.resolve()),
        "size": size,
        "decoder": DECODER_VERSION,
        "slices": len(cache.row),
        "quarantined": len(cache.quarantine),
    }
    write_text(cache.folder / "quarantine.csv", csv_text(cache.quarantine))
    write_text(cache.folder / "meta.json", json.dumps(meta, indent=1))


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UserError(
            f"the decoded slices need {needed / 1e9:.1f} GB under {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free. Set data.cache_dir to a larger disk, or lower "
            f"data.cache_size or data.subset."
        )


def check_quarantine(reasons: list[str], total: int, absent: int, allowed: float) -> None:
    """Refuses to go on without too many of the images.

    Args:
        reasons: why, of each image that cannot be used.
        total: images.
        absent: those that were not looked at, because the decoding stopped before.
        allowed: share of the images.

    Raises:
        UserError: with the commonest reasons.
    """
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
def _disk_errors(folder: Path) -> Iterator[None]:
    """Says in one sentence what a full disk or a killed process means; nothing is lost by them."""
    kept = "What has been decoded is kept: run the same command again to go on."
    try:
        yield
    except OSError as error:
        # A used-up quota, or a file system that takes no file so large, is a full disk here.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"the decoded slices cannot be written to {folder} ({error.strerror or error}). "
            + ("Free space there, or set" if full else "Set")
            + f" data.cache_dir to a folder on another disk. {kept}"
        ) from error
    # Raised when a process ends without a word, as by the kernel where memory runs out.
    except BrokenProcessPool:
        raise UserError(
            f"a decoding process was killed, probably for want of memory. Set data.workers to a "
            f"smaller number. {kept}"
        ) from None

"""Decoded slices on disk: int16 HU `[N, S, S]`, memory-mapped, shared by all jobs of a sweep.

Windows, augmentation and normalization come later, on the device, so a sweep over them decodes
nothing again. A build goes on beside its final place under a lock and is renamed when complete:
what exists is whole. A slice that cannot be decoded is quarantined with its reason; too many of
them stop the build.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from ich.config import UserError
from ich.dicom import HU_MIN, DicomError, read_hu
from ich.pool import available_cores, run_parallel
from ich.store import SliceStore

DECODER_VERSION = 1  # raise it when the same file would decode to other values
_CHUNK = 64  # slices a worker takes at a time
_SLICES_PER_WORKER = 500  # a process takes about as long to start as this many take to decode

Progress = Callable[[int, int], None]

# What reading a file or an archive's member raises: damage, encryption, unknown compression.
_UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    NotImplementedError,
    EOFError,
    KeyError,
)


@dataclass(frozen=True)
class Cache:
    """An open cache.

    hu: int16 memory map [N, S, S], HU.
    row: image id -> position in `hu`; quarantined images are absent.
    quarantine: `image_id`, `reason`.
    folder: where it lies.
    """

    hu: np.ndarray
    row: dict[str, int]
    quarantine: pd.DataFrame
    folder: Path


def open_cache(
    images: pd.DataFrame,
    store: SliceStore,
    folder: Path,
    size: int,
    max_quarantine: float,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Opens the cache of these images, building it first if it is not there.

    Args:
        images: distinct images, columns `image_id` and `path` in the store.
        store: where the files lie.
        folder: the place of all caches.
        size: S, the side of a decoded slice in pixels.
        max_quarantine: the share of images that may be undecodable.
        workers: decoding processes; None is one per core.
        progress: called with (slices done, slices in all) while building.

    Raises:
        UserError: more than `max_quarantine` of the images cannot be decoded.
    """
    images = images.sort_values("image_id")
    place = folder / f"hu{size}-{_fingerprint(images, store, size)}"
    if not (place / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f"{place.name}.lock"):
            if not (place / "meta.json").exists():
                _build(images, store, place, size, max_quarantine, workers, progress)
    cache = _open(place)
    _check_quarantine(cache.quarantine["reason"].tolist(), len(images), max_quarantine)
    return cache


def _fingerprint(images: pd.DataFrame, store: SliceStore, size: int) -> str:
    digest = hashlib.sha256(f"{DECODER_VERSION}|{size}|{store.identity()}".encode())
    digest.update("\n".join(images["image_id"] + " " + images["path"]).encode())
    return digest.hexdigest()[:12]


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; whoever comes second waits."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open(place: Path) -> Cache:
    index = pd.read_csv(place / "index.csv")
    return Cache(
        hu=np.load(place / "hu.npy", mmap_mode="r"),
        row=dict(zip(index["image_id"], index["row"], strict=True)),
        quarantine=pd.read_csv(place / "quarantine.csv"),
        folder=place,
    )


def _build(
    images: pd.DataFrame,
    store: SliceStore,
    place: Path,
    size: int,
    max_quarantine: float,
    workers: int | None,
    progress: Progress | None,
) -> None:
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _require_space(part, len(images) * size * size * 2)
        reasons = _decode_all(images, store, part / "hu.npy", size, workers, progress)
        _check_quarantine(list(reasons.values()), len(images), max_quarantine)
        ids = images["image_id"].to_numpy()
        good = [i for i in range(len(ids)) if i not in reasons]
        pd.DataFrame({"image_id": ids[good], "row": good}).to_csv(part / "index.csv", index=False)
        bad = [(ids[i], reason) for i, reason in sorted(reasons.items())]
        pd.DataFrame(bad, columns=["image_id", "reason"]).to_csv(
            part / "quarantine.csv", index=False
        )
        meta = {"decoder": DECODER_VERSION, "size": size, "slices": len(good), "bad": len(bad)}
        (part / "meta.json").write_text(json.dumps(meta))
        part.rename(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UserError(
            f"the decoded slices need {needed / 1e9:.1f} GB under {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free. Set data.cache_dir to a larger disk, or lower "
            f"data.cache_size or data.subset."
        )


def _check_quarantine(reasons: list[str], total: int, allowed: float) -> None:
    if len(reasons) > allowed * total:
        common = Counter(reasons).most_common(10)
        raise UserError(
            f"{len(reasons):,} of {total:,} slices cannot be used, more than data.max_quarantine="
            f"{allowed:g} allows. The commonest reasons: "
            + "; ".join(f"{text} ({n:,})" for text, n in common)
            + ". Mend data.root, or raise data.max_quarantine to go on without them."
        )


def _decode_all(
    images: pd.DataFrame,
    store: SliceStore,
    target: Path,
    size: int,
    workers: int | None,
    progress: Progress | None,
) -> dict[int, str]:
    """Decodes every image into its row of `target`; returns row -> reason for those that fail."""
    paths = images["path"].tolist()
    np.lib.format.open_memmap(target, "w+", np.int16, (len(paths), size, size)).flush()
    chunks = [range(i, min(i + _CHUNK, len(paths))) for i in range(0, len(paths), _CHUNK)]
    jobs = [(store.root, [paths[i] for i in rows], rows.start, target, size) for rows in chunks]
    workers = workers or min(available_cores(), -(-len(paths) // _SLICES_PER_WORKER))
    reasons: dict[int, str] = {}
    done = 0
    for count, failed in run_parallel(_decode_chunk, jobs, workers):
        done += count
        reasons |= failed
        if progress:
            progress(done, len(paths))
    return reasons


_Job = tuple[Path, list[str], int, Path, int]


def _decode_chunk(job: _Job) -> tuple[int, dict[int, str]]:
    root, paths, first, target, size = job
    hu = np.load(target, mmap_mode="r+")
    failed: dict[int, str] = {}
    for row, path in enumerate(paths, start=first):
        try:
            hu[row] = resize_area(square(read_hu(_read_bytes(root, path))), size)
        except DicomError as error:
            failed[row] = str(error)
    hu.flush()
    return len(paths), failed


def _read_bytes(root: Path, path: str) -> bytes:
    if not path:
        raise DicomError("the file is missing")
    try:
        if root.is_dir():
            if not (file := root / path).is_file() or file.is_symlink():
                raise DicomError("not a regular file")
            return file.read_bytes()
        return _archive(root).read(path)
    except _UNREADABLE as error:
        raise DicomError(f"cannot be read ({type(error).__name__})") from None


@lru_cache(maxsize=1)
def _archive(root: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(root)


def square(hu: np.ndarray) -> np.ndarray:
    """Pads the shorter side of [H, W] with air on both ends, so that resizing keeps the aspect."""
    height, width = hu.shape
    side = max(height, width)
    if height == width:
        return hu
    out = np.full((side, side), HU_MIN, hu.dtype)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = hu
    return out


def resize_area(hu: np.ndarray, size: int) -> np.ndarray:
    """Exact area average of a square slice: int16 [S, S] -> int16 [size, size], HU."""
    if hu.shape[0] == size:
        return hu
    weights = _area_weights(hu.shape[0], size)
    return np.rint(weights @ hu.astype(np.float32) @ weights.T).astype(np.int16)


@lru_cache(maxsize=8)
def _area_weights(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: the share of each source pixel in each target pixel."""
    edges = np.arange(target + 1) * (source / target)
    left = np.maximum(edges[:-1, None], np.arange(source)[None])
    right = np.minimum(edges[1:, None], np.arange(source)[None] + 1)
    overlap = np.maximum(right - left, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)

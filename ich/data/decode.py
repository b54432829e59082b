"""What a decoding process runs: files -> slices of one size -> their places in the cache.

Apart from `cache`, because a new process imports this, and pandas would double the time it takes.
"""

from __future__ import annotations

import fcntl
import math
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ich.data.dicom import HU_MIN, DicomError, read_hu, read_slice
from ich.data.store import Location, Unreadable, read_bytes

DECODER_VERSION = 3  # raise it when the same file would decode to other values


class Chunk(NamedTuple):
    """Files to decode, and the row of each in `target`. builder: the id of the building process."""

    root: Path
    locations: list[Location]
    rows: list[int]
    target: str
    size: int
    builder: int


class Decoded(NamedTuple):
    """What became of one file: its row and checksum, or row -1 and the reason."""

    path: str
    signature: str
    row: int
    checksum: int = 0
    reason: str = ""
    again: bool = False  # another try may succeed


def decode_chunk(chunk: Chunk) -> list[Decoded]:
    """Decodes each file and writes it at its row; no row is touched by two processes.

    Raises:
        OSError: the disk is full.
        RuntimeError: the building process is gone, and another may own the rows by now.
    """
    _keep_memory()
    target = os.open(chunk.target, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Held while writing: the next build waits for it, should ours be killed meanwhile.
        fcntl.flock(target, fcntl.LOCK_SH)
        if chunk.builder not in (os.getpid(), os.getppid()):
            raise RuntimeError("the build was ended")
        return [
            _decode_into(target, chunk.root, location, row, chunk.size)
            for location, row in zip(chunk.locations, chunk.rows, strict=True)
        ]
    finally:
        os.close(target)


def _decode_into(target: int, root: Path, location: Location, row: int, size: int) -> Decoded:
    path, signature = location.path, location.signature
    try:
        hu = resize_area(square(read_hu(read_bytes(root, location))), size)
    except DicomError as error:
        again = isinstance(error, Unreadable)
        return Decoded(path, signature, -1, 0, " ".join(str(error).split()), again)
    # Not through a memory map: a full disk is then an OSError and no fatal signal.
    data = memoryview(np.ascontiguousarray(hu).data).cast("B")
    written = 0
    while written < len(data):
        written += os.pwrite(target, data[written:], row * len(data) + written)
    return Decoded(path, signature, row, checksum(data))


class Asked(NamedTuple):
    """Files to read into memory, once per side in `sizes`, pixels. numbers: what each is called."""

    root: Path
    locations: list[Location]
    numbers: list[int]
    sizes: tuple[int, ...]


class Read(NamedTuple):
    """One file that was asked for.

    hu: int16 [S, S] for each side S, HU; none if there is a reason why not. study, series,
    position: as in `ich.data.dicom.Slice`. logits: float32 [M, L] of M networks, if it was
    predicted where it was read (`ich.inference.session`).
    """

    number: int
    hu: dict[int, np.ndarray]
    study: str = ""
    series: str = ""
    position: float = math.nan
    reason: str = ""
    logits: np.ndarray | None = None


def read_chunk(asked: Asked) -> list[Read]:
    """Decodes files as for the cache, and keeps nothing."""
    _keep_memory()
    found = []
    for location, number in zip(asked.locations, asked.numbers, strict=True):
        try:
            one = read_slice(read_bytes(asked.root, location))
        except DicomError as error:
            found.append(Read(number, {}, reason=" ".join(str(error).split())))
            continue
        whole = square(one.hu)
        hu = {size: resize_area(whole, size) for size in asked.sizes}
        found.append(Read(number, hu, one.study, one.series, one.position))
    return found


@cache
def _keep_memory() -> None:
    """Keeps freed memory in this process for the next slice.

    glibc gives blocks of a slice's size back to the system each time, and faulting their pages in
    again took longer than decoding. Freeing one large block, never touched, raises its threshold
    (mallopt(3), M_MMAP_THRESHOLD); other allocators take no notice.
    """
    np.empty(24 << 20, np.uint8)


def checksum(data: bytes | memoryview) -> int:
    """The sum of a slice's 64-bit words modulo 2^64, which no change of a single byte survives.

    (CRC-32 took 8 % of the time of a slice of 320 x 320; this takes 1 %.)
    """
    words = np.frombuffer(data, "<u8", len(data) // 8)
    rest = int.from_bytes(data[8 * len(words) :], "little")
    return (int(np.add.reduce(words)) + rest) % (1 << 64)


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
    """Exact area average of a square slice: int16 [S, S] -> int16 [size, size], HU.

    512 -> 320 is 8 -> 5, repeated 64 times: small products, block by block, cost a twentieth of
    one with the whole, mostly empty matrix. Sides without a common factor are a single block.
    """
    side = hu.shape[0]
    if side == size:
        return hu
    blocks = math.gcd(side, size)
    weights = area_weights(side // blocks, size // blocks)
    rows = weights @ hu.astype(np.float32).reshape(blocks, -1, side)
    out: np.ndarray = (
        rows.reshape(size * blocks, -1) @ weights.T
    )  # as one product: many small ones took longer
    np.rint(out, out=out)
    return out.astype(np.int16).reshape(size, size)


@lru_cache(maxsize=8)
def area_weights(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: the share of each source pixel in each target pixel."""
    edges = np.arange(target + 1) * (source / target)
    left = np.maximum(edges[:-1, None], np.arange(source)[None])
    right = np.minimum(edges[1:, None], np.arange(source)[None] + 1)
    overlap = np.maximum(right - left, 0)
    return np.asarray(overlap / overlap.sum(1, keepdims=True), np.float32)

"""What a decoding process runs: files -> slices in HU, into memory or into the rows of a cache.

Apart from `cache`, because a new process imports this, and pandas would double the time it takes.
It knows files and HU alone: what is predicted from a slice is the business of `ich.inference`.
"""

from __future__ import annotations

import fcntl
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from ich.base.memory import keep_slice_memory
from ich.data.dicom import HU_MIN, DicomError, read_hu, read_slice
from ich.data.store import Location, Unreadable, read_dicom

DECODER_VERSION = 4  # raise it when the same file would decode to other values


class DecodeRequest(NamedTuple):
    """Files to decode into the cache `target`, and the row of each; `size` is a slice's side there,
    pixels. builder: the id of the building process."""

    root: Path
    locations: list[Location]
    rows: list[int]
    target: str
    size: int
    builder: int


class DecodeResult(NamedTuple):
    """What became of one file: its row and checksum, or row -1 and the reason. crc: CRC-32 of its
    bytes, -1 if they could not be read. again: another try may succeed."""

    path: str
    signature: str
    row: int
    checksum: int = 0
    reason: str = ""
    again: bool = False
    crc: int = -1


def decode_to_cache(request: DecodeRequest) -> list[DecodeResult]:
    """Decodes each file and writes it at its row; no row is touched by two processes.

    Raises:
        OSError: the disk is full.
        RuntimeError: the building process is gone, and another may own the rows by now.
    """
    keep_slice_memory()
    target = os.open(request.target, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Held while writing: the next build waits for it, should ours be killed meanwhile.
        fcntl.flock(target, fcntl.LOCK_SH)
        # Asked with the lock in hand: while it was waited for, another build may have begun. An
        # orphan has another parent; the build itself decodes too.
        if request.builder not in (os.getpid(), os.getppid()):
            raise RuntimeError("the build was ended")
        return [
            _decode_into(target, request.root, location, row, request.size)
            for location, row in zip(request.locations, request.rows, strict=True)
        ]
    finally:
        os.close(target)


def _decode_into(target: int, root: Path, location: Location, row: int, size: int) -> DecodeResult:
    path, signature, crc = location.path, location.signature, -1
    try:
        source = read_dicom(root, location)
        crc = isal_zlib.crc32(source)
        hu = resize_area(square(read_hu(source)), size)
    except DicomError as error:
        again = isinstance(error, Unreadable)
        return DecodeResult(path, signature, -1, 0, error.reason, again, crc)
    # Not through a memory map: a full disk is then an OSError and no fatal signal.
    data = memoryview(np.ascontiguousarray(hu).data).cast("B")
    # A write may take less than it is given, as on a disk with little room left.
    written = 0
    while written < len(data):
        written += os.pwrite(target, data[written:], row * len(data) + written)
    return DecodeResult(path, signature, row, checksum(data), crc=crc)


class ReadRequest(NamedTuple):
    """Files to read into memory, once per side in `sizes`, pixels. numbers: what each is called."""

    root: Path
    locations: list[Location]
    numbers: list[int]
    sizes: tuple[int, ...]


class ReadResult(NamedTuple):
    """One file that was to be read.

    hu: int16 [S, S] for each side S, HU; none if there is a reason why not. study, series,
    position: as in `ich.data.dicom.Slice`.
    """

    number: int
    hu: dict[int, np.ndarray]
    study: str = ""
    series: str = ""
    position: float = math.nan
    reason: str = ""


def read_slices(request: ReadRequest) -> list[ReadResult]:
    """Decodes files as for the cache, and keeps nothing."""
    keep_slice_memory()
    results = []
    for location, number in zip(request.locations, request.numbers, strict=True):
        try:
            decoded = read_slice(read_dicom(request.root, location))
        except DicomError as error:
            results.append(ReadResult(number, {}, reason=error.reason))
            continue
        # Padded once, then averaged to each side from the full resolution.
        whole = square(decoded.hu)
        hu = {size: resize_area(whole, size) for size in request.sizes}
        results.append(ReadResult(number, hu, decoded.study, decoded.series, decoded.position))
    return results


def checksum(data: bytes | memoryview) -> int:
    """The sum of a slice's 64-bit words modulo 2^64, which no change of a single byte survives.

    (CRC-32 took 8 % of the time of a slice of 320 x 320; this takes 1 %.)
    """
    # A fixed byte order: a cache read on another machine has the same sums.
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
    # As one product: many small ones took longer.
    out: np.ndarray = rows.reshape(size * blocks, -1) @ weights.T
    # astype cuts towards 0: soft tissue would lose, and air gain, half a HU on average.
    np.rint(out, out=out)
    return out.astype(np.int16).reshape(size, size)


@lru_cache(maxsize=8)
def area_weights(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: the share of each source pixel in each target pixel."""
    edges = np.arange(target + 1) * (source / target)
    left = np.maximum(edges[:-1, None], np.arange(source)[None])
    right = np.minimum(edges[1:, None], np.arange(source)[None] + 1)
    overlap = np.maximum(right - left, 0)
    # By their own sum, so that a constant slice stays what it is.
    return np.asarray(overlap / overlap.sum(1, keepdims=True), np.float32)

"""Compressed frames: decoded whole, or refused.

Decoders are lenient. Of a JPEG Lossless stream that was cut in the middle, libjpeg decodes half a
slice and makes up the rest; OpenJPEG does so where the tail became zeros. So a stream is walked
before it is decoded (its size, its one scan, its end marker), and whether the decoder used all of
its data and no more is asked of the decoder itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Decode = Callable[[bytes], np.ndarray]  # a frame's stream -> integers [H, W]

_EOI = b"\xff\xd9"  # ends JPEG, JPEG-LS (EOI) and JPEG 2000 (EOC) alike
_SOS, _DHT, _SOT, _COD = 0xDA, 0xC4, 0x90, 0x52
# The byte after 0xFF in a scan's data: 0 is stuffed (JPEG, ITU-T T.81 B.1.1.5), or anything below
# 0x80 (JPEG-LS, T.87 A.1), and 0xD0 to 0xD7 are restarts. Any other ends the scan.
_END_OF_SCAN = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
_END_OF_LS_SCAN = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")
# A code of ones alone is none (T.81 annex C): whoever still reads symbols there cannot go on. It is
# longer than a code and the bits after it.
_ONES = b"\xff\x00" * 16
_ZEROS = bytes(16)
# Bytes of padding that an encoder may leave after its last pixel.
_PADDING = 8
_RUN = 16  # bytes, each equal to the one before the last
_MAX_TILES, _MAX_LAYERS = 4096, 256  # of JPEG 2000; a slice has one, and a dozen at most


class StreamError(RuntimeError):
    """Why a compressed stream yields no slice. Holds nothing of the file's but numbers."""


class _Jpeg(NamedTuple):
    """A JPEG or JPEG-LS stream of one scan: until its data, these, and whether one of its Huffman
    tables knows a code of ones."""

    head: bytes
    data: bytes
    complete: bool


def decode_jpeg(frame: bytes, shape: tuple[int, int], decode: Decode) -> np.ndarray:
    """Lossless or sequential JPEG (ITU-T T.81).

    Args:
        frame: the encapsulated bytes of one frame.
        shape: Rows and Columns of the header.
        decode: what decodes a stream.

    Raises:
        StreamError: the stream is of another size, cut, or holds more than the pixels.
    """
    head, data, complete = _walk_jpeg(frame, shape, _END_OF_SCAN)
    # Raises if the decoder is short of data, for what follows them is no code.
    whole = decode(head + data + _ONES + _EOI)
    if complete and not np.array_equal(whole, decode(head + data + _ZEROS + _EOI)):
        raise StreamError("the stream is cut: it ends before the last pixel")
    if len(data) > 2 * _PADDING:
        # Without its last bytes it must not decode to the same. 0xFF would swallow what follows.
        shorter = head + data[:-_PADDING].rstrip(b"\xff") + _ONES + _EOI
        if (tried := _tried(shorter, decode)) is not None and np.array_equal(whole, tried):
            raise StreamError("the stream goes on after the last pixel, so its data are damaged")
    return whole


def decode_jpeg_ls(frame: bytes, shape: tuple[int, int], decode: Decode) -> np.ndarray:
    """JPEG-LS (ITU-T T.87); CharLS refuses what is short of data or has too many itself."""
    head, data, _ = _walk_jpeg(frame, shape, _END_OF_LS_SCAN)
    return decode(head + data + _EOI)


def decode_jpeg_2000(frame: bytes, shape: tuple[int, int], decode: Decode) -> np.ndarray:
    """JPEG 2000 (ITU-T T.800), also high-throughput; OpenJPEG refuses what is short of data."""
    # Some writers put the stream into a JP2 file, which DICOM does not know (PS3.5 A.4.4).
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        raise StreamError("no JPEG 2000 stream")
    stream = _ended(frame[start:])
    last = _walk_jpeg_2000(stream, shape)
    whole = decode(stream)
    body = stream[: -len(_EOI)]
    # Of compressed data such a run is as good as none. It is what a tail of zeros leaves.
    if body[-_RUN:] == body[-_RUN - 2 : -2]:
        run = next((n for n in range(_RUN, len(body) - 2) if body[-n - 1] != body[-n - 3]), _RUN)
        # Sound where it is packets without content, as of last rows that are of one value. Then
        # none of them can be missed, nor be something else.
        length = max(int.from_bytes(body[last + 6 : last + 10]) - _PADDING, 0).to_bytes(4)
        shorter = body[: last + 6] + length + body[last + 10 : -_PADDING] + _EOI
        other = body[:-run] + b"\xaa" * run + _EOI
        if any(_tried(stream, decode) is not None for stream in (shorter, other)):
            raise StreamError("the stream ends in a run that is no data, so it was cut")
    return whole


def decode_rle(frame: bytes, shape: tuple[int, int], _: Decode) -> np.ndarray:
    """Run lengths (PS3.5 annex G): 16 bits as a segment of high bytes and one of low bytes."""
    _check_length(frame, shape)
    count, low, high = (int.from_bytes(frame[n : n + 4], "little") for n in (0, 8, 4))
    if count != 2 or not 64 <= high <= low <= len(frame):
        raise StreamError(f"a stream of {count} RLE segments, not 2 in order")
    size = shape[0] * shape[1]
    stored = np.empty((size, 2), np.uint8)
    stored[:, 0] = _unpack(frame[low:], size)
    stored[:, 1] = _unpack(frame[high:low], size)
    return stored.view("<u2").reshape(shape)


def _unpack(segment: bytes, size: int) -> np.ndarray:
    """uint8 [size] of a segment (PS3.5 G.3.2)."""
    unpacked, at = bytearray(), 0
    while len(unpacked) < size and at + 1 < len(segment):
        n = segment[at]
        if n < 128:
            unpacked += segment[at + 1 : at + 2 + n]
            at += 2 + n
        elif n > 128:
            unpacked += segment[at + 1 : at + 2] * (257 - n)
            at += 2
        else:
            at += 1
    if len(unpacked) != size or at < len(segment) - _PADDING:
        raise StreamError(f"an RLE segment of other than {size:,} bytes, so it was cut")
    return np.frombuffer(unpacked, np.uint8)


def _tried(stream: bytes, decode: Decode) -> np.ndarray | None:
    try:
        return decode(stream)
    except Exception:  # decoder plug-ins raise their own types
        return None


def _check_length(frame: bytes, shape: tuple[int, int]) -> None:
    # No encoding makes more of a slice than its pixels and little beside. More would take time.
    if len(frame) > 4 * shape[0] * shape[1] + 65_536:
        raise StreamError(f"a stream of {len(frame):,} bytes for {shape[0]} x {shape[1]} pixels")


def _check_shape(found: tuple[int, int], components: int, shape: tuple[int, int]) -> None:
    # Before it is decoded, because a decoder allocates what the stream asks for.
    if found != shape or components != 1:
        raise StreamError(
            f"a stream of {found[0]} x {found[1]} pixels and {components} component(s), not "
            f"{shape[0]} x {shape[1]} and 1"
        )


def _ended(stream: bytes) -> bytes:
    """The stream without what pads it to an even length: zeros, or from some writers ones."""
    stripped = stream.rstrip(b"\0\xff")
    if not stripped.endswith(_EOI):
        raise StreamError("the stream is cut: it does not end with its end marker")
    return stripped


def _walk_jpeg(frame: bytes, shape: tuple[int, int], end: re.Pattern[bytes]) -> _Jpeg:
    """Through the marker segments (T.81 B.1.1) and the data of the one scan.

    A second scan would be decoded over the first: a stream of many takes minutes.
    """
    _check_length(frame, shape)
    if not frame.startswith(b"\xff\xd8"):
        raise StreamError("no JPEG stream")
    stream, at, size, complete = _ended(frame), 2, False, False
    while stream[at : at + 1] == b"\xff" and at + 9 <= len(stream):
        marker = stream[at + 1]
        if marker == 0xFF:  # any number of these may come before a marker
            at += 1
            continue
        segment = stream[at + 4 : at + 2 + int.from_bytes(stream[at + 2 : at + 4])]
        at += 4 + len(segment)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (_DHT, 0xC8, 0xCC)):
            height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
            _check_shape((height, width), segment[5], shape)
            size = True
        elif marker == _DHT:
            complete |= _knows_ones(segment)
        elif marker == _SOS:
            if not size:
                break
            if (found := end.search(stream, at)) is None or found.end() != len(stream):
                raise StreamError("the stream has more than one scan")
            return _Jpeg(stream[:at], stream[at : found.start()], complete)
    raise StreamError("no frame header in the JPEG stream")


def _knows_ones(segment: bytes) -> bool:
    """Whether a table of a DHT segment (T.81 B.2.4.2) has no code left for ones alone."""
    at = 0
    while at + 17 <= len(segment):
        counts = segment[at + 1 : at + 17]
        if sum(count << (15 - n) for n, count in enumerate(counts)) >= 1 << 16:
            return True
        at += 17 + sum(counts)
    return False


def _walk_jpeg_2000(stream: bytes, shape: tuple[int, int]) -> int:
    """Through the main header and the tile-parts (T.800 annex A), to where the last one begins."""
    _check_length(stream, shape)
    x1, y1, x0, y0, width, height, left, top = (
        int.from_bytes(stream[n : n + 4]) for n in range(8, 40, 4)
    )
    _check_shape((y1 - y0, x1 - x0), int.from_bytes(stream[40:42]), shape)
    tiles = -(-(x1 - left) // max(width, 1)) * -(-(y1 - top) // max(height, 1))
    at, layers = 2, 1
    while at + 10 < len(stream) and stream[at] == 0xFF and stream[at + 1] != _SOT:
        if stream[at + 1] == _COD:
            layers = int.from_bytes(stream[at + 6 : at + 8])
        at += 2 + int.from_bytes(stream[at + 2 : at + 4])
    if tiles > _MAX_TILES or layers > _MAX_LAYERS:
        raise StreamError(f"a stream of {tiles:,} tiles and {layers:,} layers")
    last, end = at, len(stream) - len(_EOI)
    while at < end and stream[at : at + 2] == bytes((0xFF, _SOT)):
        last, length = at, int.from_bytes(stream[at + 6 : at + 10])
        at = at + length if length else end  # 0 says: all that there is
    if at != end or last == 2:
        raise StreamError("the stream is cut: its parts do not end at its end marker")
    return last

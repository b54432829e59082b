"""Compressed frames: decoded whole, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pydicom
import pytest
from dicom_files import dataset, encoded
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from ich.data.dicom import DicomError, read_hu
from ich.data.pixels import codecs
from ich.data.pixels.codecs import StreamError, decode_jpeg, decode_jpeg_2000, decode_rle


def head(side: int = 64) -> np.ndarray:
    """int16 stored values with intercept -1024: noisy air and brain, and rows of one value."""
    y, x = np.mgrid[:side, :side] - side / 2
    inside = np.hypot(x, y) < side * 0.4
    noise = np.random.default_rng(0).normal(0, 12, (side, side))
    stored = (np.where(inside, 1064, 24) + noise).astype(np.int16)
    stored[-4:] = 24
    return stored


def jpeg_lossless(stored: np.ndarray, lengths: tuple[int, int] = (5, 17)) -> bytes:
    """Process 14, predictor 1 (ITU-T T.81 annex H): each difference from the pixel to the left.

    lengths: of the Huffman codes, bits, and how many of them there are.
    """
    length, symbols = lengths
    values = stored.astype(np.int64) & 0xFFFF
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0], predicted[0, 0] = values[:-1, 0], 1 << 15
    bits = []
    for difference in ((values - predicted + 0x8000) % 0x10000 - 0x8000).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:0{length}b}")
        if category:
            below = difference if difference > 0 else difference + (1 << category) - 1
            bits.append(f"{below:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0")
    counts = bytes(symbols if n == length - 1 else 0 for n in range(16))
    table = b"\0" + counts + bytes(range(symbols))
    height, width = (side.to_bytes(2) for side in stored.shape)
    parts = (b"\xff\xd8\xff\xc3\0\x0b\x10", height, width, b"\1\1\x11\0\xff\xc4")
    parts += ((2 + len(table)).to_bytes(2), table, b"\xff\xda\0\x08\1\1\0\1\0\0", data)
    return b"".join((*parts, b"\xff\xd9"))


def compressed(syntax: UID, stored: np.ndarray) -> tuple[bytes, Callable[[bytes], bytes]]:
    """One frame, and what makes a file of another."""
    d = dataset(stored)
    if syntax == JPEGLosslessSV1:
        d.file_meta.TransferSyntaxUID = syntax
        frame = jpeg_lossless(stored)
    else:
        options = {JPEG2000: {"j2k_cr": [20, 10, 4]}, JPEGLSNearLossless: {"jls_error": 2}}
        d.compress(syntax, generate_instance_uid=False, **options.get(syntax, {}))
        frame = get_frame(d.PixelData, 0, number_of_frames=1)

    def file(other: bytes) -> bytes:
        return encoded(d, PixelData=encapsulate([other]))

    return frame, file


LOSSLESS = (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless)
SYNTAXES = (*LOSSLESS, JPEGLSNearLossless, JPEG2000)


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("side", [32, 64])
def test_a_whole_frame_is_read_whatever_pads_it(syntax: UID, side: int) -> None:
    stored = head(side)
    frame, file = compressed(syntax, stored)
    for padding in (b"", b"\0\0", bytes(6)):
        hu = read_hu(file(frame + padding))
        assert np.array_equal(hu, np.maximum(stored - 1024, -1024))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_frame_that_was_cut_is_refused_whatever_fills_it(syntax: UID, share: float) -> None:
    frame, file = compressed(syntax, head())
    body = frame.rstrip(b"\0").removesuffix(b"\xff\xd9")
    end = frame[len(body) :]
    kept = body[: int(len(body) * share)]
    missing = len(body) - len(kept)
    fillings = {
        "nothing": kept + b"\0" * (len(kept) % 2),
        "its end marker": kept + end,
        "zeros": kept + bytes(missing + len(end)),
        "zeros and its end marker": kept + bytes(missing) + end,
        "ones": kept + b"\xff\0" * (missing // 2) + end,
    }
    whole = read_hu(file(frame))
    for filling, cut in fillings.items():
        try:
            hu = read_hu(file(cut))
        except DicomError as error:
            message = error.reason
        else:
            # The last rows are of one value, which some encodings write as zeros.
            assert np.array_equal(hu, whole), filling
            continue
        assert "pixel data cannot be decoded: " in message


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, RLELossless])
def test_a_frame_with_other_data_in_its_tail_is_refused(syntax: UID) -> None:
    """JPEG 2000 cannot tell: its last blocks decode from any bytes."""
    frame, file = compressed(syntax, head())
    body = frame.rstrip(b"\0").removesuffix(b"\xff\xd9")
    half = len(body) // 2
    rng = np.random.default_rng(3)
    for other in (rng.bytes(len(body) - half).replace(b"\xff", b"\x7f"), body[:half]):
        with pytest.raises(DicomError, match="pixel data cannot be decoded: "):
            read_hu(file(body[:half] + other + frame[len(body) :]))


def decode(syntax: UID, d: pydicom.Dataset) -> codecs.Decode:
    def decode(stream: bytes) -> np.ndarray:
        d.PixelData = encapsulate([stream])
        found: np.ndarray = get_decoder(syntax).as_array(d, index=0, decoding_plugin="pylibjpeg")[0]
        return found

    return decode


def test_a_table_whose_codes_may_be_all_ones_is_no_way_round() -> None:
    stored = head()
    stream = jpeg_lossless(stored, (4, 16))
    d = dataset(stored, JPEGLosslessSV1)
    by = decode(JPEGLosslessSV1, d)
    assert np.array_equal(decode_jpeg(stream, stored.shape, by), stored)
    for share in (0.3, 0.6, 0.95):
        for filling in (b"", bytes(len(stream)), b"\xff\0" * 2000):
            cut = stream[: int(len(stream) * share)] + filling + b"\xff\xd9"
            with pytest.raises((StreamError, RuntimeError)):
                decode_jpeg(cut, stored.shape, by)


def test_sequential_jpeg_is_read_whole_or_refused() -> None:
    d = pydicom.dcmread(get_testdata_file("JPGExtended.dcm", download=False))
    frame = get_frame(d.PixelData, 0, number_of_frames=1)
    shape, by = (d.Rows, d.Columns), decode(d.file_meta.TransferSyntaxUID, d)
    expected = by(frame)
    assert np.array_equal(decode_jpeg(frame, shape, by), expected)
    stream = frame.rstrip(b"\0")
    for share in (0.3, 0.6, 0.95):
        kept = stream[: int(len(stream) * share)]
        for cut in (kept, kept + b"\xff\xd9", kept + bytes(len(stream) - len(kept)) + b"\xff\xd9"):
            with pytest.raises((StreamError, RuntimeError)):
                decode_jpeg(cut, shape, by)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f + bytes(70_000), "a stream of 7.,... bytes for 32 x 32 pixels"),
        # A second scan, empty, as a frame of thousands would be decoded for minutes.
        (lambda f: f[:-2] + b"\xff\xda\0\x08\1\1\0\1\0\0" * 2 + f[-2:], "more than one scan"),
        (lambda f: b"\0\0" + f, "no JPEG stream"),
        (lambda f: f.replace(b"\1\1\x11\0\xff\xc4", b"\2\1\x11\0\xff\xc4"), "2 component"),
    ],
)
def test_streams_that_would_take_long_are_not_decoded(
    make: Callable[[bytes], bytes], message: str
) -> None:
    stream = jpeg_lossless(head(32))
    with pytest.raises(StreamError, match=message):
        decode_jpeg(make(stream), (32, 32), lambda _: pytest.fail("decoded"))


def test_jpeg_2000_of_many_tiles_or_layers_is_not_decoded() -> None:
    frame, _ = compressed(JPEG2000Lossless, head())
    at = frame.index(b"\xff\x52") + 6
    for stream, message in (
        (frame[:24] + (1).to_bytes(4) * 2 + frame[32:], "16,384 tiles and 1 layers"),
        (frame[:at] + (60_000).to_bytes(2) + frame[at + 2 :], "4 tiles and 60,000 layers"),
    ):
        wide = stream[:8] + (128).to_bytes(4) * 2 + stream[16:]
        with pytest.raises(StreamError, match=message):
            decode_jpeg_2000(wide, (128, 128), lambda _: pytest.fail("decoded"))
    with pytest.raises(StreamError, match="no JPEG 2000 stream"):
        decode_jpeg_2000(frame[2:], (64, 64), lambda _: pytest.fail("decoded"))


@pytest.mark.parametrize("header", [(3, 64, 64), (2, 64, 60), (2, 64, 9999), (2, 0, 64)])
def test_rle_segments_that_are_none_are_refused(header: tuple[int, ...]) -> None:
    frame = b"".join(n.to_bytes(4, "little") for n in header).ljust(64, b"\0") + bytes(200)
    with pytest.raises(StreamError, match="RLE segments, not 2 in order"):
        decode_rle(frame, (8, 8), lambda _: pytest.fail("decoded"))

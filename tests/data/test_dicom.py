"""One file -> HU: right, or refused by name. The reference is the formula in plain numpy."""

from __future__ import annotations

import contextlib
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import CANARY, STORED, dataset, encoded
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from ich.data import dicom
from ich.data.dicom import DicomError, read_hu, read_keys, read_slice
from ich.data.elements import MAX_ELEMENTS, find_elements
from ich.data.pixels import hounsfield
from ich.data.pixels.hounsfield import unwrap_12bit


def raw_element(data: bytes, keyword: str, old: bytes, new: bytes) -> bytes:
    """Replaces an element's value by bytes that pydicom would not write."""
    tag = pydicom.tag.Tag(keyword)
    head = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
    at = data.index(head) + len(head)
    assert data[at + 4 : at + 4 + len(old)] == old
    length = len(new).to_bytes(2, "little")
    return data[: at + 2] + length + new + data[at + 4 + len(old) :]


def reference(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    return np.rint(np.clip(stored.astype(float) * slope + intercept, -1024, 3071))


EVERY = np.arange(-32768, 32768).astype(np.int16).reshape(256, 256)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every stored value most are outside the range of HU, which no slice's are."""
    monkeypatch.setattr(hounsfield, "_refuse_clipped", lambda *_: None)


# Right HU


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
@pytest.mark.parametrize(
    ("slope", "intercept"),
    [
        *((1, b) for b in (-1024, 0, -1000, 32767, -32768, -40000, 5000, -1024.5)),
        *((0.5, -1024), (2, 10), (-1, 40)),
    ],
)
@pytest.mark.usefixtures("unlimited")
def test_hu_of_every_stored_value(syntax: UID, dtype: type, slope: float, intercept: float) -> None:
    stored = EVERY.view(dtype)
    data = encoded(
        dataset(stored, syntax), RescaleSlope=str(slope), RescaleIntercept=str(intercept)
    )
    hu = read_hu(data)
    assert hu.dtype == np.int16
    assert np.array_equal(hu, reference(stored, slope, intercept))


def test_big_endian() -> None:
    d = dataset(STORED, ExplicitVRBigEndian)
    assert np.array_equal(read_hu(encoded(d)), reference(STORED, 1, -1024))


@pytest.mark.parametrize("shape", [(638, 490), (768, 768), (1, 1), (3, 1)])
def test_any_size(shape: tuple[int, int]) -> None:
    stored = np.random.default_rng(1).integers(-100, 4000, shape).astype(np.int16)
    assert np.array_equal(read_hu(encoded(dataset(stored))), reference(stored, 1, -1024))


# Padding (PS3.3 C.7.5.1.1.2)

# HU of a slice whose field of view is round, NaN outside it; with a fat 0 HU wherever it may be.
ROUND = np.random.default_rng(1).integers(-1000, 1500, (32, 32)).astype(float)
ROUND[12:17, 12:17] = 0
ROUND[np.hypot(*np.mgrid[-15.5:16, -15.5:16]) > 16] = np.nan
AIR = np.nan_to_num(ROUND, nan=-1024)


def padded(padding: int, bits: int, signed: bool, intercept: float, syntax: UID) -> Dataset:
    """`ROUND` with this stored value outside its field of view, or its lowest `bits` bits."""
    values = np.nan_to_num(ROUND - intercept, nan=padding).astype(int)
    least = -(2 ** (bits - 1)) if signed else 0
    stored = (values - least) % 2**bits + least  # wraps around what is below 0
    d = dataset(stored.astype(np.int16 if signed else np.uint16), syntax)
    d.BitsStored, d.HighBit, d.RescaleIntercept = bits, bits - 1, str(intercept)
    return d


@pytest.mark.parametrize(
    "syntax",
    [
        *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian),
        *(JPEGLSLossless, JPEG2000Lossless, RLELossless),
    ],
)
@pytest.mark.parametrize(
    ("padding", "bits", "signed", "intercept", "declared"),
    [
        (-2000, 16, True, 0, -2000),
        (-32768, 16, True, -1024, -32768),
        (32767, 16, True, 0, 32767),
        (3000, 16, True, 0, 3000),  # within the range of HU
        (0, 16, True, 0, 0),  # water
        (63536, 16, False, -1024, 63536),
        (63536, 16, False, -1024, -2000),  # with the other sign
        (65535, 16, False, -1024, 65535),
        (0, 16, False, -1024, 0),
        (4095, 12, False, -1024, 4095),
        (2096, 12, False, -1024, -2000),  # the lowest 12 bits of -2000
        (2096, 12, False, 0, 63536),  # in a file of wrapped values
        (-2000, 12, True, 0, -2000),
    ],
)
def test_padding_is_air_in_every_encoding_and_sign(
    padding: int, bits: int, signed: bool, intercept: float, declared: int, syntax: UID
) -> None:
    d = padded(padding, bits, signed, intercept, ExplicitVRLittleEndian)
    if not syntax.is_encapsulated:
        d = padded(padding, bits, signed, intercept, syntax)
    vr, order = ("SS" if declared < 0 else "US"), ("big" if "Big" in syntax.name else "little")
    d.add_new("PixelPaddingValue", "SS" if signed else "US", 0)
    if syntax.is_encapsulated:
        d.compress(syntax, generate_instance_uid=False)
    # Written by hand, for pydicom writes no value of the other sign.
    raw = declared.to_bytes(2, order, signed=declared < 0)
    d["PixelPaddingValue"] = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag("PixelPaddingValue"), vr, 2, raw, 0, False, order == "little"
    )
    assert np.array_equal(read_hu(encoded(d)), AIR)


@pytest.mark.parametrize(("padding", "signed"), [(63536, False), (32767, True), (-2000, True)])
def test_padding_is_air_after_a_lossy_compression(padding: int, signed: bool) -> None:
    d = padded(padding, 16, signed, -1024, ExplicitVRLittleEndian)
    d.PixelPaddingValue = padding
    d.compress(JPEGLSNearLossless, jls_error=3, generate_instance_uid=False)
    hu = read_hu(encoded(d))
    assert (hu[np.isnan(ROUND)] == -1024).all()
    assert np.abs(hu - AIR).max() <= 3


@pytest.mark.parametrize(("first", "last"), [(-2100, -1900), (-1900, -2100), (-2000, -600)])
def test_padding_may_be_a_range_of_values(first: int, last: int) -> None:
    d = padded(-2000, 16, True, 0, ExplicitVRLittleEndian)
    hu = read_hu(encoded(d, PixelPaddingValue=first, PixelPaddingRangeLimit=last))
    # Background up to -600 HU is suppressed at the edges; within the slice it is a sinus.
    inner = np.hypot(*np.mgrid[-15.5:16, -15.5:16]) < 11
    assert np.array_equal(hu[inner], AIR[inner])
    assert (hu[np.isnan(ROUND)] == -1024).all()


@pytest.mark.parametrize("value", [0, 40, -1000, 3071])
def test_a_declared_padding_that_no_edge_shows_takes_no_tissue_away(value: int) -> None:
    stored = np.full((6, 6), 100, np.int16)
    stored[2:4, 2:4] = value
    d = dataset(stored)
    hu = read_hu(encoded(d, RescaleIntercept="0", PixelPaddingValue=value))
    assert np.array_equal(hu, stored)


def test_a_padding_that_is_no_number_is_refused() -> None:
    d = dataset(STORED)
    d.add_new("PixelPaddingValue", "LO", CANARY)
    with pytest.raises(DicomError, match="PixelPaddingValue is something else, not an integer"):
        read_hu(encoded(d))
    d["PixelPaddingValue"].value = ""
    assert np.array_equal(read_hu(encoded(d)), reference(STORED, 1, -1024))


def head() -> np.ndarray:
    """int16 HU: a third of it air, and a head."""
    hu = np.random.default_rng(2).integers(-1020, -980, (40, 40)).astype(np.int16)
    hu[4:36, 4:38] = 40
    return hu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Signed data in a header that says unsigned, and the reverse; another's intercept.
        ({"PixelRepresentation": 0}, "32 % of the pixels are above 3071 HU, so its header"),
        ({"RescaleIntercept": "-32768", "PixelData": (head() ^ -32768).tobytes()},
         "68 % of the pixels are below -1024 HU"),
        ({"RescaleIntercept": "-3000"}, "100 % of the pixels are below -1024 HU"),
        ({"RescaleSlope": "-1", "RescaleIntercept": "5000"}, "100 % of the pixels are above 3071"),
        ({"RescaleSlope": "1000"}, "100 % of the pixels|68 % of the pixels are above 3071"),
    ],
)  # fmt: skip
def test_a_slice_that_would_be_mostly_clipped_is_refused(
    changes: dict[str, object], message: str
) -> None:
    hu = head()
    d = dataset(hu)
    d.RescaleIntercept = "0"
    assert np.array_equal(read_hu(encoded(d)), hu)
    with pytest.raises(DicomError, match=message):
        read_hu(encoded(d, **changes))


def test_metal_and_padding_that_is_not_declared_are_clipped() -> None:
    hu = head()
    hu[:4], hu[10:13, 10:30] = -2000, 20_000  # a tenth each, and less
    hu[:, :4] = -3024
    hu[:, 38:] = -3024
    d = dataset(hu)
    assert np.array_equal(read_hu(encoded(d, RescaleIntercept="0")), reference(hu, 1, 0))
    only = dataset(np.full((8, 8), -2000, np.int16))
    assert (read_hu(encoded(only, PixelPaddingValue=-2000)) == -1024).all()


def test_a_padding_byte_is_allowed_and_a_second_slice_is_not() -> None:
    stored = STORED[:1, :1]
    d = dataset(stored)
    data = encoded(d)
    padded = data[:-6] + (3).to_bytes(4, "little") + stored.tobytes() + b"\0"
    assert read_hu(padded).tolist() == reference(stored, 1, -1024).tolist()
    with pytest.raises(DicomError, match=r"4 bytes, but 1 x 1 pixels of 16 bits take 2$"):
        read_hu(encoded(d, PixelData=stored.tobytes() * 2))


def test_wrapped_12_bit_values_over_the_whole_range() -> None:
    hu = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)
    assert np.array_equal(unwrap_12bit((hu % 4096).astype(np.uint16)), hu)
    shifted = ((hu.astype(np.int32) - 7) % 4096).astype(np.uint16)
    assert np.array_equal(unwrap_12bit(shifted, intercept=7), hu)
    d = dataset(shifted)
    assert np.array_equal(read_hu(encoded(d, BitsStored=12, HighBit=11, RescaleIntercept="7")), hu)
    # The popular fix (+1000, wrap, -1000) is wrong exactly below -1000.
    popular = (hu.astype(np.int32) % 4096 + 1000) % 4096 - 1000
    assert np.array_equal(np.unique(hu[popular != hu]), np.arange(-1024, -1000))


def test_twelve_bits_with_the_usual_intercept_are_not_wrapped() -> None:
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    hu = read_hu(encoded(dataset(stored), BitsStored=12, HighBit=11))
    assert np.array_equal(hu, reference(stored, 1, -1024))


@pytest.mark.parametrize("bits", [12, 13, 16])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
@pytest.mark.usefixtures("unlimited")
def test_bits_above_the_highest_are_not_read(bits: int, dtype: type) -> None:
    d = dataset(EVERY.view(dtype))
    data = encoded(d, BitsStored=bits, HighBit=bits - 1)
    expected = reference(pydicom.dcmread(io.BytesIO(data)).pixel_array, 1, -1024)
    assert np.array_equal(read_hu(data), expected)
    low = -(2 ** (bits - 1)) if dtype is np.int16 else 0
    values = EVERY.view(dtype).astype(int)
    assert np.array_equal(expected, reference((values - low) % 2**bits + low, 1, -1024))


def test_headers_seen_before_are_told_apart() -> None:
    for intercept in (-1024, -1000, -1024):
        hu = read_hu(encoded(dataset(STORED), RescaleIntercept=str(intercept)))
        assert np.array_equal(hu, reference(STORED, 1, intercept))
    swapped = read_hu(encoded(dataset(STORED.reshape(10, 12))))
    assert swapped.shape == (10, 12)


# Refused by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RescaleSlope": None}, "RescaleSlope is None, not a number"),
        ({"RescaleSlope": ["1", "2"]}, "RescaleSlope is something else, not a number"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0, so stored values carry no HU"),
        ({"RescaleSlope": "1e300"}, r"RescaleSlope is 1e\+300, not within 100,000 of 0"),
        ({"RescaleIntercept": None}, "RescaleIntercept is None, not a number"),
        ({"RescaleIntercept": "-1e300"}, r"RescaleIntercept is -1e\+300, not within 100,000 of 0"),
        ({"Modality": "MR"}, "Modality is 'MR', not 'CT'"),
        ({"Modality": "CANARY PATIENT"}, "Modality is something else, not 'CT'"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "is 'MONOCHROME1', not 'MONOCHROME2'"),
        ({"PhotometricInterpretation": "RGB"}, "is 'RGB', not 'MONOCHROME2'"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel is 3, not 1"),
        ({"BitsAllocated": 8}, "BitsAllocated is 8, not 16"),
        ({"BitsStored": None}, "BitsStored is None, not 16"),
        ({"HighBit": 11}, "HighBit is 11, not 15, one less than BitsStored"),
        ({"PixelRepresentation": 2}, "PixelRepresentation is 2, not 0"),
        ({"NumberOfFrames": "2"}, r"multi-frame file \(2 frames\), .* emf2sf of dcm4che splits"),
        ({"NumberOfFrames": ["1", "2"]}, r"unreadable header \(TypeError\)"),
        ({"Rows": 60000}, "Rows is 60000, not from 1 to 4096"),
        ({"Columns": 0}, "Columns is 0, not from 1 to 4096"),
        ({"Rows": None}, "Rows is None, not from 1 to 4096"),
        ({"PixelData": None}, "PixelData is missing"),
        (
            {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11}
            | {"RescaleIntercept": "0", "RescaleSlope": "2"},
            "RescaleSlope is 2 in a file of wrapped 12-bit values, not 1",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_ct_slice_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DicomError, match=message) as caught:
        read_hu(encoded(dataset(STORED), **changes))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"SOPClassUID": SecondaryCaptureImageStorage},
            "'Secondary Capture Image Storage', not",
        ),
        ({"SOPClassUID": EnhancedCTImageStorage}, "is 'Enhanced CT Image Storage', not 'CT Image"),
        ({"SOPClassUID": "2.25.99"}, "SOPClassUID is something else, not 'CT Image Storage'"),
        ({"RescaleType": "Z_EFF"}, "RescaleType is 'Z_EFF', not 'HU'"),
        ({"RescaleType": "HU_MOD"}, "RescaleType is 'HU_MOD', not 'HU'"),
        ({"RescaleType": CANARY}, "RescaleType is something else, not 'HU'"),
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation is 'YES', not 'NO'"),
        ({"ImageType": r"ORIGINAL\PRIMARY\LOCALIZER\CT_SOM5 TOP"}, "LOCALIZER: an overview"),
        ({"ImageType": r"DERIVED\SECONDARY\SCREEN SAVE"}, "ImageType says SCREEN: a page, no"),
        ({"ImageType": r"DERIVED\SECONDARY\OTHER\CT_SOM5 PROT"}, "ImageType says PROT: a page"),
        ({"ImageType": r"DERIVED\SECONDARY\AXIAL\TMAX"}, "TMAX: a map of perfusion, not of HU"),
        ({"ImageType": r"DERIVED\PRIMARY\AXIAL\CBF_MAP"}, "ImageType says CBF: a map of perfusion"),
        ({"ImageType": r"DERIVED\PRIMARY\AXIAL\EFF_ATOMIC_NUM"}, "a map of materials, not of HU"),
        ({"ImageType": r"DERIVED\PRIMARY\AXIAL\MAT_SPECIFIC"}, "ImageType says MAT: a map of mat"),
        ({"ImageType": r"DERIVED\SECONDARY\REFORMATTED\MIN IP"}, "says IP: a projection, no slice"),
        ({"ImageType": r"DERIVED\SECONDARY"}, "SECONDARY, and no plane that is known to be in HU"),
        ({"ImageType": "DERIVED\\SECONDARY\\AXIAL\\CANARY"}, "SECONDARY, and no plane"),
    ],
)
def test_what_is_no_slice_of_a_head_is_refused_by_name(
    changes: dict[str, object], message: str
) -> None:
    for read in (read_hu, read_slice):
        with pytest.raises(DicomError, match=message) as caught:
            read(encoded(dataset(STORED), **changes))
        assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"RescaleType": "US"},
        {"RescaleType": "hu ", "BurnedInAnnotation": "NO"},
        {"RescaleType": "", "BurnedInAnnotation": "", "ImageType": ""},
        {"ImageType": r"ORIGINAL\PRIMARY\AXIAL\CT_SOM5 SPI DUAL"},
        {"ImageType": r"ORIGINAL\PRIMARY\AXIAL\ADD"},
        {"ImageType": r"DERIVED\PRIMARY\AXIAL"},  # lossy compression alone makes DERIVED of it
        {"ImageType": r"DERIVED\SECONDARY\REFORMATTED\AVERAGE"},
        {"ImageType": r"DERIVED\SECONDARY\MPR\CT_SOM5 MPR"},
        {"ImageType": "AXIAL"},
    ],
)
def test_slices_in_hu_are_read_whatever_else_they_say(changes: dict[str, object]) -> None:
    hu = read_hu(encoded(dataset(STORED), SOPClassUID=CTImageStorage, **changes))
    assert np.array_equal(hu, reference(STORED, 1, -1024))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"nan ", "RescaleIntercept is nan, not finite"),
        (b"-inf", "RescaleIntercept is -inf, not finite"),
        (b"abc ", "RescaleIntercept is something else, not a number"),
        (b"    ", "RescaleIntercept is empty, not a number"),
        (b"\xff\xfe\n\0", "RescaleIntercept is something else, not a number"),
        (b"1" * 3000, "RescaleIntercept is inf, not finite"),
        (b"1" * 6000, r"unreadable header \(a value of 6,000 bytes\)"),
    ],
)
def test_an_element_that_cannot_be_converted_is_refused(value: bytes, message: str) -> None:
    data = raw_element(encoded(dataset(STORED)), "RescaleIntercept", b"-1024 ", value)
    with pytest.raises(DicomError, match=message):
        read_hu(data)


def test_a_reason_is_one_short_line() -> None:
    d = dataset(STORED)
    data = raw_element(encoded(d), "Modality", b"CT", b"X\n" * 1500)
    with pytest.raises(DicomError, match="^Modality is ") as caught:
        read_hu(data)
    assert len(str(caught.value)) < 120
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>" * 20, r"not a DICOM file \(no DICM prefix\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300), "not a DICOM file"),
        (bytes(128) + b"DICM", "Modality is None|unreadable header"),
        (bytes(128) + b"DICM" + b"\xff" * 500, "unreadable header|Modality is None"),
        (bytes(5000), "not a DICOM file"),
        (b"GIF89a" + bytes(300), "not a DICOM file"),
    ],
)
def test_what_is_no_dicom_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DicomError, match=message):
        read_hu(data)


def test_a_file_cut_anywhere_is_refused_and_never_crashes() -> None:
    data = encoded(dataset(STORED))
    for length in range(0, len(data), 7):
        with pytest.raises(DicomError):
            read_hu(data[:length])
    with pytest.raises(DicomError, match="pixel data cannot be decoded: 238 bytes, but 12 x 10"):
        read_hu(data[:-2])


def test_flipped_bytes_never_crash() -> None:
    data = bytearray(encoded(dataset(STORED)))
    rng = np.random.default_rng(2)
    for _ in range(2000):
        at = int(rng.integers(132, len(data) - STORED.nbytes))
        before, data[at] = data[at], int(rng.integers(256))
        reason = ""
        try:
            assert read_hu(bytes(data)).dtype == np.int16
        except DicomError as error:
            reason = str(error)
        assert CANARY not in reason
        data[at] = before


# The header


def outcome(data: bytes) -> object:
    try:
        found = read_slice(data)
    except DicomError as error:
        return str(error)
    return found.hu.tolist(), found.study, found.series, str(found.position)


def placed(syntax: UID) -> bytes:
    d = dataset(STORED, syntax)
    d.SpecificCharacterSet = "ISO_IR 100"
    d.SeriesInstanceUID, d.ImageType = "2.25.31", ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.ImageOrientationPatient = ["1", "0", "0", "0", "0.95", "0.31"]
    d.ImagePositionPatient = ["-125.0", "-110.5", "37.25"]
    d.RequestAttributesSequence = [Dataset()]  # of known length
    d.RequestAttributesSequence[0].Rows = 7
    d.add_new(0x00091010, "UN", b"private" * 3 + b"\0")
    return encoded(d)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_damaged_header_is_found_as_pydicom_finds_it_whatever_was_read_before(
    syntax: UID,
) -> None:
    whole = placed(syntax)
    assert isinstance(outcome(whole), tuple)
    rng, header, read = np.random.default_rng(4), len(whole) - STORED.nbytes, 0
    for number in range(2000):
        mutated = bytearray(whole)
        for _ in range(number % 3):
            mutated[int(rng.integers(header))] = int(rng.integers(256))
        if number % 5 == 0:
            mutated = mutated[: int(rng.integers(header, len(mutated) + 1))]
        data = bytes(mutated)
        after_others = outcome(data)
        before = dict(dicom._seen)
        dicom._seen.clear()
        assert outcome(data) == after_others, number
        dicom._seen.update(before)
        if isinstance(after_others, tuple):
            read += 1
            d = pydicom.dcmread(io.BytesIO(data), force=True)
            hu = reference(d.pixel_array, float(d.RescaleSlope), float(d.RescaleIntercept))
            assert np.array_equal(after_others[0], hu), number
    assert read > 500


@pytest.mark.parametrize("by", [b"LO", b"OB", b"zz", b"UN", b"\0\0"])
def test_whether_a_file_is_read_depends_on_no_other(by: bytes) -> None:
    """Once a file with the same elements had been read, damaged ones were read, too."""
    whole = placed(ExplicitVRLittleEndian)
    damaged = (
        whole.replace(b"\2\0\x10\0UI", b"\2\0\x10\0" + by, 1),
        whole.replace(b"\2\0\0\0UL", b"\2\0\0\0" + by, 1),
        whole.replace(b"\2\0\0\0UL\4\0", b"\2\0\0\0UL\2\0", 1),
        whole.replace(b"\x28\0\x52\x10DS", b"\x28\0\x52\x10" + by, 1),
    )
    for data in damaged:
        assert data != whole
        dicom._seen.clear()
        cold = outcome(data)
        assert isinstance(outcome(whole), tuple)
        assert outcome(data) == cold


def undefined_lengths() -> Dataset:
    d = dataset(STORED)
    inner, outer = Dataset(), Dataset()
    inner.is_undefined_length_sequence_item = outer.is_undefined_length_sequence_item = True
    inner.Rows, inner.PatientID = 7, CANARY
    outer.ReferencedImageSequence = [inner, Dataset()]
    outer["ReferencedImageSequence"].is_undefined_length = True
    d.RequestAttributesSequence = [outer]
    d["RequestAttributesSequence"].is_undefined_length = True
    return d


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_sequences_of_undefined_length_are_walked_over(syntax: UID) -> None:
    d = undefined_lengths()
    d.file_meta.TransferSyntaxUID = syntax
    data = encoded(d)
    assert np.array_equal(read_hu(data), reference(STORED, 1, -1024))
    tag = int(pydicom.tag.Tag("Rows"))
    assert find_elements(data, {tag}).values[tag][1] == len(STORED).to_bytes(2, "little")
    for length in range(140, len(data) - STORED.nbytes, 3):
        with pytest.raises(DicomError):
            read_hu(data[:length])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_files_without_preamble_are_read(syntax: UID) -> None:
    whole = placed(syntax)
    length = int.from_bytes(whole[140:144], "little")
    for start in (132, 144 + length):  # with the file meta information, and without
        assert outcome(whole[start:]) == outcome(whole)
    assert read_keys(whole[144 + length :])[:2] == (CANARY, "2.25.2")


def test_a_file_that_misnames_its_encoding_is_read_as_what_it_is() -> None:
    whole = placed(ExplicitVRLittleEndian)
    misnamed = raw_element(
        whole, "TransferSyntaxUID", b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0"
    )
    assert outcome(misnamed) == outcome(whole)


SEQUENCE, ITEM = b"\x08\0\x40\x11" + b"\xff" * 4, b"\xfe\xff\0\xe0"


def part_10(syntax: bytes, body: bytes, before: bytes = b"", vr: bytes = b"UI") -> bytes:
    element = b"\2\0\x10\0" + vr + len(syntax).to_bytes(2, "little") + syntax
    return bytes(128) + b"DICM" + before + element + body


IMPLICIT, DEFLATED = b"1.2.840.10008.1.2\0", DeflatedExplicitVRLittleEndian.encode()
MANY = MAX_ELEMENTS + 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # Empty elements: all of one tag, each of another, items of a sequence, fragments.
        (part_10(IMPLICIT, bytes(8 * MANY)), "more than 100,000 elements"),
        (
            part_10(IMPLICIT, b"".join(
                (0x0009_0010 + n >> 16).to_bytes(2, "little")
                + (0x0010 + n & 0xFFFF).to_bytes(2, "little") + bytes(4) for n in range(MANY))),
            "more than 100,000 elements",
        ),
        (
            part_10(IMPLICIT, SEQUENCE + (ITEM + bytes(4)) * MANY),
            "more than 100,000 elements",
        ),
        (
            part_10(IMPLICIT, b"\xe0\x7f\x10\0" + b"\xff" * 4 + (ITEM + bytes(4)) * MANY),
            "more than 100,000 elements",
        ),
        # A sequence in a sequence in a sequence, ...
        (
            part_10(IMPLICIT, (SEQUENCE + ITEM + b"\xff" * 4) * 99),
            "sequences within sequences without end",
        ),
        # Millions of values in one element.
        (
            part_10(IMPLICIT, b"\x08\0\x08\0" + (10_000).to_bytes(4, "little") + b"\\" * 10_000),
            "a value of 10,000 bytes",
        ),
        # Deflated data after file meta information that is odd.
        (part_10(DEFLATED, b"\0" * 99, vr=b"LO"), "Deflated Explicit VR Little Endian is not read"),
        (
            part_10(DEFLATED, bytes(9), b"\2\0\2\1OB\0\0\x70\x17\0\0" + bytes(6000)),
            "Deflated Explicit VR Little Endian is not read",
        ),
    ],
)  # fmt: skip
def test_bombs_are_refused_by_the_parser_itself(data: bytes, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DicomError, match=message):
        read_hu(data)
    with contextlib.suppress(DicomError):
        assert read_keys(data)[:3] == ("", "", "")
    assert time.monotonic() - start < 5  # it took minutes and gigabytes


def test_a_number_of_the_wrong_kind_is_refused() -> None:
    whole = placed(ExplicitVRLittleEndian)
    tag = b"\x28\0\1\1"  # BitsStored
    data = whole.replace(tag + b"US\2\0\x10\0", tag + b"FL\4\0" + np.float32(16).tobytes(), 1)
    assert data != whole
    with pytest.raises(DicomError, match=r"BitsStored is 16\.0, not 16"):
        read_hu(data)


def test_a_file_may_name_the_deflated_syntax_if_it_is_not_its_own() -> None:
    d = dataset(STORED)
    d.AvailableTransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert np.array_equal(read_hu(encoded(d)), reference(STORED, 1, -1024))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["inf", "1e200", "nan", "x"])
def test_a_place_that_is_none_is_unknown(value: str) -> None:
    data = placed(ExplicitVRLittleEndian)
    text = f"{value}\\0\\0\\0\\{value}\\0".encode()
    text += b" " * (len(text) % 2)
    data = raw_element(data, "ImageOrientationPatient", b"1\\0\\0\\0\\0.95\\0.31 ", text)
    assert np.isnan(read_slice(data).position)


def test_a_missing_or_unknown_transfer_syntax_is_refused() -> None:
    d = dataset(STORED)
    whole = encoded(d)
    for syntax, message in (
        (b"1.2.840.10008.1.2.9\0", "the transfer syntax is none that is read here"),
        (DeflatedExplicitVRLittleEndian.encode(), "Little Endian is not read: `dcmconv"),
    ):
        even = syntax + b"\0" * (len(syntax) % 2)
        data = raw_element(whole, "TransferSyntaxUID", b"1.2.840.10008.1.2.1\0", even)
        with pytest.raises(DicomError, match=message):
            read_hu(data)


# Compressed


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_lossless_compression_changes_nothing(syntax: UID) -> None:
    stored = np.random.default_rng(3).integers(-1000, 3000, (32, 48)).astype(np.int16)
    d = dataset(stored)
    d.compress(syntax, generate_instance_uid=False)
    assert np.array_equal(read_hu(encoded(d)), reference(stored, 1, -1024))


def test_a_missing_decoder_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    d = dataset(STORED, JPEGLosslessSV1)
    data = encoded(d, PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    with pytest.raises(DicomError, match=r"JPEG Lossless.*: pip install 'ich\[codecs\]'"):
        read_hu(data)


@pytest.mark.parametrize(
    ("syntax", "stream", "message"),
    [
        # A frame header of 60,000 x 60,000 after a fill byte and a comment.
        (JPEGLosslessSV1, "ffd8 ffff fe0004 abcd ffc3 000b 10 ea60 ea60 01 01 11 00 ffd9", "60000"),
        (JPEGLSLossless, "ffd8 fff7 000b 10 ea60 ea60 01 01 11 00 ffd9", "60000"),
        (JPEG2000Lossless, "ff4f ff51 0029 0000 0000ea60 0000ea60 00000000 00000000 ffd9", "60000"),
        # The same in a JP2 file.
        (
            JPEG2000Lossless,
            "0000000c 6a502020 ff4f ff51 0029 0000 0000ea60 0000ea60 00000000 00000000 ffd9",
            "60000",
        ),
        (JPEGLosslessSV1, "ffd8 ffd9", "no frame header"),
        (JPEGLosslessSV1, "ffd8 ffff ffd9", "no frame header"),
        (JPEGLSLossless, "00000000", "cannot be decoded"),
    ],
)
def test_a_compressed_stream_of_another_size_is_refused_before_decoding(
    syntax: UID, stream: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = dataset(STORED, syntax)
    data = encoded(d, PixelData=encapsulate([bytes.fromhex(stream)]))
    if message != "cannot be decoded":
        decoder = type(get_decoder(syntax))
        monkeypatch.setattr(decoder, "as_array", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DicomError, match=f"pixel data cannot be decoded: .*{message}|{message}"):
        read_hu(data)


def test_a_second_frame_that_is_not_announced_is_not_decoded() -> None:
    d = dataset(np.random.default_rng(3).integers(-1000, 3000, (32, 48)).astype(np.int16))
    d.compress(JPEGLSLossless, generate_instance_uid=False)
    frame = get_frame(d.PixelData, 0, number_of_frames=1)
    one = read_hu(encoded(d))
    absurd = bytes.fromhex("ffd8 fff7 000b 10 ea60 ea60 01 01 11 00")
    assert np.array_equal(read_hu(encoded(d, PixelData=encapsulate([frame, absurd]))), one)


def test_absurd_rows_are_refused_before_decoding_also_when_compressed() -> None:
    d = dataset(STORED, JPEGLosslessSV1)
    data = encoded(d, PixelData=encapsulate([b"\xff\xd8\xff\xd9"]), Rows=65000, Columns=65000)
    with pytest.raises(DicomError, match="Rows is 65000, not from 1 to 4096"):
        read_hu(data)


# Identifiers


def test_the_keys_of_a_file() -> None:
    keys = read_keys(encoded(dataset(STORED)))
    assert keys[:3] == (CANARY, "2.25.2", "")
    assert np.isnan(keys.position)
    nobody = read_keys(encoded(dataset(STORED), PatientID=None, StudyInstanceUID=None))
    assert nobody[:3] == ("", "", "")
    with pytest.raises(DicomError, match="the file is empty"):
        read_keys(b"")


# Real files


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as z:
        return {Path(n).stem: z.read(n) for n in z.namelist() if n.endswith(".dcm")}


def test_real_slices_equal_pydicoms_values(shared: Path) -> None:
    files = members(shared / "rsna_mini.zip")
    assert len(files) == 185
    for name in files:
        d = pydicom.dcmread(io.BytesIO(files[name]))
        expected = reference(d.pixel_array, float(d.RescaleSlope), float(d.RescaleIntercept))
        assert np.array_equal(read_hu(files[name]), expected), name


def test_the_odd_slices_of_the_rsna_set(shared: Path) -> None:
    files = members(shared / "rsna_mini.zip")
    zero = read_hu(files["ID_000aa2bce"])  # intercept 0, signed: the stored values are HU
    assert zero.min() == -1024
    assert 0.1 < ((zero > 0) & (zero < 80)).mean() < 0.5
    wide = read_hu(files["ID_0a2e1269e"])  # stored values from -31788 to 31573
    assert (wide.min(), wide.max()) == (-1024, 3071)


def test_a_ge_study(shared: Path) -> None:
    slices = [read_hu(data) for data in members(shared / "ge_head.zip").values()]
    assert len(slices) == 28
    assert all(s.shape == (512, 512) and s.min() >= -1024 for s in slices)
    assert 0.05 < np.mean([((s > 0) & (s < 80)).mean() for s in slices]) < 0.5


def test_jpeg_lossless_slices(shared: Path) -> None:
    for data in members(shared / "jpeg_lossless.zip").values():
        hu = read_hu(data)
        assert hu.shape == (512, 512)
        assert hu.min() == -1024  # air outside the head
        assert hu.max() > 1000  # bone
        assert 0.1 < ((hu > 0) & (hu < 80)).mean() < 0.4

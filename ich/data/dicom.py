"""One DICOM file -> one int16 slice in Hounsfield units. The only reader of pixel data.

Nothing is guessed: a file without a usable slope or intercept, or one that is no single greyscale
CT slice in HU, is refused by name.
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.charset import convert_encodings
from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from ich.data.elements import DicomError as DicomError
from ich.data.elements import Elements, find_elements
from ich.data.pixels.codecs import decode_jpeg, decode_jpeg_2000, decode_jpeg_ls, decode_rle
from ich.data.pixels.hounsfield import HU_MAX as HU_MAX
from ich.data.pixels.hounsfield import HU_MIN as HU_MIN
from ich.data.pixels.hounsfield import Padding, Scale, padding_of, to_hu
from ich.data.subgroups.facts import (
    Facts,
    age_decade_of,
    kernel_of,
    manufacturer_of,
    thickness_of,
    tilt_of,
)

# pydicom logs and warns with the values it finds odd, UIDs and names among them.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

# Raise it when headers become readable that were not, or more of them is: scans are done again.
HEADER_VERSION = 4
MAX_SIDE = 4096  # Rows or Columns above this are no CT slice; refused before memory is allocated
_MOSTLY_AXIAL = 0.7071  # cosine of 45 degrees; a gantry tilts by at most 30
_MAX_RESCALE = 100_000  # no scanner's slope or intercept is beyond it; sums then stay finite

# What must hold of a slice in HU, beside its size and rescale, with the section of PS3.3. The first
# value is the usual one.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "Modality": ("CT",),  # C.7.3.1.1.1
    # C.8.2.1: the pixels of a CT image.
    "SamplesPerPixel": (1,),
    "PhotometricInterpretation": ("MONOCHROME2",),
    "BitsAllocated": (16,),
    "BitsStored": tuple(range(16, 0, -1)),
    "PixelRepresentation": (0, 1),
}
# The same, but what is absent or empty says nothing: the RSNA's files have none of these.
_ALLOWED_IF_THERE = {
    "SOPClassUID": (CTImageStorage,),  # A.3; a dose report is a Secondary Capture, A.8
    # C.11.1.1.2. US is "unspecified", in which sound slices come too; the others are maps.
    "RescaleType": ("HU", "US"),
    "BurnedInAnnotation": ("NO",),  # C.7.6.1: else there is text in the pixels
}
# Words of ImageType that no slice in HU has in any value: C.7.6.1.1.2, C.8.2.1.1.1, C.8.16.1.3,
# C.8.16.1.4, and what vendors and workstations write.
_NO_SLICE = """
an overview, no axial slice: LOCALIZER SCOUT TOPOGRAM SURVIEW SCANOGRAM
a page, no slice: SCREEN SCREENSHOT SCREENSAVE CAPTURE DOSE REPORT PROTOCOL PROT PAGE SUMMARY TEXT
a graph, no slice: GRAPH CHART CURVE
a map of perfusion, not of HU: PERFUSION PERF CBF CBV MTT TTP TMAX TTD TTS T0 PBV RCBF RCBV RMTT
a map of perfusion, not of HU: RTTP FLOW PERMEABILITY PENUMBRA MISMATCH INFARCT
a map of materials, not of HU: ATOMIC Z ZEFF EFF ELECTRON RHO MAT MATERIAL MGML MOD PCT ED EDW
a map of materials, not of HU: IODINE WATER CALCIUM URIC VNC VUE
a projection, no slice: MIP MINIP MAXIP TMIP IP PROJECTION VRT VR RENDER RENDERED RENDERING SSD 3D
a projection, no slice: DRR CPR CURVED
computed from several images: SUBTRACTION SUBTRACTED DSA MASKED MAXIMUM MINIMUM DEVIATION DIVISION
computed from several images: MULTIPLICATION ADDITION QUANTITY FUSION FUSED COLOR COLOUR OVERLAY
a segmentation, not HU: SEGMENTATION MASK LABEL LABELMAP
"""
_KIND_OF = {
    word: kind
    for kind, _, words in (line.partition(": ") for line in _NO_SLICE.strip().splitlines())
    for word in words.split()
}
# Of images made from others (SECONDARY, C.7.6.1.1.2), slices in HU have one of the first words,
# and no others than of both.
_PLANES = frozenset(["AXIAL", "MPR", "REFORMATTED"])
_OF_PLANES = _PLANES | frozenset(
    ["AVERAGE", "MEAN", "RESAMPLED", "CSA", "PARALLEL", "CT", "SOM5", "SOM7"]
)

# What a message may quote: modalities, interpretations and types of rescale (PS3.3 C.7.3.1.1.1,
# C.7.6.3.1.2, C.11.1.1.2).
_TERM = re.compile(
    "CR|CT|DX|ES|IO|KO|MG|MR|NM|OP|OT|PR|PT|PX|RF|RTDOSE|RTIMAGE|RTPLAN|RTSTRUCT|SC|SEG|SM|SR|US|"
    "XA|XC|MONOCHROME[12]|PALETTE COLOR|RGB|YBR_(FULL|FULL_422|PARTIAL_420|ICT|RCT)|"
    "OD|HU|HU_MOD|Z_EFF|ED|EDW|MGML|PCT|YES|NO"
)
_KEYWORDS = (
    *_ALLOWED,
    *_ALLOWED_IF_THERE,
    "ImageType",
    *("HighBit", "NumberOfFrames", "Rows", "Columns", "RescaleSlope", "RescaleIntercept"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    "MediaStorageSOPClassUID",  # of files without a SOPClassUID
)
_CHECKED_TAGS = tuple(int(Tag(keyword)) for keyword in _KEYWORDS)
# Where the slice belongs; read without a check, and absent in many files.
_STUDY, _SERIES, _ORIENTATION, _POSITION = _LOCATING_TAGS = tuple(
    int(Tag(keyword))
    for keyword in (
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "ImageOrientationPatient",
        "ImagePositionPatient",
    )
)
_WANTED = frozenset((*_CHECKED_TAGS, *_LOCATING_TAGS))
_KEYS = frozenset((int(Tag("SpecificCharacterSet")), int(Tag("PatientID")), *_LOCATING_TAGS))
# Of the scanner and the age. Elements stand in the order of their tags, and all of these before
# those that tell where a slice belongs.
_FACT_TAGS = tuple(
    int(Tag(keyword))
    for keyword in (
        "Manufacturer",
        "SliceThickness",
        "ConvolutionKernel",
        "GantryDetectorTilt",
        "PatientAge",
        "PatientBirthDate",
        "StudyDate",
    )
)


# Of each encoding the plug-in of pydicom that decodes it (always the same one, for another may fill
# up what this one refuses; none for run lengths), and what makes sure that it is decoded whole.
_CODECS = {
    JPEGBaseline8Bit: ("pylibjpeg", decode_jpeg),
    JPEGExtended12Bit: ("pylibjpeg", decode_jpeg),
    JPEGLossless: ("pylibjpeg", decode_jpeg),
    JPEGLosslessSV1: ("pylibjpeg", decode_jpeg),
    JPEGLSLossless: ("pyjpegls", decode_jpeg_ls),
    JPEGLSNearLossless: ("pyjpegls", decode_jpeg_ls),
    JPEG2000Lossless: ("pylibjpeg", decode_jpeg_2000),
    JPEG2000: ("pylibjpeg", decode_jpeg_2000),
    HTJ2KLossless: ("pylibjpeg", decode_jpeg_2000),
    HTJ2KLosslessRPCL: ("pylibjpeg", decode_jpeg_2000),
    HTJ2K: ("pylibjpeg", decode_jpeg_2000),
    RLELossless: ("", decode_rle),
}
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K)
_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


class _Header(NamedTuple):
    """The checked elements of one slice. `syntax` says how its pixel data are encoded."""

    rows: int
    columns: int
    scale: Scale
    syntax: UID


class Slice(NamedTuple):
    """One slice, and where it belongs.

    hu: int16 [Rows, Columns], HU in -1024..3071. study, series: the file's own UIDs, empty where it
    has none; they name a person, and whoever gets them replaces them at once. position: mm along
    the normal of the slice (PS3.3 C.7.6.2.1.1), which orders a series also with a tilted gantry;
    NaN if the file does not say.
    """

    hu: np.ndarray
    study: str
    series: str
    position: float


class Keys(NamedTuple):
    """Whose slice a file is, and where it lies: PatientID, StudyInstanceUID and SeriesInstanceUID,
    empty where the file has none, and `position` as in `Slice`.

    They name a person: whoever gets them replaces them at once (`ich.data.patients`). The `facts`
    are in bins, and name nobody.
    """

    patient: str
    study: str
    series: str
    position: float
    facts: Facts = Facts()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing, which may then stand further on in a file cut short."""
        return bool(self.patient and self.study and self.series) and np.isfinite(self.position)


def read_hu(data: bytes) -> np.ndarray:
    """Decodes one file's bytes.

    Returns:
        int16 [Rows, Columns], HU in -1024..3071.

    Raises:
        DicomError: the file is no DICOM, no single-frame greyscale CT slice in HU, or damaged.
    """
    return _read(data)[1]


def read_slice(data: bytes) -> Slice:
    """Decodes one file's bytes, with what tells its place among others.

    Raises:
        DicomError: as `read_hu`; also for a slice that is not axial, which a workstation keeps
            beside the axial ones.
    """
    elements, hu = _read(data)
    normal = _normal(_text(elements, _ORIENTATION))
    # Of NaN, where the file does not say, this does not hold: such a slice is taken.
    if abs(normal[2]) < _MOSTLY_AXIAL:
        raise DicomError("ImageOrientationPatient is more than 45 degrees from axial: a reformat")
    study, series = _text(elements, _STUDY), _text(elements, _SERIES)
    return Slice(hu, study, series, _position(elements))


def _position(elements: Elements) -> float:
    with np.errstate(all="ignore"):  # a file may say "inf"
        return along_normal(_text(elements, _POSITION), _text(elements, _ORIENTATION))


def along_normal(position: str, orientation: str) -> float:
    """ImagePositionPatient along the normal of ImageOrientationPatient, both as DICOM writes them
    (`1.5\\2\\...`), mm; NaN if one of them is missing or is anything else."""
    return float(_normal(orientation) @ numbers(position, 3))


def _read(data: bytes) -> tuple[Elements, np.ndarray]:
    elements = find_elements(data, _WANTED)
    header = _header(elements)
    if not elements.start:
        raise DicomError("PixelData is missing")
    native = header.syntax in _NATIVE
    stored = (_uncompressed if native else _decoded)(elements, header, data)
    return elements, to_hu(stored, header.scale)


def _text(elements: Elements, tag: int) -> str:
    """An element's bytes as text without padding; empty if it is not there."""
    return elements.values.get(tag, ("", b""))[1].decode("latin-1").strip("\0 ")


def numbers(text: str, count: int) -> np.ndarray:
    """float64 [count] of a text `1.5\\2\\...`, as DICOM writes it; NaN if it is anything else."""
    try:
        return np.array(text.split("\\"), float).reshape(count)
    except ValueError:
        return np.full(count, np.nan)


@lru_cache(maxsize=64)
def _normal(orientation: str) -> np.ndarray:
    """The unit vector along which slices follow one another [3]; NaN if the file does not say."""
    across, down = numbers(orientation, 6).reshape(2, 3)
    with np.errstate(all="ignore"):
        normal = np.cross(across, down)
        return np.asarray(normal / np.linalg.norm(normal))


def read_keys(data: bytes) -> Keys:
    """Whose slice one file's bytes are, and where it lies.

    Raises:
        DicomError: the file is no DICOM, or its header is damaged.
    """
    try:
        elements = find_elements(data, _KEYS.union(_FACT_TAGS), pixels=False)
    except DicomError:  # a fact that is damaged makes no file unreadable
        elements = find_elements(data, _KEYS, pixels=False)
    with _damaged_header_refused():
        dataset = _dataset(elements)
        # As pydicom itself does where it reads a file.
        encoding = convert_encodings(dataset.get("SpecificCharacterSet"))
        dataset.set_original_encoding(None, elements.little, encoding)
        wanted = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
        patient, study, series = (str(dataset.get(k) or "") for k in wanted)
    return Keys(patient, study, series, _position(elements), _facts(elements))


def _facts(elements: Elements) -> Facts:
    texts = (_text(elements, tag) for tag in _FACT_TAGS)
    manufacturer, thickness, kernel, tilt, age, born, studied = texts
    return Facts(
        manufacturer=manufacturer_of(manufacturer),
        slice_thickness=thickness_of(thickness),
        kernel=kernel_of(kernel),
        tilt=tilt_of(tilt, _normal(_text(elements, _ORIENTATION))),
        age_decade=age_decade_of(age, born, studied),
    )


@contextmanager
def _damaged_header_refused() -> Iterator[None]:
    """pydicom can raise nearly anything when it converts a value, and warns of identifiers. Only
    the error's name is shown: its text may quote any element."""
    try:
        with warnings.catch_warnings():
            # RSNA's identifiers look like ID_..., which is no valid UID.
            warnings.simplefilter("ignore")
            yield
    except DicomError:
        raise
    except Exception as error:
        raise DicomError(f"unreadable header ({type(error).__name__})") from None


# The slices of a data set share few distinct headers, and converting and checking these
# tags takes longer than reading the pixel data, so each combination of raw values is seen once.
_seen: dict[tuple[object, ...], _Header] = {}
_SEEN_LIMIT, _SEEN_BYTES = 256, 1024  # headers, and bytes of each


def _header(elements: Elements) -> _Header:
    # All that decides: the checks see nothing else of the file.
    key = elements.syntax, *map(elements.values.get, _CHECKED_TAGS)
    if (header := _seen.get(key)) is None:
        with _damaged_header_refused():
            header = _check(_dataset(elements), UID(elements.syntax))
        if len(_seen) >= _SEEN_LIMIT:
            _seen.clear()
        # So much in these elements is no scanner's; files made that way would fill the memory.
        if sum(len(value) for _, value in elements.values.values()) <= _SEEN_BYTES:
            _seen[key] = header
    return header


def _dataset(elements: Elements) -> pydicom.Dataset:
    """pydicom's objects of the elements that were found, which convert their values."""
    raw = {}
    for tag, (vr, value) in elements.values.items():
        filled = value or empty_value_for_VR(vr, raw=True)
        raw[BaseTag(tag)] = RawDataElement(
            BaseTag(tag), vr, len(value), filled, 0, vr is None, elements.little
        )
    return pydicom.Dataset(raw)


def _check(dataset: pydicom.Dataset, syntax: UID) -> _Header:
    for keyword, allowed in _ALLOWED.items():
        value = dataset.get(keyword)
        if value not in allowed or isinstance(value, float):  # 16.0 is in allowed
            raise DicomError(f"{keyword} is {_shown(value)}, not {allowed[0]!r}")
    frames = dataset.get("NumberOfFrames")
    if int(frames or 1) != 1:
        raise DicomError(
            f"multi-frame file ({_shown(int(frames))} frames), not one slice: the tool emf2sf of "
            f"dcm4che splits it"
        )
    for keyword, known in _ALLOWED_IF_THERE.items():
        value = dataset.get(keyword) or dataset.get(f"MediaStorage{keyword}")
        if value not in (None, "") and str(value).strip().upper() not in known:
            raise DicomError(f"{keyword} is {_shown(value)}, not {_shown(known[0])}")
    _check_image_type(dataset)
    for keyword in ("Rows", "Columns"):
        value = dataset.get(keyword)
        if not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
            raise DicomError(f"{keyword} is {_shown(value)}, not from 1 to {MAX_SIDE}")
    if dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise DicomError(
            f"HighBit is {_shown(dataset.HighBit)}, not {dataset.BitsStored - 1}, one less than "
            f"BitsStored"
        )
    slope, intercept = _finite(dataset, "RescaleSlope"), _finite(dataset, "RescaleIntercept")
    # An ordinary file of these twelve bits has intercept -1024, and so reaches down to air. Near 0
    # air could only have been stored by wrapping around.
    wrapped = dataset.BitsStored == 12 and dataset.PixelRepresentation == 0 and intercept > -100
    if slope == 0:
        raise DicomError("RescaleSlope is 0, so stored values carry no HU")
    if wrapped and slope != 1:
        raise DicomError(f"RescaleSlope is {slope:g} in a file of wrapped 12-bit values, not 1")
    signed = bool(dataset.PixelRepresentation)
    scale = Scale(dataset.BitsStored, signed, slope, intercept, wrapped)
    scale = scale._replace(padding=_padding(dataset, scale, syntax in _LOSSY))
    return _Header(dataset.Rows, dataset.Columns, scale, _checked_syntax(syntax))


def _check_image_type(dataset: pydicom.Dataset) -> None:
    value = dataset.get("ImageType") or ""
    values = [value] if isinstance(value, str) else list(value)
    words = [re.findall("[A-Z0-9]+", str(v).upper()) for v in values]
    for word in itertools.chain(*words):
        if word in _KIND_OF:
            raise DicomError(f"ImageType says {word}: {_KIND_OF[word]}")
    further = {word for later in words[2:] for word in later}
    if ["SECONDARY"] in words[:2] and not (further & _PLANES and further <= _OF_PLANES):
        raise DicomError("ImageType says SECONDARY, and no plane that is known to be in HU")


def _padding(dataset: pydicom.Dataset, scale: Scale, lossy: bool) -> Padding | None:
    first = _padding_value(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = _padding_value(dataset, "PixelPaddingRangeLimit")
    return padding_of(first, first if last is None else last, scale, lossy)


def _padding_value(dataset: pydicom.Dataset, keyword: str) -> int | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    # As text, for writers have put it into other types than an integer.
    number = numbers(str(value), 1)[0]
    if not number.is_integer() or abs(number) > 65_535:
        raise DicomError(f"{keyword} is {_shown(value)}, not an integer of 16 bits")
    return int(number)


def _shown(value: Any) -> str:
    """A value for a message: a number, or one of the standard's own terms.

    Anything else is not shown. In a damaged header an element can hold what follows it, or take
    another's place: a name would be printed as the number of rows.
    """
    if value is None or isinstance(value, int | float):
        return f"{value!r:.20}"
    if not str(value):
        return "empty"
    if isinstance(value, UID) and value.name != value:
        return repr(value.name)
    return repr(str(value)) if _TERM.fullmatch(str(value)) else "something else"


def _finite(dataset: pydicom.Dataset, keyword: str) -> float:
    value = dataset.get(keyword)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DicomError(f"{keyword} is {_shown(value)}, not a number") from None
    if not np.isfinite(number):
        raise DicomError(f"{keyword} is {number}, not finite")
    if abs(number) > _MAX_RESCALE:
        raise DicomError(f"{keyword} is {number:g}, not within {_MAX_RESCALE:,} of 0")
    return number


def _checked_syntax(syntax: UID) -> UID:
    """The transfer syntax, if it is one that can be decoded here."""
    if not syntax:
        raise DicomError("the transfer syntax is missing, so the encoding of the pixels is unknown")
    if syntax in _NATIVE:
        return syntax
    if syntax not in _CODECS:
        raise DicomError("the transfer syntax is none that is read here")
    plugin, _ = _CODECS[syntax]
    if plugin and plugin not in get_decoder(syntax).available_plugins:
        raise DicomError(
            f"{syntax.name} needs a decoder that is not installed: pip install 'ich[codecs]'"
        )
    return syntax


def _uncompressed(elements: Elements, header: _Header, data: bytes) -> np.ndarray:
    """Integers [Rows, Columns] as stored; unsigned or signed as the header says."""
    count = header.rows * header.columns
    present = min(elements.length, len(data) - elements.start)
    if not 0 <= present - 2 * count <= 1:  # one byte of padding may follow
        raise DicomError(
            f"pixel data cannot be decoded: {present:,} bytes, but {header.rows} x "
            f"{header.columns} pixels of 16 bits take {2 * count:,}"
        )
    stored = np.frombuffer(data, "<u2" if elements.little else ">u2", count, elements.start)
    stored = stored.astype("<u2", copy=False).view("<i2" if header.scale.signed else "<u2")
    return _without_unused_bits(stored, header).reshape(header.rows, header.columns)


def _without_unused_bits(stored: np.ndarray, header: _Header) -> np.ndarray:
    # What stands above the highest bit is not said (PS3.5 8.1.1): the sign, an overlay, anything.
    if unused := 16 - header.scale.bits:
        return stored << unused >> unused
    return stored


def _decoded(elements: Elements, header: _Header, data: bytes) -> np.ndarray:
    """Pixel data in any other encoding, by pydicom's plug-ins."""
    plugin, decode_whole = _CODECS[header.syntax]

    def decode(stream: bytes) -> np.ndarray:
        stored: np.ndarray = get_decoder(header.syntax).as_array(
            encapsulate([stream]),
            index=0,
            decoding_plugin=plugin,
            number_of_frames=1,
            rows=header.rows,
            columns=header.columns,
            samples_per_pixel=1,
            photometric_interpretation="MONOCHROME2",
            bits_allocated=16,
            bits_stored=header.scale.bits,
            pixel_representation=int(header.scale.signed),
            pixel_keyword="PixelData",
        )[0]
        return stored

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = decode_whole(_frame(elements, data), (header.rows, header.columns), decode)
    except Exception as error:  # decoder plug-ins raise their own types
        # Only decoding itself raises this one; the text of others can quote any element.
        plain = isinstance(error, RuntimeError)
        text = " ".join(str(error).split())[:200] if plain else type(error).__name__
        raise DicomError(f"pixel data cannot be decoded: {text}") from None
    # Of 8 bits in 16 some decoders return single bytes.
    stored = stored.astype(np.int16 if header.scale.signed else np.uint16, copy=False)
    return _without_unused_bits(stored, header)


def _frame(elements: Elements, data: bytes) -> bytes:
    """The first frame of encapsulated pixel data: all fragments, or those before the second frame
    if the offset table (PS3.5 A.4) knows one."""
    if not elements.fragments:
        raise RuntimeError("it is not encapsulated")
    (at, length), *fragments = elements.fragments
    offsets = np.frombuffer(data, "<u4", length // 4, at)
    if len(offsets) > 1:
        # Counted from the head of the first fragment, 8 bytes before its data.
        end = at + length + int(offsets[1])
        fragments = [f for f in fragments if f[0] - 8 < end]
    return b"".join(data[start : start + count] for start, count in fragments)

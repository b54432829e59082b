"""One DICOM file -> one int16 slice in Hounsfield units. The only reader of pixel data.

HU = stored value x RescaleSlope + RescaleIntercept (DICOM PS3.3 C.11.1.1.2), clipped to
-1024..3071, the 4,096 values a 12-bit scanner can tell apart. Nothing is guessed: a file without
a usable slope or intercept, or one that is no single greyscale CT slice, is refused by name.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

HU_MIN, HU_MAX = -1024, 3071
MAX_SIDE = 4096  # Rows or Columns above this are no CT slice; refused before memory is allocated


class DicomError(ValueError):
    """Why one file yields no slice. Names the element and its value, never an identifier."""


def read_hu(data: bytes) -> np.ndarray:
    """Decodes one file's bytes.

    Returns:
        int16 [Rows, Columns], HU in -1024..3071.

    Raises:
        DicomError: the file is no DICOM, no single-frame greyscale CT slice, or damaged.
    """
    dataset = _parse(data)
    try:
        _check_is_ct_slice(dataset)
        slope = _finite(dataset, "RescaleSlope")
        intercept = _finite(dataset, "RescaleIntercept")
        wrapped = _is_wrapped(dataset, intercept)
    except DicomError:
        raise
    except Exception as error:  # a damaged element raises when it is first looked at
        raise DicomError(f"unreadable header ({type(error).__name__})") from None
    if slope == 0:
        raise DicomError("RescaleSlope is 0, so stored values carry no HU")
    if wrapped and slope != 1:
        raise DicomError(f"RescaleSlope is {slope:g} in a file of wrapped 12-bit values, not 1")
    stored = _stored_values(dataset)
    if wrapped:
        return unwrap_12bit(stored, round(intercept))
    hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return np.clip(np.rint(hu), HU_MIN, HU_MAX).astype(np.int16)


def unwrap_12bit(stored: np.ndarray, intercept: int = 0) -> np.ndarray:
    """HU of 12-bit unsigned files whose values were stored modulo 4096.

    Some scanners' files declare an intercept near 0 with BitsStored 12, unsigned: they hold HU
    itself (less the intercept), and what is below 0 wrapped around. -1024..3071 are exactly 4,096
    values, so the wrap can be undone without loss: with intercept 0, 0..3071 are themselves and
    3072..4095 are -1024..-1. (The popular fix adds 1000 before it wraps, which turns air, -1024
    stored as 3072, into +3072.)

    Args:
        stored: unsigned integers [H, W] in 0..4095.
        intercept: RescaleIntercept, HU.

    Returns:
        int16 [H, W], HU in -1024..3071.
    """
    values = stored.astype(np.int32) + intercept
    return ((values - HU_MIN) % 4096 + HU_MIN).astype(np.int16)


def _is_wrapped(dataset: pydicom.Dataset, intercept: float) -> bool:
    return (
        dataset.get("BitsStored") == 12
        and dataset.get("PixelRepresentation") == 0
        and intercept > -100
    )


def _parse(data: bytes) -> pydicom.Dataset:
    if not data:
        raise DicomError("the file is empty")
    with warnings.catch_warnings():
        # RSNA's identifiers look like ID_..., which is no valid UID; nothing here reads them.
        warnings.simplefilter("ignore")
        try:
            return pydicom.dcmread(io.BytesIO(data))
        except InvalidDicomError:
            raise DicomError("not a DICOM file (no DICM prefix)") from None
        except Exception as error:  # a damaged header can raise nearly anything in the parser
            raise DicomError(f"unreadable header ({type(error).__name__})") from None


def _check_is_ct_slice(dataset: pydicom.Dataset) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "Modality": ("CT",),
        "SamplesPerPixel": (1,),
        "PhotometricInterpretation": ("MONOCHROME2",),
        "BitsAllocated": (16,),
    }
    for keyword, allowed in wanted.items():
        if (value := dataset.get(keyword)) not in allowed:
            raise DicomError(f"{keyword} is {value!r}, not {allowed[0]!r}")
    if int(dataset.get("NumberOfFrames", 1) or 1) != 1:
        raise DicomError(f"multi-frame file ({dataset.NumberOfFrames} frames), not one slice")
    for keyword in ("Rows", "Columns"):
        value = dataset.get(keyword)
        if not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
            raise DicomError(f"{keyword} is {value!r}, not from 1 to {MAX_SIDE}")


def _finite(dataset: pydicom.Dataset, keyword: str) -> float:
    value = dataset.get(keyword)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DicomError(f"{keyword} is {value!r}, not a number") from None
    if not np.isfinite(number):
        raise DicomError(f"{keyword} is {number}, not finite")
    return number


def _stored_values(dataset: pydicom.Dataset) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return dataset.pixel_array
        except Exception as error:  # decoder plug-ins raise their own types
            text = " ".join(str(error).split())[:200]
            raise DicomError(f"pixel data cannot be decoded: {text}") from None

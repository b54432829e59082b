"""What a header says of scanner, reconstruction and age, in bins so wide that they name nobody.

For subgroups of a report. The raw text, which may hold anything, ends here: whatever is not known
as a maker, or does not look like the code of a kernel, is `other`.
"""

from __future__ import annotations

import math
import re
from datetime import date
from typing import NamedTuple

import numpy as np

UNKNOWN, OTHER = "unknown", "other"
_MAKERS = {
    "GE": re.compile(r"\bge\b|general electric"),
    "Siemens": re.compile("siemens"),
    "Philips": re.compile("philips"),
    "Canon/Toshiba": re.compile("canon|toshiba"),
    "Hitachi": re.compile("hitachi"),
}
# As H31s, Hr40f, FC21, UB: stricter than the 16 characters of PS3.3 C.8.2.1.1.9, so that neither a
# name nor a date nor a number of a patient is one. The words are GE's.
_KERNEL = re.compile(r"[A-Z]{1,2}|[A-Z]{1,3}\d{1,3}[A-Z]{0,2}[-+.]?", re.IGNORECASE)
_WORDS = re.compile(r"(SOFT|STANDARD|STND|DETAIL|BRAIN|HEAD|BONE|BONEPLUS|EDGE|LUNG|ULTRA)[-+]?")
_AGE = re.compile(r"(\d{1,3})([DWMY]?)")  # PS3.5 6.2, AS: 045Y
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0, "": 1.0}
_DATE = re.compile(r"(\d{4})\.?(\d\d)\.?(\d\d)")  # PS3.5 6.2, DA; with dots before DICOM 3
_OLDEST = 130  # years; more is a mistake
_TILTED = 0.5  # degrees
_THICKEST = 10  # mm, above which there is one bin


class Facts(NamedTuple):
    """The bin of a slice by each of five facts, `unknown` where its header does not say.

    manufacturer: GE, Siemens, Philips, Canon/Toshiba, Hitachi or other. slice_thickness: `5 mm`, to
    half a millimetre, or `over 10 mm`. kernel: its code, or other. tilt: none (below 0.5 degrees)
    or tilted. age_decade: `under 10`, `10s` to `80s`, or `90 or more`.
    """

    manufacturer: str = UNKNOWN
    slice_thickness: str = UNKNOWN
    kernel: str = UNKNOWN
    tilt: str = UNKNOWN
    age_decade: str = UNKNOWN


FACTS = Facts._fields


def manufacturer_of(text: str) -> str:
    """The bin of a Manufacturer."""
    folded = text.strip().casefold()
    known = (name for name, pattern in _MAKERS.items() if pattern.search(folded))
    return next(known, OTHER if folded else UNKNOWN)


def thickness_of(text: str) -> str:
    """The bin of a SliceThickness, mm."""
    mm = _number(text)
    if not mm > 0:
        return UNKNOWN
    if mm > _THICKEST:
        return f"over {_THICKEST} mm"
    return f"{max(0.5, math.floor(2 * mm + 0.5) / 2):g} mm"


def kernel_of(text: str) -> str:
    """The bin of a ConvolutionKernel; of several values the first."""
    code = text.split("\\")[0].strip()
    if _WORDS.fullmatch(code.upper()):
        return code.upper()
    return code if _KERNEL.fullmatch(code) else OTHER if code else UNKNOWN


def tilt_of(gantry: str, normal: np.ndarray) -> str:
    """The bin of a tilt.

    Args:
        gantry: GantryDetectorTilt, degrees; where it is no number, the slice's own plane tells.
        normal: of that plane, float64 [3], NaN if unknown.
    """
    degrees = abs(_number(gantry))
    if math.isnan(degrees):
        x, y, z = map(float, normal)
        degrees = math.degrees(math.atan2(math.hypot(x, y), abs(z)))
    return UNKNOWN if math.isnan(degrees) else "none" if degrees < _TILTED else "tilted"


def age_decade_of(age: str, born: str, studied: str) -> str:
    """The bin of a PatientAge, or else of the time from PatientBirthDate to StudyDate."""
    if found := _AGE.fullmatch(age.strip().upper()):
        years = int(found[1]) * _YEARS[found[2]]
    else:
        birth, study = _date(born), _date(studied)
        if birth is None or study is None:
            return UNKNOWN
        had_birthday = (study.month, study.day) >= (birth.month, birth.day)
        years = study.year - birth.year - (not had_birthday)
    if not 0 <= years <= _OLDEST:
        return UNKNOWN
    decade = int(years // 10 * 10)
    return "under 10" if not decade else "90 or more" if decade >= 90 else f"{decade}s"


def _date(text: str) -> date | None:
    try:
        found = _DATE.fullmatch(text.strip())
        return date(*map(int, found.groups())) if found else None
    except ValueError:  # no such day
        return None


def _number(text: str) -> float:
    """NaN for what is none, or infinite."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan

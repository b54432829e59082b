"""Stored integers -> Hounsfield units (PS3.3 C.11.1.1.2), or why they are none.

HU = stored value x RescaleSlope + RescaleIntercept, clipped to -1024..3071, the 4,096 values that a
12-bit scanner can tell apart. Of the DICOM file this module knows numbers alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ich.data.elements import DicomError

HU_MIN, HU_MAX = -1024, 3071
# Shares of a slice beyond that range, above which its header and its data contradict each other.
# Above it metal alone is found: at most 0.04 % of 216 real slices, where air that is read with the
# wrong sign takes a third and more. Below it lies undeclared padding, one value, 25 % of the
# same slices at most; and noise of air, which does not reach 500 HU further down.
_MOST_ABOVE, _MOST_BELOW, _MOST_FAR_BELOW = 0.2, 0.5, 0.25
_FAR_BELOW = 500  # HU


class Padding(NamedTuple):
    """Stored values that are no measurement, `low` to `high`, both included (PS3.3 C.7.5.1.1.2).

    everywhere: no tissue has these values. Otherwise they count where they reach in from an edge of
    the slice, for writers also declare padding, 0 most often, in slices that have none.
    """

    low: int
    high: int
    everywhere: bool


class Scale(NamedTuple):
    """How a slice's stored values, of `bits` bits, become HU.

    wrapped: they are HU less the intercept, modulo 4,096 (`unwrap_12bit`); the slope is 1 then.
    """

    bits: int
    signed: bool
    slope: float
    intercept: float
    wrapped: bool
    padding: Padding | None = None

    @property
    def span(self) -> tuple[int, int]:
        """The least and the greatest value that a pixel can have."""
        least = -(1 << self.bits - 1) if self.signed else 0
        return least, least + (1 << self.bits) - 1


def to_hu(stored: np.ndarray, scale: Scale) -> np.ndarray:
    """Stored values -> HU. Padding becomes air.

    Args:
        stored: int16 or uint16 [H, W].
        scale: what the header says of them.

    Returns:
        int16 [H, W], HU in -1024..3071.

    Raises:
        DicomError: much of it would be clipped.
    """
    padded = _padded(stored, scale.padding) if scale.padding else None
    if scale.wrapped:
        hu = unwrap_12bit(stored, round(scale.intercept))
    else:
        _refuse_clipped(stored, scale, padded)
        hu = rescale(stored, scale.slope, scale.intercept)
    if padded is not None:
        hu[padded] = HU_MIN
    return hu


def padding_of(first: int, last: int, scale: Scale, lossy: bool = False) -> Padding:
    """What PixelPaddingValue and PixelPaddingRangeLimit mean in a slice of this scale.

    Writers are careless about the sign: -2000 and 63536 are the same 16 bits, and in a file of
    12 bits the pixels hold the lowest 12 of them. So both are taken modulo the values that a pixel
    can have. After a lossy compression a pixel is padding above HU that is nearer to it than to HU.
    """
    least, most = scale.span
    low, high = sorted((v - least) % (most - least + 1) + least for v in (first, last))
    values = np.arange(low, high + 1)
    if scale.wrapped:
        hu = unwrap_12bit(values, round(scale.intercept)).astype(float)
    else:
        hu = values * scale.slope + scale.intercept
    everywhere = not ((hu > HU_MIN) & (hu <= HU_MAX)).any()
    if lossy and everywhere and scale.slope > 0 and hu[0] > HU_MAX:
        low, high = math.ceil((low + (HU_MAX - scale.intercept) / scale.slope) / 2), most
    return Padding(low, high, everywhere)


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


def rescale(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Stored values [H, W] -> int16 HU; in the stored type where slope and intercept allow it."""
    if slope == 1 and intercept.is_integer() and abs(intercept) <= 32_767:
        shift, span = int(intercept), np.iinfo(stored.dtype)
        low, high = max(HU_MIN - shift, span.min), min(HU_MAX - shift, span.max)
        if low <= high:  # clipped before it is shifted, so the sum fits int16, also modulo 65,536
            kind = stored.dtype.type  # Python's integers make clipping uint16 slow
            hu: np.ndarray = np.clip(stored, kind(low), kind(high)).view(np.int16)
            hu += np.int16(shift)
            return hu
    hu = stored.astype(np.float64) * slope + intercept
    return np.rint(np.clip(hu, HU_MIN, HU_MAX)).astype(np.int16)


def _padded(stored: np.ndarray, padding: Padding) -> np.ndarray | None:
    """bool [H, W], True where there is padding; None if there is none."""
    low, high = map(stored.dtype.type, padding[:2])
    inside: np.ndarray = stored == low if low == high else (stored >= low) & (stored <= high)
    if not inside.any():
        return None
    if padding.everywhere:
        return inside
    reached = np.zeros_like(inside)
    for axis in (0, 1):
        reached |= np.logical_and.accumulate(inside, axis)
        reached |= np.flip(np.logical_and.accumulate(np.flip(inside, axis), axis), axis)
    return reached


def _refuse_clipped(stored: np.ndarray, scale: Scale, padded: np.ndarray | None) -> None:
    # Some 64 rows tell whether all are to be counted, which takes a twentieth of reading a slice.
    step = max(1, len(stored) // 64)
    some = None if padded is None else padded[::step]
    if not _clipped(stored[::step], scale, some, 0.8):
        return
    if found := _clipped(stored, scale, padded, 1):
        share, where = found
        raise DicomError(
            f"{100 * share:.0f} % of the pixels are {where} HU, so its header (sign, slope or "
            f"intercept) is not that of its data"
        )


def _clipped(
    stored: np.ndarray, scale: Scale, padded: np.ndarray | None, limit: float
) -> tuple[float, str] | None:
    """The share of pixels beyond the range of HU, and where, if it is above `limit` times what a
    header can be right with."""
    count = stored.size - (0 if padded is None else int(np.count_nonzero(padded)))
    share, where = _share(stored, scale, padded, HU_MAX + 0.5, 1, count), f"above {HU_MAX}"
    wrong = share > _MOST_ABOVE * limit
    if not wrong:
        share, where = _share(stored, scale, padded, HU_MIN - 0.5, -1, count), f"below {HU_MIN}"
        wrong = share > _MOST_BELOW * limit
    if not wrong and share > _MOST_FAR_BELOW * limit:
        # One value is padding that the header does not declare.
        lowest = stored.max() if scale.slope < 0 else stored.min()
        left_out = stored == lowest if padded is None else (stored == lowest) | padded
        far = _share(stored, scale, left_out, HU_MIN - _FAR_BELOW, -1, count)
        wrong = far > _MOST_FAR_BELOW * limit
    return (share, where) if wrong else None


def _share(
    stored: np.ndarray, scale: Scale, left_out: np.ndarray | None, hu: float, side: int, count: int
) -> float:
    """Pixels above (side 1) or below (-1) so many HU, of `count`, without those left out."""
    limit = (hu - scale.intercept) / scale.slope
    above = (side > 0) == (scale.slope > 0)
    # An integer of the pixels' own type: ten times as fast as a comparison with a float.
    edge = math.floor(limit) if above else math.ceil(limit)
    least, most = scale.span
    # No value of so many bits is beyond it, as in most files of 12 bits: nothing is counted.
    if not count or (edge >= most if above else edge <= least):
        return 0.0
    if edge < least or edge > most:
        outside = np.ones(stored.shape, bool)
    else:
        kind = stored.dtype.type
        outside = stored > kind(edge) if above else stored < kind(edge)
    if left_out is not None:
        outside &= ~left_out
    return float(np.count_nonzero(outside) / count)

"""Where the elements of a plain DICOM header lie, for a decoder that sees thousands of one kind.

pydicom makes an object of every element, which takes longer than all else that is done to an
uncompressed slice. This walk interprets nothing and knows one case only: a Part 10 file, little
endian and not compressed, its elements in ascending order and of known lengths, with the pixel data
last. Of anything else it finds nothing, and pydicom reads the file.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import NamedTuple

_PREFIX_END = 132  # 128 bytes of preamble, and "DICM" (PS3.10 7.1)
_META_GROUP, _ITEM_GROUP = 0x0002, 0xFFFE
_GROUP_LENGTH, _SYNTAX = 0x0000, 0x0010  # of the file meta information
_PIXEL_DATA = 0x7FE0_0010
_EXPLICIT, _IMPLICIT = b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2"
_UNDEFINED = 0xFFFF_FFFF
# PS3.5 7.1.2: the length is two bytes, or four after two reserved ones.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_head = struct.Struct("<HH2sH").unpack_from
_four_bytes = struct.Struct("<I").unpack_from


class DicomError(ValueError):
    """Why one file yields no slice. Names the element and its value, never an identifier."""

    @property
    def reason(self) -> str:
        """The message in one line, as tables and journals have it."""
        return " ".join(str(self).split())


class Elements(NamedTuple):
    """What a file says of itself.

    syntax: the transfer syntax, empty if unknown. values: of each wanted tag that is there, its VR
    (None in a file of implicit VR) and its bytes. start, length: of the pixel data, bytes.
    """

    syntax: str
    values: dict[int, tuple[str | None, bytes]]
    start: int
    length: int


def find_elements(data: bytes, wanted: Container[int]) -> Elements | None:
    """Walks through a file's top-level elements; None if it is not of the one known kind.

    Args:
        data: the whole file.
        wanted: tags whose values are kept, group x 65,536 + element.
    """
    if data[_PREFIX_END - 4 : _PREFIX_END] != b"DICM":
        return None
    try:
        # In the file meta information lengths and VRs are explicit, whatever follows it.
        offset, syntax = _meta(data)
        if syntax not in (_EXPLICIT, _IMPLICIT):
            return None
        explicit = syntax == _EXPLICIT
        if (
            data[offset + 4 : offset + 6].isupper() != explicit
        ):  # a VR there, or none: wrongly named
            return None
        return _walk(data, offset, wanted, explicit, syntax.decode())
    except struct.error:  # it ends before its pixel data
        return None


def transfer_syntax(data: bytes) -> bytes:
    """What the file meta information names, empty if anything about it is odd."""
    if data[_PREFIX_END - 4 : _PREFIX_END] != b"DICM":
        return b""
    try:
        return _meta(data)[1]
    except struct.error:
        return b""


def _meta(data: bytes) -> tuple[int, bytes]:
    """Where the file meta information (PS3.10 7.1) ends, and the transfer syntax it names; no
    syntax if anything is odd."""
    offset, syntax = _PREFIX_END, b""
    # To the first element of another group: the group length, which names that place, can be wrong.
    while True:
        group, element, vr, length = _head(data, offset)
        if group != _META_GROUP:
            return offset, syntax
        offset += 8
        if vr in _LONG:
            (length,) = _four_bytes(data, offset)
            offset += 4
        odd = vr not in _LONG and vr not in _SHORT
        odd |= element == _GROUP_LENGTH and (vr, length) != (b"UL", 4)
        odd |= element == _SYNTAX and vr != b"UI"
        if odd:
            return offset, b""
        if element == _SYNTAX:
            # UIDs are padded to an even length by a zero, and by some writers with a blank.
            syntax = data[offset : offset + length].rstrip(b"\0 ")
        offset += length


def _walk(
    data: bytes, offset: int, wanted: Container[int], explicit: bool, syntax: str
) -> Elements | None:
    values: dict[int, tuple[str | None, bytes]] = {}
    last = 0
    while True:
        group, element, vr, length = _head(data, offset)
        offset += 8
        if not explicit:
            (length,) = _four_bytes(data, offset - 4)
        elif vr in _LONG:
            (length,) = _four_bytes(data, offset)
            offset += 4
        elif vr not in _SHORT:
            return None
        tag = group << 16 | element
        # Out of order or twice, a sequence or compressed pixels, or an item: pydicom's business.
        if tag <= last or length == _UNDEFINED or group == _ITEM_GROUP:
            return None
        if tag == _PIXEL_DATA:
            return (
                Elements(syntax, values, offset, length) if offset + length == len(data) else None
            )
        # A value that is cut short leaves nothing behind it, and the next head raises.
        if tag in wanted:
            values[tag] = (vr.decode() if explicit else None, data[offset : offset + length])
        offset += length
        last = tag

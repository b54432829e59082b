"""Where the elements of a DICOM file lie. The only parser of headers: what one refuses, no other
reads.

It interprets nothing and inflates nothing: it walks over the top-level elements (PS3.5 chapter 7),
keeps the bytes of those that are wanted, and stops at a number of elements that no slice has.
pydicom, which makes an object of every element, takes longer than all else that is done to an
uncompressed slice, and makes them for minutes of a file that holds nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import NamedTuple

PREFIX_BYTES = 132  # 128 bytes of preamble, and "DICM" (PS3.10 7.1)
MAX_ELEMENTS = 100_000  # of a file, items and fragments included; a slice has some hundred
MAX_VALUE = 4096  # bytes of a wanted element: numbers, identifiers, short texts
_MAX_DEPTH = 32  # of sequences in sequences
_META_GROUP, _ITEM_GROUP = 0x0002, 0xFFFE
_SYNTAX = 0x0002_0010
_PIXEL_DATA = 0x7FE0_0010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
# The end of a sequence; little endian or not.
_END = {True: b"\xfe\xff\xdd\xe0", False: b"\xff\xfe\xe0\xdd"}
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
_UNDEFINED = 0xFFFF_FFFF
# PS3.5 7.1.2: the length is two bytes, or four after two reserved ones.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


class DicomError(ValueError):
    """Why one file yields no slice. Names the element and its value, never an identifier."""

    @property
    def reason(self) -> str:
        """The message in one line, as tables and journals have it."""
        return " ".join(str(self).split())


class Elements(NamedTuple):
    """What a file says of itself.

    syntax: the transfer syntax, empty if unknown. little: whether it is little endian. values: of
    each wanted tag that is there, its VR (None where that is implicit) and its bytes. start,
    length: of the pixel data, bytes; 0 if there are none. fragments: the same of each fragment of
    encapsulated pixel data (PS3.5 A.4), the offset table first.
    """

    syntax: str
    little: bool
    values: dict[int, tuple[str | None, bytes]]
    start: int
    length: int
    fragments: list[tuple[int, int]]


def check_prefix(head: bytes) -> None:
    """Refuses by its first `PREFIX_BYTES` bytes what is no DICOM, before any more of it is read.

    Raises:
        DicomError: it is empty, or has neither the prefix nor a first element that old files
            without one begin with: of group 8, or of the file meta information.
    """
    if not head:
        raise DicomError("the file is empty")
    if head[PREFIX_BYTES - 4 : PREFIX_BYTES] == b"DICM":
        return
    group, element = head[:2], int.from_bytes(head[2:4], "little")
    if not ((group == b"\x08\0" and element <= 0x18) or head[:4] == b"\2\0\0\0"):
        raise DicomError("not a DICOM file (no DICM prefix)")


def find_elements(data: bytes, wanted: Container[int], pixels: bool = True) -> Elements:
    """Walks through a file's top-level elements.

    Args:
        data: the whole file; without `pixels` its beginning may do.
        wanted: tags whose values are kept, group x 65,536 + element.
        pixels: go on to the pixel data, and to the end.

    Raises:
        DicomError: it is no DICOM, deflated, damaged, or of more elements than any slice.
    """
    check_prefix(data[:PREFIX_BYTES])
    try:
        return _Walk(data, wanted, pixels).elements()
    except struct.error:  # it ends within an element
        raise DicomError("unreadable header (the file ends within it)") from None


class _Walk:
    """One file on the way through it."""

    def __init__(self, data: bytes, wanted: Container[int], pixels: bool) -> None:
        self._data, self._wanted, self._pixels = data, wanted, pixels
        self._values: dict[int, tuple[str | None, bytes]] = {}
        self._left = MAX_ELEMENTS
        self._set_order(little=True)

    def _set_order(self, little: bool) -> None:
        self._little, order = little, "<" if little else ">"
        self._head = struct.Struct(f"{order}HH2sH").unpack_from
        self._four_bytes = struct.Struct(f"{order}I").unpack_from

    def elements(self) -> Elements:
        prefixed = self._data[PREFIX_BYTES - 4 : PREFIX_BYTES] == b"DICM"
        at, syntax = self._meta(PREFIX_BYTES if prefixed else 0)
        explicit = self._is_explicit(at)
        if not prefixed and not syntax:
            # The default of the standard (PS3.5 10.1), or what the file itself shows.
            syntax = _EXPLICIT if explicit else _IMPLICIT
        if syntax == _DEFLATED:
            raise DicomError(
                "the transfer syntax Deflated Explicit VR Little Endian is not read: `dcmconv +te` "
                "of DCMTK converts it"
            )
        little = syntax != _BIG_ENDIAN
        self._set_order(little)
        return Elements(syntax, little, self._values, *self._dataset(at, explicit))

    def _meta(self, at: int) -> tuple[int, str]:
        """Where the file meta information (PS3.10 7.1) ends, and the transfer syntax it names."""
        syntax = b""
        # To the first element of another group: the group length, which names that place, can be
        # wrong. Lengths and VRs are explicit here, whatever follows.
        while self._data[at : at + 2] == b"\2\0":
            tag, vr, length, at = self._next(at, explicit=True)
            if tag == _SYNTAX:
                syntax = self._value(at, length)
            elif tag in self._wanted:
                self._values[tag] = vr, self._value(at, length)
            at += length
        # UIDs are padded to an even length by a zero, and by some writers with a blank.
        return at, syntax.rstrip(b"\0 ").decode("latin-1")

    def _dataset(self, at: int, explicit: bool) -> tuple[int, int, list[tuple[int, int]]]:
        """Start, length and fragments of the pixel data; fills in the values."""
        size, wanted = len(self._data), self._wanted
        pixels: tuple[int, int, list[tuple[int, int]]] = (0, 0, [])
        while at + 8 <= size:
            tag, vr, length, at = self._next(at, explicit)
            if tag >> 16 == _ITEM_GROUP:
                raise DicomError("unreadable header (an item outside of a sequence)")
            if tag == _PIXEL_DATA and not self._pixels:
                break
            if length == _UNDEFINED:
                fragments: list[tuple[int, int]] = []
                start, at = at, self._items(at, fragments, 0)
                if tag == _PIXEL_DATA:
                    pixels = start, at - start, fragments
                continue
            if tag in wanted:
                self._values[tag] = vr, self._value(at, length)
            elif tag == _PIXEL_DATA:
                pixels = at, length, []
            at += length
        return pixels

    def _next(self, at: int, explicit: bool) -> tuple[int, str | None, int, int]:
        """Tag, VR (None if implicit), length, and where the value begins."""
        self._left -= 1
        if self._left < 0:
            raise DicomError(f"unreadable header (more than {MAX_ELEMENTS:,} elements)")
        group, element, vr, length = self._head(self._data, at)
        tag = group << 16 | element
        if explicit:
            if vr in _SHORT:
                return tag, vr.decode(), length, at + 8
            if vr in _LONG:
                return tag, vr.decode(), self._four_bytes(self._data, at + 8)[0], at + 12
            if vr.isupper() and vr.isalpha():  # of another edition of the standard
                return tag, vr.decode(), length, at + 8
        # Items have none, and some writers leave it out of single elements.
        return tag, None, self._four_bytes(self._data, at + 4)[0], at + 8

    def _value(self, at: int, length: int) -> bytes:
        if length > MAX_VALUE:
            raise DicomError(f"unreadable header (a value of {length:,} bytes)")
        value = self._data[at : at + length]
        if len(value) != length:
            raise DicomError("unreadable header (the file ends within it)")
        return value

    def _is_explicit(self, at: int) -> bool:
        # By what is there, not by the transfer syntax: it is wrong in some files.
        vr = self._data[at + 4 : at + 6]
        return vr.isupper() and vr.isalpha()

    def _items(self, at: int, found: list[tuple[int, int]], depth: int) -> int:
        """Past a value of undefined length: items or fragments, and a delimiter (PS3.5 7.5)."""
        if depth > _MAX_DEPTH:
            raise DicomError("unreadable header (sequences within sequences without end)")
        while True:
            tag, _, length, start = self._next(at, explicit=False)
            if tag == _SEQUENCE_END:
                return start
            if tag != _ITEM:
                # Something private, whose end alone is known.
                end = self._data.find(_END[self._little], at)
                if found or end < 0:
                    raise DicomError("unreadable header (a sequence without an end)")
                return end + 8
            at = start + length if length != _UNDEFINED else self._item(start, depth)
            found.append((start, at - start))

    def _item(self, at: int, depth: int) -> int:
        """Past an item of undefined length, which holds elements until its delimiter."""
        explicit = self._is_explicit(at)  # in UN it is implicit, whatever is around it (6.2.2)
        while True:
            tag, _, length, at = self._next(at, explicit)
            if tag == _ITEM_END:
                return at
            at = at + length if length != _UNDEFINED else self._items(at, [], depth + 1)

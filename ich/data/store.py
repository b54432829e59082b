"""Where slices lie: an unpacked folder, or a zip archive read in place.

An archive's directory is parsed here and not by `zipfile`, whose objects for the 870,000 members
of the RSNA archive take half a gigabyte; it is parsed once, in the calling process. What a worker
process needs to read a file is a `Location`.
"""

from __future__ import annotations

import bz2
import errno
import lzma
import os
import stat
import struct
import unicodedata
import zipfile
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

# isal inflates twice as fast as zlib: 0.77 against 1.51 ms a slice.
from isal import igzip_lib, isal_zlib

from ich.data.dicom import DicomError
from ich.data.elements import PREFIX_BYTES, check_prefix

MAX_BYTES = 64 << 20  # of a slice's file, before and after inflating; a CT slice has half a MB
_USUAL_BYTES = 1 << 20  # inflated in two milliseconds; a look at the beginning would take longer
MAX_TABLE_BYTES = 256 << 20  # of a label or metadata file, inflated; the RSNA's has 120 MB
_MISSING = -1
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
# Of APPNOTE.TXT 4.4.5; the others have not been written for decades.
_NOT_READ = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_ENCRYPTED = 0x1  # among an entry's flags
_ZIP64, _UNICODE_PATH = 0x1, 0x7075  # tags of extra fields
# Of an entry in the directory: magic, flags, method, CRC-32, packed and full size, the lengths of
# name, extra field and comment, offset.
_ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")


# What reading and unpacking raise of damaged bytes.
_DAMAGED = (OSError, EOFError, UnicodeError, igzip_lib.IsalError, lzma.LZMAError)
_LOCAL_HEADER = 30  # bytes before a member's name, extra field and data


class Unreadable(DicomError):
    """Why a file's bytes cannot be had; another try may succeed."""


class Location(NamedTuple):
    """Where one file's bytes are.

    size: bytes, -1 if the file is missing. stamp: CRC-32 in a zip, else the time of change in ns.
    offset: of the member's local header in a zip, else -1. packed: compressed bytes.
    kind: a member's compression method, and from bit 16 on its flags.
    """

    path: str
    size: int = _MISSING
    stamp: int = 0
    offset: int = -1
    packed: int = 0
    kind: int = 0

    @property
    def signature(self) -> str:
        """Changes when the file does; empty if it is missing."""
        if self.size == _MISSING:
            return ""
        if self.offset >= 0:
            return f"{self.stamp:08x}-{self.size}"
        return f"{self.size}-{self.stamp}"


@dataclass(frozen=True)
class SliceStore:
    """A folder tree or one zip archive.

    follow_links: whether a linked folder belongs to the tree, if what it leads to lies elsewhere.
    """

    root: Path
    follow_links: bool = False

    @staticmethod
    def open(root: str) -> SliceStore:
        """A data set's folder, whose linked folders belong to it, or its zip archive.

        Raises:
            UserError: it does not exist or is neither.
        """
        from ich.base.config import UserError  # here: decoding processes need no hydra

        path = Path(root)
        if not path.exists():
            raise UserError(
                f"data.root is {root!r}, which does not exist. Give the folder or the zip archive "
                f"that holds the slices, or use data=phantom, which needs no files."
            )
        # is_file first: a pipe would be waited for.
        if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
            raise UserError(
                f"data.root is {root!r}, which is neither a folder nor a zip archive. Give the "
                f"folder or the zip that holds the slices; a broken download must be repeated."
            )
        return SliceStore(path, follow_links=True)

    @property
    def is_zip(self) -> bool:
        return self.root.is_file()

    @cached_property
    def paths(self) -> list[str]:
        """Every file, relative to `root`, with forward slashes, sorted; no hidden folder.

        A folder that is a link, or cannot be opened, stands for itself: reading it tells why not.
        """
        if self.is_zip:
            return self._directory[0]
        paths: list[str] = []

        def keep_closed(error: OSError) -> None:
            paths.append(Path(os.fsdecode(error.filename)).relative_to(self.root).as_posix())

        known = [self.root.resolve()]  # trees that are walked through

        def follow(folder: Path) -> bool:
            place = folder.resolve()
            # Else a file would be there twice, or a circle be walked for ever.
            if not self.follow_links or any(
                place.is_relative_to(k) or k.is_relative_to(place) for k in known
            ):
                return False
            known.append(place)
            return True

        for folder, below, files in os.walk(self.root, onerror=keep_closed, followlinks=True):
            here = Path(folder)
            named = sorted(d for d in below if not d.startswith("."))
            links = [d for d in named if (here / d).is_symlink() and not follow(here / d)]
            # In place, by which os.walk leaves out the hidden ones and links.
            below[:] = [d for d in named if d not in links]
            relative = here.relative_to(self.root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            paths += [prefix + name for name in [*files, *links]]
        return sorted(paths)

    @cached_property
    def _directory(self) -> tuple[list[str], np.ndarray]:
        return read_directory(self.root)

    def locate(self, paths: Sequence[str]) -> list[Location]:
        """Where each file is and what tells it from a later one; looks, but does not read."""
        look = self._member if self.is_zip else self._file
        return [look(path) for path in paths]

    def _member(self, path: str) -> Location:
        names, entries = self._directory
        i = bisect_left(names, path)
        if i == len(names) or names[i] != path:
            return Location(path)
        return Location(path, *entries[i].tolist())

    def _file(self, path: str) -> Location:
        if not path:
            return Location(path)
        try:
            # Of the link, not of what it points to: reading refuses it by name.
            status = os.lstat(_place(self.root, path))
        except OSError:
            return Location(path)
        return Location(path, status.st_size, status.st_mtime_ns)

    def read(self, path: str) -> bytes:
        """One file of the store, whole: a label CSV.

        Raises:
            FileNotFoundError: it is not there.
            UserError: it is damaged, too large, or packed in a way that is not read.
        """
        from ich.base.config import UserError  # as in `open`

        (location,) = self.locate([path])
        if location.size == _MISSING:
            raise FileNotFoundError(f"{self.root} holds no {path}")
        try:
            return read_bytes(self.root, location, MAX_TABLE_BYTES)
        except DicomError as error:
            raise UserError(
                f"{path} in {self.root} cannot be used: {error.reason}. Unpack it with the program "
                f"that packed it, and give it with data.labels=FILE."
            ) from None


def read_dicom(root: Path, location: Location, head: int | None = None) -> bytes:
    """As `read_bytes`, of a DICOM file: of a large file that is none only the first bytes are read.

    An archive of a thousand members of zeros would be inflated whole otherwise, 64 MB each.
    """
    if location.size > _USUAL_BYTES:
        check_prefix(read_bytes(root, location, head=PREFIX_BYTES))
    return read_bytes(root, location, head=head)


def read_bytes(
    root: Path, location: Location, limit: int = MAX_BYTES, head: int | None = None
) -> bytes:
    """One file's bytes, of a folder or a zip. What a worker process calls: it lists nothing.

    Args:
        root: the folder or zip.
        location: where the file is.
        limit: bytes above which it is refused.
        head: read this many bytes from its start and no more; a checksum cannot be compared then.

    Raises:
        DicomError: missing, no regular file, above `limit` bytes, damaged, or changed meanwhile.
    """
    if location.size == _MISSING:
        raise DicomError("the file is missing")
    if max(location.size, location.packed) > limit:
        raise DicomError(f"the file has {location.size:,} bytes, more than {limit:,}")
    try:
        if location.offset >= 0:
            return _read_member(root, location, head)
        return _read_file(_place(root, location.path), location, head)
    except _DAMAGED as error:  # type: ignore[misc]
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise DicomError("a symbolic link, which is not followed") from None
        raise Unreadable(f"cannot be read ({type(error).__name__})") from None


def _place(root: Path, path: str) -> str:
    """Where a file of a folder lies, whatever normal form its name has there: a cohort is also that
    of a copy on another file system, which may have changed it."""
    if not path.isascii():
        for form in ("NFC", "NFD"):
            same = unicodedata.normalize(form, path)
            if same != path and not os.path.lexists(f"{root}/{path}"):
                return f"{root}/{same}"
    return f"{root}/{path}"


def _read_file(path: str, location: Location, head: int | None) -> bytes:
    # A symbolic link is refused (ELOOP), and a FIFO does not block.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DicomError("not a regular file")
        wanted = location.size if head is None else min(head, location.size)
        data = os.read(handle, wanted)
        now = status.st_mtime_ns, status.st_size
        # The journal will say that the slice is of this signature, so these must be its bytes.
        if now != (location.stamp, location.size) or len(data) != wanted:
            raise Unreadable("the file changed while it was looked at")
        return data
    finally:
        os.close(handle)


def _read_member(root: Path, location: Location, head: int | None) -> bytes:
    flags, method = location.kind >> 16, location.kind & 0xFFFF
    if flags & _ENCRYPTED:
        raise DicomError("encrypted in the archive")
    if method not in (_STORED, _DEFLATED, _BZIP2, _LZMA):
        raise DicomError(
            f"compressed in the archive by {_NOT_READ.get(method, f'method {method}')}, which is "
            f"not read: Deflate, bzip2 and LZMA are"
        )
    with root.open("rb", buffering=0) as archive:
        packed = _packed(archive.fileno(), location, head)
    data = _inflate(packed, method, location.size if head is None else min(head, location.size))
    if head is not None:
        return data[:head]
    if len(data) != location.size or isal_zlib.crc32(data) != location.stamp:
        raise Unreadable("damaged in the archive (its size or CRC-32 differs)")
    return data


def _inflate(packed: bytes, method: int, size: int) -> bytes:
    """At most one byte more than `size`, whatever the stream holds."""
    if method == _DEFLATED:
        # Negative: bare deflate data, without a header of zlib.
        return bytes(isal_zlib.decompressobj(-isal_zlib.MAX_WBITS).decompress(packed, size + 1))
    if method == _BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, size + 1)
    if method == _LZMA:
        # Version and length of the properties, these, and the bare stream (APPNOTE.TXT 5.8.8).
        parameters, dictionary = struct.unpack("<BL", packed[4:9].ljust(5, b"\xff"))
        settings: dict[str, int] = {
            "id": lzma.FILTER_LZMA1,
            "lc": parameters % 9,
            "lp": parameters // 9 % 5,
            "pb": parameters // 45,
            # No more than there is to look back on: a file may ask for gigabytes.
            "dict_size": max(4096, min(dictionary, size)),
        }
        bare = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[settings])
        # Not a byte more: a stream without an end mark does not say where it ends.
        return bare.decompress(packed[9:], size)
    return packed


def _packed(archive: int, location: Location, head: int | None) -> bytes:
    header = os.pread(archive, 30, location.offset)
    n, m = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    # The local header has an extra field of its own, often of another length than the directory's.
    rest = os.pread(archive, n + m, location.offset + 30)
    same = _member_name(rest[:n], rest[n:]) == location.path
    # An archive that was replaced since has other members at the same places.
    if header[:4] != b"PK\x03\x04" or not same:
        raise Unreadable("damaged in the archive (its local header differs)")
    wanted = location.packed
    # Of the other methods a beginning may give nothing: bzip2 has blocks of up to 900 KB.
    if head is not None and location.kind & 0xFFFF in (_STORED, _DEFLATED):
        # Deflated data are at most a little longer than what they stand for.
        wanted = min(wanted, head + 1024)
    return os.pread(archive, wanted, location.offset + 30 + n + m)


def read_directory(path: Path) -> tuple[list[str], np.ndarray]:
    """The members of a zip archive, sorted by name; of two with one name the later counts.

    Returns:
        Names, without folders, and int64 [N, 5]: the fields of `Location` after its path.

    Raises:
        UserError: the directory is damaged.
    """
    from ich.base.config import UserError  # as in `SliceStore.open`

    names: list[str] = []
    fields = array("q")
    try:
        with path.open("rb", buffering=1 << 20) as archive:
            start, size, shift = _find_directory(archive)
            archive.seek(start)
            for name, *entry, offset, packed, kind in _members(archive, size):
                if name and not name.endswith("/"):
                    names.append(name)
                    fields.extend((*entry, offset + shift, packed, kind))
    # Sizes that contradict each other end an iterator early, or do not fit 64 bits.
    except (OSError, ValueError, struct.error, OverflowError, RuntimeError) as error:
        raise UserError(
            f"the directory of the zip archive {path} cannot be read ({error}). A broken download "
            f"must be repeated; `zip -FF` may mend an archive."
        ) from None
    _refuse_overlaps(path, np.frombuffer(fields, np.int64).reshape(-1, 5))
    # As objects, by Python's own comparison, for `bisect` looks names up by it. Stable: of two
    # members of one name the later follows.
    order = np.argsort(np.array(names, dtype=object), kind="stable")
    kept = [
        i for n, i in enumerate(order) if n + 1 == len(order) or names[i] != names[order[n + 1]]
    ]
    return [names[i] for i in kept], np.frombuffer(fields, np.int64).reshape(-1, 5)[kept]


def read_raw_directory(path: Path) -> Iterator[bytes]:
    """The directory of a zip archive as it stands there, in pieces; of a damaged one nothing, which
    `read_directory` explains."""
    with path.open("rb") as archive:
        try:
            start, size, _ = _find_directory(archive)
            archive.seek(start)
        except (OSError, ValueError, struct.error):
            return
        while size > 0 and (block := archive.read(min(size, 1 << 20))):
            size -= len(block)
            yield block


def _refuse_overlaps(path: Path, entries: np.ndarray) -> None:
    """Of few bytes that many members share, petabytes can be inflated."""
    from ich.base.config import UserError  # as in `SliceStore.open`

    # Offset and packed size, in the order in which the members lie there.
    offset, packed = entries[np.argsort(entries[:, 2], kind="stable")][:, 2:4].T
    if (offset[:-1] + _LOCAL_HEADER + packed[:-1] > offset[1:]).any():
        raise UserError(
            f"members of the zip archive {path} overlap, as no program that packs files makes "
            f"them: it is damaged, or made to fill memory and disk. Get it again, or unpack it "
            f"with care and give the folder."
        )


def _find_directory(archive: IO[bytes]) -> tuple[int, int, int]:
    """Start and bytes of the central directory, and how many bytes stand before the archive.

    See APPNOTE.TXT 4.3.14 to 4.3.16. Raises ValueError.
    """
    length = archive.seek(0, os.SEEK_END)
    tail_start = max(0, length - 65_557)  # the last record with the longest comment
    archive.seek(tail_start)
    tail = archive.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise ValueError("its end is missing")
    size, offset = struct.unpack_from("<LL", tail, at + 12)
    end = tail_start + at
    # The locator, 20 bytes, stands directly before the last record; the record of 56 before that.
    if tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        end -= 76  # the ZIP64 record and its locator stand between
        archive.seek(max(0, end))
        record = archive.read(56)
        if record[:4] != b"PK\x06\x06":
            raise ValueError("its ZIP64 end is missing")
        size, offset = struct.unpack_from("<QQ", record, 40)
    if end < size + offset:
        raise ValueError("its end contradicts its length")
    # From its end, not by its offset: something may stand before the archive, as an unpacker does.
    return end - size, size, end - size - offset


def _members(archive: IO[bytes], size: int) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Name, size, CRC-32, offset, packed size and kind of each entry (APPNOTE.TXT 4.3.12)."""
    while size > 0:
        head = archive.read(46)
        magic, flags, method, crc, packed, full, n, m, k, offset = _ENTRY.unpack(head)
        if magic != b"PK\x01\x02":
            raise ValueError("an entry is damaged")
        rest = archive.read(n + m + k)
        size -= 46 + len(rest)
        if 0xFFFFFFFF in (full, packed, offset):
            full, packed, offset = _zip64(rest[n : n + m], full, packed, offset)
        name = _member_name(rest[:n], rest[n : n + m])
        yield name, full, crc, offset, packed, flags << 16 | method


def _member_name(raw: bytes, extra: bytes) -> str:
    """A member's path, with forward slashes. What is no ASCII is UTF-8 if it can be, flagged so or
    not (macOS sets no flag), else code page 437 (APPNOTE.TXT 4.4.17 and appendix D)."""
    for tag, data in _fields(extra) if not raw.isascii() else ():
        # A second name in UTF-8, valid as long as the first has not been changed (4.6.9).
        if tag == _UNICODE_PATH and data[1:5] == isal_zlib.crc32(raw).to_bytes(4, "little"):
            raw = data[5:]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("cp437")
    # Programs for Windows may write their own separators, and those for macOS take umlauts apart.
    return unicodedata.normalize("NFC", name).replace("\\", "/").lstrip("/")


def _zip64(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset, where they are too large for 32 bits, from an entry's extra field."""
    for tag, data in _fields(extra):
        # Only values that did not fit are there, in this order (APPNOTE.TXT 4.5.3).
        if tag == _ZIP64:
            large = struct.iter_unpack("<Q", data[: len(data) // 8 * 8])
            return [next(large)[0] if v == 0xFFFFFFFF else v for v in values]
    return list(values)


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """The tag and data of each of an entry's extra fields (APPNOTE.TXT 4.5.1)."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        yield tag, extra[at + 4 : at + 4 + length]
        at += 4 + length

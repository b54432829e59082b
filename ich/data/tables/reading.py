"""Tables as people save them: CSV with any separator, encoding or packing, as columns of text.

A table is read where it can be understood in one way only, and what was understood is said. A row
with more or fewer values than there are headings is refused by its line, since nobody knows which
of its values is missing; so are two columns of one name.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import logging
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import pandas as pd

from ich.base.config import UserError
from ich.base.naming import clean_name
from ich.data.store import MAX_TABLE_BYTES, SliceStore

BLOCK = 100_000  # rows at a time: pandas needs far more memory while reading
# As `MAX_TABLE_BYTES`, twice what the RSNA's label file has: 9 million values in 120 MB.
MAX_VALUES = 20_000_000
_MAX_HEADING = 1 << 20  # characters
_MAX_COLUMNS = 5000  # each costs pandas some microseconds in every block of rows
_LINES = 4 << 20  # characters read at a time
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# No text in Latin-1 has these: ISO/IEC 8859-1 leaves 80 to 9F to control characters, and encodings
# in which they are letters (Windows-1252, code page 850, Mac Roman) contradict each other.
_NO_LATIN_1 = re.compile(rb"[\x00\x80-\x9f]")
_UNREADABLE = (csv.Error, OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)


log = logging.getLogger(__name__)


@cache
def tell(note: str) -> None:
    """Says how data were understood, once: a command may look at them several times."""
    log.warning("%s", note)


def read_table(source: Path | IO[bytes], name: str, keys: Sequence[str]) -> pd.DataFrame:
    """Reads a table, packed by gzip, bzip2, xz or zip or not. Blank lines are left out, and blanks
    around values; how it was understood is said where it is no plain CSV.

    Args:
        source: a path, or an open binary file that can be read twice.
        name: what the source is called in messages.
        keys: headings of which it should have one: the separator is known by them.

    Returns:
        Its columns by their headings, as text; the index is the line on which each row begins.

    Raises:
        UserError: it is no table, or one that is too large, damaged, or ambiguous.
    """
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                return _read(_member(source, file, name), name, keys)
        return _read(source, name, keys)
    except _UNREADABLE as error:
        raise UserError(
            f"{name} cannot be read as CSV: {error or type(error).__name__}. Save it as CSV in "
            f"UTF-8; a file that was cut short must be got again."
        ) from None


def find_column(frame: pd.DataFrame, names: Sequence[str], name: str) -> str | None:
    """The column with the first of these headings that is there, whatever its case.

    Args:
        frame: a table.
        names: headings; blanks, `_` and `-` in them count as little as case.
        name: what the table is called in messages.

    Raises:
        UserError: two columns have it.
    """
    for wanted in names:
        found = [str(c) for c in frame.columns if bare(str(c)) == bare(wanted)]
        if len(found) > 1:
            raise UserError(
                f"{name} has the columns {' and '.join(found)}, which both may be its {wanted}. "
                f"Remove or rename one of them."
            )
        if found:
            return found[0]
    return None


def bare(heading: str) -> str:
    """A heading without what people write differently: case, blanks, `_` and `-`."""
    return re.sub(r"[ _-]", "", clean_name(heading).casefold())


# From a file to text


def _member(path: Path, file: IO[bytes], name: str) -> IO[bytes]:
    """The file itself, or the one table in it if it is a zip archive."""
    if file.read(4) != b"PK\x03\x04":
        return file
    store = SliceStore(path)
    tables = [p for p in store.paths if PurePosixPath(p).suffix.lower() in (".csv", ".tsv", ".txt")]
    if len(tables) != 1:
        raise UserError(
            f"{name} is a zip archive or a spreadsheet's own format, and {len(tables)} tables in "
            f"it are CSV. Save the one that is meant as CSV in UTF-8, and give that."
        )
    return io.BytesIO(store.read(tables[0]))


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """From its beginning."""
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if magic == b"\xfd7zXZ\x00" else file


def _encoding(file: IO[bytes], name: str) -> str:
    """By a first look at all of it, which also finds out how much there is.

    Raises:
        UserError: it is too large, or text in no encoding that is known without doubt.
    """
    block = file.read(_LINES)
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig" if block.startswith(codecs.BOM_UTF8) else "utf-8"
    decoder, size, is_latin_1 = codecs.getincrementaldecoder(encoding)(), 0, encoding == "utf-8"
    is_known = True
    while True:
        size += len(block)
        if size > MAX_TABLE_BYTES:
            raise UserError(
                f"{name} has more than {MAX_TABLE_BYTES >> 20} MB, which is more than is read as a "
                f"table. Leave out rows and columns that are not needed; one row per image takes "
                f"less than one per image and label."
            )
        is_latin_1 = is_latin_1 and not _NO_LATIN_1.search(block)
        try:
            if is_known and "\0" in decoder.decode(block, final=not block):
                raise UserError(
                    f"{name} holds zero bytes: it is no text, or UTF-16 without its mark. Save it "
                    f"as CSV in UTF-8."
                )
        except UnicodeError:
            is_known = False
        if not block:
            break
        block = file.read(_LINES)
    if not is_known and not is_latin_1:
        raise UserError(
            f"{name} is text in an encoding that cannot be told: it is neither UTF-8 nor plain "
            f"Latin-1. Save it as CSV in UTF-8."
        )
    return encoding if is_known else "latin-1"


# From text to columns


class _Layout(NamedTuple):
    """How a table is written.

    separator: between values. headings: as they stand there. width: values in each row. line: the
    heading's. first: lines that were read behind it.
    """

    separator: str
    headings: list[str]
    width: int
    line: int
    first: list[str]


def _read(file: IO[bytes], name: str, keys: Sequence[str]) -> pd.DataFrame:
    encoding = _encoding(_unpacked(file), name)
    with io.TextIOWrapper(_unpacked(file), encoding) as text:
        layout = _layout(text, name, keys)
        blocks = list(_frames(text, layout, name))
    frame = pd.concat(blocks) if blocks else pd.DataFrame(columns=range(layout.width))
    # Spreadsheets leave rows of separators alone behind.
    if (empty := frame[0] == "").any():
        blank = (frame[empty] == "").all(axis=1)
        frame = frame.drop(index=blank.index[blank])
    if frame.empty:
        raise UserError(f"{name} holds no row below its heading.")
    notes = [] if encoding.startswith("utf-8") else [f"its encoding is {encoding}"]
    if layout.separator != ",":
        notes.append(f"{_SEPARATORS[layout.separator]} separate its values")
    frame, more = _headed(frame, layout, name)
    if notes := [*notes, *more]:
        tell(f"{name} is understood so: {'; '.join(notes)}")
    return frame


def _layout(text: IO[str], name: str, keys: Sequence[str]) -> _Layout:
    """Reads the heading and the first row."""
    number, given, line = 0, "", "\n"
    while line and not line.strip():
        line, number = text.readline(_MAX_HEADING), number + 1
        # Excel's own first line, which says what separates values.
        if number == 1 and (mark := re.fullmatch(r"\W?sep=([,;\t|])\W?\s*", line, re.I)):
            given, line = mark[1], "\n"
    if not line:
        raise csv.Error("it is empty")
    if len(line) >= _MAX_HEADING:
        raise csv.Error(f"its first line has more than {_MAX_HEADING:,} characters")
    separator, headings = _split_heading(line, given or "".join(_SEPARATORS), keys)
    while len(headings) > 1 and not headings[-1].strip():
        headings.pop()
    first: list[str] = []

    def lines() -> Iterator[str]:
        for line in iter(text.readline, ""):
            first.append(line)
            yield line

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    row = next((row for row in rows if any(map(str.strip, row))), headings)
    if (width := max(len(headings), len(row))) > _MAX_COLUMNS:
        raise csv.Error(f"it has {width:,} columns, and at most {_MAX_COLUMNS:,} are read")
    layout = _Layout(separator, headings, len(row), number, first)
    # Values of nothing at the end of a row may do without a heading, if all rows have them.
    if len(row) < len(headings) or any(map(str.strip, row[len(headings) :])):
        raise _other_width(layout, row, number + len(first), name)
    return layout


def _split_heading(line: str, separators: str, keys: Sequence[str]) -> tuple[str, list[str]]:
    """The first separator by which the heading has one of the keys; none has: the first."""
    splits = []
    for separator in separators:
        try:
            splits.append((separator, next(csv.reader([line], delimiter=separator, strict=True))))
        except csv.Error:  # what stands in quotes ends before another separator
            continue
    if not splits:
        raise csv.Error("the quotes of its heading are not closed")
    known = {bare(key) for key in keys}
    return next((s for s in splits if known & set(map(bare, s[1]))), splits[0])


def _frames(text: IO[str], layout: _Layout, name: str) -> Iterator[pd.DataFrame]:
    values = 0
    for numbers, columns in _blocks(text, layout, name):
        values += len(numbers) * len(columns)
        if values > MAX_VALUES:
            raise UserError(
                f"{name} has more than {MAX_VALUES:,} values, which is more than is read as a "
                f"table. Leave out rows and columns that are not needed; one row per image takes "
                f"less than one per image and label."
            )
        yield pd.DataFrame(dict(enumerate(columns)), pd.Index(numbers), dtype="str")


_Block = tuple[Sequence[int], list[Sequence[str]]]  # lines of rows, and their columns


def _blocks(text: IO[str], layout: _Layout, name: str) -> Iterator[_Block]:
    separator, width = layout.separator, layout.width
    number, lines = layout.line + 1, [*layout.first, *text.readlines(_LINES)]
    while lines:
        block = "".join(lines)
        if '"' in block:  # a value may go on in the next block
            yield from _records(chain(lines, text), number, layout, name)
            return
        # Without quotes a table is read by splitting, in a third of the time of `csv`.
        if all(line.count(separator) == width - 1 for line in lines):
            cells = block.removesuffix("\n").replace("\n", separator).split(separator)
            if " " in block or "\t" in block or not block.isascii():
                cells = [cell.strip() for cell in cells]
            columns: list[Sequence[str]] = [cells[i::width] for i in range(width)]
            yield range(number, number + len(lines)), columns
        else:
            yield from _records(lines, number, layout, name)
        number += len(lines)
        lines = text.readlines(_LINES)


def _records(lines: Iterable[str], number: int, layout: _Layout, name: str) -> Iterator[_Block]:
    """Row by row; `number` is the first line's."""
    reader = csv.reader(lines, delimiter=layout.separator, strict=True)
    rows: list[list[str]] = []
    numbers: list[int] = []
    begin = number
    for cells in reader:
        row = [cell.strip() for cell in cells]
        if any(row):
            if len(row) != layout.width:
                raise _other_width(layout, row, begin, name)
            rows.append(row)
            numbers.append(begin)
        begin = number + reader.line_num
        if len(rows) == BLOCK:
            yield numbers, list(zip(*rows, strict=True))
            rows, numbers = [], []
    if rows:
        yield numbers, list(zip(*rows, strict=True))


def _other_width(layout: _Layout, row: Sequence[str], line: int, name: str) -> UserError:
    # Of its values only what is an id or a path for certain: any other may be a name.
    first = f": {row[0][:80]!r}" if bare(layout.headings[0]) in ("id", "imageid", "path") else ""
    return UserError(
        f"{name} has {len(layout.headings)} headings, but a row with {len(row)} values (line "
        f"{line}{first}), and which of them is missing or too many is not known. Mend the row; "
        f"values that hold a separator stand in quotes."
    )


def _headed(frame: pd.DataFrame, layout: _Layout, name: str) -> tuple[pd.DataFrame, list[str]]:
    """The table with its headings, without columns that have none; and what was left out."""
    notes = []
    headings = [clean_name(text) for text in layout.headings]
    if any(text != text.strip() for text in layout.headings):
        notes.append("blanks around its headings are left out")
    for i in range(len(headings), layout.width):
        if (odd := frame[i] != "").any():
            row = frame.loc[odd].iloc[0].tolist()
            raise _other_width(layout, row, int(frame.index[odd][0]), name)
    if layout.width > len(headings):
        notes.append("each of its rows ends with a separator")
    kept = {}
    for i, heading in enumerate(headings):
        if heading:
            kept[i] = heading
        elif i == 0 and _counts_rows(frame[i]):
            notes.append("its first column, which counts the rows, is left out")
        elif (frame[i] != "").any():
            raise UserError(
                f"{name} has a column without a heading, number {i + 1}. Give it one, or remove it."
            )
    if len(set(kept.values())) < len(kept):
        twice = next(h for h in kept.values() if headings.count(h) > 1)
        raise UserError(
            f"{name} has {headings.count(twice)} columns with the heading {twice!r}, and which of "
            f"them is meant is not known. Remove or rename all but one."
        )
    return frame[list(kept)].set_axis(list(kept.values()), axis=1), notes


def _counts_rows(column: pd.Series) -> bool:
    """Whether it is an index, which pandas and R write without a heading: from 0 or from 1 on."""
    values = column.tolist()
    return any(values == [str(n + first) for n in range(len(values))] for first in (0, 1))

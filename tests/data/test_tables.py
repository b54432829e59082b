"""Tables as people save them: what is read, what is said of it, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ich.base.config import UserError
from ich.data import store
from ich.data.tables import reading as tables
from ich.data.tables.reading import find_column, read_table

KEYS = ("image_id", "ID")
PLAIN = "image_id,Blutung ältere,c\nx,0,1\ny,1,0\n"
# Without the time: workers of xdist would not agree on the tests' names.
LONG_GZ = gzip.compress(PLAIN.encode() * 99, mtime=0)


def read(data: bytes | str, name: str = "the table t.csv") -> pd.DataFrame:
    data = data if isinstance(data, bytes) else data.encode()
    return read_table(io.BytesIO(data), name, KEYS)


def values(frame: pd.DataFrame) -> list[list[str]]:
    return [list(frame.columns), *frame.to_numpy().tolist()]


EXPECTED = [["image_id", "Blutung ältere", "c"], ["x", "0", "1"], ["y", "1", "0"]]


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (PLAIN.encode(), ""),
        (PLAIN.replace("\n", "\r\n").encode(), ""),
        (PLAIN.replace("\n", "\r").encode(), ""),
        (PLAIN.removesuffix("\n").encode(), ""),
        (PLAIN.encode("utf-8-sig"), ""),
        (PLAIN.replace("ä", "a\u0308").encode(), ""),
        (PLAIN.replace(",", ";").encode(), "semicolons separate its values"),
        (PLAIN.replace(",", "\t").encode(), "tabs separate its values"),
        (PLAIN.replace(",", "|").encode(), "vertical bars separate its values"),
        (PLAIN.encode("latin-1"), "its encoding is latin-1"),
        (PLAIN.replace(",", "\t").encode("utf-16"), "its encoding is utf-16; tabs separate"),
        (b"sep=;\r\n" + PLAIN.replace(",", ";").encode(), "semicolons separate its values"),
        (PLAIN.replace("1\n", "1,\n").replace("0\n", "0,\n").encode(), "ends with a separator"),
        (PLAIN.replace("\n", ",,\n").encode(), "ends with a separator"),
        (PLAIN.replace(",", " , ").encode(), "blanks around its headings"),
        (f",{PLAIN}".replace("x,", "0,x,").replace("y,", "1,y,").encode(), "counts the rows"),
        (f'"",{PLAIN}'.replace("x,", '"1",x,').replace("y,", '"2",y,').encode(), "counts the rows"),
        (PLAIN.replace("x", '"x"').replace("image_id", '"image_id"').encode(), ""),
        (f"\n{PLAIN}\n , , \n,,\n\n".encode(), ""),
        (gzip.compress(PLAIN.encode(), mtime=0), ""),
        (bz2.compress(PLAIN.encode()), ""),
        (lzma.compress(PLAIN.encode()), ""),
    ],
)
def test_a_table_is_read_however_it_was_saved(
    data: bytes, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    tables.tell.cache_clear()
    assert values(read(data)) == EXPECTED
    assert note in caplog.text
    assert bool(note) == bool(caplog.text)


def test_a_zip_with_one_table_is_one(tmp_path: Path) -> None:
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as out:
        out.writestr("t.csv", PLAIN)
        out.writestr("about.pdf", "x")
    assert values(read_table(path, "t", KEYS)) == EXPECTED
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("u.csv", PLAIN)
    with pytest.raises(UserError, match="is a zip archive or a spreadsheet's own format, and 2"):
        read_table(path, "t", KEYS)


def test_lines_are_those_of_the_file() -> None:
    frame = read('\nimage_id,b\nw,1\n\n"x\ny",2\n,\nz,3\n')
    assert frame.index.tolist() == [3, 5, 8]
    assert frame["image_id"].tolist() == ["w", "x\ny", "z"]
    assert read("image_id,b\nx,1\n").index.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,a,b\nx,0\n", r"has 3 headings, but a row with 2 values \(line 2: 'x'\)"),
        ("image_id,a,b\nx,0,1\ny,0,1,1\n", r"a row with 4 values \(line 3: 'y'\)"),
        ("image_id,a,b\nx,0,1,1\n", r"a row with 4 values \(line 2: 'x'\)"),
        ("image_id,a,b\nx,0,1,\ny,0,1\n", r"a row with 3 values \(line 3: 'y'\)"),
        ("image_id,a,b\nx,0,1,\ny,0,1,1\n", r"a row with 4 values \(line 3: 'y'\)"),
        ('image_id,a,b\n"x",0,1\ny,0\n', r"a row with 2 values \(line 3: 'y'\)"),
        ("image_id,a,b\n0,x,0,1\n", r"a row with 4 values \(line 2"),
        ("name,image_id,b\nCANARY,x\n", r"a row with 2 values \(line 2\)"),
        ("image_id,a,a\nx,0,1\n", "has 2 columns with the heading 'a'"),
        ("image_id,a, a \nx,0,1\n", "has 2 columns with the heading 'a'"),
        ("image_id,ä,a\u0308\nx,0,1\n", "has 2 columns with the heading 'ä'"),
        ("image_id,,a\nx,0,1\n", "a column without a heading, number 2"),
        (",image_id,a\n0,x,1\n2,y,1\n", "a column without a heading, number 1"),
        ("image_id,a\n", "holds no row below its heading"),
        ("image_id,a\n\n,\n", "holds no row below its heading"),
        ("image_id\n\n", "holds no row below its heading"),
        ("", "cannot be read as CSV: it is empty"),
        ("\n\n", "cannot be read as CSV: it is empty"),
        ('image_id,a\n"x,0\n', "cannot be read as CSV: unexpected end of data"),
        ('image_id,a\n"x"y,0\n', "cannot be read as CSV: ',' expected"),
        ('"image_id,a\nx,0\n', "the quotes of its heading are not closed"),
        ("image_id,a\nx\0,0\n", "holds zero bytes"),
        (b"image_id,\x84\nx,0\n", "neither UTF-8 nor plain Latin-1"),
        (b"image_id,a\n\xe4\0,0\n", "neither UTF-8 nor plain Latin-1"),
        (b"image_id,\xe4\nx,0\n\xc3".replace(b"x", b"\x93x"), "neither UTF-8 nor plain Latin-1"),
        ("image_id" + ",a" * 5000 + "\n", "it has 5,001 columns, and at most 5,000 are read"),
        ("image_id,a\nx,0" + "," * 5000, "it has 5,002 columns"),
        ("a" * (1 << 20), "its first line has more than 1,048,576 characters"),
        (
            gzip.compress(PLAIN.encode() * 99, mtime=0)[:-9],
            "cannot be read as CSV: Compressed file ended",
        ),
        (gzip.compress(PLAIN.encode() * 99, mtime=0)[:25], "cannot be read as CSV"),
        (b"\x1f\x8b garbage", "cannot be read as CSV"),
        (bz2.compress(PLAIN.encode())[:-9], "cannot be read as CSV"),
        (lzma.compress(PLAIN.encode())[:-9], "cannot be read as CSV"),
        ("a\ud800".encode("utf-16-le", "surrogatepass"), "cannot be|holds zero bytes"),
        (b"\xff\xfe\x00\xd8i\x00\n\x00", "encoding that cannot be told"),
    ],
)
def test_what_cannot_be_understood_in_one_way_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_table_that_inflates_to_too_much_is_refused_before_it_is_held(
    monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 20 << 20)
    monkeypatch.setattr(tables, "_frames", None)
    with pytest.raises(UserError, match="has more than 20 MB, which is more than is read"):
        read(pack(b"image_id,a\n" + b"x,0\n" * (6 << 20)))


def test_so_is_one_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("t.csv", "image_id,a\n" + "x,0\n" * 999)
    monkeypatch.setattr(store, "MAX_TABLE_BYTES", 4000)
    with pytest.raises(UserError, match=r"t.csv in .*t.zip cannot be used: the file has 4,007 byt"):
        read_table(path, "t", KEYS)


def test_more_values_than_are_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_VALUES", 6)
    assert len(read("image_id,a\n" + "x,0\n" * 3)) == 3
    with pytest.raises(UserError, match="has more than 6 values, which is more than is read"):
        read("image_id,a\n" + "x,0\n" * 4)


def test_any_table_reads_as_by_pythons_own_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few lines: with and without quotes, line breaks in values, blank lines."""
    monkeypatch.setattr(tables, "_LINES", 40)
    monkeypatch.setattr(tables, "BLOCK", 3)
    rng = random.Random(0)
    for _ in range(60):
        cells = ["a", "0", "", "ä b", "x,y", 'q"q', "two\nlines", "NA"][: rng.choice((4, 8))]
        rows = [[f"i{n}", *rng.choices(cells, k=2)] for n in range(rng.randint(1, 30))]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([["image_id", "a", "b"], *rows])
        assert values(read(out.getvalue()))[1:] == rows


def test_a_column_is_found_whatever_its_case() -> None:
    frame = pd.DataFrame(columns=["Image-ID", "PATIENT ID", "x"])
    assert find_column(frame, ("image_id", "Image"), "t") == "Image-ID"
    assert find_column(frame, ("patient_id",), "t") == "PATIENT ID"
    assert find_column(frame, ("study_id",), "t") is None
    twice = pd.DataFrame(columns=["patient_id", "PatientID"])
    with pytest.raises(UserError, match="has the columns patient_id and PatientID, which both may"):
        find_column(twice, ("patient_id",), "t")

"""State on disk: written whole or not at all, and read as data whatever stands there."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ich.base.config import load_config, saved_config
from ich.base.files import (
    DamagedError,
    append_line,
    csv_text,
    read_bytes,
    read_json,
    read_json_lines,
    read_yaml,
    replacing,
    write_bytes,
    write_json,
    write_text,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


# Writing


WRITERS: list[Callable[[Path], None]] = [
    lambda path: write_bytes(path, b"new"),
    lambda path: write_text(path, "new"),
    lambda path: write_json(path, {"new": float("nan")}),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_what_was_there_outlives_a_full_disk_which_names_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], fails: str
) -> None:
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write(path)
        if fails == "fsync":
            with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
                append_line(path, "more")
    assert path.read_text().startswith("old")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    write(path)
    assert "new" in path.read_text()


def test_the_file_and_its_name_are_safe_on_disk_before_and_after_the_rename(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    write_text(path, "new")
    assert done == [f"{path}.part", str(path.parent)]
    append_line(path.parent / "journal", "first")
    append_line(path.parent / "journal", "second")
    journal, folder = f"{path.parent}/journal", str(path.parent)
    assert done[2:] == [journal, folder, journal]


def test_what_a_killed_process_has_left_is_taken_away(path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text("half of something longer than what comes now")
    write_text(path, "new")
    assert (path.read_text(), part.exists()) == ("new", False)

    def interrupted() -> None:
        with replacing(path) as other:
            other.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), part.exists()) == ("new", False)


def test_of_two_writers_the_second_waits(path: Path) -> None:
    begun, texts = threading.Event(), {"a" * 10, "b" * 5}

    def slow() -> None:
        with replacing(path) as part:
            begun.set()
            part.write_text("a" * 5)
            time.sleep(0.1)
            part.write_text("a" * 10)

    first = threading.Thread(target=slow)
    first.start()
    begun.wait()
    write_text(path, "b" * 5)
    first.join()
    assert path.read_text() in texts - {"a" * 10}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a\rb.dcm", "a\nb.dcm", 'a"b', "a,b", "a\r\nb", " a "])
def test_a_row_of_csv_is_one_row_whatever_a_file_is_called(name: str) -> None:
    table = pd.DataFrame({"file": [name, "c"], "any": [0.25, float("nan")], "n": [1, 2]})
    text = csv_text(table)
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["file", name, "c"]
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(text, newline="")), table)
    # Outside of quotes no line ends but at the end of a row.
    assert len("".join(text.split('"')[::2]).splitlines()) == 3


# Reading


def fifo(path: Path) -> None:
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "NUL": lambda p: p.write_bytes(b"\0" * 100),
    "garbage": lambda p: p.write_bytes(bytes(range(256))),
    "cut": lambda p: p.write_text('{"a": ["b", {"c'),
    "a list": lambda p: p.write_text("[1, 2]"),
    "deep": lambda p: p.write_text("[" * 100_000),
    "a long number": lambda p: p.write_text('{"a": ' + "9" * 10_000 + "}"),
    "a folder": lambda p: p.mkdir(),
    "a pipe": fifo,
    "a link to itself": lambda p: p.symlink_to(p),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("read", [read_json, read_yaml, load_config])
def test_what_cannot_be_read_is_named(
    path: Path, damage: str, read: Callable[[Path], object]
) -> None:
    with pytest.raises(FileNotFoundError, match=str(path)):
        read(path)
    DAMAGE[damage](path)
    if (read, damage) == (read_yaml, "a long number"):
        path.write_text("a: " + "9" * 10_000)
    with pytest.raises(DamagedError, match=str(path)) as error:
        read(path)
    assert len(str(error.value)) < 400 + len(str(path))
    assert "\n" not in str(error.value)


def test_a_name_that_no_file_can_have_is_of_none(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(path: Path) -> None:
    path.write_bytes(b" " * 101)
    assert len(read_bytes(path, 101)) == 101
    with pytest.raises(DamagedError, match="is damaged .it has more than 0 KB"):
        read_bytes(path, 100)
    with pytest.raises(DamagedError, match="is no regular file"):
        read_bytes(Path("/dev/zero"))
    path.write_text("a: " + "x" * (64 << 10))
    with pytest.raises(DamagedError, match="more than 64 KB"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x [1]\nb: *x\n", "it holds an alias"),
        ("a: ${oc.env:HOME}\n", r"it holds \$\{, which a record never does"),
        ("${a}: 1\n", r"it holds \$\{"),
        ("a: [{b: ['x', '${c}']}]\n", r"it holds \$\{"),
        ("a: !!python/object/apply:os.system ['touch executed']\n", "could not determine"),
        ("a: !!binary aGVsbG8=\n", "it holds a bytes"),
        ("a: 2020-01-01\n", "it holds a date"),
        ("a: !!set {b}\n", "it holds a set"),
        ("1: 2\n", "a key is no text"),
        ("- a\n", "it holds no settings"),
    ],
)
def test_a_record_is_data(
    path: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    path.write_text(text)
    with pytest.raises(DamagedError, match=f"state.json is damaged .*{reason}"):
        read_yaml(path)
    assert not Path("executed").exists()


def test_a_bomb_of_aliases_is_refused_at_once(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    path.write_text("\n".join(lines))
    began = time.monotonic()
    with pytest.raises(DamagedError, match="it holds an alias"):
        load_config(path)
    assert time.monotonic() - began < 1


def test_the_configs_in_a_record_are_data_too() -> None:
    with pytest.raises(DamagedError, match=r"sweep.json is damaged .* \$\{"):
        saved_config({"name": "${oc.env:HOME}"}, "sweep.json")
    for values in ({"name": 7, "unknown": 1}, {"data": 5}, {"seed": "x"}, {"data": []}, {}):
        with pytest.raises(DamagedError, match="is damaged or of another version of ich"):
            saved_config(values, "sweep.json")


def test_a_journal_is_read_but_for_its_damaged_lines(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n\0\0\n[2]\n{"a": 3}\n{"a"')
    objects, damaged = read_json_lines(path)
    assert objects == [{"a": 1}, {"a": 3}]
    assert [what.split(" is damaged")[0] for what in damaged] == [
        f"line {n} of {path}" for n in (2, 3)
    ]
    path.write_text('{"a": 1}')  # whole, but for its end
    assert read_json_lines(path) == ([{"a": 1}], [])


def test_what_is_written_comes_back(path: Path) -> None:
    value: dict[str, Any] = {"a": [1, "ü", None], "b": {"c": 1.5}}
    write_json(path, value)
    assert read_json(path) == json.loads(path.read_text()) == value

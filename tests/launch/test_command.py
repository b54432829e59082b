"""What a shell and Hydra make of a path, and what is said of it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ich.prepare import main

Capture = pytest.CaptureFixture[str]
NAMES = ["Kopf_ä", "scans (2019)", "scan#1", "a=b", "x,y", "it's", 'a"b', "[old]", "{a}", "a&b;c"]
NAMES += ["2019_01", "1e3", " x", "true", "a, 'b' \"c\"", "ö\\", "choice(a)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_with_hydras_characters_is_told_with_the_command_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    given = ["data=folder", f"data.root={name}", "dry_run=true", "data.labels=scan#1.csv"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.count("uote it for Hydra too: ich prepare ") == 1
    # The very command, as a shell and Hydra read it.
    words = shlex.split(error.partition("Hydra too: ")[2])
    assert words[:2] == ["ich", "prepare"]
    overrides = OverridesParser.create().parse_overrides(words[2:])
    values = {override.key_or_group: override.value() for override in overrides}
    assert values["data.root"] == name
    assert main(words[2:]) == 2
    assert "data.labels is 'scan#1.csv', which is no file" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = ["data=folder", "data.labels=~/l.csv", "data.metadata='~/m.csv'"]
    for root in ("~/scans", '"~/scans"', "~"):
        assert main([*given, f"data.root={root}"]) == 2
        assert f"data.root is '{tmp_path}/home" in capsys.readouterr().err
    (tmp_path / "home" / "scans").mkdir(parents=True)
    assert main([*given, "data.root=~/scans"]) == 2
    assert f"data.labels is '{tmp_path}/home/l.csv', which is no file" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["word", "folder"])
def test_bytes_that_are_no_utf8_are_refused_with_how_to_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, where: str
) -> None:
    name = os.fsdecode(b"scans_\xe4")
    try:
        (tmp_path / name).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    monkeypatch.chdir(tmp_path / name if where == "folder" else tmp_path)
    assert main([f"data.root='{name}'"] if where == "word" else []) == 2
    error = capsys.readouterr().err
    assert "holds bytes that are no UTF-8: " in error
    assert r"scans_\xe4" in error
    assert "convmv -f latin1" in error
    assert error.count("\n") == 1


def test_files_of_such_names_below_the_root_are_refused_only_if_they_are_wanted(
    tmp_path: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted((phantom / "stage_2_train").glob("*.dcm"))[:40]
    places = [Path("scans") / f"p{n % 8}" / f"{n}.dcm" for n in range(40)]
    for file, place in zip(files, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    rows = [f"{n},p{n % 8},{n % 2}" for n in range(40)]
    Path("labels.csv").write_text("\n".join(["image_id,patient_id,bleed", *rows]))
    own = ["data=folder", "data.root=scans", "data.labels=labels.csv", "dry_run=true"]
    own += ["protocol=sound", "protocol.oversample=null"]
    Path("scans", os.fsdecode(b"notes_\xe4.txt")).touch()
    assert main(own) == 0
    Path("scans", "p1").rename(Path("scans", os.fsdecode(b"Kopf_\xe4")))
    assert main(own) == 2
    assert r"scans holds bytes that are no UTF-8 in the name Kopf_\xe4/1" in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_made_is_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".ich-cache").touch()
    assert main([]) == 2
    error = capsys.readouterr().err
    assert "the cache folder .ich-cache cannot be used (File exists). Set data.cache_dir" in error
    assert error.count("\n") == 1

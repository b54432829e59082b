"""Names of images in tables and of their files, which differ in form only."""

from __future__ import annotations

import pytest

from ich.data.tables.names import example, match_by_form, plain_path, stem_of


@pytest.mark.parametrize(
    ("wanted", "present"),
    [
        ("ID_1.dcm", "p/ID_1.dcm"),
        ("ID_1.png", "p/ID_1.DCM"),
        ("id_1", "p/ID_1.ima"),
        ("ID_1.JPEG", "deep/down/id_1"),
        ("1.2.840.5", "x/1.2.840.5.dcm"),
        ("a.v2", "A.V2.dcm"),
        ("gro\u0308\u00dfe", "GRÖSSE.dcm"),
    ],
)
def test_an_id_is_the_one_file_of_that_form(wanted: str, present: str) -> None:
    others = ["p/ID_10.dcm", "1.2.840.55.dcm", "ID_1_.dcm"]
    assert match_by_form([wanted], [*others, present], any_folder=True) == ({wanted: present}, [])


@pytest.mark.parametrize("wanted", ["P/A/X.DCM", "./p/a//x.dcm", "p\\a\\x", "p/a/x.png"])
def test_folders_of_a_path_must_agree(wanted: str) -> None:
    present = ["q/a/x.dcm", "p/a/x.dcm", "a/x.dcm", "o/p/a/x.dcm"]
    assert match_by_form([wanted], present, any_folder=False).found == {wanted: "p/a/x.dcm"}


@pytest.mark.parametrize(
    ("wanted", "present"),
    [("scans/p/x.dcm", "p/x.dcm"), ("p/x.dcm", "set/scans/p/x.dcm"), ("D:\\all\\p\\x", "P/x.ima")],
)
def test_folders_before_a_path_may_be_lacking(wanted: str, present: str) -> None:
    assert match_by_form([wanted], ["q/x.dcm", present], any_folder=True).found == {wanted: present}
    assert match_by_form([wanted], [present], any_folder=False).found == {}


def test_what_could_be_two_is_told_and_not_guessed() -> None:
    found, unclear = match_by_form(["x"], ["a/X.dcm", "b/x.ima"], any_folder=True)
    assert (found, unclear) == ({}, ["'x' may be 'a/X.dcm' or 'b/x.ima'"])
    found, unclear = match_by_form(["x.png", "X", "y.dcm"], ["x.dcm", "Y.dcm"], any_folder=True)
    assert found == {"y.dcm": "Y.dcm"}
    assert unclear == ["'x.png' and 'X' may both be 'x.dcm'"]


def test_endings_that_are_none_are_kept() -> None:
    assert match_by_form(["scan.a"], ["scan.dcm"], any_folder=True).found == {}
    assert stem_of("1.2.3") == "1.2.3"
    assert stem_of("1.2.3.DICOM") == "1.2.3"


def test_a_path_is_made_plain_and_still_shows_where_it_leads() -> None:
    assert plain_path(".\\a\\.\\b//c.dcm") == "a/b/c.dcm"
    assert plain_path("a/.b/c..d") == "a/.b/c..d"
    assert plain_path("/etc/./x") == "/etc/x"
    assert plain_path("..\\..\\x") == "../../x"


def test_the_example_is_the_likest() -> None:
    assert example("ID_0017", ["README", "id-0017.dcm", "zzz"]) == "id-0017.dcm"
    assert example("a", []) == ""

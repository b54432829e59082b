"""Subgroups from tables: which columns, which image has which, and bands of many numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ich.base.config import DataConfig, UserError
from ich.data.subgroups.reading import UNKNOWN, bands, read_subgroups


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    labels, metadata = tmp_path / "labels.csv", tmp_path / "metadata.csv"
    labels.write_text("image_id,any,site\na,1,north\nb,0,south\nc,0,\n")
    metadata.write_text("image_id;PatientID;Patient Sex\nA.dcm;1;F\nb;2;M\n")
    return DataConfig(labels=str(labels), metadata=str(metadata))


def test_columns_of_both_tables_are_matched_to_images(data: DataConfig) -> None:
    found = read_subgroups(data, ["site", "PatientSex"], ["b", "a", "c", "a"])
    assert found["site"].values == ["south", "north", UNKNOWN, "north"]
    assert found["PatientSex"].values == ["M", "F", UNKNOWN, "F"]
    assert read_subgroups(data, ["site"], [])["site"] == ("the label file labels.csv", [])


def test_what_is_no_subgroup_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names 'scanner', which .*kernel.*, site, image_"):
        read_subgroups(data, ["scanner"], ["a"])
    for name in ("PatientID", "patient_id", "image_id", "Patient Name"):
        with pytest.raises(UserError, match="tells images or persons apart and makes no subgroup"):
            read_subgroups(data, [name], ["a"])
    (tmp_path / "labels.csv").write_text("file,site\na,north\n")
    with pytest.raises(UserError, match=r"label file labels.csv has no column for the image"):
        read_subgroups(data, ["site"], ["a"])


def test_many_numbers_become_bands() -> None:
    assert bands("kernel", ["H30", "", "H30"]) == ["H30", UNKNOWN, "H30"]
    assert bands("SliceThickness", ["5", "2.5", "5"]) == ["5", "2.5", "5"]
    ages = [f"{n:03d}Y" for n in range(20, 60)]
    assert bands("PatientAge", [*ages, ""])[::10] == [
        *("20 to 29", "30 to 39", "40 to 49", "50 to 59"),
        UNKNOWN,
    ]
    tilt = bands("GantryDetectorTilt", [str(n / 10) for n in range(-50, 51)])
    assert sorted(set(tilt)) == ["-2.5 to 0", "-5 to -2.5", "0 to 2.5", "2.5 to 5"]
    assert tilt[-1] == "2.5 to 5"

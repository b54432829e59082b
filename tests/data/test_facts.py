"""What headers tell of scanner and age: the bin of each value, and where it is kept and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import CANARY, STORED, dataset, encoded

from ich.base.config import Config, UserError
from ich.data.cohorts import CohortFiles, load_cohort, open_store
from ich.data.dicom import read_keys
from ich.data.subgroups.facts import (
    FACTS,
    OTHER,
    UNKNOWN,
    Facts,
    age_decade_of,
    kernel_of,
    manufacturer_of,
    thickness_of,
    tilt_of,
)
from ich.data.subgroups.reading import keep_header_facts, read_subgroups

AXIAL = np.array([0.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("General Electric", "GE"),
        ("Imaging GE-Lab", "GE"),
        ("Siemens Healthineers", "Siemens"),
        ("SIEMENS", "Siemens"),
        ("Philips Medical Systems", "Philips"),
        ("TOSHIBA_MEC", "Canon/Toshiba"),
        ("Canon Medical Systems", "Canon/Toshiba"),
        ("HITACHI,Ltd.", "Hitachi"),
        ("Neusoft", OTHER),
        (f"{CANARY}\n,1970", OTHER),
        ("Geneva <b>", OTHER),
        ("", UNKNOWN),
        ("  ", UNKNOWN),
    ],
)
def test_a_maker_is_one_of_five_or_other(text: str, expected: str) -> None:
    assert manufacturer_of(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5 mm"),
        ("5.000000", "5 mm"),
        ("4.8", "5 mm"),
        ("0.625", "0.5 mm"),
        ("0.1", "0.5 mm"),
        ("1.25", "1.5 mm"),
        ("10", "10 mm"),
        ("10.5", "over 10 mm"),
        ("0", UNKNOWN),
        ("-5", UNKNOWN),
        ("nan", UNKNOWN),
        ("inf", UNKNOWN),
        ("5\\5", UNKNOWN),
        (CANARY, UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_a_thickness_is_to_half_a_millimetre(text: str, expected: str) -> None:
    assert thickness_of(text) == expected


def test_a_kernel_is_a_code_and_neither_a_name_nor_a_number() -> None:
    codes = ["H31s", "Hr40f", "J40s", "FC21", "UB", "A", "B", "I30f", "FC08-", "BONE+"]
    assert [kernel_of(code) for code in codes] == codes
    assert kernel_of("Hr38f\\3") == "Hr38f"
    assert kernel_of("Standard ") == "STANDARD"
    for text in ("SMITH", CANARY, "19040506", "123", "SMITH1971", "H 31", "é", "A1234567"):
        assert kernel_of(text) == OTHER
    assert kernel_of("") == kernel_of(" \\ ") == UNKNOWN


def test_a_tilt_is_that_of_the_gantry_or_else_of_the_slice() -> None:
    nowhere = np.full(3, np.nan)
    assert [tilt_of(t, nowhere) for t in ("0", "-0.4", "0.5", "-17.5")] == [
        *("none", "none", "tilted", "tilted")
    ]
    assert [tilt_of(t, nowhere) for t in ("", "x", "nan", "inf")] == [UNKNOWN] * 4
    degrees = np.radians([0, 0.4, 0.6, 20])
    normals = np.stack([0 * degrees, np.sin(degrees), -np.cos(degrees)], 1)
    assert [tilt_of("", n) for n in normals] == ["none", "none", "tilted", "tilted"]
    assert tilt_of("-20", AXIAL) == "tilted"


@pytest.mark.parametrize(
    ("age", "born", "studied", "expected"),
    [
        ("067Y", "", "", "60s"),
        ("67", "", "", "60s"),
        ("069y", "19000101", "20200101", "60s"),
        ("018M", "", "", "under 10"),
        ("121M", "", "", "10s"),
        ("006W", "", "", "under 10"),
        ("012D", "", "", "under 10"),
        ("089Y", "", "", "80s"),
        ("095Y", "", "", "90 or more"),
        ("104Y", "", "", "90 or more"),
        ("999Y", "", "", UNKNOWN),
        ("", "19500615", "20200614", "60s"),
        ("", "19500615", "20200615", "70s"),
        ("", "1950.06.15", "2020.06.15", "70s"),
        ("", "19250101", "20200101", "90 or more"),
        ("", "20200102", "20200101", UNKNOWN),
        ("", "19501341", "20200101", UNKNOWN),
        ("", "19500615", "", UNKNOWN),
        ("", "", "20200101", UNKNOWN),
        ("old", "", "", UNKNOWN),
        ("", "", "", UNKNOWN),
    ],
)
def test_an_age_is_a_decade(age: str, born: str, studied: str, expected: str) -> None:
    assert age_decade_of(age, born, studied) == expected


def test_a_header_gives_all_five_or_unknown() -> None:
    d = dataset(STORED)
    assert read_keys(encoded(d)).facts == Facts()
    said = {
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "SliceThickness": "2.5",
        "ConvolutionKernel": "SOFT",
        "GantryDetectorTilt": "-12",
        "PatientBirthDate": "19290101",
        "StudyDate": "20240506",
    }
    facts = Facts("GE", "2.5 mm", "SOFT", "tilted", "90 or more")
    assert read_keys(encoded(d, **said)).facts == facts


def test_a_damaged_fact_makes_no_file_unreadable() -> None:
    d = dataset(STORED)
    d.add_new("Manufacturer", "UT", "GE " * 2000)  # more than a header's value may have
    keys = read_keys(encoded(d))
    assert keys[:2] == (CANARY, "2.25.2")
    assert keys.facts == Facts()


# Beside a cohort


@pytest.fixture
def hospital(phantom: Path, tmp_path: Path) -> Path:
    """The phantom, with a scanner for each patient and text in its header that nobody may see."""
    root = tmp_path / "set"
    (root / "stage_2_train").mkdir(parents=True)
    (root / "stage_2_train.csv").write_bytes((phantom / "stage_2_train.csv").read_bytes())
    for file in sorted((phantom / "stage_2_train").glob("*.dcm")):
        header = pydicom.dcmread(file)
        number = sum(header.PatientID.encode()) % 3
        header.Manufacturer = ("SIEMENS", "Philips", CANARY)[number]
        header.PatientBirthDate, header.StudyDate = "19310203", "20040506"
        header.ConvolutionKernel = CANARY
        header.save_as(root / "stage_2_train" / file.name)
    return root


def ordered(composed: Callable[..., Config], root: Path, *overrides: str) -> Config:
    own = (f'data.root="{root}"', "data.cache_size=16", "data.workers=1")
    return composed(*own, *overrides)


def test_facts_are_kept_beside_a_cohort_if_a_report_asks_for_them(
    composed: Callable[..., Config], hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ordered(composed, hospital)
    cohort, key = load_cohort(plain, open_store(plain.data))
    images = cohort.rows["image_id"].tolist()
    files = CohortFiles(Path(plain.data.cache_dir), key)
    keep_header_facts(plain, key)
    assert not files.header_facts.exists()
    with pytest.raises(UserError, match=r"names 'kernel', which headers tell, but .* Launch the"):
        read_subgroups(plain.data, ["kernel"], images, files)
    asking = ordered(composed, hospital, f"report.subgroups=[{','.join(FACTS)}]")
    keep_header_facts(asking, key)
    found = read_subgroups(asking.data, FACTS, [*images, "none such"], files)
    assert {f.source for f in found.values()} == {"the files' headers"}
    groups = {name: set(f.values[:-1]) for name, f in found.items()}
    assert groups == {
        "manufacturer": {"Siemens", "Philips", OTHER},
        "slice_thickness": {UNKNOWN},
        "kernel": {OTHER},
        "tilt": {"none", "tilted"},
        "age_decade": {"70s"},
    }
    assert {f.values[-1] for f in found.values()} == {UNKNOWN}
    by_file = dict(zip(images, found["manufacturer"].values, strict=False))
    for image in images[::40]:
        text = pydicom.dcmread(hospital / "stage_2_train" / f"{image}.dcm").Manufacturer
        assert by_file[image] == manufacturer_of(text)
    kept = b"".join(p.read_bytes() for p in files.folder.glob("headers-*.csv"))
    kept += pd.read_csv(files.header_facts).to_csv().encode()
    assert not any(word in kept for word in (b"CANARY", b"19310203", b"20040506"))
    # Neither a second launch nor a name that a table has reads anything.
    monkeypatch.setattr("ich.data.subgroups.reading.open_store", None)
    keep_header_facts(asking, key)
    files.header_facts.write_bytes(files.header_facts.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"were not read .*-headers.csv.gz, is damaged"):
        read_subgroups(asking.data, ["Slice Thickness"], images, files)
    monkeypatch.undo()
    keep_header_facts(asking, key)
    again = read_subgroups(asking.data, ["Slice Thickness"], images, files)
    assert set(again["Slice Thickness"].values) == {UNKNOWN}


def test_a_column_comes_before_the_header(
    composed: Callable[..., Config], hospital: Path, tmp_path: Path
) -> None:
    table = tmp_path / "m.csv"
    table.write_text("image_id,Manufacturer\na,Imatron\n")
    asking = ordered(
        composed, hospital, "report.subgroups=[manufacturer]", f"data.metadata={table}"
    )
    keep_header_facts(asking, "a cohort that is not there")
    found = read_subgroups(asking.data, ["manufacturer"], ["a"])
    assert found == {"manufacturer": ("the metadata file m.csv", ["Imatron"])}

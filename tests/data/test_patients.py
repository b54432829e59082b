"""Patients and studies: from metadata or headers, as keys that name nobody."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pydicom
import pytest
from canaries import Canaries
from commands import run_module

from ich.base.config import Config, UserError
from ich.data import patients as patients_module
from ich.data.dataset import load_dataset
from ich.data.dicom import Keys, along_normal
from ich.data.patients import Pseudonyms, keys_of_images, read_metadata, scan_headers
from ich.data.store import SliceStore, read_bytes
from ich.data.tables.reading import tell

Compose = Callable[..., Config]


@pytest.fixture
def pseudonyms(tmp_path: Path) -> Pseudonyms:
    return Pseudonyms.beside(tmp_path / "cache")


def test_the_secret_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    first, second = Pseudonyms.beside(tmp_path), Pseudonyms.beside(tmp_path)
    assert first == second
    assert len(first.secret) == 32
    assert stat.S_IMODE((tmp_path / ".pseudonym-key").stat().st_mode) == 0o600
    other = Pseudonyms.beside(tmp_path / "other")
    assert first.key("patient", "ID_1") != other.key("patient", "ID_1")


@pytest.mark.parametrize("read", [Pseudonyms.beside, Pseudonyms.existing])
@pytest.mark.parametrize("length", [0, 31])
def test_a_key_that_was_cut_short_is_refused(
    tmp_path: Path, read: Callable[[Path], object], length: int
) -> None:
    (tmp_path / ".pseudonym-key").write_bytes(b"k" * length)
    with pytest.raises(UserError, match=rf"has {length} bytes, but must have 32: .* remove it"):
        read(tmp_path)


@pytest.mark.parametrize("read", [Pseudonyms.beside, Pseudonyms.existing])
@pytest.mark.parametrize("key", [bytes(32), b"secret" * 8, bytes(100) + b"0123456789"])
def test_a_key_that_can_be_guessed_is_refused(
    tmp_path: Path, read: Callable[[Path], object], key: bytes
) -> None:
    """Zeros are what a power cut leaves of a file that was not synced."""
    (tmp_path / ".pseudonym-key").write_bytes(key)
    with pytest.raises(UserError, match=rf"is not random: its {len(key)} bytes have .* remove it"):
        read(tmp_path)


def test_the_key_and_its_name_are_on_the_disk_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    Pseudonyms.beside(tmp_path / "cache")
    assert synced == [".pseudonym-key.part", "cache"]
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_keys_tell_apart_and_name_nobody(pseudonyms: Pseudonyms) -> None:
    assert pseudonyms.key("patient", "DOE") == pseudonyms.key("patient", " DOE ")
    assert len({pseudonyms.key(k, v) for k in ("patient", "study") for v in ("a", "b")}) == 4
    assert pseudonyms.key("patient", "") == ""


def test_metadata_gives_keys_by_image(tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    file = tmp_path / "meta.csv"
    file.write_text("Image,PatientID,StudyInstanceUID\na,p,s\nb,p,t\na,p,s\n")
    keys = read_metadata(file, pseudonyms)
    assert keys.index.tolist() == ["a", "b"]
    assert keys.loc["a", "patient"] == keys.loc["b", "patient"] == pseudonyms.key("patient", "p")
    assert keys.loc["a", "study"] != keys.loc["b", "study"]


def keys_by_metadata(
    folder: Path, pseudonyms: Pseudonyms, named: list[str], images: list[str]
) -> list[str]:
    """The patient keys of images by metadata in which the nth image is of patient n."""
    (folder / "m.csv").write_text(
        "image_id;patient_id\n" + "".join(f"{image};{n}\n" for n, image in enumerate(named))
    )
    keys = read_metadata(folder / "m.csv", pseudonyms)
    return keys_of_images(keys, images, "m.csv")["patient"].tolist()


@pytest.mark.parametrize(
    ("named", "images"),
    [
        (["a", "b"], ["a", "b"]),
        (["a.dcm", "b.dcm"], ["a", "b"]),
        (["A", "B.png"], ["a", "b"]),
        (["a", "b"], ["p0/a.dcm", "p1/b.dcm"]),
        (["scans\\p0\\a.dcm", "./p1/b.dcm"], ["p0/a.dcm", "P1/B"]),
        (["p0/a.dcm", "p1/b.dcm", "c"], ["a", "b"]),
    ],
)
def test_metadata_name_images_in_any_form(
    tmp_path: Path, pseudonyms: Pseudonyms, named: list[str], images: list[str]
) -> None:
    expected = [pseudonyms.key("patient", n) for n in "01"]
    assert keys_by_metadata(tmp_path, pseudonyms, named, images) == expected


def test_metadata_of_other_images_are_refused_and_of_some_are_said(
    tmp_path: Path, pseudonyms: Pseudonyms, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"m.csv matched 0 of 2 images. .* 'ID_1'; it has 'id-1'"):
        keys_by_metadata(tmp_path, pseudonyms, ["zzz", "id-1"], ["ID_1", "ID_2"])
    with pytest.raises(UserError, match="told apart by their names: 'a' may be 'A' or 'a.dcm'"):
        keys_by_metadata(tmp_path, pseudonyms, ["A", "a.dcm"], ["a", "b"])
    tell.cache_clear()
    assert keys_by_metadata(tmp_path, pseudonyms, ["a", "x"], ["b", "a"])[0] == ""
    assert "m.csv matched 1 of 2 images. The labels name 'b'; it has 'x'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Image,PatientID\na,p\na,q\n", "gives 1 images two patients or studies .the first: a"),
        ("Image,Name\na,p\n", "must have a column for the image .* and one for the patient"),
        ("", "the metadata file meta.csv cannot be read as CSV"),
    ],
)
def test_bad_metadata_is_refused(
    tmp_path: Path, pseudonyms: Pseudonyms, text: str, message: str
) -> None:
    file = tmp_path / "meta.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_metadata(file, pseudonyms)
    with pytest.raises(UserError, match="data.metadata is '.*', which is no file"):
        read_metadata(tmp_path / "none.csv", pseudonyms)


def test_headers_are_read_once_and_a_killed_scan_goes_on(
    phantom: Path, tmp_path: Path, pseudonyms: Pseudonyms, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = SliceStore.open(str(phantom)), tmp_path / "cache"
    paths = [p for p in store.paths if p.endswith(".dcm")]
    monkeypatch.setattr(patients_module, "_CHUNK", 16)

    def stop(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_headers(paths, store, folder, pseudonyms, 1, stop)
    (file,) = folder.glob("headers-*.csv")
    with file.open("a") as out:
        out.write("a line that was cut o")
    counts: list[int] = []
    whole = scan_headers(paths, store, folder, pseudonyms, 1, lambda done, _: counts.append(done))
    assert counts[:2] == [32, 32 + 16]
    by_path = whole.set_axis(paths)
    for path in (paths[0], paths[-1]):
        header = pydicom.dcmread(phantom / path, stop_before_pixels=True)
        assert by_path.loc[path, "patient"] == pseudonyms.key("patient", header.PatientID)
        study = (
            header.get_item("StudyInstanceUID").value.decode().rstrip("\0")
        )  # unlike a UID's form, so raw
        assert by_path.loc[path, "study"] == pseudonyms.key("study", study)
        assert by_path.loc[path, "position"] == along_normal(
            "\\".join(map(str, header.ImagePositionPatient)),
            "\\".join(map(str, header.ImageOrientationPatient)),
        )
    assert whole["patient"].nunique() == 8
    with monkeypatch.context() as patch:
        patch.setattr(patients_module, "read_keys", None)
        assert scan_headers(paths, store, folder, pseudonyms, 1).equals(whole)
    # A version that reads other headers reads all of them.
    monkeypatch.setattr(patients_module, "HEADER_VERSION", 0)
    monkeypatch.setattr(patients_module, "read_keys", lambda data: Keys("p", "s", "t", 0.0))
    again = scan_headers(paths, store, folder, pseudonyms, 1)
    assert set(again["patient"]) == {pseudonyms.key("patient", "p")}


def test_unreadable_files_are_nobodys(
    phantom: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    (tmp_path / "x.dcm").write_text("<html>")
    store = SliceStore.open(str(tmp_path))
    scan = scan_headers(["x.dcm", "gone.dcm", ""], store, tmp_path / "cache", pseudonyms, 1)
    assert len(scan) == 3
    assert (scan["patient"] == "").all()
    assert not scan["readable"].any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_header_is_read_whole_and_a_short_one_is_enough(
    phantom: Path, tmp_path: Path, pseudonyms: Pseudonyms, packed: bool
) -> None:
    """With 40 KB of private elements before the study, the first 16 KB do not hold it."""
    dataset = pydicom.dcmread(next((phantom / "stage_2_train").glob("*.dcm")))
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        del dataset[keyword]  # RSNA's are no valid UIDs, and pydicom warns when it replaces them
    dataset.SOPInstanceUID = dataset.StudyInstanceUID = "1.2.3"
    dataset.PatientID = "p"
    short = pydicom.filebase.DicomBytesIO()
    dataset.save_as(short)
    dataset.private_block(0x0019, "X", create=True).add_new(1, "OB", bytes(40_000))
    (root := tmp_path / "set").mkdir()
    dataset.save_as(root / "long.dcm")
    # The pixels are cut, and only the whole file shows it: the header is not read beyond the head.
    (root / "short.dcm").write_bytes(short.getvalue()[:-100])
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in root.iterdir():
                archive.write(file, file.name)
        root = tmp_path / "set.zip"
    store = SliceStore.open(str(root))
    scan = scan_headers(["long.dcm", "short.dcm"], store, tmp_path / "cache", pseudonyms, 1)
    assert scan["patient"].tolist() == [pseudonyms.key("patient", "p")] * 2
    assert scan["study"].tolist() == [pseudonyms.key("study", "1.2.3")] * 2
    assert scan["readable"].all()
    head = read_bytes(store.root, store.locate(["short.dcm"])[0], head=100)
    assert head == short.getvalue()[:100]


def test_headers_and_metadata_give_the_same_split(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    rows = []
    for file in sorted((phantom / "stage_2_train").glob("*.dcm")):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        rows.append({"image_id": file.stem, "patient_id": header.PatientID})
    pd.DataFrame(rows).to_csv(tmp_path / "meta.csv", index=False)
    own = [f'data.root="{phantom}"', "data.workers=1", "data.cache_size=32", "protocol=sound"]
    a = load_dataset(composed(*own))
    b = load_dataset(composed(*own, f"data.metadata={tmp_path / 'meta.csv'}"))
    assert a.test is not None
    assert b.test is not None
    assert (a.train.image_id == b.train.image_id).all()
    assert (a.test.image_id == b.test.image_id).all()
    assert a.summary.leak == {"image": 0.0, "study": 0.0, "patient": 0.0}
    assert b.summary.leak == {"image": 0.0, "study": None, "patient": 0.0}


def test_no_identifier_reaches_what_a_preparation_prints_or_keeps(
    canaries: Canaries, tmp_path: Path
) -> None:
    """FAULTS 36."""
    own = (f"data.root={canaries.root}", "data.cache_size=32", "data.workers=1", "protocol=sound")
    done = run_module("prepare", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert canaries.seen_in(tmp_path, done.stdout + done.stderr) == []

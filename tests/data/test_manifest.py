"""Label CSVs, long and wide, and which file belongs to which image: what is read, what refused."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ich.base.config import Config, UserError
from ich.data.dataset import load_dataset
from ich.data.manifest import Labels, read_labels
from ich.data.phantom.spec import LABELS, SUBTYPES

Compose = Callable[..., Config]


def wide(rows: int, epidural: int, subdural: int = 0) -> pd.DataFrame:
    table = pd.DataFrame(0, index=range(rows), columns=list(LABELS), dtype=np.int8)
    table.loc[: epidural - 1, "epidural"] = 1
    table.loc[epidural : epidural + subdural - 1, "subdural"] = 1
    table["any"] = table[list(SUBTYPES)].max(axis=1)
    table.insert(0, "image_id", [f"ID_{i:09x}" for i in range(rows)])
    return table


def long_csv(table: pd.DataFrame) -> str:
    lines = [f"{row.image_id}_{k},{getattr(row, k)}" for row in table.itertuples() for k in LABELS]
    return "\n".join(["ID,Label", *lines]) + "\n"


def read(
    text: str, columns: tuple[str, ...] | None = LABELS, any_label: str | None = "any"
) -> Labels:
    return read_labels(io.BytesIO(text.encode()), "labels.csv", columns, any_label)


def test_labels_read_back_and_exact_repetitions_are_dropped_and_counted() -> None:
    table = wide(5, 1, 1)
    text = long_csv(table)
    repeated = text + "\n".join(text.splitlines()[1:7]) + "\n"
    got = read(repeated)
    assert (got.repeated, got.names) == (1, LABELS)
    pd.testing.assert_frame_equal(got.table, table, check_dtype=False)
    assert read(text).repeated == 0


def test_wide_labels_say_the_same_as_long_ones() -> None:
    table = wide(5, 1, 1)
    text = table.to_csv(index=False)
    got = read(text + text.splitlines()[2] + "\n")
    assert (got.repeated, got.names) == (1, LABELS)
    pd.testing.assert_frame_equal(got.table, table, check_dtype=False)


def test_the_labels_are_the_columns_there_are() -> None:
    text = "path,patient_id,fracture,bleed\na/1.dcm,p1,0,1\na/2.dcm,p1,1,0\n"
    got = read(text, None, None)
    assert got.names == ("fracture", "bleed")
    assert got.table.columns.tolist() == ["image_id", "path", "patient_id", "fracture", "bleed"]
    assert got.table["image_id"].tolist() == ["a/1.dcm", "a/2.dcm"]
    assert read(text, ("bleed",), None).names == ("bleed",)
    assert read(long_csv(wide(2, 1)), None).names == LABELS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("_any,", "_eny,", 1), r"line 7: 'ID_000000000_eny'"),
        (lambda t: t.replace("_any,1", "_any,2", 1), r"line 7: '2'\)"),
        (lambda t: t.replace("_any,1", "_any,0.5", 1), r"line 7: '0.5'\)"),
        (lambda t: t.replace("_any,1", "_any,", 1), r"line 7: ''\)"),
        (lambda t: t.replace("_any,1", "_any,nan", 1), r"line 7: 'nan'\)"),
        (lambda t: t.replace("ID_000000000_any", "../../etc/passwd_any", 1), r"line 7: '../../etc"),
        (lambda t: t.replace("ID_000000000_any,1\n", ""), "ID_000000000 lack some of the 6 labels"),
        (
            lambda t: t.replace("ID_000000000_any,1", "ID_000000000_any,0"),
            "ID_000000000 have an `any` that is not the OR",
        ),
        (lambda t: t + "ID_000000000_epidural,0\n", "ID_000000000 have labels that contradict"),
        (
            lambda t: t.replace("ID,Label", "id,label"),
            "must have ID and Label .*or image_id or path",
        ),
        (lambda t: "", "cannot be read as CSV"),
        (lambda t: "ID,Label\n", "holds no row"),
        (lambda t: t[: len(t) - 4], r"line 31: 'ID_000000004_an'"),
    ],
)
def test_bad_long_labels_are_refused_by_line_or_id(
    change: Callable[[str], str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(change(long_csv(wide(5, 1))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,a\nx,2\n", r"in the column a: a value is no label.*line 2: '2'"),
        ("image_id,a\nx,\n", r"in the column a.*line 2: ''"),
        ("image_id,a\nx,0\nx,1\n", "x stand twice with different values"),
        ("image_id,a\n../x,0\n", r"in the column image_id: a value is no image id .line 2: '../x'"),
        ("path,a\n/etc/passwd,0\n", "is no path .line 2: '/etc/passwd'"),
        ("path,a\na/../../b,0\n", "is no path .line 2: 'a/../../b'"),
        ("path,a\na\\b,0\n", "is no path"),
        ("image_id\nx\n", "has no label column, only image_id"),
        ("name,a\nx,0\n", "has the columns name, a, but must have ID and Label"),
    ],
)
def test_bad_wide_labels_are_refused_by_line_or_id(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text, None, None)


def test_labels_that_the_config_names_must_be_there() -> None:
    with pytest.raises(UserError, match="has no column c; it has image_id, a. Name the label"):
        read("image_id,a\nx,0\n", ("a", "c"), None)
    with pytest.raises(UserError, match="data.any_label is 'any', but .* has the labels a, b"):
        read("image_id,a,b\nx,0,1\n", None, "any")


# The store


def zipped(folder: Path, archive: Path, top: str) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                out.write(file, f"{top}/{file.relative_to(folder)}")
    return archive


def test_folder_and_zip_give_the_same_slices(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    top = "rsna-intracranial-hemorrhage-detection"
    archive = zipped(phantom, tmp_path / "kaggle.zip", top)
    cohorts = [
        load_dataset(composed(f'data.root="{root}"', "data.workers=1", "data.cache_size=32"))
        for root in (phantom, archive)
    ]
    for side in ("train", "val"):
        a, b = (getattr(c, side) for c in cohorts)
        assert (a.image_id == b.image_id).all()
        assert (cohorts[0].hu[a.row] == cohorts[1].hu[b.row]).all()
        assert (a.target == b.target).all()


def test_rsna_reads_the_same_layout_as_the_phantom(composed: Compose, phantom: Path) -> None:
    own = [f'data.root="{phantom}"', "data.workers=1", "data.cache_size=32", "data.subset=1.0"]
    a, b = (load_dataset(composed(f"data={d}", *own)) for d in ("phantom", "rsna"))
    assert (a.train.image_id == b.train.image_id).all()


def test_a_missing_root_is_refused(composed: Compose) -> None:
    with pytest.raises(UserError, match="data.root is '/no/such/zip', which does not exist"):
        load_dataset(composed("data=rsna", "data.root=/no/such/zip"))
    with pytest.raises(UserError, match="data.root is not set. Give the folder or the zip"):
        load_dataset(composed("data=rsna"))


def test_no_zip_and_no_labels_are_refused(composed: Compose, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("<html>")
    with pytest.raises(UserError, match="is neither a folder nor a zip archive"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path / 'text.zip'}"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as out:
        out.writestr("stage_2_train/ID_0.dcm", b"")
    with pytest.raises(UserError, match=r"holds no stage_2_train.csv, so there are no labels"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path / 'empty.zip'}"))
    with pytest.raises(UserError, match="data.labels is 'none.csv', which is no file"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path}", "data.labels=none.csv"))
    with pytest.raises(UserError, match="data.labels is not set. Give the label CSV with"):
        load_dataset(composed("data=folder", f"data.root={tmp_path}"))


def test_labels_without_images_are_refused(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    shutil.copy(phantom / "stage_2_train.csv", tmp_path)
    with pytest.raises(UserError, match=r"holds none of the \d+ labelled images as stage_2_train"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path}"))


# Other people's data


@pytest.fixture
def hospital(phantom: Path, tmp_path: Path) -> Path:
    """A folder per study, odd suffixes, junk beside the slices, and other labels."""
    rsna = read_labels(phantom / "stage_2_train.csv", "labels").table
    root, rows = tmp_path / "scans of a hospital", []
    for n, row in enumerate(rsna.itertuples()):
        suffix = ("", ".dcm", ".DCM", ".ima")[n % 4]
        file = root / f"study {n // 20}" / "CT" / f"{n:04d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(phantom / "stage_2_train" / f"{row.image_id}.dcm", file)
        rows.append(
            {
                "image_id": f"{n:04d}",
                "path": file.relative_to(root).as_posix(),
                "patient_id": f"p{n // 20}",
                "bleed": row.any,
                "extra axial": max(row.epidural, row.subdural),
            }
        )
    (root / "study 0" / "DICOMDIR").write_bytes(b"no slice")
    (root / "README.txt").write_text("not a slice")
    table = pd.DataFrame(rows)
    table.drop(columns="path").to_csv(tmp_path / "by_name.csv", index=False)
    table.drop(columns="image_id").to_csv(tmp_path / "by_path.csv", index=False)
    return tmp_path


def test_a_folder_of_other_labels_is_read_by_name_and_by_path(
    composed: Compose, hospital: Path
) -> None:
    root = hospital / "scans of a hospital"
    archive = zipped(root, hospital / "scans.zip", ".").rename(hospital / "scans.zip")
    own = ["data=folder", "data.cache_size=32", "data.workers=1", "protocol=sound"]
    own += ["protocol.oversample=extra axial"]
    sets = []
    for place, labels in ((root, "by_name"), (root, "by_path"), (archive, "by_name")):
        where = [f'data.root="{place}"', f"data.labels={hospital / labels}.csv"]
        sets.append(load_dataset(composed(*own, *where)))
    for found in sets:
        assert found.labels == ("bleed", "extra axial")
        assert found.train.target.shape[1] == 2
        assert found.summary.leak == {"image": 0.0, "study": None, "patient": 0.0}
        assert found.test is not None
    by_name, by_path, in_zip = sets
    assert (by_name.hu[by_name.train.row] == in_zip.hu[in_zip.train.row]).all()
    assert all("/CT/" in i for i in by_path.train.image_id)


def test_the_patients_of_the_label_file_are_audited_under_the_reports_protocol(
    composed: Compose, hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.data.cohorts.scan_headers", None)  # the file has told them
    root, labels = hospital / "scans of a hospital", hospital / "by_name.csv"
    own = ["data=folder", "data.cache_size=32", "data.workers=1", "protocol.oversample=null"]
    found = load_dataset(composed(*own, f'data.root="{root}"', f"data.labels={labels}"))
    assert found.summary.leak["patient"] == 1.0


def test_two_files_of_one_name_need_a_path(composed: Compose, hospital: Path) -> None:
    root = hospital / "scans of a hospital"
    shutil.copy(root / "study 0/CT/0001.dcm", root / "study 1/CT/0001.dcm")
    with pytest.raises(UserError, match=r"1 image ids are the name of several files, as 0001"):
        load_dataset(
            composed(
                "data=folder", f'data.root="{root}"', f"data.labels={hospital / 'by_name.csv'}"
            )
        )


def test_oversampling_a_label_that_is_not_there_is_refused(
    composed: Compose, hospital: Path
) -> None:
    root, labels = hospital / "scans of a hospital", hospital / "by_name.csv"
    with pytest.raises(UserError, match="protocol.oversample is 'epidural', but the labels are"):
        load_dataset(composed("data=folder", f'data.root="{root}"', f"data.labels={labels}"))


@pytest.mark.parametrize("label", ["file", "study", "slices", "positive", "reason"])
def test_a_label_called_like_a_column_of_predictions_is_refused(label: str) -> None:
    csv = f"image_id,any,{label}\na,0,1\n".encode()
    with pytest.raises(UserError, match=f"has a label '{label}', but where predictions are"):
        read_labels(io.BytesIO(csv), "labels.csv")
    assert read_labels(io.BytesIO(csv), "labels.csv", ["any"]).names == ("any",)


def test_what_may_be_a_name_is_not_shown() -> None:
    csv = b"image_id,any,PatientName\na,0,CANARY^JANE\nb,1,1\n"
    message = r"the column PatientName: .*\(line 2: a text\).*or name the columns that are labels"
    with pytest.raises(UserError, match=message):
        read_labels(io.BytesIO(csv), "labels.csv")

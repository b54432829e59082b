"""Label CSVs, long and wide, and which file belongs to which image: what is read, what refused."""

from __future__ import annotations

import io
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from ich.base.config import Config, Source, UserError
from ich.data.dataset import load_dataset
from ich.data.manifest import Labels, build_manifest, read_labels, rsna_labels
from ich.data.phantom.spec import LABELS, SUBTYPES
from ich.data.store import SliceStore
from ich.data.tables.reading import tell

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
        ("path,a\n..\\b,0\n", "is no path .line 2: '../b'"),
        ("path,a\n\\\\server\\b,0\n", "is no path .line 2: '/server/b'"),
        ("path,a\n./b,0\n.\\b,1\n", "b stand twice with different values"),
        ("image_id,path,a\nx,s/1,0\ny,./s/1,1\nz,s/2,0\n", "x, y have one path, and a file is one"),
        ("image_id,PatientID,patient_id,a\nx,p,q,0\n", "has the columns PatientID and patient_id"),
        ("image_id,a,Image_ID\nx,0,y\n", "has the columns image_id and Image_ID"),
        ("image_id\nx\n", "has no label column, only image_id"),
        ("name,a\nx,0\n", "has the columns name, a, but must have ID and Label"),
    ],
)
def test_bad_wide_labels_are_refused_by_line_or_id(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,bleed,any,bleed\nx,0,0,1\n", "has 2 columns with the heading 'bleed'"),
        ("ID,Label,Label\nID_a_any,0,1\n", "has 2 columns with the heading 'Label'"),
        ("image_id,any\nx,0,1\n", r"has 2 headings, but a row with 3 values \(line 2: 'x'\)"),
        ("image_id,any\n0,x,1\n", "has 2 headings, but a row with 3 values"),
        ("image_id,patient_id,any\nx,p,0,0\n", "has 3 headings, but a row with 4 values"),
        ("image_id,any,patient_id\nx,0\n", "has 3 headings, but a row with 2 values"),
        *(
            (f"image_id,any\nx,{value}\n", "is no label; labels are 0 or 1 .line 2")
            for value in (
                "0.9999999999999999999",
                "1e-400",
                "1e0",
                "+1",
                "0x1",
                "\u0661",
                "T",
                "yes",
            )
        ),
        ("ID,Label\nID_a_any,0.99999999999999999999\n", "is no label"),
        ("image_id,any,a;b\nx,0,0\n", "has a label 'a;b', but a label's name is made of"),
        ("ID,Label\nID_a_any,0\nID_a_split,0\n", "has a label 'split', but where"),
        ("image_id,any,Any\nx,0,0\n", "has the labels 'any' and 'Any', which differ in case"),
    ],
)
def test_what_may_mean_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text, None, None)


def test_true_and_false_are_labels_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tell.cache_clear()
    got = read("image_id,a,b\nx,TRUE,0.0\ny,False,1.00\n", None, None).table
    assert got[["a", "b"]].to_numpy().tolist() == [[1, 0], [0, 1]]
    assert "in the label file labels.csv, True is read as 1 and False as 0" in caplog.text


def test_keys_are_known_in_any_case_and_never_labels() -> None:
    got = read("Image ID,Patient-ID,SOPInstanceUID,a\nx,p,1.2,0\n", None, None)
    assert got.names == ("a",)
    assert got.table.iloc[0].tolist() == ["x", "p", 0]


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


# Names that differ in form only


def store_of(folder: Path, *files: str) -> SliceStore:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return SliceStore.open(str(folder))


def paths_of(
    store: SliceStore, key: str, names: Sequence[str], source: Source = Source.folder
) -> list[str]:
    rows = "".join(f"{name},{n % 2}\n" for n, name in enumerate(names))
    labels = read(f"{key},a\n{rows}", None, None)
    return build_manifest(labels, store, source)["path"].tolist()


FILES = ("p0/Id_1.dcm", "p1/Id_2.dcm", "Schädel/Id_3.DCM")


@pytest.mark.parametrize(
    "names",
    [
        ("Id_1", "Id_2", "Id_3"),
        ("Id_1.dcm", "Id_2.png", "Id_3.jpeg"),
        ("ID_1", "id_2", "ID_3.IMA"),
    ],
)
def test_ids_are_found_in_any_form(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    tell.cache_clear()
    assert paths_of(store_of(tmp_path, *FILES, "x.txt"), "image_id", names) == list(FILES)
    said = f"3 of 3 labelled images have a file whose name differs in form only, as '{names[0]}'"
    assert (said in caplog.text) == (names[0] != "Id_1")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p,
        lambda p: f"./{p}",
        lambda p: p.replace("/", "\\"),
        str.upper,
        lambda p: p[:-4],
        lambda p: f"{p[:-4]}.png",
        lambda p: f"data/scans/{p}",
        lambda p: f"D:\\scans\\{p}",
        lambda p: unicodedata.normalize("NFD", p),
        lambda p: p.partition("/")[2],
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_paths_are_found_in_any_form(
    tmp_path: Path, form: Literal["NFC", "NFD"], change: Callable[[str], str]
) -> None:
    files = [unicodedata.normalize(form, f) for f in FILES]
    wanted = [change(f) for f in FILES]
    assert paths_of(store_of(tmp_path, *files), "path", wanted) == files
    if "scans" not in wanted[0]:  # the same below another folder
        store = store_of(tmp_path / "all", *(f"set/{f}" for f in files))
        assert paths_of(store, "path", wanted) == [f"set/{f}" for f in files]


def test_names_of_the_rsna_layout_are_found_in_any_form(tmp_path: Path) -> None:
    files = ("RSNA/Stage_2_Train/ID_1.DCM", "RSNA/Stage_2_Train/id_2.dcm")
    store = store_of(tmp_path, *files, "RSNA/stage_2_test/ID_1.dcm", "RSNA/Stage_2_Train.CSV")
    labels = read("ID,Label\nID_1_any,0\nID_2_any,1\n", None, None)
    assert build_manifest(labels, store, Source.rsna)["path"].tolist() == list(files)
    both = store_of(tmp_path / "both", "stage_1_train/ID_1.dcm", "stage_2_train/ID_1.dcm")
    later = build_manifest(labels, both, Source.rsna)["path"].tolist()
    assert later == ["stage_2_train/ID_1.dcm", ""]
    assert rsna_labels(store) == "RSNA/Stage_2_Train.CSV"


def test_one_that_is_missing_is_not_taken_from_another_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell.cache_clear()
    store = store_of(tmp_path, "p0/1.dcm", "1.dcm", "old/p1/1.dcm")
    assert paths_of(store, "path", ["p0/1.dcm", "p1/1.dcm"]) == ["p0/1.dcm", ""]
    assert (
        "1 of 2 labelled images have no file. The labels name 'p1/1.dcm'; there is" in caplog.text
    )


@pytest.mark.parametrize(
    ("key", "names", "message"),
    [
        ("image_id", ["id_1"], "told apart by their names: 'id_1' may be 'a/ID_1.dcm' or 'b/Id_1"),
        ("image_id", ["Id_2.dcm", "ID_2"], "'Id_2.dcm' and 'ID_2' may both be 'a/id_2.dcm'"),
        ("path", ["q/a/id_2", "r/a/id_2.png"], "'q/a/id_2' and 'r/a/id_2.png' may both be"),
        ("image_id", ["17"], "none of the 1 labelled images by their file name or path; .*'17'"),
        ("path", ["s/id_3.dcm"], "The labels name 's/id_3.dcm'; there is 'a/id_2.dcm'"),
    ],
)
def test_names_that_may_be_several_or_none_are_shown(
    tmp_path: Path, key: str, names: list[str], message: str
) -> None:
    store = store_of(tmp_path, "a/ID_1.dcm", "b/Id_1.dcm", "a/id_2.dcm")
    with pytest.raises(UserError, match=message):
        paths_of(store, key, names)


def test_linked_folders_belong_to_a_data_set_unless_they_lead_in_circles(tmp_path: Path) -> None:
    store_of(tmp_path / "elsewhere", "p0/1.dcm", "p1/2.dcm")
    root = tmp_path / "root"
    store_of(root, "own/3.dcm")
    (root / "p0").symlink_to(tmp_path / "elsewhere" / "p0")
    (root / "again").symlink_to(tmp_path / "elsewhere" / "p0")
    (root / "up").symlink_to(tmp_path)
    (root / "own" / "self").symlink_to(root)
    (root / "own" / "loop").symlink_to("loop")
    (tmp_path / "elsewhere" / "p0" / "back").symlink_to(root)
    found = SliceStore.open(str(root)).paths
    assert [p for p in found if p.endswith(".dcm")] == ["again/1.dcm", "own/3.dcm"]
    assert {"p0", "up", "own/self", "own/loop", "again/back"} <= set(found)
    assert SliceStore(root).paths == ["again", "own/3.dcm", "own/loop", "own/self", "p0", "up"]


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

"""From label CSV and DICOM to the cohort and the cache: counts, refusals, quarantine."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from ich import cache as cache_module
from ich.cache import open_cache, resize_area, square
from ich.config import Config, ProtocolConfig, UserError
from ich.data import load_dataset
from ich.dicom import DicomError, read_hu, unwrap_12bit
from ich.manifest import LABELS, SUBTYPES, build_manifest, read_labels, rsna_labels
from ich.phantom import PhantomSpec, write_phantom
from ich.protocol import apply_protocol
from ich.store import SliceStore

REPORT = ProtocolConfig(name="report", seed=0, epidural_times=8, val_fraction=0.15)


def wide(rows: int, epidural: int, subdural: int = 0) -> pd.DataFrame:
    table = pd.DataFrame(0, index=range(rows), columns=list(LABELS), dtype=np.int8)
    table.loc[: epidural - 1, "epidural"] = 1
    table.loc[epidural : epidural + subdural - 1, "subdural"] = 1
    table["any"] = table[list(SUBTYPES)].max(axis=1)
    return table.assign(image_id=[f"ID_{i:09x}" for i in range(rows)], path="x")


def long_csv(table: pd.DataFrame) -> str:
    lines = [f"{row.image_id}_{k},{getattr(row, k)}" for row in table.itertuples() for k in LABELS]
    return "\n".join(["ID,Label", *lines]) + "\n"


def read(text: str) -> tuple[pd.DataFrame, int]:
    return read_labels(io.BytesIO(text.encode()), "labels.csv")


# The report's protocol


def test_the_protocols_counts() -> None:
    cohort = apply_protocol(wide(1000, 20, 100), REPORT, subset=0.5)
    assert cohort.steps == {
        "images": 1000,
        "oversampled": 1140,
        "subset": 570,
        "train": 484,
        "val": 86,
    }
    whole = apply_protocol(wide(1000, 20, 100), REPORT, subset=1.0)
    assert whole.rows["image_id"].value_counts().head(20).eq(8).all()
    assert sorted(whole.rows.loc[whole.rows["image_id"] == "ID_000000000", "repeat"]) == [*range(8)]


def test_the_split_is_stratified_and_seeded() -> None:
    table = wide(2000, 30, 200)
    cohort = apply_protocol(table, REPORT, 1.0)
    rates = cohort.summary()["rates"]
    for label in ("epidural", "subdural", "any"):
        assert rates["val"][label] == pytest.approx(rates["train"][label], rel=0.05)
    again = apply_protocol(table, REPORT, 1.0)
    assert again.rows.equals(cohort.rows)
    moved = apply_protocol(table, ProtocolConfig("report", 1, 8, 0.15), 1.0)
    assert not moved.rows["split"].equals(cohort.rows["split"])


def test_the_leak_is_measured() -> None:
    cohort = apply_protocol(wide(400, 50), REPORT, 1.0)
    train = set(cohort.split("train")["image_id"])
    val = cohort.split("val")
    assert cohort.summary()["leak_images"] == pytest.approx(
        np.mean([i in train for i in val["image_id"]]), abs=1e-4
    )
    assert cohort.summary()["leak_images"] > 0
    once = ProtocolConfig("report", 0, 1, 0.15)
    assert apply_protocol(wide(400, 50), once, 1.0).summary()["leak_images"] == 0


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="3 rows leave 0 after taking a share of 0.1"):
        apply_protocol(wide(3, 0), REPORT, 0.1)


# Labels


def test_labels_read_back_and_exact_repetitions_are_dropped_and_counted() -> None:
    table = wide(5, 1, 1)
    text = long_csv(table)
    repeated = text + "\n".join(text.splitlines()[1:7]) + "\n"
    got, count = read(repeated)
    assert count == 1
    pd.testing.assert_frame_equal(got, table[["image_id", *LABELS]], check_dtype=False)
    assert read(text)[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("_any,", "_eny,", 1), r"line 7: 'ID_000000000_eny'"),
        (lambda t: t.replace("_any,1", "_any,2", 1), r"line 7: '2'\)"),
        (lambda t: t.replace("_any,1", "_any,0.5", 1), r"line 7: '0.5'\)"),
        (lambda t: t.replace("_any,1", "_any,", 1), r"line 7: ''\)"),
        (lambda t: t.replace("ID_000000000_any", "../../etc/passwd_any", 1), r"line 7: '../../etc"),
        (lambda t: t.replace("ID_000000000_any,1\n", ""), "ID_000000000 lack some of the 6 labels"),
        (
            lambda t: t.replace("ID_000000000_any,1", "ID_000000000_any,0"),
            "ID_000000000 have an `any` that is not the OR",
        ),
        (lambda t: t + "ID_000000000_epidural,0\n", "ID_000000000 have labels that contradict"),
        (lambda t: t.replace("ID,Label", "id,label"), "must have ID and Label"),
        (lambda t: "", "cannot be read as CSV"),
        (lambda t: "ID,Label\n", "holds no row"),
        (lambda t: t[: len(t) - 4], r"line 31: 'ID_000000004_an'"),
    ],
)
def test_bad_labels_are_refused_by_line_or_id(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(change(long_csv(wide(5, 1))))


# The store


def test_folder_and_zip_give_the_same_slices(
    composed: Callable[..., Config], phantom: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "kaggle.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(phantom.rglob("*")):
            if file.is_file():
                out.write(
                    file, f"rsna-intracranial-hemorrhage-detection/{file.relative_to(phantom)}"
                )
    cohorts = [
        load_dataset(composed(f'data.root="{root}"', "data.workers=1", "data.cache_size=32"))
        for root in (phantom, archive)
    ]
    for side in ("train", "val"):
        a, b = (getattr(c, side) for c in cohorts)
        assert (a.image_id == b.image_id).all()
        assert (cohorts[0].hu[a.row] == cohorts[1].hu[b.row]).all()
        assert (a.target == b.target).all()


def test_rsna_reads_the_same_layout_as_the_phantom(
    composed: Callable[..., Config], phantom: Path
) -> None:
    own = [f'data.root="{phantom}"', "data.workers=1", "data.cache_size=32", "data.subset=1.0"]
    a, b = (load_dataset(composed(f"data={d}", *own)) for d in ("phantom", "rsna"))
    assert (a.train.image_id == b.train.image_id).all()


def test_a_missing_root_is_refused(composed: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="data.root is '/no/such/zip', which does not exist"):
        load_dataset(composed("data=rsna", "data.root=/no/such/zip"))
    with pytest.raises(UserError, match="data.root is not set. Give the unpacked RSNA folder"):
        load_dataset(composed("data=rsna"))


def test_no_zip_and_no_labels_are_refused(composed: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("<html>")
    with pytest.raises(UserError, match="is neither a folder nor a zip archive"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path / 'text.zip'}"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as out:
        out.writestr("stage_2_train/ID_0.dcm", b"")
    with pytest.raises(UserError, match=r"holds no stage_2_train.csv, so there are no labels"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path / 'empty.zip'}"))
    with pytest.raises(UserError, match="data.labels is 'none.csv', which is no file"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path}", "data.labels=none.csv"))


def test_labels_without_images_are_refused(
    composed: Callable[..., Config], phantom: Path, tmp_path: Path
) -> None:
    shutil.copy(phantom / "stage_2_train.csv", tmp_path)
    with pytest.raises(UserError, match=r"holds none of the \d+ labelled images as"):
        load_dataset(composed("data=rsna", f"data.root={tmp_path}"))


# Quarantine and cache


def damaged(phantom: Path, folder: Path, share: float) -> tuple[Path, list[str]]:
    """A copy of the phantom in which some files are broken, each in another way."""
    root = folder / "damaged"
    shutil.copytree(phantom, root)
    files = sorted((root / "stage_2_train").glob("*.dcm"))
    chosen = files[:: max(1, int(1 / share))]
    for n, file in enumerate(chosen):
        if n % 4 == 0:
            file.write_bytes(b"")
        elif n % 4 == 1:
            file.write_bytes(file.read_bytes()[:-2000])
        elif n % 4 == 2:
            file.write_text("<html>not found</html>")
        else:
            file.unlink()
    return root, [f.stem for f in chosen]


def images_of(root: Path) -> tuple[pd.DataFrame, SliceStore]:
    store = SliceStore.open(str(root))
    labels, _ = read_labels(io.BytesIO(store.read(rsna_labels(store))), "labels")
    return build_manifest(labels, store), store


def test_bad_slices_are_quarantined_with_their_reason(phantom: Path, tmp_path: Path) -> None:
    root, bad = damaged(phantom, tmp_path, 0.03)
    images, store = images_of(root)
    cache = open_cache(images, store, tmp_path / "cache", 32, max_quarantine=0.1, workers=1)
    assert set(cache.quarantine["image_id"]) == set(bad)
    assert (
        cache.quarantine["reason"]
        .str.contains("empty|cannot be decoded|not a DICOM file|missing")
        .all()
    )
    assert cache.quarantine["reason"].nunique() == 4
    assert set(cache.row) == set(images["image_id"]) - set(bad)


def test_quarantined_images_leave_the_cohort(
    composed: Callable[..., Config], phantom: Path, tmp_path: Path
) -> None:
    root, bad = damaged(phantom, tmp_path, 0.03)
    config = composed(
        f"data.root={root}", "data.workers=1", "data.max_quarantine=0.1", "data.cache_size=32"
    )
    dataset = load_dataset(config)
    used = {*dataset.train.image_id, *dataset.val.image_id}
    assert not used & set(bad)
    assert dataset.summary["quarantined"] == len(bad)
    assert dataset.summary["train"] == len(dataset.train.row)


def test_too_many_bad_slices_stop_the_build_and_leave_nothing(
    phantom: Path, tmp_path: Path
) -> None:
    root, _ = damaged(phantom, tmp_path, 0.2)
    images, store = images_of(root)
    with pytest.raises(
        UserError,
        match=r"slices cannot be used, more than data.max_quarantine=0.01"
        r".*the file is empty \(\d+\)",
    ):
        open_cache(images, store, tmp_path / "cache", 32, max_quarantine=0.01, workers=1)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_what_is_decoded_is_not_decoded_again(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, store = images_of(phantom)
    first = open_cache(images, store, tmp_path, 32, 0.0, workers=2)
    monkeypatch.setattr(cache_module, "_build", None)
    again = open_cache(images.sample(frac=1, random_state=0), store, tmp_path, 32, 0.0)
    assert np.array_equal(first.hu, again.hu)
    row = first.row[images["image_id"].iloc[3]]
    hu = read_hu((phantom / images["path"].iloc[3]).read_bytes())
    assert np.array_equal(first.hu[row], resize_area(hu, 32))


def test_other_files_under_the_same_path_are_decoded_anew(tmp_path: Path) -> None:
    root = tmp_path / "phantom"
    caches = []
    for prevalence in (0.0, 1.0):
        shutil.rmtree(root, ignore_errors=True)
        write_phantom(root, PhantomSpec(2, 0, 64, prevalence), workers=1)
        images, store = images_of(root)
        caches.append(open_cache(images, store, tmp_path / "cache", 32, 0.0, workers=1))
    first, second = caches
    assert first.row == second.row
    assert not np.array_equal(first.hu, second.hu)


def test_the_quarantine_limit_holds_for_a_cache_that_is_there(
    phantom: Path, tmp_path: Path
) -> None:
    root, _ = damaged(phantom, tmp_path, 0.2)
    images, store = images_of(root)
    open_cache(images, store, tmp_path / "cache", 32, max_quarantine=1.0, workers=1)
    with pytest.raises(UserError, match="more than data.max_quarantine=0.01 allows"):
        open_cache(images, store, tmp_path / "cache", 32, max_quarantine=0.01, workers=1)


def test_an_interrupted_build_is_never_read(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, store = images_of(phantom)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cache(images, store, tmp_path, 32, 0.0, workers=1, progress=stop)
    assert not list(tmp_path.rglob("hu.npy"))
    assert len(open_cache(images, store, tmp_path, 32, 0.0, workers=1).row) == len(images)


def test_area_resize_is_the_block_mean_and_keeps_the_total() -> None:
    hu = np.random.default_rng(0).integers(-1000, 2000, (12, 12)).astype(np.int16)
    blocks = hu.reshape(4, 3, 4, 3).mean((1, 3))
    assert np.abs(resize_area(hu, 4) - blocks).max() <= 0.5
    assert resize_area(hu, 5).mean() == pytest.approx(hu.mean(), abs=1)
    assert np.array_equal(resize_area(hu, 12), hu)


def test_slices_that_are_not_square_are_padded_with_air() -> None:
    out = square(np.ones((638, 490), np.int16))
    assert out.shape == (638, 638)
    assert out[:, :74].max() == -1024
    assert out[:, 74:564].min() == 1


# DICOM


def edited(phantom: Path, **changes: object) -> bytes:
    dataset = pydicom.dcmread(next(iter(sorted((phantom / "stage_2_train").glob("*.dcm")))))
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RescaleSlope": None}, "RescaleSlope is None, not a number"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0"),
        ({"RescaleIntercept": None}, "RescaleIntercept is None, not a number"),
        ({"Modality": "MR"}, "Modality is 'MR', not 'CT'"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "is 'MONOCHROME1', not 'MONOCHROME2'"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel is 3"),
        ({"NumberOfFrames": "2"}, r"multi-frame file \(2 frames\)"),
        ({"Rows": 60000}, "Rows is 60000, not from 1 to 4096"),
        ({"NumberOfFrames": ["1", "2"]}, r"unreadable header \(TypeError\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_that_are_no_ct_slice_are_refused_by_name(
    phantom: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DicomError, match=message):
        read_hu(edited(phantom, **changes))


def test_wrapped_12_bit_values_over_the_whole_range() -> None:
    hu = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)
    assert np.array_equal(unwrap_12bit((hu % 4096).astype(np.uint16)), hu)
    shifted = ((hu.astype(np.int32) - 7) % 4096).astype(np.uint16)
    assert np.array_equal(unwrap_12bit(shifted, intercept=7), hu)
    # The popular fix (+1000, wrap, -1000) is wrong exactly below -1000.
    popular = (hu.astype(np.int32) % 4096 + 1000) % 4096 - 1000
    assert np.array_equal(np.unique(hu[popular != hu]), np.arange(-1024, -1000))


# Real data


def test_the_real_mini_set(composed: Callable[..., Config], shared: Path) -> None:
    config = composed(
        "data=rsna",
        f"data.root={shared / 'rsna_mini.zip'}",
        "data.subset=1.0",
        "data.cache_size=64",
    )
    dataset = load_dataset(config)
    assert dataset.summary["images"] == 155
    assert dataset.summary["repeated_ids"] == 4
    assert dataset.summary["oversampled"] == 155 + 7 * 6
    assert dataset.summary["quarantined"] == 0
    assert dataset.hu.shape == (155, 64, 64)
    brain = (dataset.hu > 0) & (dataset.hu < 80)
    assert 0.1 < brain.mean() < 0.5


def test_compressed_slices_without_a_decoder_are_refused_by_name(shared: Path) -> None:
    with zipfile.ZipFile(shared / "jpeg_lossless.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dcm"))
        with pytest.raises(DicomError, match=re.compile("pixel data cannot be decoded.*", re.S)):
            read_hu(archive.read(name))

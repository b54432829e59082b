"""The order of slices: from headers or metadata, and against a plain loop."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from canaries import Canaries

from ich.base.config import Config, UserError
from ich.data import order as order_module
from ich.data.dataset import load_dataset
from ich.data.dicom import read_keys
from ich.data.order import Sequences, check_order, order_slices, read_positions
from ich.data.patients import Pseudonyms
from ich.data.tables.reading import tell

Compose = Callable[..., Config]


def drawn_order(
    sizes: list[int], seed: int = 0, twins: int = 0, interleaved: bool = False
) -> pd.DataFrame:
    """Studies of so many slices each, in random order of their ids; each of the first `twins`
    positions of a series stands twice; two series of a study if interleaved."""
    rng = np.random.default_rng(seed)
    rows = []
    for study, size in enumerate(sizes):
        for n in range(size):
            series = n % 2 if interleaved else 0
            place = n // 2 if interleaved else n
            if place < 2 * twins:
                place = place // 2 * 2
            rows.append((f"study{study}", f"series{study}-{series}", -40.0 + 2.5 * place))
    ids = rng.permutation(len(rows))
    table = pd.DataFrame(rows, columns=["study", "series", "position"])
    table.insert(0, "image_id", [f"ID_{i:06d}" for i in ids])
    return table.sort_values("image_id", ignore_index=True).assign(readable=True)


def by_a_loop(order: pd.DataFrame, row: dict[str, int], reach: int) -> dict[int, list[int]]:
    """Of each position in the cache, those of the slices around it, one slice after another."""
    found = {}
    for _, series in order.groupby(["study", "series"]):
        places = sorted(set(series["position"]))
        at = {p: sorted(series.loc[series["position"] == p, "image_id"]) for p in places}
        for number, place in enumerate(places):
            for rank, image in enumerate(at[place]):
                around = []
                for step in range(-reach, reach + 1):
                    there = at[places[min(max(number + step, 0), len(places) - 1)]]
                    around.append(row[there[min(rank, len(there) - 1)]])
                found[row[image]] = around
    return found


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize(
    "order",
    [
        drawn_order([5, 1, 3]),
        drawn_order([600, 2], seed=1),
        drawn_order([9, 8], seed=2, interleaved=True),
        drawn_order([9, 6, 1], seed=3, twins=2),
        drawn_order([20], seed=4, twins=3, interleaved=True),
    ],
)
def test_neighbours_are_those_of_a_plain_loop(order: pd.DataFrame, reach: int) -> None:
    cached = np.random.default_rng(9).permutation(len(order) + 5)[: len(order)]
    row = dict(zip(order["image_id"], map(int, cached), strict=True))
    sequences = order_slices(order, row, "neighbours")
    expected = by_a_loop(order, row, reach)
    around = sequences.neighbours(cached, reach)
    assert around.dtype == np.int64
    assert around.tolist() == [expected[int(r)] for r in cached]
    # One sequence for each series, in the order of its positions.
    position = dict(zip(cached, order["position"], strict=True))
    series = dict(zip(cached, order["series"], strict=True))
    assert sorted(sequences.rows) == sorted(cached)
    parts = [
        sequences.rows[a:b] for a, b in zip(sequences.start, sequences.start[1:], strict=False)
    ]
    for part in parts:
        assert len({series[r] for r in part}) == 1
        assert (np.diff([position[r] for r in part]) >= 0).all()
    assert len(parts) == order["series"].nunique()


def test_what_is_in_no_sequence_has_no_neighbours() -> None:
    sequences = Sequences(np.array([4, 2]), np.array([0, 2]), np.array([0, 1]))
    assert sequences.neighbours(np.array([2])).tolist() == [[4, 2, 2]]
    for row in (3, 5):
        with pytest.raises(IndexError):
            sequences.neighbours(np.array([row]))


def test_the_order_depends_on_no_key() -> None:
    """Keys are hashes under a secret, which is another on another machine."""
    order = drawn_order([5, 4, 6])
    row = {image: n for n, image in enumerate(order["image_id"])}
    other = order.assign(study=order["study"].str[::-1], series=order["series"].str[::-1])
    first, second = (order_slices(o, row, "study") for o in (order, other))
    assert first.rows.tolist() == second.rows.tolist()


def test_a_slice_that_cannot_be_decoded_leaves_its_neighbours_to_one_another() -> None:
    order = drawn_order([3, 2])
    ids = order[order["study"] == "study0"].sort_values("position")["image_id"].tolist()
    row = {image: n for n, image in enumerate(order["image_id"]) if image != ids[1]}
    around = order_slices(order, row, "neighbours").neighbours(np.array([row[ids[0]]]))
    assert around.tolist() == [[row[ids[0]], row[ids[0]], row[ids[2]]]]


def test_twins_are_said(caplog: pytest.LogCaptureFixture) -> None:
    tell.cache_clear()
    order = drawn_order([9], twins=2)
    order_slices(order, {image: n for n, image in enumerate(order["image_id"])}, "study")
    assert "2 of 9 slices lie where another of their series does" in caplog.text


def test_an_unknown_order_is_refused() -> None:
    order = drawn_order([3, 2])
    lost = order.assign(position=order["position"].where(order.index != 1))
    with pytest.raises(UserError, match=r"1 of 5 images have no position .* first: ID_000001"):
        check_order(lost, "neighbours")
    with pytest.raises(UserError, match="study needs the order of slices, but 5 of 5 .* position"):
        check_order(order.assign(position=np.nan), "study")
    with pytest.raises(UserError, match="5 of 5 images have no study or series"):
        check_order(order.assign(study="", series=""), "study")
    with pytest.raises(UserError, match="each of the 3 images is alone in its study and series"):
        check_order(drawn_order([1, 1, 1]), "neighbours")
    check_order(order.assign(study=""), "study")  # a series belongs to one study


# From files


def ordered(composed: Compose, root: Path, *overrides: str) -> Config:
    return composed(
        f'data.root="{root}"',
        "protocol=sound",
        "context=neighbours",
        "data.cache_size=16",
        "data.workers=1",
        *overrides,
    )


def test_headers_give_the_order_and_are_read_once(
    composed: Compose, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ordered(composed, phantom)
    dataset = load_dataset(config)
    sequences, train = dataset.sequences, dataset.train
    assert sequences is not None
    assert len(sequences.start) == 8 + 1
    z = {}
    for file in (phantom / "stage_2_train").glob("*.dcm"):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        z[file.stem] = header.PatientID, float(header.ImagePositionPatient[2])
    image = dict(zip(train.row.tolist(), train.image_id.tolist(), strict=True))
    before, at, after = sequences.neighbours(train.row).T
    assert (at == train.row).all()
    for one, two in ((before, at), (at, after)):
        here, there = ([z[image[int(r)]] for r in rows] for rows in (one, two))
        assert [p for p, _ in here] == [p for p, _ in there]
        assert all(a <= b for (_, a), (_, b) in zip(here, there, strict=True))
    # In a job nothing is looked up; nor when it is prepared again.
    monkeypatch.setattr(order_module, "scan_headers", None)
    for build in (False, True):
        again = load_dataset(config, build=build).sequences
        assert again is not None
        assert (again.rows == sequences.rows).all()
    (file,) = Path(config.data.cache_dir).glob("cohort-*-order.csv.gz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="the order of this cohort's slices is not known yet"):
        load_dataset(config, build=False)
    monkeypatch.undo()
    assert load_dataset(config).sequences is not None


def test_the_cohort_is_that_without_context(composed: Compose, phantom: Path) -> None:
    plain = load_dataset(ordered(composed, phantom, "context=slice"))
    for name in ("neighbours", "study"):
        other = load_dataset(ordered(composed, phantom, f"context={name}"))
        assert other.summary == plain.summary
        assert (other.train.row == plain.train.row).all()
    assert plain.sequences is None


def test_a_cohort_without_half_its_patients_is_another_one(
    composed: Compose, phantom: Path
) -> None:
    few = ("protocol.negatives_per_positive=0.5", "protocol.oversample=null")
    plain, whole = (
        load_dataset(ordered(composed, phantom, f"context={name}", *few)).summary.cohort
        for name in ("slice", "neighbours")
    )
    assert plain != whole


def test_metadata_give_the_order(composed: Compose, phantom: Path, tmp_path: Path) -> None:
    rows = []
    for file in sorted((phantom / "stage_2_train").glob("*.dcm")):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        place, across = header.ImagePositionPatient, header.ImageOrientationPatient
        series = header.get_item("SeriesInstanceUID").value.decode().rstrip("\0 ")
        rows.append((file.stem, header.PatientID, series, *map(str, place), *map(str, across)))
    axes = [f"ImagePositionPatient_{n}" for n in range(3)]
    cosines = [f"ImageOrientationPatient_{n}" for n in range(6)]
    table = pd.DataFrame(rows, columns=["Image", "PatientID", "SeriesInstanceUID", *axes, *cosines])
    expected = load_dataset(ordered(composed, phantom)).sequences
    assert expected is not None
    for name, frame in (
        ("numbers", table),
        ("without orientation", table.drop(columns=cosines)),
        (
            "one text",
            table.drop(columns=[*axes, *cosines]).assign(
                ImagePositionPatient=[str(list(r)) for r in table[axes].to_numpy()]
            ),
        ),
        (
            "along the normal",
            table.drop(columns=[*axes, *cosines]).assign(position=table[axes[2]]),
        ),
    ):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        config = ordered(composed, phantom, f"data.metadata='{tmp_path / name}.csv'")
        found = load_dataset(config).sequences
        assert found is not None
        assert (found.rows == expected.rows).all(), name
        assert (found.start == expected.start).all(), name


def test_metadata_without_positions_leave_them_to_headers(
    composed: Compose, phantom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell.cache_clear()
    files = sorted((phantom / "stage_2_train").glob("*.dcm"))
    names = [(f.stem, pydicom.dcmread(f, stop_before_pixels=True).PatientID) for f in files]
    pd.DataFrame(names, columns=["image_id", "patient_id"]).to_csv(tmp_path / "m.csv", index=False)
    config = ordered(composed, phantom, f"data.metadata={tmp_path / 'm.csv'}")
    assert load_dataset(config).sequences is not None
    assert "m.csv has no positions of slices: they are read from the files' headers" in caplog.text


def test_coronal_slices_are_ordered_along_their_own_axis(tmp_path: Path) -> None:
    """Without an orientation: where the slices of a series lie farthest apart."""
    (tmp_path / "m.csv").write_text(
        "image_id,patient_id,series_id,ImagePositionPatient\n"
        "a,p,s,\"['1.0', '-5', '7']\"\nb,p,s,1\\-9.5\\7\nc,p,t,1\\2\\3\nd,p,t,1\\2.1\\4e1\n"
    )
    found = read_positions(tmp_path / "m.csv", list("abcd"), Pseudonyms(bytes(range(32))))
    assert found is not None
    assert found["position"].tolist() == [-5.0, -9.5, 3.0, 40.0]
    assert found["series"].nunique() == 2
    assert not found["series"].isin(["s", "t"]).any()


def test_metadata_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image_id,patient_id,position\na,p,1\na,p,2\n")
    with pytest.raises(UserError, match="gives 1 images two series or positions .the first: a"):
        read_positions(tmp_path / "m.csv", ["a"], Pseudonyms(bytes(range(32))))


def test_files_without_a_position_are_refused_and_unreadable_ones_are_not(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(phantom, root)
    first, second, *_ = sorted((root / "stage_2_train").glob("*.dcm"))
    first.write_bytes(b"")
    config = ordered(composed, root, "data.max_quarantine=0.5")
    dataset = load_dataset(config)
    assert dataset.sequences is not None
    assert dataset.summary.quarantined == 1
    data = pydicom.dcmread(second)
    del data.ImagePositionPatient
    data.save_as(second)
    with pytest.raises(UserError, match=f"1 of .* no position .* first: {second.stem}"):
        load_dataset(config)


def test_the_report_s_protocol_is_refused(composed: Compose) -> None:
    from ich.base.validation import validate

    with pytest.raises(UserError, match=r"protocol=report tears them apart.*Add protocol=sound"):
        validate(composed("context=study"))
    with pytest.raises(UserError, match="context.windows is 'first', but must be null with"):
        validate(composed("context.windows=first"))


def test_no_identifier_is_written(
    composed: Compose, canaries: Canaries, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load_dataset(ordered(composed, canaries.root, "data.max_quarantine=0.5"))
    assert dataset.sequences is not None
    assert not canaries.seen_in(tmp_path, caplog.text)


# Real data


def test_a_tilted_gantry_is_ordered_along_its_normal(shared: Path) -> None:
    """One GE series, tilted by 18.5 degrees: as its InstanceNumbers have it."""
    found = []
    with zipfile.ZipFile(shared / "ge_head.zip") as archive:
        for name in archive.namelist():
            if name.endswith("/"):
                continue
            data = archive.read(name)
            header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
            found.append((int(header.InstanceNumber), read_keys(data)))
    assert len(found) == 28
    assert len({keys.series for _, keys in found}) == 1
    assert (np.diff([keys.position for _, keys in sorted(found)]) > 1).all()


def test_real_positions_are_along_the_table(shared: Path) -> None:
    """The RSNA's metadata have no orientation; all of its series are axial, some are tilted."""
    path = shared / "stage_1_test_meta.csv.gz"
    table = pd.read_csv(path)
    found = read_positions(path, table["Image"].tolist(), Pseudonyms(bytes(range(32))))
    assert found is not None
    z = table["ImagePositionPatient"].str.extract(r"'([^']+)'\]$")[0].astype(float)
    assert (found["position"] == z).all()
    order = found.assign(image_id=table["Image"], study="", readable=True)
    order = order.sort_values("image_id", ignore_index=True)
    row = {image: n for n, image in enumerate(order["image_id"])}
    sequences = order_slices(order, row, "study")
    assert len(sequences.start) == 2214 + 1
    position, series = order["position"].to_numpy(), order["series"].to_numpy()
    around = sequences.neighbours(np.arange(len(order)))
    assert (series[around] == series[:, None]).all()
    assert (np.diff(position[around]) >= 0).all()
    # The first and the last of each series alone have one neighbour less.
    ends = (np.diff(around) == 0).any(1)
    assert 2 * 2214 <= ends.sum() <= 2 * 2214 + 424

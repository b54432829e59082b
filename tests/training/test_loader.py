"""Batches: the same slices in the same order, wherever they are kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ich.base.config import Feed
from ich.data.dataset import Dataset, Split
from ich.training.loader import (
    Batch,
    Loader,
    MappedSlices,
    ResidentSlices,
    SliceSource,
    open_slice_source,
)

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def split(rows: np.ndarray) -> Split:
    target = np.stack([rows, -rows], axis=1).astype(np.float32)
    return Split(
        np.array([f"ID_{i}" for i in rows]),
        rows,
        target,
        np.full(len(rows), -1),
        np.full(len(rows), -1),
    )


def hu_of(rows: int, side: int = 3) -> np.ndarray:
    """Slices whose every pixel is their row."""
    return np.arange(rows, dtype=np.int16)[:, None, None] * np.ones((1, side, side), np.int16)


def loader(rows: int, batch_size: int = 4) -> Loader:
    return Loader(
        MappedSlices(hu_of(rows)),
        split(np.arange(rows)),
        batch_size,
        CPU,
    )


def rows_of(batch: Batch) -> list[int]:
    """Which slices a batch holds; its targets are checked to be theirs."""
    rows = batch.hu[:, 0, 0].tolist()
    assert (batch.hu == batch.hu[:, :1, :1]).all()
    assert batch.target.tolist() == [[r, -r] for r in rows]
    return rows


def test_an_epoch_serves_every_row_once_in_a_seeded_order() -> None:
    seen = list(loader(10).epoch(0, 1))
    order = [row for batch in seen for row in rows_of(batch)]
    assert sorted(order) == list(range(10))
    assert [len(batch.target) for batch in seen] == [4, 4, 2]
    again = [row for batch in loader(10).epoch(0, 1) for row in rows_of(batch)]
    other = [row for batch in loader(10).epoch(0, 2) for row in rows_of(batch)]
    assert order == again
    assert order != other


def test_draws_follow_their_rows_and_an_epoch_can_begin_in_its_middle() -> None:
    draws = torch.arange(10.0)[:, None]
    whole = list(loader(10).epoch(3, 1, draws))
    for batch in whole:
        assert batch.draws is not None
        assert batch.draws[:, 0].tolist() == rows_of(batch)
    late = list(loader(10).epoch(3, 1, draws, start=1))
    assert [rows_of(b) for b in late] == [rows_of(b) for b in whole[1:]]
    assert list(loader(10).epoch(3, 1, draws, start=3)) == []


def test_a_last_batch_of_one_row_joins_the_one_before() -> None:
    assert [len(rows_of(b)) for b in loader(9).in_order()] == [4, 5]
    assert len(loader(9)) == 2
    assert [len(rows_of(b)) for b in loader(1).in_order()] == [1]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("feed", list(Feed))
def test_every_place_serves_the_same(feed: Feed, device: torch.device, tmp_path: Path) -> None:
    """A cohort is a part of the cache, in an order of its own, with copies."""
    np.save(tmp_path / "hu.npy", hu_of(50))
    hu = np.load(tmp_path / "hu.npy", mmap_mode="r")
    train, val = np.array([40, 3, 3, 17, 3, 49, 20]), np.array([5, 0, 31])
    dataset = Dataset(hu, ("a", "b"), split(train), split(val), None, {})
    slices = open_slice_source(dataset, feed, device)
    if feed is Feed.resident:
        assert isinstance(slices, ResidentSlices)
        assert len(slices.hu) == 8  # distinct slices of this cohort alone
    for part, rows in ((dataset.train, train), (dataset.val, val)):
        served = list(Loader(slices, part, 2, device).in_order())
        assert [r for batch in served for r in rows_of(batch)] == rows.tolist()
        assert {b.hu.device.type for b in served} == {device.type}
        assert {b.hu.dtype for b in served} == {torch.int16}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("feed", [Feed.resident, Feed.mapped])
def test_every_place_serves_slices_with_those_around_them(
    feed: Feed, device: torch.device, tmp_path: Path
) -> None:
    np.save(tmp_path / "hu.npy", hu_of(50))
    hu = np.load(tmp_path / "hu.npy", mmap_mode="r")
    rows = np.array([40, 3, 3, 17, 20])
    around = np.array([[40, 40, 17], [20, 3, 3], [20, 3, 3], [40, 17, 20], [17, 20, 3]])
    part = replace(split(rows), around=around)
    slices = open_slice_source(Dataset(hu, ("a", "b"), part, part, None, {}), feed, device)
    served = list(Loader(slices, part, 2, device).in_order())
    assert [list(batch.hu.shape) for batch in served] == [[2, 3, 3, 3], [3, 3, 3, 3]]
    assert torch.cat([b.hu[..., 1, 1] for b in served]).tolist() == around.tolist()
    assert torch.cat([b.target[:, 0] for b in served]).tolist() == rows.tolist()


def test_without_room_the_next_place_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99.00 GiB")

    monkeypatch.setattr("ich.training.loader.ResidentSlices", full)
    rows = np.arange(4)
    dataset = Dataset(hu_of(4), ("a", "b"), split(rows), split(rows), None, {})
    with caplog.at_level(logging.INFO, "ich.training.loader"):
        slices = open_slice_source(dataset, Feed.resident, CPU)
    assert isinstance(slices, MappedSlices)
    assert "slices cannot be resident (CUDA out of memory" in caplog.text


def test_a_reader_that_fails_says_so_where_batches_are_taken() -> None:
    slices: SliceSource = MappedSlices(hu_of(4))
    with pytest.raises(IndexError, match="out of bounds"):
        list(slices.batches([np.array([1]), np.array([9])]))

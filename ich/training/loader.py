"""Batches of HU slices on the device, in an order that is a function of (seed, epoch).

Slices are kept in one of two places, which differ in speed and in nothing else: `resident` on the
device, or `mapped` from the decoded files, which the system keeps in memory that it can have back,
a thread reading ahead. Everything that the host tells the device about an epoch is sent
before its first step, so that nothing waits within it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ich.base.config import Feed
from ich.data.dataset import Dataset, Split
from ich.training.devices import free_memory
from ich.training.transforms import stream_seed

log = logging.getLogger(__name__)
_PREFETCHED = 2  # batches that a thread reads before they are asked for
_STEPS_AHEAD = 2  # that a GPU is told to do before the host waits for the first of them


@dataclass(frozen=True)
class Batch:
    """hu: int16 [B, S, S], or [B, P, S, S] of P slices for each row. target: float32 [B, L]. draws:
    float32 [B, D], or None."""

    hu: torch.Tensor
    target: torch.Tensor
    draws: torch.Tensor | None


class SliceSource(Protocol):
    """A cohort's slices, wherever they are kept."""

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        """int16 [B, S, S] on the device for each int64 [B] of positions in the cache; [B, P, S, S]
        for each [B, P]."""


class ResidentSlices:
    """All slices of a cohort on the device; a batch is one gather there.

    Args:
        hu: int16 [N, S, S], mapped from a file.
        rows: positions in it that are used.
        device: that keeps them.
    """

    def __init__(self, hu: np.ndarray, rows: np.ndarray, device: torch.device):
        # -1 for rows that are not kept: as an index on the device, an error and no other slice.
        self.slot = np.full(int(rows.max()) + 1, -1, np.int64)  # position in the file -> here
        self.slot[rows] = np.arange(len(rows))
        self.device = device
        self.hu = torch.empty((len(rows), *hu.shape[1:]), dtype=torch.int16, device=device)
        for start in range(0, len(rows), 1024):  # never a second copy of everything
            part = torch.from_numpy(hu[rows[start : start + 1024]])
            self.hu[start : start + len(part)].copy_(part)

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        # One copy to the device for the whole epoch: one for each step would wait at each step.
        slots = torch.from_numpy(self.slot[np.concatenate(rows)]).to(self.device)
        for index in slots.split([len(r) for r in rows]):
            yield self.hu.index_select(0, index.flatten()).unflatten(0, index.shape)


class MappedSlices:
    """Batches gathered from the decoded files by a thread that reads ahead.

    Args:
        hu: int16 [N, S, S], mapped from a file.
    """

    def __init__(self, hu: np.ndarray):
        self.hu = hu

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        # A training that is ended between two steps leaves this generator early; `with` then waits
        # for the reads under way.
        with ThreadPoolExecutor(1, "read ahead") as reader:
            ahead: list[Future[torch.Tensor]] = []
            for number in range(len(rows) + _PREFETCHED):
                if number < len(rows):
                    ahead.append(reader.submit(self._gather, number, rows[number]))
                if number >= _PREFETCHED:
                    yield ahead.pop(0).result()

    def _gather(self, number: int, row: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.hu[row])


class StagedSlices(MappedSlices):
    """The same for a GPU. The thread gathers into page-locked memory, from which alone a copy runs
    beside the computing; a few such places are used in turn, however long the training.

    Args:
        hu: int16 [N, S, S], mapped from a file.
        device: where batches go.
    """

    def __init__(self, hu: np.ndarray, device: torch.device):
        super().__init__(hu)
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(_PREFETCHED + 1)]
        self._places: list[torch.Tensor] = []

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        shape = (max(map(len, rows)), *rows[0].shape[1:], *self.hu.shape[1:])
        first = self._places[0].shape if self._places else (0,)
        if first[0] < shape[0] or first[1:] != shape[1:]:
            self._places = [
                torch.empty(shape, dtype=torch.int16, pin_memory=True) for _ in self._copied
            ]
        computing = torch.cuda.current_stream(self.device)
        told: deque[torch.cuda.Event] = deque()  # the end of each step that is under way
        for number, batch in enumerate(super().batches(rows)):
            with torch.cuda.stream(self._copies):
                on_device = batch.to(self.device, non_blocking=True)
                self._copied[number % len(self._places)].record(self._copies)
            computing.wait_stream(self._copies)
            on_device.record_stream(computing)  # its memory is not used again before that is done
            yield on_device
            # A host that is faster than the GPU would tell it hundreds of steps ahead, each with a
            # batch of its own in memory.
            told.append(computing.record_event())
            if len(told) > _STEPS_AHEAD:
                told.popleft().synchronize()

    def _gather(self, number: int, row: np.ndarray) -> torch.Tensor:
        place = number % len(self._places)
        self._copied[place].synchronize()  # the batch before, in this place
        batch = self._places[place][: len(row)]
        # `clip` writes into the place itself, where the default makes a copy first.
        np.take(self.hu, row, axis=0, out=batch.numpy(), mode="clip")
        return batch


def open_slice_source(
    dataset: Dataset, feed: Feed, device: torch.device, needed: int = 0
) -> SliceSource:
    """Puts a cohort's slices where batches come from fastest, and logs where.

    Args:
        dataset: the cohort.
        feed: where; `auto` takes a GPU's memory if the slices fit beside the training, else the
            files.
        device: where batches go.
        needed: bytes of the device's memory that the training itself takes.
    """
    splits = (dataset.train, dataset.val, dataset.test)
    # Each slice once: the copies that oversampling adds, and a slice of two splits, share it.
    rows = np.unique(np.concatenate([s.row for s in splits if s is not None]))
    size = len(rows) * dataset.hu[:1].nbytes
    for choice in _candidates(feed, device, size, needed):
        try:
            if choice is Feed.resident:
                source: SliceSource = ResidentSlices(dataset.hu, rows, device)
            else:
                source = _mapped(dataset.hu, device)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            log.warning("slices cannot be %s (%s); the next place is tried", choice.value, reason)
            continue
        log.info("slices: %s, %d of %.2f GB in all", choice.value, len(rows), size / 1e9)
        return source
    # The place that was asked for by name had no room. Files always do.
    return _mapped(dataset.hu, device)


def _mapped(hu: np.ndarray, device: torch.device) -> SliceSource:
    return StagedSlices(hu, device) if device.type == "cuda" else MappedSlices(hu)


def _candidates(feed: Feed, device: torch.device, size: int, needed: int) -> list[Feed]:
    """Where to try to keep slices of `size` bytes, first to last."""
    if feed is not Feed.auto:
        return [feed]
    fits = device.type == "cuda" and size + needed < free_memory(device)
    return [Feed.resident, Feed.mapped] if fits else [Feed.mapped]


class Loader:
    """Serves one split of a cohort."""

    def __init__(self, slices: SliceSource, split: Split, batch_size: int, device: torch.device):
        self.slices, self.split, self.batch_size, self.device = slices, split, batch_size, device

    def __len__(self) -> int:
        # By cutting, not by dividing: a last row may have joined the batch before it.
        return len(self._cut(torch.arange(len(self.split.row))))

    def _cut(self, order: torch.Tensor) -> list[torch.Tensor]:
        """Batches of an order. A last batch of one row joins the one before it: on a 1 x 1 feature
        map (InceptionV3 at 75 px) batch normalization has no variance to take from one value."""
        parts = list(order.split(self.batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def epoch(
        self, seed: int, epoch: int, draws: torch.Tensor | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """All rows once, in the order of (seed, epoch), but for the first `start` batches.

        Args:
            seed: of the run.
            epoch: its number.
            draws: random numbers of the epoch, by position in the split, [N, D].
            start: batches to leave out.
        """
        # A generator of its own, on the CPU: the order is the same on every device, and neither
        # moves nor follows the random numbers of dropout.
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch, "order"))
        order = torch.randperm(len(self.split.row), generator=generator)
        return self._batches(order, draws, start)

    def in_order(self) -> Iterator[Batch]:
        """All rows once, in the cohort's order."""
        return self._batches(torch.arange(len(self.split.row)))

    def _batches(
        self, order: torch.Tensor, draws: torch.Tensor | None = None, start: int = 0
    ) -> Iterator[Batch]:
        # Cut first, then left out: the batches of a resumed epoch are those of an undisturbed one.
        parts = self._cut(order)[start:]
        if not parts:
            return
        sizes = [len(part) for part in parts]
        # All of an epoch is sent at once, and cut on the device: views, without a wait per step.
        left = torch.cat(parts)
        targets = torch.from_numpy(self.split.target)[left].to(self.device).split(sizes)
        drawn = draws[left].to(self.device).split(sizes) if draws is not None else None
        slices = self.slices.batches([self.split.shown[part.numpy()] for part in parts])
        for number, hu in enumerate(slices):
            yield Batch(hu, targets[number], drawn[number] if drawn else None)

"""Batches of HU slices on the device, in an order that is a function of (seed, epoch).

Slices are kept in one of three places, which differ in speed and in nothing else: `resident` on the
device, `pinned` in page-locked memory that the device copies from, or `mapped` from the decoded
files, a thread reading ahead. Everything that the host tells the device about an epoch is sent
before its first step, so that nothing waits within it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ich.base.config import Feed
from ich.base.memory import available_memory
from ich.data.dataset import Dataset, Split
from ich.training.transforms import stream_seed

log = logging.getLogger(__name__)
_PREFETCHED = 2  # batches that a thread reads before they are asked for
_HOST_SHARE = 0.5  # of free memory, page-locked at most: the rest of the system needs it


@dataclass(frozen=True)
class Batch:
    """hu: int16 [B, S, S]. target: float32 [B, L]. draws: float32 [B, D], or None."""

    hu: torch.Tensor
    target: torch.Tensor
    draws: torch.Tensor | None


class SliceSource(Protocol):
    """A cohort's slices, wherever they are kept."""

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        """int16 [B, S, S] on the device for each int64 [B] of positions in the cache."""


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
            yield self.hu.index_select(0, index)


class PrefetchedSlices:
    """Batches gathered on the host by a thread and copied to the device while it computes.

    Args:
        hu: int16 [N, S, S], mapped from a file.
        rows: positions in it that are used.
        device: where batches go.
        pinned: keep the slices that are used in page-locked memory.
    """

    def __init__(self, hu: np.ndarray, rows: np.ndarray, device: torch.device, pinned: bool):
        self.device, self.hu, self.slot = device, hu, np.arange(len(hu))
        if pinned:
            # Only from page-locked memory does a copy run beside the computing. From any other,
            # CUDA copies into a buffer of its own first, and the host waits.
            kept = torch.empty((len(rows), *hu.shape[1:]), dtype=torch.int16, pin_memory=True)
            self.slot[rows] = np.arange(len(rows))
            for start in range(0, len(rows), 1024):
                part = torch.from_numpy(hu[rows[start : start + 1024]])
                kept[start : start + len(part)].copy_(part)
            self.hu = kept.numpy()  # a view of the same page-locked memory
            self._kept = kept

    def batches(self, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        # A training that is ended between two steps leaves this generator early; `with` then waits
        # for the reads under way.
        with ThreadPoolExecutor(1, "read ahead") as reader:
            ahead: list[Future[torch.Tensor]] = []
            for number in range(len(rows) + _PREFETCHED):
                if number < len(rows):
                    ahead.append(reader.submit(self._gather, rows[number]))
                if number >= _PREFETCHED:
                    yield ahead.pop(0).result().to(self.device, non_blocking=True)

    def _gather(self, row: np.ndarray) -> torch.Tensor:
        # In the thread, too: to lock pages is a call into the driver that steps need not wait for.
        part = torch.from_numpy(self.hu[self.slot[row]])
        return part.pin_memory() if self.device.type == "cuda" else part


def open_slice_source(
    dataset: Dataset, feed: Feed, device: torch.device, needed: int = 0
) -> SliceSource:
    """Puts a cohort's slices where batches come from fastest, and logs where.

    Args:
        dataset: the cohort.
        feed: where; `auto` takes the device's memory if the slices fit beside the training,
            else page-locked memory, else the files. Without a GPU it takes the files: the system
            keeps them in memory that it can have back, and a training needs no more for more data.
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
                source = PrefetchedSlices(dataset.hu, rows, device, pinned=choice is Feed.pinned)
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the second: none to lock
            reason = str(error).splitlines()[0]
            log.warning("slices cannot be %s (%s); the next place is tried", choice.value, reason)
            continue
        log.info("slices: %s, %d of %.2f GB in all", choice.value, len(rows), size / 1e9)
        return source
    # The place that was asked for by name had no room. Files always do.
    return PrefetchedSlices(dataset.hu, rows, device, pinned=False)


def _candidates(feed: Feed, device: torch.device, size: int, needed: int) -> list[Feed]:
    """Where to try to keep slices of `size` bytes, first to last."""
    if feed is not Feed.auto:
        return [feed]
    if device.type != "cuda":
        return [Feed.mapped]
    # Of what the driver calls free; jobs that share a GPU and start at once all see the same.
    free, _ = torch.cuda.mem_get_info(device)
    fits = [Feed.resident] if size + needed < free else []
    # torch rounds a page-locked block up to a power of two: of this half, nearly all may be taken.
    if size < _HOST_SHARE * available_memory():
        fits.append(Feed.pinned)
    return [*fits, Feed.mapped]


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
        slices = self.slices.batches([self.split.row[part.numpy()] for part in parts])
        for number, hu in enumerate(slices):
            yield Batch(hu, targets[number], drawn[number] if drawn else None)

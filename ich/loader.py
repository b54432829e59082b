"""Batches of HU slices on the device, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ich.data import Split
from ich.transforms import stream_seed


@dataclass(frozen=True)
class Batch:
    """hu: int16 [B, S, S]. target: float32 [B, L]. position: int64 [B], places in the split."""

    hu: torch.Tensor
    target: torch.Tensor
    position: torch.Tensor


class Loader:
    """Serves one split of a cohort from the memory-mapped cache."""

    def __init__(self, hu: np.ndarray, split: Split, batch_size: int, device: torch.device):
        self.hu, self.split, self.batch_size, self.device = hu, split, batch_size, device

    def __len__(self) -> int:
        return len(self._cut(torch.arange(len(self.split.row))))

    def _cut(self, order: torch.Tensor) -> list[torch.Tensor]:
        """Batches of an order. A last batch of one row joins the one before it: on a 1 x 1 feature
        map (InceptionV3 at 75 px) batch normalization has no variance to take from one value."""
        parts = list(order.split(self.batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """All rows once, in the order of (seed, epoch), but for the first `start` batches."""
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch, "order"))
        return self._batches(torch.randperm(len(self.split.row), generator=generator), start)

    def in_order(self) -> Iterator[Batch]:
        """All rows once, in the cohort's order."""
        return self._batches(torch.arange(len(self.split.row)))

    def _batches(self, order: torch.Tensor, start: int = 0) -> Iterator[Batch]:
        target = torch.from_numpy(self.split.target)
        for position in self._cut(order)[start:]:
            hu = torch.from_numpy(self.hu[self.split.row[position.numpy()]])
            yield Batch(
                hu.to(self.device, non_blocking=True),
                target[position].to(self.device, non_blocking=True),
                position,
            )

"""Heads over whole studies at work: what a slice was predicted as by itself becomes what it is in
its study.

Files are read series by series. The pooled features of a slice are kept until all files of its
series are there, and then go through the head as one sequence: memory holds the series that are
being read, and not the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ich.data.order import Sequences, sequences_of
from ich.inference.ensemble import Network
from ich.inference.session import PredictResult
from ich.training.study.head import StudyHead

_OCCLUDED_AT_ONCE = 8  # slices; of a study of 600, attention then takes 46 MB a layer


class StudyHeads:
    """The heads of M networks over the series of N files.

    Args:
        heads: of each network, None without one.
        places: of each file, the keys `study` and `series`, empty if unknown, and `position` in mm,
            NaN if so.
        logits: float32 [N, M, L]. Whoever predicts fills them in; those of a network with a head
            are replaced, series by series.
        in_study: bool [N], set where they are.
    """

    def __init__(
        self,
        heads: Sequence[StudyHead | None],
        places: pd.DataFrame,
        logits: np.ndarray,
        in_study: np.ndarray,
    ):
        self._heads, self._logits, self._in_study = heads, logits, in_study
        owner = places["study"] + "/" + places["series"]
        known = (np.isfinite(places["position"]) & (owner != "/")).to_numpy(bool)
        self._series = np.full(len(places), -1)  # of each file, the number of its sequence
        self._sequences: Sequences | None = None
        self._left = np.zeros(0, np.int64)  # of each sequence, the files that are not back yet
        if known.any():
            found = sequences_of(owner[known], places["position"][known], np.flatnonzero(known))
            self._sequences, self._left = found, np.diff(found.start)
            self._series[found.rows] = np.repeat(np.arange(len(self._left)), self._left)
        self._features: dict[int, np.ndarray] = {}  # float16 [M, F], of files that are back

    @property
    def waiting(self) -> int:
        """How many slices' features are kept now."""
        return len(self._features)

    def add(self, batch: list[PredictResult]) -> None:
        """Takes what the heads need of a batch, whose logits are filled in; applies them to the
        series that are complete."""
        labels = self._logits.shape[2]
        for file, outputs in batch:
            number = self._series[file.number]
            if number < 0:
                continue
            if outputs is not None and np.isfinite(outputs).all():
                self._features[file.number] = outputs[:, labels:].astype(np.float16)
            self._left[number] -= 1
            if not self._left[number]:
                self._apply(number)

    def finish(self) -> None:
        """Applies the heads to what is there of series whose other files never came back."""
        for number in np.flatnonzero(self._left).tolist():
            self._apply(number)

    def again(self, chosen: np.ndarray, is_usable: np.ndarray) -> np.ndarray:
        """What is to be predicted anew where some files are: with each its series, for the logits
        of these are no longer those of slices.

        Args:
            chosen: bool [N]; of files that can be used.
            is_usable: bool [N].

        Returns:
            bool [N].
        """
        series = np.unique(self._series[chosen & (self._series >= 0)])
        again = chosen | (is_usable & np.isin(self._series, series))
        self._left[series] = [(again & (self._series == number)).sum() for number in series]
        return again

    def _apply(self, number: int) -> None:
        assert self._sequences is not None
        span = slice(*self._sequences.start[number : number + 2])
        rows, place = self._sequences.rows[span], self._sequences.place[span]
        kept = np.array([row in self._features for row in rows.tolist()])
        rows, features = rows[kept], [self._features.pop(row) for row in rows[kept].tolist()]
        if len(rows) < 2:  # by itself
            return
        # As in training, what cannot be read leaves its place to the next one.
        place = np.unique(place[kept], return_inverse=True)[1]
        self._in_study[rows] = True
        for m, head in enumerate(self._heads):
            if head:
                of_member = np.stack([f[m, : head.features] for f in features])
                self._logits[rows, m] = apply_head(head, of_member, self._logits[rows, m], place)


def logits_of_series(network: Network, hu: np.ndarray) -> np.ndarray:
    """int16 HU of a series in its order, [T, S, S] as `Network.logits` takes it, T at least 2 ->
    logits of the network and its head, float32 [T, L]."""
    assert network.head is not None
    outputs, labels = network.outputs(hu), len(network.metadata.labels)
    features = outputs[:, labels:].astype(np.float16)
    return apply_head(network.head, features, outputs[:, :labels], np.arange(len(hu)))


@torch.inference_mode()
def apply_head(
    head: StudyHead, features: np.ndarray, logits: np.ndarray, place: np.ndarray
) -> np.ndarray:
    """Logits of a sequence of T slices, with their study in view.

    Args:
        head: in eval mode, on any device.
        features: float16 [T, F].
        logits: float32 [T, L], of the slice network.
        place: int64 [T], numbers of the slices' places along the normal.

    Returns:
        float32 [T, L].
    """
    inputs = (features.astype(np.float32), np.ascontiguousarray(logits), place)
    tensors = (torch.from_numpy(part)[None].to(head.out.weight.device) for part in inputs)
    return np.asarray(head(*tensors)[0].cpu().numpy())


@torch.inference_mode()
def slices_that_moved(
    head: StudyHead, features: np.ndarray, logits: np.ndarray, place: np.ndarray
) -> np.ndarray:
    """What each slice of a sequence is worth to the head's highest answer, by occlusion (Zeiler and
    Fergus 2014, arXiv 1311.2901, section 4.2): a slice's logits and features give way to the mean
    of its sequence, and the head's logit, at the slice where it was highest, falls by so much.

    Not by a gradient, which tells what a small change would do; nor by attention, which tells what
    was looked at, and not what came of it.

    Args:
        head, features, logits, place: as for `apply_head`.

    Returns:
        float32 [T, L]; below 0 for a slice that spoke against the finding.
    """
    device = head.out.weight.device
    given = [torch.from_numpy(np.array(x, np.float32)).to(device) for x in (features, logits)]
    at, count = torch.from_numpy(place).to(device), len(place)
    before = head(*(x[None] for x in given), at[None])[0]
    highest, top = before.max(0)
    label, moved = torch.arange(len(top), device=device), torch.empty_like(before)
    for start in range(0, count, _OCCLUDED_AT_ONCE):
        chosen = torch.arange(start, min(count, start + _OCCLUDED_AT_ONCE), device=device)
        occluded = [x.repeat(len(chosen), 1, 1) for x in given]
        for x, whole in zip(occluded, given, strict=True):
            x[chosen - start, chosen] = whole.mean(0)
        after = head(*occluded, at.expand(len(chosen), -1))
        moved[chosen] = highest - after[:, top, label]
    return np.asarray(moved.cpu().numpy())

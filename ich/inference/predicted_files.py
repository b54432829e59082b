"""Files through networks: each is decoded and predicted where it is cheapest, and takes its place.

The way of a slice goes down once: files (`ich.data.inputs`), processes (`ich.base.workers`), and in
each process decoding (`ich.data.decode`) and, if it can hold the networks, predicting
(`ich.inference.session`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from ich.base.config import UserError
from ich.base.progress import ProgressCallback
from ich.base.workers import available_cores, run_parallel, worker_count
from ich.data.inputs import Inputs
from ich.data.order import read_places, surround
from ich.inference.ensemble import Ensemble
from ich.inference.session import (
    PredictRequest,
    PredictResult,
    ShownFiles,
    open_session,
    predict_batch,
    read_and_predict,
    read_shown,
)
from ich.inference.study import StudyHeads

_SLICES_PER_START = 200  # a process takes about as long to start as this many to decode
_KILLED = (
    "not read: a decoding process was killed, for want of memory or by a file that crashes its "
    "decoder; --workers 1 shows which"
)
_NOT_FINITE = "its logits are not finite: the weights are damaged"


@dataclass(frozen=True)
class PredictedFiles:
    """What became of N files, each by its number in `Inputs`.

    logits: float32 [N, M, L], of M members; NaN for a file that was refused. reasons: of those.
    study, series: keys, empty where a file names none. position: float64 [N], mm, NaN if unknown.
    around: int64 [N, P], what the networks saw of each: itself, or with those before and after it.
    in_study: bool [N], whose logits are of a head, with the study in view.
    """

    logits: np.ndarray
    reasons: dict[int, str]
    study: list[str]
    series: list[str]
    position: np.ndarray
    around: np.ndarray
    in_study: np.ndarray

    @staticmethod
    def of_none(count: int, ensemble: Ensemble) -> PredictedFiles:
        """N files of which nothing is known yet."""
        shape = count, len(ensemble.members), len(ensemble.labels)
        return PredictedFiles(
            logits=np.full(shape, np.nan, np.float32),
            reasons={},
            study=[""] * count,
            series=[""] * count,
            position=np.full(count, np.nan),
            around=np.stack([np.arange(count)] * ensemble.slices, 1),
            in_study=np.zeros(count, bool),
        )

    @property
    def numbers(self) -> list[int]:
        """The files that were predicted, ascending."""
        return [n for n in range(len(self.logits)) if n not in self.reasons]

    @property
    def lone(self) -> int:
        """How many were to be seen with their neighbours and have none."""
        if self.around.shape[1] == 1:
            return 0
        around = self.around[self.numbers]
        return int((around == around[:, :1]).all(1).sum())

    def add(self, batch: list[PredictResult], key: Callable[[str, str], str]) -> None:
        """Notes a batch; `key` replaces its identifiers, which name a person, before they are."""
        labels = self.logits.shape[2]
        for file, outputs in batch:
            if outputs is None:
                self.reasons[file.number] = file.reason
                continue
            self.study[file.number] = key("study", file.study)
            self.series[file.number] = key("series", file.series)
            self.position[file.number] = file.position
            # A NaN is above no threshold: the file would count as without a finding.
            if np.isfinite(outputs).all():
                self.logits[file.number] = outputs[:, :labels]
            else:
                self.reasons[file.number] = _NOT_FINITE


def predict_files(
    ensemble: Ensemble,
    inputs: Inputs,
    key: Callable[[str, str], str],
    progress: ProgressCallback,
    tta: str = "none",
    batch_size: int = 32,
    workers: int | None = None,
    places: pd.DataFrame | None = None,
) -> PredictedFiles:
    """Decodes files by all cores and predicts them, batch by batch; holds a few batches at a time,
    and for heads the features, 2 to 4 KB a slice, of series that are being read: where a network
    sees more than a slice, headers are read first, and the files of a series follow one another.

    A converted network computes where its files are decoded. Batches are made of neighbouring
    files, so that the result does not depend on who is faster.

    Args:
        ensemble: the networks.
        inputs: the N files.
        key: replaces an identifier: its kind ("study" or "series") and itself.
        progress: called with (files done, files in all).
        tta: one of `TTA`.
        batch_size: files in a batch.
        workers: decoding processes, this one included; None is up to one per core.
        places: where the files lie, as `surround` takes it; None is by their headers.

    Raises:
        UserError: the GPU's memory does not suffice.
    """
    count = len(inputs)
    predicted = PredictedFiles.of_none(count, ensemble)
    processes = worker_count(workers, count, _SLICES_PER_START)
    if places is None and (ensemble.slices > 1 or ensemble.has_head):
        places = read_places(inputs, key, workers)
    heads = _heads(ensemble, predicted, places)
    unread = set(range(count))
    if count:
        progress(0, count)
    try:
        for batches in _rounds(ensemble, inputs, predicted, places, heads, batch_size):
            for batch in _predict_batches(ensemble, batches, processes, tta):
                predicted.add(batch, key)
                if heads:
                    heads.add(batch)
                # By number, for batches come back in any order.
                unread.difference_update(result.file.number for result in batch)
                progress(count - len(unread), count)
    except BrokenProcessPool:
        # What came back stands. Which file of the others killed the process is not known here.
        predicted.reasons.update(dict.fromkeys(unread, _KILLED))
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(error, batch_size)) from None
    finally:
        # This process decoded and predicted among the others, and has sessions of its own.
        open_session.cache_clear()  # who goes on needs the networks no longer
    if heads:
        heads.finish()
    return predicted


def _out_of_memory(error: torch.OutOfMemoryError, batch_size: int) -> str:
    return (
        f"out of GPU memory at {batch_size} slices at a time: {str(error).splitlines()[0]} "
        f"Lower the batch size (--batch-size, or batch_size for ich.evaluate), or compute on the "
        f"CPU (--device cpu, device=cpu)."
    )


def _heads(
    ensemble: Ensemble, predicted: PredictedFiles, places: pd.DataFrame | None
) -> StudyHeads | None:
    if not ensemble.has_head:
        return None
    assert places is not None
    members = [m.network.head for m in ensemble.members]
    return StudyHeads(members, places, predicted.logits, predicted.in_study)


def _rounds(
    ensemble: Ensemble,
    inputs: Inputs,
    predicted: PredictedFiles,
    places: pd.DataFrame | None,
    heads: StudyHeads | None,
    batch_size: int,
) -> Iterator[Iterator[ShownFiles]]:
    """What to predict, in batches. A second time where a neighbour could not be read: as in
    training, the next one is seen in its place."""
    if places is None:
        requests = inputs.batches(batch_size, ensemble.sizes)
        yield (ShownFiles([r], [(n,) for n in r.numbers]) for r in requests)
        return
    around, sequence = surround(places, np.ones(len(places), bool))
    if ensemble.slices == 1:
        yield _surrounded(inputs, predicted.around, sequence, ensemble.sizes, batch_size)
        return
    predicted.around[:] = around
    yield _surrounded(inputs, around, sequence, ensemble.sizes, batch_size)
    is_usable = np.isin(np.arange(len(places)), predicted.numbers)
    mended, sequence = surround(places, is_usable)
    changed = is_usable & (mended != around).any(1)
    predicted.around[:] = mended
    if heads:
        changed = heads.again(changed, is_usable)
    if changed.any():
        yield _surrounded(inputs, mended, sequence[changed[sequence]], ensemble.sizes, batch_size)


def _surrounded(
    inputs: Inputs,
    around: np.ndarray,
    numbers: np.ndarray,
    sizes: tuple[int, ...],
    batch_size: int,
) -> Iterator[ShownFiles]:
    """Files in batches, each with the slices around its own: those at its ends are read twice."""
    for start in range(0, len(numbers), batch_size):
        shown = around[numbers[start : start + batch_size]]
        needed = inputs.requests(np.unique(shown).tolist(), sizes)
        yield ShownFiles(list(needed), [tuple(row) for row in shown.tolist()])


def _predict_batches(
    ensemble: Ensemble, batches: Iterator[ShownFiles], processes: int, tta: str
) -> Iterator[list[PredictResult]]:
    """Batches in the order of completion. So many processes read files, and predict them, too, if
    each can hold the networks; else this one predicts what they send."""
    if networks := ensemble.converted_for(processes):
        # Cores are shared out: more threads than cores would wait for one another.
        threads = max(1, available_cores() // processes)
        requests = (PredictRequest(shown, networks, threads, tta) for shown in batches)
        yield from run_parallel(read_and_predict, requests, processes)
    else:
        # The networks are in this process, or on its GPU, and the others feed them.
        for shown in run_parallel(read_shown, batches, processes):
            yield predict_batch(shown, partial(ensemble.outputs, tta=tta))

"""Networks converted for onnxruntime, and what a process runs that both decodes and predicts.

Processes that each compute on a thread of their own need not wait for one another, as the threads
of one network do: on two cores that is 1.2 times as many slices a second (MobileNetV2 at 96 px).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ich.data.decode import ReadRequest, ReadResult, read_slices

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flips": ((), (-1,), (-2,), (-2, -1)),  # axes of [..., H, W]
}
TTA = tuple(FLIPS)
# Slices that one thread computes at a time: what lies between the layers then stays in its cache
# (MobileNetV2 at 96 px: 854 a second, 788 at 32 at a time). Several threads need more to share.
_AT_ONCE = 8


class ConvertedNetwork(NamedTuple):
    """An ONNX file from int16 HU [B, side, side] to float32 [B, L], or from [B, slices, side, side]
    of several."""

    path: str
    side: int
    slices: int = 1

    @property
    def size(self) -> int:
        """Bytes, its weights with it."""
        return sum(
            p.stat().st_size for p in Path(self.path).parent.glob(f"{Path(self.path).name}*")
        )


class Session:
    """An ONNX file on so many threads of this machine's processor."""

    def __init__(self, path: Path, threads: int):
        # Here: onnxruntime is an extra, and nothing but a session needs it.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Decoding processes want the cores while a batch waits.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Errors alone: a warning of each process would stand among the lines of progress.
        options.log_severity_level = 3
        self._at_once = _AT_ONCE if threads == 1 else None
        self._session: Any = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, hu: np.ndarray) -> np.ndarray:
        """int16 HU [B, S, S] or [B, P, S, S] -> float32 [B, L], as the file gives it."""
        step = self._at_once or len(hu)
        parts = [
            self._session.run(None, {"hu": np.ascontiguousarray(hu[start : start + step])})[0]
            for start in range(0, len(hu), step)
        ]
        return np.concatenate(parts)


@lru_cache
def open_session(path: str, threads: int) -> Session:
    """The session of a file, opened once in a process, or again after
    `open_session.cache_clear()`."""
    return Session(Path(path), threads)


def stack(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """What M networks give for B slices, float32 [B, W] each -> [B, M, W] of the widest W; behind
    what is narrower stand zeros."""
    stacked = np.zeros(
        (len(outputs[0]), len(outputs), max(o.shape[1] for o in outputs)), np.float32
    )
    for number, output in enumerate(outputs):
        stacked[:, number, : output.shape[1]] = output
    return stacked


def average_flips(
    network: Callable[[np.ndarray], np.ndarray], hu: np.ndarray, tta: str
) -> np.ndarray:
    """Logits [B, L] of int16 HU [..., S, S]; with `flips` the mean over the four of each slice."""
    # Copied below: a flip is a view with negative strides, which torch does not take.
    flipped = [np.flip(hu, axes) if axes else hu for axes in FLIPS[tta]]
    # One flip after the other: all four at once would need four times the memory.
    logits = np.stack([network(np.ascontiguousarray(h)) for h in flipped])
    return np.asarray(logits.mean(0))


def of_slices(hu: np.ndarray, slices: int) -> np.ndarray:
    """What a network that sees so many slices at once sees of int16 HU [B, P, S, S]: the middle one
    [B, S, S], or all. [B, S, S] is as it is."""
    return hu[:, hu.shape[1] // 2] if hu.ndim == 4 and slices == 1 else hu


class ShownFiles(NamedTuple):
    """Files to read, and what of them is seen at once.

    files: each file once. around: of every file to predict the numbers of P files, itself in the
    middle: one, or with those before and after it.
    """

    files: list[ReadRequest]
    around: list[tuple[int, ...]]


class ShownSlices(NamedTuple):
    """What was read of `ShownFiles`."""

    files: list[ReadResult]
    around: list[tuple[int, ...]]


def read_shown(shown: ShownFiles) -> ShownSlices:
    """Decodes the files of a batch."""
    return ShownSlices([r for request in shown.files for r in read_slices(request)], shown.around)


class PredictRequest(NamedTuple):
    """Files to read, and M networks to predict them by, each on so many threads."""

    shown: ShownFiles
    networks: tuple[ConvertedNetwork, ...]
    threads: int
    tta: str

    def outputs(self, hu: dict[int, np.ndarray]) -> np.ndarray:
        """int16 HU [B, P, S, S] of each side S -> float32 [B, M, W], as `Ensemble.outputs`."""
        return stack(
            [
                average_flips(
                    open_session(n.path, self.threads), of_slices(hu[n.side], n.slices), self.tta
                )
                for n in self.networks
            ]
        )


class PredictResult(NamedTuple):
    """One file that was to be predicted.

    file: what was read of it, its slices dropped. outputs: float32 [M, W] of M networks, as
    `Ensemble.outputs`; None if it could not be read.
    """

    file: ReadResult
    outputs: np.ndarray | None


def read_and_predict(request: PredictRequest) -> list[PredictResult]:
    """Decodes and predicts in one process: what goes back to the caller is logits, no slices."""
    return predict_batch(read_shown(request.shown), request.outputs)


def predict_batch(
    shown: ShownSlices, outputs: Callable[[dict[int, np.ndarray]], np.ndarray]
) -> list[PredictResult]:
    """Predicts the files of a batch that could be read, as one batch of the networks.

    Args:
        shown: what was read, each file in the same sides S.
        outputs: int16 HU [B, P, S, S] of each side S -> float32 [B, M, W].
    """
    readable, hu = see(shown)
    # Those that could not be read take their place in the result, not in the batch.
    numbers = {around[len(around) // 2] for around in shown.around}
    refused = [f for f in shown.files if f.reason and f.number in numbers]
    results = [PredictResult(file, None) for file in refused]
    if readable:
        for file, of_file in zip(readable, outputs(hu), strict=True):
            # Without its slices, which would else be copied back to the calling process.
            results.append(PredictResult(file._replace(hu={}), of_file))
    return results


def see(shown: ShownSlices) -> tuple[list[ReadResult], dict[int, np.ndarray]]:
    """The B files to predict that could be read, and what is seen of them: int16 HU [B, P, S, S] of
    each side S. In the place of a neighbour that could not be read stands the file itself."""
    read = {file.number: file for file in shown.files}
    middle = [read[numbers[len(numbers) // 2]] for numbers in shown.around]
    readable = [file for file in middle if not file.reason]
    seen = [
        read[n] if not read[n].reason else own
        for own, numbers in zip(middle, shown.around, strict=True)
        for n in numbers
        if not own.reason
    ]
    hu = {side: np.stack([file.hu[side] for file in seen]) for side in (seen[0].hu if seen else ())}
    return readable, {
        side: slices.reshape(len(readable), -1, side, side) for side, slices in hu.items()
    }

"""Networks converted for onnxruntime, and what a process runs that both decodes and predicts.

Processes that each compute on a thread of their own need not wait for one another, as the threads
of one network do: on two cores that is 1.2 times as many slices a second (MobileNetV2 at 96 px).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ich.data.decode import ReadRequest, ReadResult, read_slices

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flips": ((), (2,), (1,), (1, 2)),  # axes of [B, H, W]
}
TTA = tuple(FLIPS)
# Slices that one thread computes at a time: what lies between the layers then stays in its cache
# (MobileNetV2 at 96 px: 854 a second, 788 at 32 at a time). Several threads need more to share.
_AT_ONCE = 8


class ConvertedNetwork(NamedTuple):
    """An ONNX file from int16 HU [B, side, side] to float32 [B, L]."""

    path: str
    side: int

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
        """int16 HU [B, S, S] -> float32 [B, L], as the file gives it."""
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


def average_flips(
    network: Callable[[np.ndarray], np.ndarray], hu: np.ndarray, tta: str
) -> np.ndarray:
    """Logits [B, L] of int16 HU [B, S, S]; with `flips` the mean over the four of each slice."""
    # Copied below: a flip is a view with negative strides, which torch does not take.
    flipped = [np.flip(hu, axes) if axes else hu for axes in FLIPS[tta]]
    # One flip after the other: all four at once would need four times the memory.
    logits = np.stack([network(np.ascontiguousarray(h)) for h in flipped])
    return np.asarray(logits.mean(0))


class PredictRequest(NamedTuple):
    """Files to read, and M networks to predict them by, each on so many threads."""

    files: ReadRequest
    networks: tuple[ConvertedNetwork, ...]
    threads: int
    tta: str

    def logits(self, hu: dict[int, np.ndarray]) -> np.ndarray:
        """int16 HU [B, S, S] of each side S -> float32 [B, M, L]."""
        return np.stack(
            [
                average_flips(open_session(n.path, self.threads), hu[n.side], self.tta)
                for n in self.networks
            ],
            axis=1,
        )


class PredictResult(NamedTuple):
    """One file that was to be predicted.

    file: what was read of it, its slices dropped. logits: float32 [M, L] of M networks, None if it
    could not be read.
    """

    file: ReadResult
    logits: np.ndarray | None


def read_and_predict(request: PredictRequest) -> list[PredictResult]:
    """Decodes and predicts in one process: what goes back to the caller is logits, no slices."""
    return predict_batch(read_slices(request.files), request.logits)


def predict_batch(
    files: list[ReadResult], logits: Callable[[dict[int, np.ndarray]], np.ndarray]
) -> list[PredictResult]:
    """Predicts the files of a batch that could be read, as one batch of the networks.

    Args:
        files: what was read, each file in the same sides S.
        logits: int16 HU [B, S, S] of each side S -> float32 [B, M, L].
    """
    # Those that could not be read take their place in the result, not in the batch.
    results = [PredictResult(file, None) for file in files if file.reason]
    readable = [file for file in files if not file.reason]
    if readable:
        hu = {side: np.stack([file.hu[side] for file in readable]) for side in readable[0].hu}
        for file, of_file in zip(readable, logits(hu), strict=True):
            # Without its slices, which would else be copied back to the calling process.
            results.append(PredictResult(file._replace(hu={}), of_file))
    return results

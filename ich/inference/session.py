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

from ich.data.decode import Asked, Read, read_chunk

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flips": ((), (2,), (1,), (1, 2)),  # axes of [B, H, W]
}
TTA = tuple(FLIPS)
# Slices that one thread computes at a time: what lies between the layers then stays in its cache
# (MobileNetV2 at 96 px: 854 a second, 788 at 32 at a time). Several threads need more to share.
_AT_ONCE = 8


class Converted(NamedTuple):
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
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Decoding processes want the cores while a batch waits.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
def session(path: str, threads: int) -> Session:
    """The session of a file, opened once in a process, or again after `session.cache_clear()`."""
    return Session(Path(path), threads)


def averaged(network: Callable[[np.ndarray], np.ndarray], hu: np.ndarray, tta: str) -> np.ndarray:
    """Logits [B, L] of int16 HU [B, S, S]; with `flips` the mean over the four of each slice."""
    flipped = [np.flip(hu, axes) if axes else hu for axes in FLIPS[tta]]
    logits = np.stack([network(np.ascontiguousarray(h)) for h in flipped])
    return np.asarray(logits.mean(0))


class Task(NamedTuple):
    """Files to decode and to predict by M networks, each on so many threads."""

    asked: Asked
    networks: tuple[Converted, ...]
    threads: int
    tta: str


def read_and_predict(task: Task) -> list[Read]:
    """As `read_chunk`, but what comes back are logits, and no slices."""
    read = read_chunk(task.asked)
    good = [one for one in read if not one.reason]
    if not good:
        return read
    hu = {side: np.stack([one.hu[side] for one in good]) for side in task.asked.sizes}
    logits = [averaged(session(n.path, task.threads), hu[n.side], task.tta) for n in task.networks]
    done = (
        one._replace(hu={}, logits=of) for one, of in zip(good, np.stack(logits, 1), strict=True)
    )
    return [*done, *(one for one in read if one.reason)]

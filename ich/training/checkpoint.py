"""Resume checkpoints: the whole state of a training between two steps, in two generations.

A file is a checksum and then safetensors: tensors, and one JSON text of everything else. Nothing
in it is executed when it is read. The newer of two files is written beside the older one and takes
its place only when it is safe on disk, so a kill or a damaged file costs one generation at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ich.base.files import replacing

log = logging.getLogger(__name__)
_MAGIC = b"ich checkpoint 1"
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """tensors: any, on the CPU. facts: what JSON can hold; by `order` the newer one is known."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose name begins with `prefix/`, without it."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


class CheckpointError(ValueError):
    """Why one file is no checkpoint to go on from."""


class Generations:
    """The two checkpoints of a folder. The newer one is remembered and not looked up: by dates, one
    of them would never be replaced again after the clock was set back."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"checkpoint-{name}.ich" for name in "ab"]
        self._newest: Path | None = None  # that was read or written here

    def write(self, checkpoint: Checkpoint) -> None:
        """Replaces the older one, atomically.

        Raises:
            OSError: the disk is full; both generations are as they were.
        """
        # The newer one is never touched, so that there is a whole generation at every moment.
        path = next(path for path in self._paths if path != self._newest)
        # Contiguous, as safetensors asks for: weights in channels_last are not. `Trainer.restore`
        # brings their layout back.
        tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
        body = save_tensors(tensors, {"ich": json.dumps(checkpoint.facts)})
        with replacing(path) as part, part.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest())
            file.write(body)
        self._newest = path

    def read(self, check: Callable[[Checkpoint], None] = lambda _: None) -> Checkpoint | None:
        """The newest that can be used, None if there is none.

        Args:
            check: raises CheckpointError for one that is not to be gone on from.
        """
        # Both are read: which is newer stands inside, and the newer one may be the damaged one.
        readable = []
        for path in self._paths:
            try:
                checkpoint = _read(path)
                check(checkpoint)
                readable.append((checkpoint.facts["order"], path, checkpoint))
            except FileNotFoundError:
                continue
            except (CheckpointError, OSError) as error:
                log.warning("the checkpoint %s cannot be used: %s", path.name, error)
        if not readable:
            return None
        _, self._newest, checkpoint = max(readable, key=lambda found: found[:2])
        return checkpoint

    def drop(self) -> None:
        """Removes what a finished training no longer needs."""
        self._newest = None
        for path in self._paths:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)  # of a killed process


def _read(path: Path) -> Checkpoint:
    data = path.read_bytes()
    start = len(_MAGIC) + _DIGEST
    if data[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError("it is no checkpoint of ich")
    body = data[start:]
    # Before anything is parsed: what follows reads bytes as they were written, or not at all.
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise CheckpointError("it is cut or damaged (its checksum differs)")
    try:
        # `load` leaves the metadata out: here are the header's length and the header, in JSON.
        length = int.from_bytes(body[:8], "little")
        facts = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["ich"])
        if not all(isinstance(n, int) for n in facts["order"]):
            raise ValueError("no order")
        return Checkpoint(load_tensors(body), facts)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"it cannot be read ({type(error).__name__})") from None

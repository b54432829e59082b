"""Resume checkpoints: the whole state of a training between two steps, in two generations.

A file is a checksum and then safetensors: tensors, and one JSON text of everything else. Nothing
in it is executed when it is read. The newer of two files is written beside the older one and takes
its place only when it is safe on disk, so a kill or a damaged file costs one generation at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

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


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Replaces the older of the two generations in a folder, atomically.

    Raises:
        OSError: the disk is full; both generations are as they were.
    """
    # The name that is still free, or else the older file: the newer one is never touched, so that
    # there is a whole generation at every moment. Older by date, since what stands inside would
    # have to be read first; a wrong guess, as after a copy without dates, costs one generation.
    present = [path for path in _generations(folder) if path.exists()]
    older = min(present, key=lambda p: p.stat().st_mtime_ns) if len(present) == 2 else None
    path = older or next(path for path in _generations(folder) if path not in present)
    # Contiguous, as safetensors asks for: weights in channels_last are not. `Trainer.restore`
    # brings their layout back.
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
    body = save_tensors(tensors, {"ich": json.dumps(checkpoint.facts)})
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(_MAGIC + hashlib.sha256(body).digest())
        file.write(body)
        file.flush()
        os.fsync(file.fileno())  # a rename can be on disk before the data it names
    part.replace(path)
    return path


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged generation of a folder, None if there is none."""
    # Both are read: which of them is newer stands inside, and the newer one may be the damaged one.
    readable = []
    for path in _generations(folder):
        try:
            readable.append(_read(path))
        except FileNotFoundError:
            continue
        except (CheckpointError, OSError) as error:
            log.warning("the checkpoint %s cannot be used: %s", path.name, error)
    return max(readable, key=lambda c: c.facts["order"], default=None)


def drop_checkpoints(folder: Path) -> None:
    """Removes what a finished training no longer needs."""
    for path in _generations(folder):
        path.unlink(missing_ok=True)
        path.with_suffix(".part").unlink(missing_ok=True)


def _generations(folder: Path) -> Iterator[Path]:
    return (folder / f"checkpoint-{name}.ich" for name in "ab")


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
        return Checkpoint(load_tensors(body), facts)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"it cannot be read ({type(error).__name__})") from None

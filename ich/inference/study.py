"""Heads over whole studies at work: what a slice was predicted as by itself becomes what it is in
its study.

While files are read, in whatever order, the pooled features of their slices are kept. Once all are
there, each series is put in order and goes through the head as one sequence.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from ich.data.order import Sequences, sequences_of
from ich.inference.ensemble import Network
from ich.training.study.head import StudyHead


def find_sequences(places: pd.DataFrame, is_predicted: np.ndarray) -> Sequences | None:
    """The series of N files whose slices are together; None if there is none.

    Args:
        places: of each file, the keys `study` and `series`, empty if unknown, and `position` in mm,
            NaN if so.
        is_predicted: bool [N], which of them are slices.
    """
    owner = (places["study"] + "/" + places["series"]).reset_index(drop=True)
    position = places["position"].reset_index(drop=True)
    known = is_predicted & np.isfinite(position.to_numpy(float)) & (owner != "/").to_numpy()
    known &= owner.where(known).map(owner[known].value_counts()).fillna(0).to_numpy() > 1
    if not known.any():
        return None
    found: Sequences = sequences_of(owner[known], position[known], np.flatnonzero(known))
    return found


def logits_of_series(network: Network, hu: np.ndarray) -> np.ndarray:
    """int16 HU of a series in its order, [T, S, S] as `Network.logits` takes it, T at least 2 ->
    logits of the network and its head, float32 [T, L]."""
    assert network.head is not None
    outputs, labels = network.outputs(hu), len(network.metadata.labels)
    logits, features = outputs[:, :labels].copy(), outputs[:, labels:].astype(np.float16)
    count = np.arange(len(hu))
    apply_head(network.head, features, logits, Sequences(count, np.array([0, len(hu)]), count))
    return logits


@torch.inference_mode()
def apply_head(
    head: StudyHead, features: np.ndarray, logits: np.ndarray, sequences: Sequences
) -> None:
    """Replaces the logits of slices in sequences by those of a head.

    Args:
        head: in eval mode, on any device.
        features: float16 [N, F].
        logits: float32 [N, L], of the slice network.
        sequences: of some of the N.
    """
    device = head.out.weight.device
    for start, stop in zip(sequences.start[:-1], sequences.start[1:], strict=True):
        rows, place = sequences.rows[start:stop], sequences.place[start:stop]
        inputs = (features[rows].astype(np.float32), logits[rows], place)
        tensors = (torch.from_numpy(part)[None].to(device) for part in inputs)
        logits[rows] = head(*tensors)[0].cpu().numpy()

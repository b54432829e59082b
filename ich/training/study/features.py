"""What the slice network makes of every slice of a cohort, once: pooled features and logits, in the
order of its sequences, in a file of the run's folder.

A study is then one piece of the file, which is mapped: the memory it takes depends on the longest
study and not on the cohort.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ich.base.config import AugmentConfig, UserError
from ich.base.files import replacing
from ich.base.records import ComputeMode
from ich.base.results import RunPaths
from ich.data.order import Sequences
from ich.training.devices import configure_cudnn
from ich.training.loader import SliceSource
from ich.training.mode import CHANNELS_LAST
from ich.training.model import fold_batch_norms, load_trained
from ich.training.trainer import StepCallback
from ich.training.transforms import CTWindows, Resample

_AT_ONCE = {"cpu": 32, "cuda": 256}  # slices of a batch
# As for `ich predict`: a slice is resized whole.
_WHOLE = AugmentConfig(hflip=0.0, vflip=0.0, crop=0.0, crop_min=1.0)


@dataclass(frozen=True)
class SliceFeatures:
    """Of M slices in the order of the cohort's sequences, mapped from a file.

    values: [M] of `features`, float16 [F], and `logits`, float32 [L]. key: of the weights that made
    them and of the slices.
    """

    values: np.ndarray
    key: str

    @property
    def sizes(self) -> tuple[int, int]:
        """F and L."""
        (features,), (labels,) = (self.values.dtype[k].shape for k in ("features", "logits"))
        return features, labels


def read_features(
    run: RunPaths,
    slices: SliceSource,
    sequences: Sequences,
    device: torch.device,
    on_step: StepCallback,
    epoch: int,
) -> SliceFeatures:
    """The features of a cohort's slices by the run's kept weights; made if they are not there.

    They are computed as `ich predict` computes, in float32, whatever the training's mode: what the
    head is trained on is then what it will be given.

    Args:
        run: its folder, with the slice network's weights.
        slices: of the cohort.
        sequences: their order.
        device: where to compute.
        on_step: called with the phase "features", this epoch and the batches done.
        epoch: the last of the slice network.

    Raises:
        UserError: a feature is beyond float16, or not finite.
    """
    weights = run.best.read_bytes()
    key = hashlib.sha256(weights + sequences.rows.tobytes()).hexdigest()[:16]
    model, metadata = load_trained(run.best)
    kind = np.dtype(
        [
            ("features", np.float16, (model.head.in_features,)),
            ("logits", np.float32, (len(metadata.labels),)),
        ]
    )
    path = run.study / f"features-{key}.bin"
    # By its name and size: it takes this name once it is whole.
    if not (path.exists() and path.stat().st_size == len(sequences.rows) * kind.itemsize):
        fold_batch_norms(model)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        configure_cudnn(device, ComputeMode("fp32", CHANNELS_LAST))
        resample = Resample(metadata.image_size, _WHOLE)
        windows = CTWindows(metadata.windows, device, metadata.mean, metadata.std)
        size = _AT_ONCE[device.type]
        rows = [sequences.rows[i : i + size] for i in range(0, len(sequences.rows), size)]
        path.parent.mkdir(exist_ok=True)
        # Written from its beginning to its end, and not through a map: a full disk is then an error
        # and no signal.
        with replacing(path) as part, part.open("wb") as file, torch.inference_mode():
            on_step("features", epoch, 0, len(rows))
            for step, hu in enumerate(slices.batches(rows), start=1):
                features, logits = model.pooled_and_logits(windows(resample(hu)))
                file.write(_packed(features, logits, kind))
                on_step("features", epoch, step, len(rows))
    return SliceFeatures(_mapped(path, kind), key)


def _packed(features: torch.Tensor, logits: torch.Tensor, kind: np.dtype) -> bytes:
    values = np.empty(len(features), kind)
    values["features"] = features.to(torch.float16).cpu().numpy()
    values["logits"] = logits.cpu().numpy()
    if not all(np.isfinite(values[name]).all() for name in ("features", "logits")):
        raise UserError(
            "the slice network's pooled features are not finite in float16, so no head can be "
            "trained on them. Lower optimizer.lr, or take context=slice."
        )
    return values.tobytes()


def _mapped(path: Path, kind: np.dtype) -> np.ndarray:
    return np.memmap(path, kind, "r")

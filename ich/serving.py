"""What `mlflow models serve` loads: weights and metadata, by this module's `_load_pyfunc`.

A request's row is one slice: `dicom`, a file in base64, or `hu`, its Hounsfield units as rows of
pixels; all rows of a request the same (MLflow's signature takes no gaps). A row that is no CT slice
gets a reason, and the other rows their probabilities.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ich.data.decode import resize_area, square
from ich.data.dicom import HU_MAX, HU_MIN, MAX_SIDE, DicomError, read_slice
from ich.data.store import MAX_BYTES
from ich.inference.ensemble import load_ensemble
from ich.scoring.metrics import sigmoid

_AT_ONCE = 32  # slices


class Server:
    """A run's model behind MLflow's scoring protocol."""

    def __init__(self, weights: Path):
        self._model = load_ensemble([str(weights)], torch.device("cpu"))

    def predict(self, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One row per slice: a probability per label, `positive` (the labels that reach their
        thresholds, separated by `;`) and, instead of both, `reason`.

        Raises:
            ValueError: there is no column `dicom` or `hu`; MLflow answers with its text.
        """
        del params  # MLflow's; there are none
        if not {"dicom", "hu"} & set(model_input.columns):
            raise ValueError(
                "a row needs `dicom`, a DICOM file in base64, or `hu`, Hounsfield units as rows "
                'of pixels, as in {"dataframe_records": [{"dicom": "..."}]}'
            )
        model, size = self._model, self._model.sizes[0]
        count = len(model_input)
        probability = np.full((count, len(model.labels)), np.nan)
        reasons = [""] * count
        for numbers, slices in _batches(_slices(model_input), reasons, size):
            logits = model.logits({size: slices})[:, 0]
            probability[numbers] = sigmoid(logits)
        table = pd.DataFrame(probability, columns=list(model.labels)).astype(object)
        table = table.where(table.notna(), None)  # JSON has no NaN
        table["positive"] = [model.positives(p) for p in probability]
        return table.assign(reason=reasons)


def _slices(rows: pd.DataFrame) -> Iterator[np.ndarray | str]:
    """int16 HU [H, W] of each row, or why there are none."""
    for row in rows.to_dict("records"):
        dicom, hu = row.get("dicom"), row.get("hu")
        try:
            if isinstance(dicom, str) and dicom:
                yield read_slice(_bytes(dicom)).hu
            elif hu is not None and not (isinstance(hu, float) and np.isnan(hu)):
                yield _array(hu)
            else:
                yield "neither dicom nor hu is given"
        except DicomError as error:
            yield error.reason


def _bytes(text: str) -> bytes:
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise DicomError(f"the file has more than {MAX_BYTES:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DicomError("dicom is not base64") from None


def _array(given: Any) -> np.ndarray:
    try:
        hu = np.array([np.asarray(row, np.float64) for row in given])
    except (ValueError, TypeError):
        raise DicomError("hu is not rows of as many numbers each") from None
    if hu.ndim != 2 or not 1 <= min(hu.shape) <= max(hu.shape) <= MAX_SIDE:
        raise DicomError(f"hu is of shape {hu.shape}, not rows of pixels, at most {MAX_SIDE}")
    if not np.isfinite(hu).all():
        raise DicomError("hu holds values that are not finite")
    return np.asarray(np.rint(np.clip(hu, HU_MIN, HU_MAX)), np.int16)


def _batches(
    slices: Iterator[np.ndarray | str], reasons: list[str], size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Numbers of rows and their slices, int16 [B, size, size]; reasons go to `reasons`."""
    numbers: list[int] = []
    ready: list[np.ndarray] = []
    for number, result in enumerate(slices):
        if isinstance(result, str):
            reasons[number] = result
            continue
        numbers.append(number)
        ready.append(resize_area(square(result), size))
        if len(ready) == _AT_ONCE:
            yield numbers, np.stack(ready)
            numbers, ready = [], []
    if ready:
        yield numbers, np.stack(ready)


def _load_pyfunc(path: str) -> Server:
    """What MLflow calls with the model's file."""
    return Server(Path(path))

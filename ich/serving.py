"""What `mlflow models serve` loads: weights and metadata, by this module's `_load_pyfunc`.

A request's row is one slice: `dicom`, a file in base64, or `hu`, its Hounsfield units as rows of
pixels. A row that is no CT slice gets a reason, and the other rows their probabilities. No answer
holds a path or a traceback, which MLflow would put into that of whatever is raised here.
"""

from __future__ import annotations

import base64
import binascii
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ich.base.config import UserError
from ich.data.decode import resize_area, square
from ich.data.dicom import HU_MAX, HU_MIN, MAX_SIDE, DicomError, read_slice
from ich.data.store import MAX_BYTES
from ich.inference.ensemble import load_ensemble
from ich.scoring.metrics import sigmoid

_AT_ONCE = 32  # slices
_NEITHER = "neither dicom (a file in base64) nor hu (rows of Hounsfield units) is given"

log = logging.getLogger(__name__)


class Server:
    """A run's model behind MLflow's scoring protocol."""

    def __init__(self, weights: Path):
        self._model = load_ensemble([str(weights)], torch.device("cpu"))
        if self._model.slices > 1:
            raise UserError(
                "this model sees each slice with those before and after it in its series, but a "
                "row of a request is one slice, whose neighbours may be in none. Predict whole "
                "series with ich predict, or export it (ich export), which takes three slices."
            )
        if self._model.has_head:
            raise UserError(
                "this model has a head over whole studies, but a row of a request is one slice, "
                "whose study may be in none. Predict whole series with ich predict, or export it "
                "(ich export), which takes a series; or serve the network of context=slice."
            )

    def predict(self, model_input: Any, params: Any = None) -> pd.DataFrame:
        """One row per slice: a probability per label, `positive` (the labels that reach their
        thresholds, separated by `;`) and, instead of both, `reason`.

        Args:
            model_input: a DataFrame; whatever else MLflow makes of a request is answered too.
        """
        del params  # MLflow's; there are none
        rows = _records(model_input)
        model, size = self._model, self._model.sizes[0]
        probability = np.full((len(rows), len(model.labels)), np.nan)
        reasons = [""] * len(rows)
        for numbers, slices in _batches(map(_slice, rows), reasons, size):
            try:
                probability[numbers] = sigmoid(model.logits({size: slices})[:, 0])
            except Exception as error:
                log.exception("slices could not be predicted")
                for number in numbers:
                    reasons[number] = f"it could not be predicted ({type(error).__name__})"
        table = pd.DataFrame(probability, columns=list(model.labels)).astype(object)
        table = table.where(table.notna(), None)  # JSON has no NaN
        table["positive"] = [model.positives(p) for p in probability]
        return table.assign(reason=reasons)


def _records(given: Any) -> list[dict[Any, Any]]:
    """The rows of a request; one that holds nothing for a request of another form."""
    if not isinstance(given, pd.DataFrame):
        return [{}]
    if given.columns.empty:  # whatever a request calls otherwise, MLflow leaves out
        return [{}] * len(given)
    # Of a column that stands twice, the first: pandas would warn, and take the last.
    return given.loc[:, ~given.columns.duplicated()].to_dict("records")


def _slice(row: dict[Any, Any]) -> np.ndarray | str:
    """int16 HU [H, W] of a row, or why there are none."""
    dicom, hu = (None if _is_missing(row.get(key)) else row[key] for key in ("dicom", "hu"))
    try:
        if dicom is not None:
            return read_slice(_bytes(dicom)).hu
        return _NEITHER if hu is None else _array(hu)
    except DicomError as error:
        return error.reason
    except Exception as error:  # a reason for this row, and the others their probabilities
        log.exception("a row could not be read")
        return f"it cannot be read ({type(error).__name__})"


def _is_missing(value: Any) -> bool:
    """What a row holds that lacks a column which another row has; an empty text is as little."""
    is_empty = isinstance(value, str) and not value
    return value is None or is_empty or (isinstance(value, float) and np.isnan(value))


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise DicomError("dicom is not base64")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise DicomError(f"the file has more than {MAX_BYTES:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DicomError("dicom is not base64") from None


def _array(given: Any) -> np.ndarray:
    try:
        hu = np.array([np.asarray(row, np.float64) for row in given])
    except (ValueError, TypeError, OverflowError):
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
    _leave_tracebacks_out()
    return Server(Path(path))


def _leave_tracebacks_out() -> None:
    """Of MLflow's own answers, as to a CSV that it cannot read: they name files of this machine."""
    server = sys.modules.get("mlflow.pyfunc.scoring_server")  # there only in a process that serves
    if raises := getattr(server, "_handle_serving_error", None):
        quiet = functools.partial(raises, include_traceback=False)
        server._handle_serving_error = quiet  # type: ignore[union-attr]

"""What `mlflow models serve` loads: weights and metadata, by this module's `_load_pyfunc`.

A request's row is one slice: `dicom`, a file in base64, or `hu`, its Hounsfield units as rows of
pixels. Where the model sees a slice with others of its series, these are the rows of the same
request: of DICOM files by their headers, of `hu` those with the same `series`, in the rows' order.
A row that is no CT slice gets a reason, and the other rows their probabilities. No answer
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

from ich.data.decode import ReadResult, resize_area, square
from ich.data.dicom import HU_MAX, HU_MIN, MAX_SIDE, DicomError, read_slice
from ich.data.order import surround
from ich.data.store import MAX_BYTES
from ich.inference.ensemble import load_ensemble
from ich.inference.session import PredictResult
from ich.inference.study import StudyHeads
from ich.scoring.metrics import sigmoid

_AT_ONCE = 32  # slices
_NEITHER = "neither dicom (a file in base64) nor hu (rows of Hounsfield units) is given"

log = logging.getLogger(__name__)


class Server:
    """A run's model behind MLflow's scoring protocol."""

    def __init__(self, weights: Path):
        self._model = load_ensemble([str(weights)], torch.device("cpu"))

    def predict(self, model_input: Any, params: Any = None) -> pd.DataFrame:
        """One row per slice: a probability per label, `positive` (the labels that reach their
        thresholds, separated by `;`) and, instead of both, `reason`. Of a model that sees a slice
        with others, `alone` too: whether none of its series came with it.

        Args:
            model_input: a DataFrame; whatever else MLflow makes of a request is answered too.
        """
        del params  # MLflow's; there are none
        rows = _records(model_input)
        model = self._model
        logits = np.full((len(rows), 1, len(model.labels)), np.nan, np.float32)
        reasons, lone = [""] * len(rows), None
        if model.slices > 1 or model.has_head:
            lone = self._predict_series(rows, logits, reasons)
        else:
            for numbers, slices in _batches(map(_slice, rows), reasons, model.sizes[0]):
                self._outputs(numbers, slices, logits, reasons)
        probability = sigmoid(logits[:, 0])
        table = pd.DataFrame(probability, columns=list(model.labels)).astype(object)
        table = table.where(table.notna(), None)  # JSON has no NaN
        table["positive"] = [model.positives(p) for p in probability]
        table["reason"] = reasons
        return table if lone is None else table.assign(alone=lone)

    def _predict_series(
        self, rows: list[dict[Any, Any]], logits: np.ndarray, reasons: list[str]
    ) -> list[bool]:
        """Fills in logits, with the series of the request in view; tells which rows were seen by
        themselves."""
        model, size, count = self._model, self._model.sizes[0], len(rows)
        read, places = zip(*map(_placed, rows, range(count)), strict=True) if rows else ((), ())
        table = pd.DataFrame(places, columns=["study", "series", "position"])
        table = table.astype({"position": float})
        hu = np.zeros((count, size, size), np.int16)
        for numbers, slices in _batches(iter(read), reasons, size):
            hu[numbers] = slices
        usable = np.array([not reason for reason in reasons], bool)
        around, _ = surround(table, usable)
        in_study = np.zeros(count, bool)
        heads = StudyHeads([model.members[0].network.head], table, logits, in_study)
        ready = np.flatnonzero(usable)
        for start in range(0, count and len(ready), _AT_ONCE):
            numbers = ready[start : start + _AT_ONCE].tolist()
            seen = hu[around[numbers]] if model.slices > 1 else hu[numbers]
            outputs = self._outputs(numbers, seen, logits, reasons)
            if model.has_head and outputs is not None:
                files = [ReadResult(n, {}, "") for n in numbers]
                heads.add([PredictResult(f, o) for f, o in zip(files, outputs, strict=True)])
        heads.finish()
        alone = ~in_study if model.has_head else (around == around[:, :1]).all(1)
        return [bool(value) for value in alone]

    def _outputs(
        self, numbers: list[int], slices: np.ndarray, logits: np.ndarray, reasons: list[str]
    ) -> np.ndarray | None:
        """What the model gives for some rows; their logits, or why there are none, are noted."""
        try:
            outputs = self._model.outputs({self._model.sizes[0]: slices})
        except Exception as error:
            log.exception("slices could not be predicted")
            for number in numbers:
                reasons[number] = f"it could not be predicted ({type(error).__name__})"
            return None
        logits[numbers] = outputs[:, :, : len(self._model.labels)]
        return outputs


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


def _placed(row: dict[Any, Any], number: int) -> tuple[np.ndarray | str, tuple[str, str, float]]:
    """As `_slice`; and a row's study, series and position, empty and NaN if unknown."""
    hu, series, unknown = _slice(row), row.get("series"), ("", "", float("nan"))
    if isinstance(hu, str):
        return hu, unknown
    if not _is_missing(row.get("dicom")):
        found = read_slice(_bytes(row["dicom"]))
        return hu, (found.study, found.series, found.position)
    return hu, unknown if _is_missing(series) else ("", str(series), float(number))


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

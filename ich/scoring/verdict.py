"""Are two runs of one config the same, and if not, where do they part? From their folders alone."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from ich.base.config import UserError
from ich.base.results import FINISHED, RunPaths

# Of a line of the journal: which, when, and how fast. Every other value is the training's own.
_NO_METRIC = ("step", "time", "train/images_per_s")
# Settings, counts and choices: no rounding turns one into another.
_EXACT = ("train/lr", "best_epoch", "epochs", "params", "params_imagenet")
# Arrays whose values mean nothing outside their file.
_NUMBERS = ("_patient", "_study")
T = TypeVar("T")


class Outcome(Enum):
    """What two runs are to each other."""

    identical = "identical"
    within = "within tolerance"
    different = "different"


@dataclass(frozen=True)
class Difference:
    """One value that two runs do not share.

    where: epoch and metric; split, image id and label; or tensor. before, after: its value in the
    first and in the second run, None if it is undefined or missing. size: absolute difference;
    None where none is small: an image id, the best epoch, a value that only one run has.
    """

    where: str
    before: Any
    after: Any
    size: float | None


@dataclass(frozen=True)
class Part:
    """One file of both runs: how many values were compared, how many differ, and two of those.

    first: in the file's order. largest: by size, for logits that of the probability.
    """

    file: str
    compared: int
    differing: int = 0
    first: Difference | None = None
    largest: Difference | None = None

    @staticmethod
    def of(
        file: str, compared: int, found: Sequence[Difference], differing: int | None = None
    ) -> Part:
        """A part with these differences, or with these of `differing`."""
        if not found:
            return Part(file, compared)
        largest = max(found, key=lambda d: np.inf if d.size is None else d.size)
        return Part(
            file, compared, len(found) if differing is None else differing, found[0], largest
        )


@dataclass(frozen=True)
class Verdict:
    """What `compare_runs` found: per epoch, in the result, in the predictions, in the weights."""

    outcome: Outcome
    tolerance: float
    journal: Part
    result: Part
    predictions: Part
    weights: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.journal, self.result, self.predictions, self.weights


def compare_runs(a: RunPaths, b: RunPaths, tolerance: float) -> Verdict:
    """Compares what two finished runs left behind.

    `identical`: every metric of every epoch and of the result, every image id, target and logit is
    equal, and the weights are, byte for byte. `within tolerance`: no metric, loss or probability
    differs by more than `tolerance`, and the best epoch is the same. With another best epoch the
    kept weights are of another moment of the training, and the runs are `different` however close
    they are. Weights have no unit and no tolerance of their own: what their difference amounts to,
    the predictions tell. Times and speeds are not compared.

    Args:
        a: the first run. b: the second.
        tolerance: largest absolute difference of a metric, a loss or a probability.

    Raises:
        UserError: one of them did not finish, or a file is missing or damaged.
    """
    judged = _journals(a, b), _results(a, b), _predictions(a, b)
    weights = _weights(a, b)
    largest = [part.largest for part in judged if part.largest]
    if not largest and not weights.differing:
        outcome = Outcome.identical
    elif all(d.size is not None and d.size <= tolerance for d in largest) and _same_shapes(weights):
        outcome = Outcome.within
    else:
        outcome = Outcome.different
    return Verdict(outcome, tolerance, *judged, weights)


def _same_shapes(weights: Part) -> bool:
    return weights.largest is None or weights.largest.size is not None


def describe(verdict: Verdict) -> list[str]:
    """One line per file for people: what is equal, and where the rest differs."""
    return [f"{part.file}: {_in_words(part)}" for part in verdict.parts]


def _in_words(part: Part) -> str:
    weights = part.file.endswith(".safetensors")
    what = "tensors" if weights else "values"
    if part.first is None or part.largest is None:
        return f"{part.compared:,} {what}, all equal{', byte for byte' if weights else ''}"
    text = f"{part.differing:,} of {part.compared:,} {what} differ. First: {_place(part.first)}"
    if weights or part.largest == part.first:  # tensors have no unit in common
        return text
    return f"{text}. Largest: {_place(part.largest)}"


def _place(d: Difference) -> str:
    size = "" if d.size is None else f" (by {d.size:.2g})"
    return f"{d.where}, {_value(d.before)} before and {_value(d.after)} now{size}"


def _value(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


# Metrics


def _journals(a: RunPaths, b: RunPaths) -> Part:
    one, two = (_read(r.metrics, _epochs) for r in (a, b))

    def values() -> Iterator[tuple[str, str, Any, Any]]:
        for epoch in sorted(one | two):
            x, y = one.get(epoch, {}), two.get(epoch, {})
            for key in dict.fromkeys([*x, *y]):
                if key not in _NO_METRIC:
                    yield f"epoch {epoch}, {key}", key, x.get(key), y.get(key)

    return _part_of_values(a.metrics.name, values())


def _epochs(path: Path) -> dict[int, dict[str, Any]]:
    path.stat()  # the reader takes a journal that is missing for an empty one
    return {line["step"]: line for line in RunPaths(path.parent).read_metrics()}


def _results(a: RunPaths, b: RunPaths) -> Part:
    one, two = _scores(a), _scores(b)
    keys = dict.fromkeys([*one, *two])
    return _part_of_values(a.result.name, ((k, k, one.get(k), two.get(k)) for k in keys))


def _scores(run: RunPaths) -> dict[str, Any]:
    """The metrics of a result, and what they are of; not what it took to get them."""
    result = run.read_result()
    if result["status"] != FINISHED:
        raise UserError(
            f"{run.root} did not finish ({result['status']}: {result['reason']}), and only "
            f"finished runs can be compared."
        )
    validation = [k for k in result if k.startswith("val_")]
    keys = [k.removeprefix("val_") for k in validation] + validation
    keys += ["auc_top", "best_epoch", "labels", "epochs", "params", "params_imagenet"]
    baseline = result.get("always_negative", {})
    return {k: result.get(k) for k in keys} | {
        f"always_negative {k}": v for k, v in baseline.items()
    }


def _part_of_values(file: str, values: Iterable[tuple[str, str, Any, Any]]) -> Part:
    """A part of single values: where each stands, its key, and what it is in either run."""
    compared, found = 0, []
    for where, key, x, y in values:
        compared += 1
        if x != y:
            numbers = isinstance(x, int | float) and isinstance(y, int | float)
            found.append(
                Difference(where, x, y, abs(x - y) if numbers and key not in _EXACT else None)
            )
    return Part.of(file, compared, found)


# Predictions


def _predictions(a: RunPaths, b: RunPaths) -> Part:
    one, two = (_read(r.predictions, _arrays) for r in (a, b))
    compared, differing, found = 0, 0, []
    for name in dict.fromkeys([*one, *two]):
        x, y = one.get(name), two.get(name)
        if x is None or y is None or x.shape != y.shape:
            count, places = 1, [Difference(f"shape of {name}", _kind(x), _kind(y), None)]
        elif name.endswith("_logits"):
            split = name.removesuffix("_logits")
            count, places = _logits(split, one[f"{split}_image_id"], one["labels"], x, y)
        else:
            count, places = _facts(name, x, y)
        compared, differing = compared + (1 if x is None else x.size), differing + count
        found += places
    return Part.of(a.predictions.name, compared, found, differing)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of `predictions.npz` but the numbers of patients and studies."""
    with path.open("rb") as handle, np.load(handle) as file:  # numpy leaves a bad file open
        return {name: file[name] for name in file.files if not name.endswith(_NUMBERS)}


def _facts(name: str, x: np.ndarray, y: np.ndarray) -> tuple[int, list[Difference]]:
    """How many image ids, targets or labels differ, and the first."""
    places = np.argwhere(x != y)
    if not len(places):
        return 0, []
    at = tuple(int(i) for i in places[0])
    where = f"{name}, row {at[0]}" + "".join(f", label {i}" for i in at[1:])
    return len(places), [Difference(where, x[at].item(), y[at].item(), None)]


def _logits(
    split: str, image_id: np.ndarray, labels: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[int, list[Difference]]:
    """How many logits [N, L] differ; the first, and the largest as a probability."""
    places = np.argwhere(x != y)
    if not len(places):
        return 0, []
    p, q = _sigmoid(x), _sigmoid(y)
    largest = np.unravel_index(np.abs(p - q).argmax(), p.shape)

    def difference(row: int, label: int) -> Difference:
        where = f"{split}, image {image_id[row]}, probability of {labels[label]}"
        before, after = float(p[row, label]), float(q[row, label])
        return Difference(where, before, after, abs(before - after))

    return len(places), [difference(*map(int, at)) for at in (places[0], largest)]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


# Weights


def _weights(a: RunPaths, b: RunPaths) -> Part:
    names, others = (_read(r.best, _tensor_names) for r in (a, b))
    count = len(names | others)
    if a.best.read_bytes() == b.best.read_bytes():
        return Part(a.best.name, count)
    found = []
    with safe_open(a.best, "np") as x, safe_open(b.best, "np") as y:
        for name in names | others:
            one = x.get_tensor(name) if name in names else None
            two = y.get_tensor(name) if name in others else None
            found += _tensor(name, one, two)
    # Every tensor is equal, but the bytes are not: what stands beside the tensors.
    return Part.of(a.best.name, count, found or [Difference("the header", None, None, 0.0)])


def _tensor_names(path: Path) -> dict[str, None]:
    with safe_open(path, "np") as file:
        return dict.fromkeys(file.keys())


def _tensor(name: str, x: np.ndarray | None, y: np.ndarray | None) -> list[Difference]:
    """Where a tensor differs most, if it does."""
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return [Difference(f"tensor {name}", _kind(x), _kind(y), None)]
    if x.tobytes() == y.tobytes():
        return []
    x, y = x.ravel().astype(np.float64), y.ravel().astype(np.float64)
    at = int(np.abs(x - y).argmax())
    return [Difference(f"tensor {name}", float(x[at]), float(y[at]), abs(float(x[at] - y[at])))]


def _kind(array: np.ndarray | None) -> str | None:
    return None if array is None else f"{array.dtype} {array.shape}"


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """What a file holds.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and without it nothing can be compared.") from None
    except (
        OSError,
        ValueError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
        SafetensorError,
    ) as error:
        raise UserError(f"{path} is damaged ({error}), and cannot be compared.") from None

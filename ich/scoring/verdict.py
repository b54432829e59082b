"""Are two runs of one config the same, and if not, where do they part? From their folders alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from ich.base.config import UserError
from ich.base.records import HeadResult, Scores
from ich.base.results import RunPaths
from ich.scoring.predictions import read_arrays

# Of a line of the journal: which, when, and how fast. Every other value is the training's own.
_NOT_COMPARED = ("step", "time", "train/images_per_s")
# Settings, counts and choices: no rounding turns one into another.
_EXACT = (
    *("train/lr", "best_epoch", "epochs", "params", "params_imagenet"),
    *("head/lr", "head_epoch", "head_epochs"),
)
# Arrays of numbers given to patients and studies, which mean nothing outside their file.
_LOCAL_NUMBERS = ("_patient", "_study")
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
class FileComparison:
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
        file: str, compared: int, differences: Sequence[Difference], differing: int | None = None
    ) -> FileComparison:
        """Of a file with these differences, or with these of `differing`."""
        if not differences:
            return FileComparison(file, compared)
        # What has no size is more than any number.
        largest = max(differences, key=lambda d: np.inf if d.size is None else d.size)
        differing = len(differences) if differing is None else differing
        return FileComparison(file, compared, differing, differences[0], largest)


@dataclass(frozen=True)
class RerunComparison:
    """How a rerun compares: per epoch, in its result, in its predictions, in its weights."""

    outcome: Outcome
    tolerance: float
    journal: FileComparison
    result: FileComparison
    predictions: FileComparison
    weights: FileComparison

    @property
    def parts(self) -> tuple[FileComparison, ...]:
        return self.journal, self.result, self.predictions, self.weights


def compare_runs(a: RunPaths, b: RunPaths, tolerance: float) -> RerunComparison:
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
    with_units = _journals(a, b), _results(a, b), _predictions(a, b)
    weights = _weights(a, b)
    largest = [part.largest for part in with_units if part.largest]
    if not largest and not weights.differing:
        outcome = Outcome.identical
    # A difference that has no size is never within a tolerance.
    elif all(d.size is not None and d.size <= tolerance for d in largest) and _same_shapes(weights):
        outcome = Outcome.within
    else:
        outcome = Outcome.different
    return RerunComparison(outcome, tolerance, *with_units, weights)


def _same_shapes(weights: FileComparison) -> bool:
    return weights.largest is None or weights.largest.size is not None


def describe(comparison: RerunComparison) -> list[str]:
    """One line per file for people: what is equal, and where the rest differs."""
    return [f"{part.file}: {_describe_part(part)}" for part in comparison.parts]


def _describe_part(part: FileComparison) -> str:
    weights = part.file.endswith(".safetensors")
    unit = "tensors" if weights else "values"
    if part.first is None or part.largest is None:
        return f"{part.compared:,} {unit}, all equal{', byte for byte' if weights else ''}"
    first = _describe_difference(part.first)
    text = f"{part.differing:,} of {part.compared:,} {unit} differ. First: {first}"
    if weights or part.largest == part.first:  # tensors have no unit in common
        return text
    return f"{text}. Largest: {_describe_difference(part.largest)}"


def _describe_difference(d: Difference) -> str:
    size = "" if d.size is None else f" (by {d.size:.2g})"
    return f"{d.where}, {_format(d.before)} before and {_format(d.after)} now{size}"


def _format(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


# Metrics


def _journals(a: RunPaths, b: RunPaths) -> FileComparison:
    one, two = (_read(r.metrics, _epochs) for r in (a, b))

    def values() -> Iterator[tuple[str, str, Any, Any]]:
        for epoch in sorted(one | two):
            x, y = one.get(epoch, {}), two.get(epoch, {})
            for key in dict.fromkeys([*x, *y]):
                if key not in _NOT_COMPARED:
                    yield f"epoch {epoch}, {key}", key, x.get(key), y.get(key)

    return _compare_values(a.metrics.name, values())


def _epochs(path: Path) -> dict[int, Scores]:
    lines, damaged = RunPaths(path.parent).read_journal()
    if damaged or not lines:  # a comparison without an epoch would call it equal
        raise ValueError(damaged[0] if damaged else "it holds no epoch")
    return {line.step: line.metrics for line in lines}


def _results(a: RunPaths, b: RunPaths) -> FileComparison:
    one, two = _scores(a), _scores(b)
    keys = dict.fromkeys([*one, *two])
    return _compare_values(a.result.name, ((k, k, one.get(k), two.get(k)) for k in keys))


def _scores(run: RunPaths) -> dict[str, object]:
    """The metrics of a result, and what they are of; not what it took to get them."""
    result = run.read_result()
    if result.fit is None:
        raise UserError(
            f"{run.root} did not finish ({result.status}: {result.reason}), and only finished runs "
            f"can be compared."
        )
    fit = result.fit
    return {
        **fit.scores,
        **{f"val_{k}": v for k, v in fit.val_scores.items()},
        "auc_top": fit.auc_top,
        "best_epoch": fit.best_epoch,
        "labels": list(fit.labels),
        "epochs": fit.epochs,
        "params": fit.params,
        "params_imagenet": fit.params_imagenet,
        # The baseline's numbers differ only where the rows do.
        **{f"always_negative {k}": v for k, v in fit.always_negative.items()},
        **(_head_scores(fit.head) if fit.head else {}),
    }


def _head_scores(head: HeadResult) -> dict[str, object]:
    return {
        **{f"slice {k}": v for k, v in head.slice_scores.items()},
        **{f"smoothed {k}": v for k, v in head.smoothed_scores.items()},
        "head_inputs": head.inputs,
        "head_epoch": head.epoch,
        "head_epochs": head.epochs,
    }


def _compare_values(file: str, values: Iterable[tuple[str, str, Any, Any]]) -> FileComparison:
    """Of a file of single values: where each stands, its key, and what it is in either run."""
    compared, differences = 0, []
    for where, key, x, y in values:
        compared += 1
        # As they are: JSON keeps every digit of a number, and identical means all of them.
        if x != y:
            numbers = isinstance(x, int | float) and isinstance(y, int | float)
            size = abs(x - y) if numbers and key not in _EXACT else None
            differences.append(Difference(where, x, y, size))
    return FileComparison.of(file, compared, differences)


# Predictions


def _predictions(a: RunPaths, b: RunPaths) -> FileComparison:
    one, two = (_read(r.predictions, _arrays) for r in (a, b))
    compared, differing, differences = 0, 0, []
    for name in dict.fromkeys([*one, *two]):
        x, y = one.get(name), two.get(name)
        if x is None or y is None or x.shape != y.shape:
            count, shown = 1, [Difference(f"shape of {name}", _kind(x), _kind(y), None)]
        elif name.endswith("_logits") and (rows := _rows_of(one, name)):
            count, shown = _compare_logits(*rows, x, y)
        else:
            count, shown = _compare_exactly(name, x, y)
        compared, differing = compared + (1 if x is None else x.size), differing + count
        differences += shown
    return FileComparison.of(a.predictions.name, compared, differences, differing)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of `predictions.npz` but the numbers of patients and studies."""
    return {k: v for k, v in read_arrays(path).items() if not k.endswith(_LOCAL_NUMBERS)}


def _rows_of(arrays: dict[str, np.ndarray], name: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Split, image ids [N] and labels [L] of logits; None if the file names them otherwise."""
    split, shape = name.partition("_")[0], arrays[name].shape
    ids, labels = arrays.get(f"{split}_image_id"), arrays.get("labels")
    if ids is None or labels is None or (len(ids), len(labels)) != shape:
        return None
    return split, ids, labels


def _compare_exactly(name: str, x: np.ndarray, y: np.ndarray) -> tuple[int, list[Difference]]:
    """How many image ids, targets or labels differ, and the first."""
    unequal = np.argwhere(x != y)
    if not len(unequal):
        return 0, []
    first = tuple(int(i) for i in unequal[0])
    where = f"{name}, row {first[0]}" + "".join(f", label {i}" for i in first[1:])
    return len(unequal), [Difference(where, x[first].item(), y[first].item(), None)]


def _compare_logits(
    split: str, image_id: np.ndarray, labels: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[int, list[Difference]]:
    """How many logits [N, L] differ; the first, and the largest as a probability."""
    unequal = np.argwhere(x != y)
    if not len(unequal):
        return 0, []
    # As probabilities, since a tolerance has a unit: logits of 30 and of 40 are the same answer.
    p, q = _sigmoid(x), _sigmoid(y)
    largest = np.unravel_index(np.abs(p - q).argmax(), p.shape)

    def difference(row: int, label: int) -> Difference:
        where = f"{split}, image {image_id[row]}, probability of {labels[label]}"
        before, after = float(p[row, label]), float(q[row, label])
        return Difference(where, before, after, abs(before - after))

    return len(unequal), [difference(*map(int, index)) for index in (unequal[0], largest)]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


# Weights


def _weights(a: RunPaths, b: RunPaths) -> FileComparison:
    names, others = (_read(r.best, _tensor_names) for r in (a, b))
    count = len(names | others)
    # What a repeated training should come to: then no tensor has to be compared.
    if a.best.read_bytes() == b.best.read_bytes():
        return FileComparison(a.best.name, count)
    differences = []
    # As numpy, so that a comparison need not wait for torch.
    with safe_open(a.best, "np") as x, safe_open(b.best, "np") as y:
        for name in names | others:
            one = x.get_tensor(name) if name in names else None
            two = y.get_tensor(name) if name in others else None
            differences += _compare_tensors(name, one, two)
    # Every tensor is equal, but the bytes are not: what stands beside the tensors.
    # Of size 0: within any tolerance, and yet not identical.
    header = [Difference("the header", None, None, 0.0)]
    return FileComparison.of(a.best.name, count, differences or header)


def _tensor_names(path: Path) -> dict[str, None]:
    with safe_open(path, "np") as file:
        return dict.fromkeys(file.keys())


def _compare_tensors(name: str, x: np.ndarray | None, y: np.ndarray | None) -> list[Difference]:
    """Where a tensor differs most, if it does."""
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return [Difference(f"tensor {name}", _kind(x), _kind(y), None)]
    # Bytes, not values: 0.0 is not -0.0 here, and NaN is equal to itself.
    if x.tobytes() == y.tobytes():
        return []
    x, y = x.ravel().astype(np.float64), y.ravel().astype(np.float64)
    i = int(np.abs(x - y).argmax())
    return [Difference(f"tensor {name}", float(x[i]), float(y[i]), abs(float(x[i] - y[i])))]


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
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}), and cannot be compared.") from None

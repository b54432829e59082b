"""What the JSON files of a run and of its sweep say: a type for each, its one reader and writer.

`from_json` takes what every version of ich has written: a key that came later has a default, and
one that is not known, since it is of another version, is left out. No value is taken that is not of
its field's type: where it only helps it counts as missing, elsewhere it is a ValueError. `to_json`
is what goes into the file. Undefined numbers (an AUC without both classes) are NaN in memory and
null in a file, and come back from there as None.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

FINISHED, FAILED, KILLED, NOT_STARTED = "finished", "failed", "killed", "not started"

Json = dict[str, Any]  # an object of a JSON file, as parsed
Scores = Mapping[str, float | None]  # metric -> value, None where it is undefined


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _taken(kind: type, values: Json, strict: bool = False) -> Json:
    """The entries that are fields of a dataclass, each of its field's type.

    Raises:
        ValueError: `strict`, and one is of another type.
    """
    taken = {}
    # A key of a later version must not keep this one from reading the rest.
    for name, hint in _hints(kind).items():
        if name in values:
            try:
                taken[name] = typed_value(values[name], hint)
            except ValueError:
                if strict:
                    raise ValueError(f"{name} is {values[name]!r}") from None
    return taken


def typed_value(value: Any, hint: Any) -> Any:
    """A value as JSON has it, as a type of plain values has it: lists become tuples.

    Raises:
        ValueError: it is of another type.
    """
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        for one in args:
            try:
                return typed_value(value, one)
            except ValueError:
                continue
    elif kind is tuple and isinstance(value, list):
        return tuple(typed_value(v, args[0]) for v in value)
    elif kind in (dict, Mapping) and isinstance(value, dict):
        return {k: typed_value(v, args[1]) for k, v in value.items()}
    elif type(value) is int:
        if hint in (int, float, Any) and _is_number(value):
            return value
    elif hint is Any or type(value) is hint:
        return value
    raise ValueError(f"{value!r} is of another type")


def _is_number(value: object) -> bool:
    # An int of 400 digits is no number that could be computed with. Of True the type is bool.
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _object(values: Json, key: str) -> Json:
    """An object within another, empty where none stands there."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _objects(values: Json, key: str) -> dict[str, Json]:
    """The objects within an object within another."""
    return {k: v for k, v in _object(values, key).items() if isinstance(v, dict)}


def _plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are names of jobs and cohorts, which lead out of no folder."""
    return tuple(n for n in names if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+ -]{,250}", n))


@dataclass(frozen=True)
class ComputeMode:
    """What a training computes in. precision: bf16, fp32 or tf32. layout: channels_last or
    contiguous. processor: where that was found to be the fastest; empty if it was not timed. graph:
    whether a step is one CUDA graph; reason: why not, where it might have been. compiled: whether
    torch compiles the network; compiling: what that takes and saves, where it was timed. memory:
    bytes of a GPU that steps took at most, 0 if unknown. timed: images per second of all that was
    tried."""

    precision: str
    layout: str
    processor: str = ""
    graph: bool = False
    reason: str = field(default="", compare=False)
    compiled: bool = False
    compiling: str = field(default="", compare=False)
    memory: int = field(default=0, compare=False)
    timed: dict[str, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        how = f"{', graphed' if self.graph else ''}{', compiled' if self.compiled else ''}"
        return f"{self.precision}, {self.layout}{how}"

    @classmethod
    def from_json(cls, values: object) -> ComputeMode | None:
        """None where nothing has been settled."""
        taken = _taken(cls, values) if isinstance(values, dict) else {}
        return cls(**taken) if {"precision", "layout"} <= taken.keys() else None


@dataclass(frozen=True)
class Origin:
    """What a run is made from beside its config: fingerprints of data, weights and code, and what
    it computes in, once that is settled. A text is empty if nothing tells."""

    cohort: str = ""
    weights: str = ""
    code: str = ""
    mode: ComputeMode | None = None

    @classmethod
    def from_json(cls, values: Json) -> Origin:
        mode = ComputeMode.from_json(values.get("mode"))
        return cls(**_taken(cls, values) | {"mode": mode})

    def to_json(self) -> Json:
        # What is not known is left out, as before its mode is settled, and not written as empty.
        return {k: v for k, v in asdict(self).items() if v}


@dataclass(frozen=True)
class TrackingState:
    """A run's copy in MLflow. mlflow_run: its id. complete: whether everything is there.
    supersedes: the MLflow run of the earlier run whose place this one took."""

    mlflow_run: str | None = None
    complete: bool | None = None
    supersedes: str | None = None

    @classmethod
    def from_json(cls, values: Json) -> TrackingState:
        return cls(**_taken(cls, values))

    def to_json(self) -> Json:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class GitState:
    """The checkout that the code lay in. commit: its hash, or "unknown". changed: whether the code
    was changed since."""

    commit: str = "unknown"
    changed: bool = False


@dataclass(frozen=True)
class Hardware:
    """A machine. memory_gib: GiB. gpus: name and memory of each, as nvidia-smi tells them."""

    processor: str = "unknown"
    cores: int | None = None
    memory_gib: float | None = None
    system: str = ""
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """What a run, or a sweep, was made with; everything is empty if nothing tells.

    code: the fingerprint of the package. git: None outside a checkout. versions: of Python and of
    the packages that can change a number.
    """

    code: str = ""
    git: GitState | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Hardware | None = None

    @property
    def commit(self) -> str | None:
        return self.git.commit if self.git else None

    @classmethod
    def from_json(cls, values: Json) -> Provenance:
        git, machine = (_object(values, key) for key in ("git", "hardware"))
        return cls(
            **_taken(cls, values)
            | {
                "git": GitState(**_taken(GitState, git)) if git else None,
                "hardware": Hardware(**_taken(Hardware, machine)) if machine else None,
            }
        )

    def to_json(self) -> Json:
        # An empty object, not null, says in all versions that something is not known.
        return {k: v if v is not None else {} for k, v in asdict(self).items()}


@dataclass(frozen=True)
class SweepRecord:
    """A sweep's latest launch.

    jobs: their names, in the order of the table. cohorts: fingerprints of their data. mlflow_run:
    the parent run. started: local time, to the minute. command: what launched it. modes: per
    workload (`ich.training.mode.workload_key`). origins, configs: per job. provenance: of the
    launch. sharing: how many jobs share a GPU and why, where that was left to ich.
    """

    name: str = ""
    jobs: tuple[str, ...] = ()
    cohorts: tuple[str, ...] = ()
    mlflow_run: str | None = None
    started: str = ""
    command: str = ""
    modes: dict[str, ComputeMode] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    configs: dict[str, Json] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    sharing: str = ""

    @classmethod
    def from_json(cls, values: Json) -> SweepRecord:
        taken = _taken(cls, values)
        modes = {k: ComputeMode.from_json(v) for k, v in _object(values, "modes").items()}
        origins, configs = _objects(values, "origins"), _objects(values, "configs")
        return cls(
            **taken
            | {
                # They name folders, from which files are read and copied.
                "jobs": _plain_names(taken.get("jobs", ())),
                "cohorts": _plain_names(taken.get("cohorts", ())),
                # One that cannot be read is as one that has not been timed.
                "modes": {k: mode for k, mode in modes.items() if mode},
                "origins": {k: Origin.from_json(v) for k, v in origins.items()},
                "configs": configs,
                "provenance": Provenance.from_json(_object(values, "provenance")),
            }
        )

    def to_json(self) -> Json:
        # `asdict` reaches into these too, and would write what they leave out.
        return asdict(self) | {
            "origins": {k: origin.to_json() for k, origin in self.origins.items()},
            "provenance": self.provenance.to_json(),
        }


@dataclass(frozen=True)
class CohortSummary:
    """What a training's data were.

    steps: rows after each step of the protocol, then of each split, by their names; "images" are
    the distinct images at its start, "repeated_ids" those that the labels name twice. rates: per
    split, the share of rows with each label. scored: the split that tables come from. leak: the
    share of scored rows whose image, study and patient stand in the training set too, None if that
    cannot be known. quarantined: images that could not be decoded. cohort: fingerprint. cache: the
    folder of its slices. protocol: its name.
    """

    steps: dict[str, int]
    rates: dict[str, dict[str, float]]
    scored: str
    leak: Scores
    quarantined: int = 0
    cohort: str = ""
    cache: str = ""
    protocol: str = ""

    @classmethod
    def from_json(cls, values: Json) -> CohortSummary:
        """
        Raises:
            ValueError: it lacks what every version has written, or that is of another type.
        """
        # The first version had no test set, and audited images alone.
        earlier: Json = {"scored": "val", "leak": {"image": values.get("leak_images")}}
        own = earlier | {k: v for k, v in values.items() if k in _hints(cls)}  # type: ignore[arg-type]
        # Steps lie flat beside the fields, as the first version wrote them.
        own["steps"] = {k: n for k, n in values.items() if k not in own and type(n) is int}
        taken = _taken(cls, own, strict=True)
        if "rates" not in taken or "images" not in taken["steps"]:
            raise ValueError("its cohort lacks its counts")
        return cls(**taken)

    def to_json(self) -> Json:
        values = asdict(self)
        steps: Json = values.pop("steps")
        return steps | values


@dataclass(frozen=True)
class HeadResult:
    """What the head of `context=study` came to, beside the scores of its run, which are its own.

    slice_scores: of the slice network alone, on the rows that tables come from; smoothed_scores: of
    its logits averaged over each slice and its two neighbours. inputs: "logits", or "features" for
    a head over these too, whichever was better on validation. epoch: the best, 0 for the untrained
    head, which is the average; of so many. params: its own. studies: it was trained on.
    slice_minutes, feature_minutes, minutes: of each stage.
    """

    slice_scores: Scores
    smoothed_scores: Scores
    inputs: str
    epoch: int
    epochs: int
    params: int
    studies: int
    slice_minutes: float
    feature_minutes: float
    minutes: float

    @classmethod
    def from_json(cls, values: object) -> HeadResult | None:
        """None where there was none, or where what stands there is not one."""
        taken = _taken(cls, values) if isinstance(values, dict) else {}
        return cls(**taken) if len(taken) == len(fields(cls)) else None


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a finished training came to.

    scores: metrics of the best epoch's weights on the rows that tables come from. val_scores: the
    same on validation. best_epoch: from 1. auc_top: the highest validation AUC over the epochs.
    params, params_imagenet: trained parameters, and those of the ImageNet network with its head.
    images_per_s: rows trained on per second. resumed: how often the training went on from a
    checkpoint. threads: of torch. precision, layout, graph: as in `ComputeMode`. always_negative:
    what answering "no bleed" to every scored row would score. head: of `context=study`, whose
    scores these are.
    """

    # In the order of the file. By keyword only, so that those with a default, which earlier
    # versions did not write, need not stand last.
    scores: Scores
    val_scores: Scores
    best_epoch: int
    auc_top: float | None
    labels: tuple[str, ...] = ()
    params: int
    params_imagenet: int
    epochs: int
    minutes: float
    images_per_s: float
    resumed: int = 0
    device: str
    threads: int | None = None
    precision: str | None = None
    layout: str | None = None
    graph: bool | None = None
    cohort: CohortSummary
    always_negative: Scores
    head: HeadResult | None = None

    @classmethod
    def from_json(cls, values: Json) -> FitResult:
        """Whatever number is not a field is a score: their names depend on the labels.

        Raises:
            ValueError: it lacks what every version has written, or that is of another type.
        """
        validation, cohort = "val_", CohortSummary.from_json(_object(values, "cohort"))
        # The rest are also texts, as the job's name, or the MLflow run in the first version.
        numbers = {k: v for k, v in values.items() if v is None or type(v) in (int, float)}
        scores = {k: v for k, v in numbers.items() if k not in _hints(cls)}  # type: ignore[arg-type]
        own = {k: v for k, v in values.items() if k not in ("cohort", "head")} | {
            "scores": {k: v for k, v in scores.items() if not k.startswith(validation)},
            "val_scores": {
                k.removeprefix(validation): v for k, v in scores.items() if k.startswith(validation)
            },
        }
        head = HeadResult.from_json(values.get("head"))
        taken = _taken(cls, own, strict=True) | {"cohort": cohort, "head": head}
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        if missing := needed - taken.keys() or {"accuracy", "auc"} - taken["scores"].keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return cls(**taken)

    def to_json(self) -> Json:
        left_out = ("scores", "val_scores") if self.head else ("scores", "val_scores", "head")
        own = {k: v for k, v in asdict(self).items() if k not in left_out}
        # Flat, as other people's scripts read the file; the prefix keeps the two kinds apart.
        validation = {f"val_{k}": v for k, v in self.val_scores.items()}
        return {**self.scores, **validation, **own, "cohort": self.cohort.to_json()}


@dataclass(frozen=True)
class RunResult:
    """A run's outcome. status: FINISHED, FAILED, KILLED or NOT_STARTED. reason: why it did not
    finish. fit: of a finished run."""

    status: str
    reason: str = ""
    job: str = ""
    model: str = ""
    fit: FitResult | None = None

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED

    @classmethod
    def from_json(cls, values: Json) -> RunResult:
        """
        Raises:
            ValueError: it lacks what every version has written, or that is of another type.
        """
        status = values.get("status")
        if status not in (FINISHED, FAILED, KILLED, NOT_STARTED):
            raise ValueError(f"status is {status!r}")
        # Numbers beside another status are of no finished training, whatever they look like.
        fit = FitResult.from_json(values) if status == FINISHED else None
        texts = {k: v for k, v in values.items() if k != "fit"}
        return cls(**_taken(cls, texts) | {"fit": fit})

    def to_json(self) -> Json:
        own = {"job": self.job, "model": self.model, "status": self.status, "reason": self.reason}
        return own | (self.fit.to_json() if self.fit else {})


@dataclass(frozen=True)
class EpochMetrics:
    """A line of a run's journal. step: the epoch, from 1. time: seconds since 1970."""

    step: int
    time: float
    metrics: Scores

    @classmethod
    def from_json(cls, values: Json) -> EpochMetrics:
        """
        Raises:
            ValueError: it has no epoch and time, or a metric is no number.
        """
        metrics = dict(values)
        step, seconds = metrics.pop("step", None), metrics.pop("time", None)
        # Not by `typed_value`: the terminal reads a journal several times a second.
        numbers = all(v is None or _is_number(v) for v in metrics.values())
        if not (numbers and _is_number(seconds) and type(step) is int and step >= 1):
            raise ValueError("it is no epoch with its metrics")
        return cls(step, seconds, metrics)

    def to_json(self) -> Json:
        return {"step": self.step, "time": self.time, **self.metrics}


@dataclass(frozen=True)
class JobProgress:
    """Where a training is. phase: "training", "validating" or "testing". epoch: from 1. step: done,
    of so many."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int

    @classmethod
    def from_json(cls, values: Json) -> JobProgress:
        """
        Raises:
            ValueError: it does not say where a training is.
        """
        taken = _taken(cls, values, strict=True)
        if len(taken) < len(fields(cls)) or min(taken["epochs"], taken["steps"]) < 1:
            raise ValueError("it says nothing")
        return cls(**taken)

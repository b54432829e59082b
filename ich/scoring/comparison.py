"""Runs side by side: metrics, intervals, and what can be told apart. From the runs' files alone.

Runs that differ in their seed alone are one group; its score is the mean over its seeds. Groups
that were scored on the same rows are compared pairwise, by the same resamples of patients; others
are not compared at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ich.base.config import UserError
from ich.base.results import FINISHED, RunPaths, SweepPaths
from ich.base.workers import available_cores
from ich.scoring.metrics import all_metrics, best_thresholds, per_study
from ich.scoring.uncertainty import (
    FEWEST_GROUPS,
    RESAMPLES,
    Interval,
    Scored,
    bootstrap,
    draw_counts,
    group_rows,
)

BY = "auc"  # what runs are ranked by: micro-averaged over the labels
COMPARED = ("auc", "accuracy")  # the report's two metrics, whose differences have intervals
BASELINE = "always negative"
# What that has no honest value for: it states no probability.
_NO_BASELINE = ("log_loss", "brier", "ece", "f1", "threshold")
# In a job's name, with the hash that keeps it apart where a character had to be replaced.
_SEED = re.compile(r",seed=\d+(?:-[0-9a-f]{6}$)?")
_NO_SETTING = ("seed", "job", "name", "tracking", "sweep", "hydra")  # of a config


@dataclass(frozen=True)
class Predictions:
    """What a run predicted on the rows it was scored on, and on validation.

    scored: with patients, or images, as groups. drawn: "patients" or "images".
    image_id: str [N]. study: int64 [N], -1 if unknown.
    chosen: logits and targets of validation, by which thresholds are chosen; those scored where
    there is no test set.
    """

    scored: Scored
    drawn: str
    image_id: np.ndarray
    study: np.ndarray
    chosen: tuple[np.ndarray, np.ndarray]

    def of_labels(self, labels: Sequence[str]) -> Predictions:
        """The same of some labels, in their order."""
        at, scored = [self.scored.labels.index(k) for k in labels], self.scored
        kept = replace(
            scored, labels=tuple(labels), target=scored.target[:, at], logits=scored.logits[:, at]
        )
        return replace(self, scored=kept, chosen=(self.chosen[0][:, at], self.chosen[1][:, at]))

    @staticmethod
    def averaged(each: Sequence[Predictions]) -> Predictions:
        """The mean logits of several, which must be of the same rows."""
        first = each[0]
        scored = replace(first.scored, logits=np.mean([p.scored.logits for p in each], axis=0))
        chosen = np.mean([p.chosen[0] for p in each], axis=0), first.chosen[1]
        return replace(first, scored=scored, chosen=chosen)

    @cached_property
    def rows(self) -> str:
        """A fingerprint of what was scored: runs that share it can be compared pairwise."""
        digest = hashlib.sha256(repr(self.scored.labels).encode())
        for array in (self.scored.target, self.scored.group, self.image_id.astype("U")):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of `ich.scoring.metrics.all_metrics`, per slice."""
        return all_metrics(self.scored.logits, self.scored.target, self.scored.labels)

    @cached_property
    def study_metrics(self) -> dict[str, float]:
        """The same per study; empty where studies are unknown."""
        if not (self.study >= 0).any():
            return {}
        logits, target, _ = per_study(self.scored.logits, self.scored.target, self.study)
        return all_metrics(logits, target, self.scored.labels)

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Per label the probability with the best F1 on validation; none without both classes."""
        found = best_thresholds(*self.chosen, self.scored.labels)
        return {k: t for k, t in found.items() if t is not None}


@dataclass(frozen=True)
class Run:
    """A job of a sweep. name: unique among those compared. predictions: None if it did not finish
    or left none that can be read."""

    name: str
    paths: RunPaths
    result: dict[str, Any]
    config: DictConfig | None
    predictions: Predictions | None

    @property
    def is_finished(self) -> bool:
        return bool(self.result["status"] == FINISHED)

    @property
    def model(self) -> str:
        return str(self.result.get("model") or self.name.split(",")[0])

    @property
    def setting(self) -> str:
        """What the run is, but for its seed."""
        return _SEED.sub("", self.name)

    @property
    def seed(self) -> int | None:
        return None if self.config is None else OmegaConf.select(self.config, "seed")


@dataclass
class Group:
    """Runs of one setting on the same rows, which differ in their seed.

    replicates: of each metric, one value per resample [R], the mean over the seeds drawn for it.
    difference: of each compared metric, the interval of this group minus the best.
    """

    setting: str
    runs: list[Run]
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    difference: dict[str, Interval] = field(default_factory=dict)
    is_best: bool = False

    @property
    def predictions(self) -> Predictions:
        found = self.runs[0].predictions
        assert found is not None
        return found

    def values(self, metric: str, study: bool = False) -> np.ndarray:
        """A metric of each run."""
        each = [run.predictions for run in self.runs]
        tables = [(p.study_metrics if study else p.metrics) for p in each if p is not None]
        return np.array([t.get(metric, np.nan) for t in tables])

    def mean(self, metric: str, study: bool = False) -> float:
        return float(np.mean(self.values(metric, study)))

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds, NaN for one."""
        values = self.values(metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def interval(self, metric: str) -> Interval:
        if metric not in self.replicates:
            return Interval(float("nan"), float("nan"))
        return Interval.of(self.replicates[metric])

    @property
    def is_told_from_best(self) -> bool | None:
        """Whether the interval of the difference leaves out zero; None if there is none."""
        if self.is_best or BY not in self.difference or np.isnan(self.difference[BY].low):
            return None
        return not self.difference[BY].holds_zero


@dataclass(frozen=True)
class RowSet:
    """Groups that were scored on the same rows, in the order of their runs."""

    rows: str
    groups: list[Group]

    @property
    def name(self) -> str:
        """What these rows are called where there are others: by the first run scored on them."""
        return self.groups[0].runs[0].name

    @property
    def best(self) -> Group | None:
        return next((g for g in self.groups if g.is_best), None)

    @property
    def predictions(self) -> Predictions:
        return self.groups[0].predictions

    def baseline(self, study: bool = False) -> dict[str, float]:
        """The metrics of answering "no bleed" to everything, that have an honest value."""
        found = self.predictions
        constant = np.full(found.scored.target.shape, -1.0)
        answered = replace(found, scored=replace(found.scored, logits=constant))
        metrics = answered.study_metrics if study else answered.metrics
        return {k: v for k, v in metrics.items() if not k.startswith(_NO_BASELINE)}


@dataclass(frozen=True)
class Comparison:
    """name: of the sweep, or of several. runs: all of them, finished or not. resamples: 0 for none.
    records: of the sweeps' launches."""

    name: str
    runs: list[Run]
    sets: list[RowSet]
    resamples: int
    records: list[dict[str, Any]]

    @property
    def groups(self) -> list[Group]:
        return [g for s in self.sets for g in s.groups]

    @property
    def finished(self) -> list[Run]:
        return [r for r in self.runs if r.is_finished]

    def group_of(self, run: Run) -> Group | None:
        return next((g for g in self.groups if any(r is run for r in g.runs)), None)

    def factors(self) -> dict[str, dict[str, str]]:
        """What was varied: per factor, the level of each setting. The model is one if it varies."""
        levels: dict[str, dict[str, str]] = {}
        for group in self.groups:
            levels.setdefault("model", {})[group.setting] = group.runs[0].model
            for part in group.setting.split(",")[1:]:
                key, _, value = part.partition("=")
                levels.setdefault(key, {})[group.setting] = value
        return {k: v for k, v in levels.items() if len(set(v.values())) > 1}


def load_comparison(sweeps: Sequence[SweepPaths], resamples: int = RESAMPLES) -> Comparison:
    """Reads the jobs of the latest launch of each sweep, and compares them.

    Args:
        sweeps: their folders; of several, runs are named `<sweep>/<job>`.
        resamples: of the bootstrap; 0 leaves intervals out, which takes most of the time.

    Raises:
        UserError: a folder holds no sweep.
    """
    names = [s.root.resolve().name for s in sweeps]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(
            f"the sweeps to compare have folders of one name, {twice[0]!r}: their runs could not "
            f"be told apart. Give each sweep once, and rename a folder if two are called alike."
        )
    records, runs = [], []
    for sweep in sweeps:
        record = sweep.read_record()
        if not record:
            raise UserError(
                f"{sweep.root} holds no sweep (no {sweep.record.name}). Give the folder of a "
                f"sweep, as in python -m ich.report multirun_reports/demo."
            )
        records.append(record)
        prefix = f"{sweep.root.resolve().name}/" if len(sweeps) > 1 else ""
        runs += [_load_run(sweep, r, prefix) for r in sweep.read_results()]
    title = " + ".join(
        str(r.get("name", s.root.name)) for r, s in zip(records, sweeps, strict=True)
    )
    return Comparison(title, runs, _sets(runs, resamples), resamples, records)


def _load_run(sweep: SweepPaths, result: dict[str, Any], prefix: str) -> Run:
    paths = sweep.run(result["job"])
    config = OmegaConf.load(paths.config) if paths.config.exists() else None
    assert config is None or isinstance(config, DictConfig)
    found = read_predictions(paths) if result["status"] == FINISHED else None
    return Run(f"{prefix}{result['job']}", paths, result, config, found)


def read_predictions(run: RunPaths, split: str | None = None) -> Predictions | None:
    """A finished run's predictions; None if the file is gone or damaged.

    Args:
        run: its folder.
        split: whose rows; None for those that are scored, of the test set if there is one.
    """
    try:
        with run.predictions.open("rb") as handle, np.load(handle) as file:
            arrays = {name: file[name] for name in file.files}
        return _predictions(arrays, split)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _predictions(arrays: Mapping[str, np.ndarray], split: str | None) -> Predictions:
    split = split or ("test" if "test_logits" in arrays else "val")
    image_id = arrays[f"{split}_image_id"]
    for name in {split, "val"}:
        logits, target = arrays[f"{name}_logits"], arrays[f"{name}_target"]
        if logits.shape != target.shape or len(logits) != len(arrays[f"{name}_image_id"]):
            raise ValueError("arrays of different lengths")
    group, drawn = group_rows(arrays[f"{split}_patient"], image_id)
    return Predictions(
        scored=Scored(
            labels=tuple(str(k) for k in arrays["labels"]),
            target=arrays[f"{split}_target"],
            logits=arrays[f"{split}_logits"],
            group=group,
        ),
        drawn=drawn,
        image_id=image_id,
        # Runs of earlier versions did not write it down.
        study=arrays.get(f"{split}_study", np.full(len(image_id), -1)),
        chosen=(arrays["val_logits"], arrays["val_target"]),
    )


def _sets(runs: Sequence[Run], resamples: int) -> list[RowSet]:
    """Groups by the rows they were scored on, each with its best and, if asked for, intervals."""
    by_rows: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.predictions is not None:
            settings = by_rows.setdefault(run.predictions.rows, {})
            settings.setdefault(_trained_as(run), []).append(run)
    sets = []
    for rows, settings in by_rows.items():
        groups = [Group(members[0].setting, members) for members in settings.values()]
        if resamples and int(groups[0].predictions.scored.group.max()) + 1 >= FEWEST_GROUPS:
            _resample(groups, resamples)
        _find_best(groups)
        sets.append(RowSet(rows, groups))
    return sets


def _trained_as(run: Run) -> str:
    """Equal for runs that differ in their seed alone: by their configs, since names are cut."""
    if run.config is None:
        return run.setting
    values = OmegaConf.to_container(run.config)
    assert isinstance(values, dict)
    kept = {str(k): v for k, v in values.items() if k not in _NO_SETTING}
    sweep = run.name.rpartition("/")[0]
    return json.dumps([sweep, kept], sort_keys=True, default=str)


def _resample(groups: Sequence[Group], resamples: int) -> None:
    """The same patients for all groups; for each resample, the seeds of a group are drawn too."""
    group = groups[0].predictions.scored.group
    counts = draw_counts(int(group.max()) + 1, resamples)
    found = [r.predictions for g in groups for r in g.runs if r.predictions is not None]
    # In threads: nearly all of it is in numpy and scipy, which let others run.
    with ThreadPoolExecutor(available_cores()) as threads:
        resampled = iter(list(threads.map(lambda p: replicates(p, counts), found)))
    for number, g in enumerate(groups):
        each = [next(resampled) for _ in g.runs]
        rng = np.random.default_rng(number)
        seeds = rng.integers(0, len(each), (len(each), resamples))
        at = np.arange(resamples)
        common = [m for m in each[0] if all(m in e for e in each)]  # not all may know studies
        g.replicates = {m: _over_seeds(np.stack([e[m] for e in each]), seeds, at) for m in common}


def _over_seeds(values: np.ndarray, seeds: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Means over the seeds drawn for each resample, [S, R] -> [R].

    n drawn out of n vary too little, by (n - 1) / n: their distance from the mean of all is
    stretched accordingly.
    """
    n, mean = len(values), np.asarray(values.mean(0))
    drawn = np.asarray(values[seeds, at].mean(0))
    return mean if n == 1 else mean + (drawn - mean) * np.sqrt(n / (n - 1))


def replicates(found: Predictions, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of every resample, per slice and, as `study_<metric>`, per study."""
    scored = found.scored
    values = bootstrap(scored, counts)
    if (found.study >= 0).any():
        logits, target, first = per_study(scored.logits, scored.target, found.study)
        studies = Scored(scored.labels, target, logits, scored.group[first])
        values |= {f"study_{k}": v for k, v in bootstrap(studies, counts).items()}
    return values


def _find_best(groups: Sequence[Group]) -> None:
    scores = {n: g.mean(BY) for n, g in enumerate(groups)}
    defined = {n: s for n, s in scores.items() if not np.isnan(s)}
    if not defined:
        return
    best = groups[max(defined, key=lambda n: defined[n])]
    best.is_best = True
    for g in groups:
        if g is not best and g.replicates:
            g.difference = {m: Interval.of(g.replicates[m] - best.replicates[m]) for m in COMPARED}


@dataclass(frozen=True)
class Effect:
    """What a level of a factor is worth against the factor's first, over `pairs` of settings that
    differ in nothing else, in a metric: mean difference, and its interval."""

    factor: str
    level: str
    against: str
    pairs: int
    mean: float
    interval: Interval


def effects(comparison: Comparison, metric: str = BY) -> Iterator[Effect]:
    """The worth of each level of each varied factor, where settings can be paired."""
    for factor in comparison.factors():
        for rows in comparison.sets:
            yield from _effects_of(factor, rows.groups, metric)


def _effects_of(factor: str, groups: Sequence[Group], metric: str) -> Iterator[Effect]:
    levels: dict[str, dict[str, Group]] = {}
    for group in groups:
        level, rest = _split_setting(group, factor)
        if level:
            levels.setdefault(level, {})[rest] = group
    if len(levels) < 2:
        return
    first, *others = levels
    for level in others:
        pairs = [(levels[level][k], levels[first][k]) for k in levels[level] if k in levels[first]]
        if not pairs:
            continue
        means = [a.mean(metric) - b.mean(metric) for a, b in pairs]
        interval = Interval(float("nan"), float("nan"))
        if all(a.replicates and b.replicates for a, b in pairs):
            differences = [a.replicates[metric] - b.replicates[metric] for a, b in pairs]
            interval = Interval.of(np.mean(differences, axis=0))
        yield Effect(factor, level, first, len(pairs), float(np.mean(means)), interval)


def _split_setting(group: Group, factor: str) -> tuple[str, str]:
    """A setting's level of a factor (empty if it has none), and the setting without it."""
    model, *parts = group.setting.split(",")
    if factor == "model":
        sweep = model.rpartition("/")[0]
        return group.runs[0].model, ",".join([sweep, *parts])
    mine = [p for p in parts if p.startswith(f"{factor}=")]
    level = mine[0].partition("=")[2] if mine else ""
    return level, ",".join([model, *(p for p in parts if p not in mine)])


def models_compared(rows: RowSet) -> Mapping[str, Group]:
    """Per network its group, where each network stands once: only then are networks compared."""
    by_model: dict[str, Group] = {}
    for group in rows.groups:
        if by_model.setdefault(group.runs[0].model, group) is not group:
            return {}
    return by_model


def place_of(sweeps: Sequence[SweepPaths], out: Path | None) -> SweepPaths:
    """The folder a report is written to.

    Raises:
        UserError: there are several sweeps, and no folder is named.
    """
    if out is not None:
        return SweepPaths(out)
    if len(sweeps) > 1:
        raise UserError(
            f"{len(sweeps)} sweeps are compared, and -o DIR is not given. Name a folder for their "
            f"report, as in python -m ich.report A B -o multirun_reports/A-and-B."
        )
    return sweeps[0]

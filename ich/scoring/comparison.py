"""Runs side by side: metrics, intervals, and which of them differ. From the runs' files alone.

Runs that differ in their seed alone share a setting, whose score is the mean over its seeds.
Settings that were scored on the same rows are compared pairwise, by the same resamples of patients;
others are not compared at all.

In this order: what a comparison consists of (`Run`, `SettingResult`, `EvaluationSet`,
`Comparison`), how it is read from folders, and how settings are paired and resampled. What one run
predicted is in `ich.scoring.predictions`, what a varied setting is worth in `ich.scoring.effects`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from ich.base.config import MARGIN, RESAMPLES, UserError, select_value
from ich.base.progress import ProgressCallback
from ich.base.records import FitResult, Json, RunResult, SweepRecord
from ich.base.results import RunPaths, SweepPaths
from ich.base.workers import available_cores
from ich.scoring.ensembles import EnsembleResult, ensemble_results
from ich.scoring.equivalence import AgainstBest, against_best
from ich.scoring.pairs import Pair, compare_pairs
from ich.scoring.power import SampleSize
from ich.scoring.predictions import Predictions, bootstrap_predictions, read_predictions
from ich.scoring.uncertainty import MIN_GROUPS, UNDEFINED, Interval, draw_counts

RANKING_METRIC = "auc"  # what runs are ranked by: micro-averaged over the labels
COMPARED_METRICS = ("auc", "accuracy")  # the report's two metrics, whose differences have intervals
BASELINE = "always negative"
# Metrics that the baseline has no honest value for: it states no probability.
_PROBABILISTIC = ("log_loss", "brier", "ece", "f1", "threshold")
# In a job's name, with the hash that keeps it apart where a character had to be replaced.
_SEED = re.compile(r",seed=\d+(?:-[0-9a-f]{6}$)?")
# Of a config, what two runs of one setting may differ in.
_NOT_OF_A_SETTING = ("seed", "job", "name", "tracking", "sweep", "report", "hydra")


@dataclass(frozen=True)
class Run:
    """A job of a sweep. name: unique among those compared. config: plain values, empty if nothing
    tells. predictions: None if it did not finish or left none that can be read."""

    name: str
    paths: RunPaths
    result: RunResult
    config: Json
    predictions: Predictions | None

    @property
    def is_finished(self) -> bool:
        return self.result.is_finished

    @property
    def fit(self) -> FitResult:
        """What the training of a finished run came to."""
        assert self.result.fit is not None
        return self.result.fit

    @property
    def model(self) -> str:
        # A job that never started has written no model, but its name begins with it.
        return self.result.model or self.name.split(",")[0]

    @property
    def setting(self) -> str:
        """What the run is, but for its seed."""
        return _SEED.sub("", self.name)

    @property
    def seed(self) -> int | None:
        seed = select_value(self.config, "seed")
        return seed if isinstance(seed, int) else None


@dataclass
class SettingResult:
    """Runs of one setting on the same rows, which differ in their seed.

    replicates: of each metric, one value per resample [R], the mean over the seeds drawn for it.
    patient_replicates: of the AUC, the same of all its seeds: of patients alone [R].
    difference_from_best: of each compared metric, the interval of this setting minus the best.
    against_best: None where nothing was resampled. sample_size: None of the best, too.
    """

    name: str
    runs: list[Run]
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    patient_replicates: np.ndarray | None = None
    difference_from_best: dict[str, Interval] = field(default_factory=dict)
    against_best: AgainstBest | None = None
    sample_size: SampleSize | None = None
    is_best: bool = False

    @property
    def predictions(self) -> Predictions:
        """Those of its first run."""
        predictions = self.runs[0].predictions
        assert predictions is not None
        return predictions

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
            return UNDEFINED
        return Interval.of(self.replicates[metric])

    @property
    def differs_from_best(self) -> bool | None:
        """Whether the interval of the difference leaves out zero; None if there is none."""
        difference = self.difference_from_best.get(RANKING_METRIC, UNDEFINED)
        if self.is_best or np.isnan(difference.low):
            return None
        return not difference.contains_zero


def ranked(settings: Sequence[SettingResult]) -> list[SettingResult]:
    """From the highest AUC on; those without one, as with NaN logits, last."""
    return sorted(settings, key=lambda s: -np.nan_to_num(s.mean(RANKING_METRIC), nan=-1))


@dataclass(frozen=True)
class EvaluationSet:
    """Settings that were scored on the same rows, in the order of their runs.

    fingerprint: of these rows, `Predictions.fingerprint`. ensembles: of all their runs together.
    pairs: of settings that have an interval.
    """

    fingerprint: str
    settings: list[SettingResult]
    ensembles: list[EnsembleResult] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What these rows are called where there are others: by the first run scored on them."""
        return self.settings[0].runs[0].name

    @property
    def best(self) -> SettingResult | None:
        return next((s for s in self.settings if s.is_best), None)

    @property
    def predictions(self) -> Predictions:
        """Those of its first setting's first run, for what all share: the rows and their labels."""
        return self.settings[0].predictions

    def baseline(self, study: bool = False) -> dict[str, float]:
        """The metrics of answering "no bleed" to everything, that have an honest value."""
        scored = self.predictions.scored
        # Any constant below zero: every decision is "no", and all scores tie.
        constant = replace(scored, logits=np.full(scored.target.shape, -1.0))
        negative = replace(self.predictions, scored=constant)
        metrics = negative.study_metrics if study else negative.metrics
        return {k: v for k, v in metrics.items() if not k.startswith(_PROBABILISTIC)}

    def setting_per_model(self) -> dict[str, SettingResult]:
        """Per network its setting, where each stands once: only then are networks compared."""
        per_model = {s.runs[0].model: s for s in self.settings}
        return per_model if len(per_model) == len(self.settings) else {}


@dataclass(frozen=True)
class Comparison:
    """name: of the sweep, or of several. runs: all of them, finished or not. resamples: 0 for none.
    records: of the sweeps' launches. margin: of AUC, within which settings are equal."""

    name: str
    runs: list[Run]
    evaluation_sets: list[EvaluationSet]
    resamples: int
    records: list[SweepRecord]
    margin: float = MARGIN

    @property
    def settings(self) -> list[SettingResult]:
        return [s for rows in self.evaluation_sets for s in rows.settings]

    @property
    def finished(self) -> list[Run]:
        return [r for r in self.runs if r.is_finished]

    def setting_of(self, run: Run) -> SettingResult | None:
        """The setting that a run belongs to; None if the run has no predictions."""
        return next((s for s in self.settings if any(r is run for r in s.runs)), None)

    def factors(self) -> dict[str, dict[str, str]]:
        """What was varied: per factor, the level of each setting. The model is one if it varies."""
        levels: dict[str, dict[str, str]] = {}
        for setting in self.settings:
            levels.setdefault("model", {})[setting.name] = setting.runs[0].model
            # From the names, which list what a sweep varied, and nothing else.
            for part in setting.name.split(",")[1:]:
                key, _, value = part.partition("=")
                levels.setdefault(key, {})[setting.name] = value
        return {k: v for k, v in levels.items() if len(set(v.values())) > 1}


# --- Reading folders -----------------------------------------------------------------------------


def load_comparison(
    sweeps: Sequence[SweepPaths],
    resamples: int = RESAMPLES,
    progress: ProgressCallback | None = None,
    margin: float | None = None,
) -> Comparison:
    """Reads the jobs of the latest launch of each sweep, and compares them.

    Args:
        sweeps: their folders; of several, runs are named `<sweep>/<job>`.
        resamples: of the bootstrap; 0 leaves intervals out, which takes most of the time.
        progress: told of runs on the same rows that are resampled.
        margin: of AUC, within which settings are equal; None for what the sweeps were launched
            with, the smallest of several.

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
        # One that is damaged has the jobs whose folders are there.
        if not (sweep.record.is_file() and record.jobs):
            what = "no run beside" if sweep.record.is_file() else "no"
            raise UserError(
                f"{sweep.root} holds no sweep ({what} {sweep.record.name}). Give the folder of a "
                f"sweep, as in ich report multirun_reports/demo."
            )
        records.append(record)
        prefix = f"{sweep.root.resolve().name}/" if len(sweeps) > 1 else ""
        runs += [_load_run(sweep, r, prefix) for r in sweep.read_results()]
    title = " + ".join(str(r.name or s.root.name) for r, s in zip(records, sweeps, strict=True))
    margin = _recorded_margin(records) if margin is None else margin
    evaluation_sets = _evaluation_sets(runs, resamples, progress, margin)
    return Comparison(title, runs, evaluation_sets, resamples, records, margin)


def _recorded_margin(records: Sequence[SweepRecord]) -> float:
    """What the latest launches were given; an earlier version recorded none."""
    configs = [config for record in records for config in record.configs.values()]
    margins = [select_value(config, "report.margin") for config in configs]
    return min((m for m in margins if isinstance(m, float) and 0 < m < 0.5), default=MARGIN)


def _load_run(sweep: SweepPaths, result: RunResult, prefix: str) -> Run:
    paths = sweep.run(result.job)
    # As it stands and not as a `Config`, whose keys may have changed since the run.
    config = paths.read_config()
    # A run that did not finish may have left those of one of its epochs: nothing to rank.
    predictions = read_predictions(paths) if result.is_finished else None
    return Run(f"{prefix}{result.job}", paths, result, config, predictions)


# --- Pairing and resampling ----------------------------------------------------------------------


def _evaluation_sets(
    runs: Sequence[Run], resamples: int, progress: ProgressCallback | None, margin: float
) -> list[EvaluationSet]:
    """Runs by the rows they were scored on, then by setting; intervals only if asked for."""
    # Dictionaries keep the order of the runs, which is that of the table.
    runs_of: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.predictions is not None:
            of_rows = runs_of.setdefault(run.predictions.fingerprint, {})
            of_rows.setdefault(_setting_key(run), []).append(run)
    sets = []
    for fingerprint, of_rows in runs_of.items():
        settings = [SettingResult(members[0].setting, members) for members in of_rows.values()]
        if resamples and settings[0].predictions.scored.group_count >= MIN_GROUPS:
            _resample(settings, resamples, progress)
        _mark_best(settings, margin)
        ensembles, pairs = _ensembles(settings, resamples), _pairs(settings, margin)
        sets.append(EvaluationSet(fingerprint, settings, ensembles, pairs))
    return sets


def _ensembles(settings: Sequence[SettingResult], resamples: int) -> list[EnsembleResult]:
    runs = {r.name: r for s in settings for r in s.runs}
    predictions = {name: r.predictions for name, r in runs.items() if r.predictions is not None}
    best = next((s.replicates for s in settings if s.is_best), {})
    # Of runs on the same rows; that of one tells for all.
    has_test_set = all(r.fit.cohort.scored == "test" for r in runs.values())
    return ensemble_results(predictions, has_test_set, resamples, best, COMPARED_METRICS)


def _setting_key(run: Run) -> str:
    """Equal for runs that differ in their seed alone: by their configs, since names are cut."""
    if not run.config:  # it is gone or damaged: the name is all there is
        return run.setting
    kept = {k: v for k, v in run.config.items() if k not in _NOT_OF_A_SETTING}
    # Two sweeps that are compared may hold the same setting: they are not each other's seeds.
    sweep = run.name.rpartition("/")[0]
    return json.dumps([sweep, kept], sort_keys=True, default=str)


def _resample(
    settings: Sequence[SettingResult], resamples: int, progress: ProgressCallback | None
) -> None:
    """Sets the replicates of all settings: of the same patients in each resample, so that they can
    be subtracted; the seeds of a setting are drawn too."""
    counts = draw_counts(settings[0].predictions.scored.group_count, resamples)
    predictions = [r.predictions for s in settings for r in s.runs if r.predictions is not None]
    progress, replicates = progress or (lambda *_: None), []
    progress(0, len(predictions))
    # In threads: nearly all of it is in numpy and scipy, which let others run.
    with ThreadPoolExecutor(available_cores()) as threads:
        for values in threads.map(lambda p: bootstrap_predictions(p, counts), predictions):
            replicates.append(values)
            progress(len(replicates), len(predictions))
    # In the order of `predictions`: setting by setting, and seed by seed.
    remaining = iter(replicates)
    for number, setting in enumerate(settings):
        per_seed = [next(remaining) for _ in setting.runs]
        # Of each setting its own: seed 1 of one network and seed 1 of another are no pair.
        rng = np.random.default_rng(number)
        drawn = rng.integers(0, len(per_seed), (len(per_seed), resamples))
        # Metrics per study are missing for a run of an earlier version, which kept no studies.
        common = [m for m in per_seed[0] if all(m in values for values in per_seed)]
        setting.replicates = {
            m: within_range(m, mean_over_seeds(np.stack([values[m] for values in per_seed]), drawn))
            for m in common
        }
        setting.patient_replicates = np.mean([v[RANKING_METRIC] for v in per_seed], axis=0)


def within_range(metric: str, values: np.ndarray) -> np.ndarray:
    """What a metric can be: a mean that `mean_over_seeds` has stretched may lie beyond. Log losses
    have no upper end, all others lie within 0..1."""
    return np.asarray(np.clip(values, 0, None if "log_loss" in metric else 1))


def mean_over_seeds(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Means over the seeds drawn for each resample.

    n drawn out of n vary too little, by (n - 1) / n: their distance from the mean of all is
    stretched accordingly.

    Args:
        values: of each seed in each resample, [S, R]. drawn: seeds, int [S, R].

    Returns:
        float64 [R].
    """
    n, mean = len(values), np.asarray(values.mean(0))
    resampled = np.asarray(values[drawn, np.arange(values.shape[1])].mean(0))
    return mean if n == 1 else mean + (resampled - mean) * np.sqrt(n / (n - 1))


def _mark_best(settings: Sequence[SettingResult], margin: float) -> None:
    """Marks the setting with the highest mean, and gives the others their differences from it."""
    means = [s.mean(RANKING_METRIC) for s in settings]
    if np.isnan(means).all():
        return
    # Of equal means, the first.
    number = int(np.nanargmax(means))
    best = settings[number]
    best.is_best = True
    if all(s.replicates for s in settings):
        ranked = [s.replicates[RANKING_METRIC] for s in settings]
        compared = against_best(means, ranked, number, margin)
        for setting, against in zip(settings, compared, strict=True):
            setting.against_best = against
    others = [s for s in settings if s is not best and s.replicates]
    for setting in others:
        setting.difference_from_best = {
            m: Interval.of(setting.replicates[m] - best.replicates[m]) for m in COMPARED_METRICS
        }


def _pairs(settings: Sequence[SettingResult], margin: float) -> list[Pair]:
    """All pairs of those that have an interval; each but the best learns what telling it from that
    takes."""
    ranked = sorted(
        (s for s in settings if s.against_best and s.patient_replicates is not None),
        key=lambda s: (not s.is_best, -s.mean(RANKING_METRIC)),
    )
    if len(ranked) < 2:
        return []
    pairs = compare_pairs(
        [s.name for s in ranked],
        [s.mean(RANKING_METRIC) for s in ranked],
        np.stack([s.replicates[RANKING_METRIC] for s in ranked]),
        np.stack([np.asarray(s.patient_replicates) for s in ranked]),
        [[r.predictions.scored for r in s.runs if r.predictions is not None] for s in ranked],
        margin,
    )
    # The first of them are those with the best.
    for setting, pair in zip(ranked[1:], pairs, strict=False):
        setting.sample_size = pair.size
    return pairs

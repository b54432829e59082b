"""The columns of `comparison.csv`: where each comes from, how people see it, and what is best.

`COLUMNS` is the one list of them. A row is a job, the mean over the seeds of a setting, or the
baseline; what it does not have is left out, and is an empty cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from ich.base.records import FINISHED, FitResult, Scores
from ich.scoring.comparison import (
    BASELINE,
    COMPARED_METRICS,
    RANKING_METRIC,
    Comparison,
    Run,
    SettingResult,
)
from ich.scoring.ensembles import EnsembleResult
from ich.scoring.equivalence import AgainstBest
from ich.scoring.findings import REPORT_TABLE_2
from ich.scoring.metrics import ANY
from ich.scoring.power import SampleSize
from ich.scoring.predictions import Predictions
from ich.scoring.uncertainty import UNDEFINED

INDISTINGUISHABLE = "\u2248"

RowValues = Mapping[str, object]  # per column
# Of a job, and of the setting it belongs to.
CellValue = Callable[[Run, SettingResult | None], object]


@dataclass(frozen=True)
class Shown:
    """A column in Markdown and at the terminal; the CSV holds all columns, unrounded.

    position: from left to right. text: of a value that is not missing, and of its row. dropped:
    when a narrow terminal leaves it out, lowest first; None if never. if_any: whether it is left
    out where it is empty.
    """

    position: int
    heading: str
    text: Callable[[Any, pd.Series], str]
    dropped: int | None = None
    if_any: bool = False


@dataclass(frozen=True)
class Column:
    """A column of `comparison.csv`.

    name: other people's scripts rely on it. source: of a job's value, None where it has none.
    over_seeds: what the row of a setting with several seeds has: their mean, the value that all
    share, or nothing. better: which values are; None where none is. is_cost: whether runs compare
    in it that were scored on different rows. whole: whether it holds whole numbers.
    """

    name: str
    source: CellValue
    shown: Shown | None = None
    over_seeds: Literal["mean", "same", "nothing"] = "mean"
    better: Literal["higher", "lower"] | None = None
    is_cost: bool = False
    whole: bool = False


# --- Where values come from, and how they look ---------------------------------------------------


def _fit(value: Callable[[FitResult], object]) -> CellValue:
    return lambda run, _: value(run.result.fit) if run.result.fit else None


def _scored(metric: str) -> CellValue:
    return _fit(lambda f: f.scores.get(metric))


def _leak(kind: str) -> CellValue:
    return _fit(lambda f: f.cohort.leak.get(kind))


def _report(position: int) -> CellValue:
    """The report's own number for a network, of its Table 2."""
    return lambda run, _: REPORT_TABLE_2.get(run.model, (None, None))[position]


def _predicted(value: Callable[[Run, Predictions], object]) -> CellValue:
    return lambda run, _: value(run, run.predictions) if run.predictions else None


def _of_predictions(metric: str) -> Column:
    return Column(metric, _predicted(lambda _, p: p.metrics.get(metric)))


def _log_loss(run: Run, setting: SettingResult | None) -> object:
    """Of a run whose predictions are gone, its result still has it."""
    if run.predictions:
        return run.predictions.metrics["log_loss"]
    return _scored("log_loss")(run, setting)


def _setting(value: Callable[[SettingResult], object]) -> CellValue:
    return lambda _, setting: value(setting) if setting else None


def _intervals(metric: str) -> Iterator[Column]:
    """The limits of a compared metric, and of its difference from the best."""
    shown = Shown(3, "95 % interval", _interval, if_any=True) if metric == RANKING_METRIC else None
    yield Column(f"{metric}_low", _setting(lambda s: s.interval(metric).low), shown)
    yield Column(f"{metric}_high", _setting(lambda s: s.interval(metric).high))

    def difference(limit: str) -> CellValue:
        return _setting(lambda s: getattr(s.difference_from_best.get(metric), limit, None))

    yield Column(f"{metric}_minus_best_low", difference("low"))
    yield Column(f"{metric}_minus_best_high", difference("high"))


def _interval(low: float, row: pd.Series) -> str:
    text = f"{low:.3f} to {row['auc_high']:.3f}"
    return f"{text} {INDISTINGUISHABLE}" if row["told_from_best"] == "no" else text


def _difference(setting: SettingResult) -> str | None:
    if setting.is_best:
        return "best"
    differs = setting.differs_from_best
    return None if differs is None else "yes" if differs else "no"


def _against_best(value: Callable[[AgainstBest], object]) -> CellValue:
    return _setting(lambda s: value(s.against_best) if s.against_best else None)


def _sample_size(value: Callable[[SampleSize], object]) -> CellValue:
    return _setting(lambda s: value(s.sample_size) if s.sample_size else None)


def _number(decimals: int, unit: float = 1) -> Callable[[float, pd.Series], str]:
    return lambda value, _: f"{value / unit:.{decimals}f}"


_SCORE = _number(4)


def _auc_column(label: str) -> Column:
    shown = Shown(6, "AUC any", _SCORE) if label == ANY else None
    return Column(f"auc_{label}", _scored(f"auc_{label}"), shown, better="higher")


# In the order of the CSV; those of the labels, auc_<label>, follow auc.
COLUMNS = (
    Column("job", lambda run, _: run.name, over_seeds="nothing"),
    Column("model", lambda run, _: run.model, over_seeds="same"),
    Column("status", lambda run, _: run.result.status, over_seeds="same"),
    Column("reason", lambda run, _: run.result.reason, over_seeds="nothing"),
    Column("accuracy", _scored("accuracy"), Shown(1, "accuracy", _SCORE), better="higher"),
    Column("auc", _scored("auc"), Shown(2, "AUC", _SCORE), better="higher"),
    Column("auc_macro", _scored("auc_macro"), Shown(7, "AUC macro", _SCORE, 1), better="higher"),
    # The highest of any epoch, where the others are of the epoch whose weights were kept.
    Column("auc_top", _fit(lambda f: f.auc_top), better="higher"),
    Column(
        "params",
        _fit(lambda f: f.params),
        Shown(8, "trained M", _number(2, 1e6)),
        "same",
        "lower",
        is_cost=True,
        whole=True,
    ),
    Column(
        "params_imagenet",
        _fit(lambda f: f.params_imagenet),
        Shown(9, "ImageNet M", _number(1, 1e6), 2),
        "same",
        whole=True,
    ),
    Column(
        "best_epoch",
        _fit(lambda f: f.best_epoch),
        Shown(10, "best epoch", _number(0), 6),
        "nothing",
        whole=True,
    ),
    Column(
        "minutes",
        _fit(lambda f: f.minutes),
        Shown(11, "minutes", _number(1), 3),
        "mean",
        "lower",
        is_cost=True,
    ),
    Column(
        "images_per_s",
        _fit(lambda f: f.images_per_s),
        Shown(12, "images/s", _number(0), 4),
        "mean",
        "higher",
        is_cost=True,
    ),
    Column("report_accuracy", _report(0), Shown(13, "report accuracy", _SCORE, 5), "same"),
    Column("report_auc", _report(1), Shown(14, "report AUC", _SCORE, 7), "same"),
    Column("scored_on", _fit(lambda f: f.cohort.scored), over_seeds="same"),
    Column("val_accuracy", _fit(lambda f: f.val_scores.get("accuracy"))),
    Column("val_auc", _fit(lambda f: f.val_scores.get("auc"))),
    *(Column(f"leak_{kind}", _leak(kind)) for kind in ("image", "study", "patient")),
    Column("precision", _fit(lambda f: f.precision), over_seeds="same"),
    # Of a run, from its predictions:
    Column("seed", _predicted(lambda run, _: run.seed), over_seeds="nothing", whole=True),
    *map(_of_predictions, ("exact_match", "ap_macro")),
    Column("log_loss", _log_loss),
    *map(_of_predictions, ("log_loss_weighted", "brier", "ece")),
    Column("study_auc", _predicted(lambda _, p: p.study_metrics.get(RANKING_METRIC))),
    # Of a setting, over its seeds:
    Column("setting", _setting(lambda s: s.name), over_seeds="same"),
    Column("rows", _setting(lambda s: s.predictions.fingerprint), over_seeds="same"),
    Column("seeds", _setting(lambda s: len(s.runs)), whole=True),
    Column(
        "auc_sd", _setting(lambda s: s.spread("auc")), Shown(5, "sd of seeds", _SCORE, if_any=True)
    ),
    Column("accuracy_sd", _setting(lambda s: s.spread("accuracy"))),
    *(column for metric in COMPARED_METRICS for column in _intervals(metric)),
    Column("told_from_best", _setting(_difference), over_seeds="same"),
    # Of the AUC:
    Column("margin", _against_best(lambda a: a.margin)),
    Column(
        "against_best",
        _against_best(lambda a: a.verdict),
        Shown(4, "against the best", lambda verdict, _: str(verdict), 8, if_any=True),
        "same",
    ),
    Column("p_from_best", _against_best(lambda a: a.p)),
    Column("p_from_best_holm", _against_best(lambda a: a.p_holm)),
    Column("chance_best", _against_best(lambda a: a.chance_best)),
    Column("patients_to_tell", _sample_size(lambda n: n.patients), whole=True),
    Column("positives_to_tell", _sample_size(lambda n: n.positives), whole=True),
    Column("smallest_told", _sample_size(lambda n: n.smallest)),
)
_BY_NAME = {column.name: column for column in COLUMNS}


def columns_in(table: pd.DataFrame) -> list[Column]:
    """The columns of a table, in its order; any that is not in `COLUMNS` is the AUC of a label."""
    return [
        _BY_NAME.get(name) or _auc_column(name.removeprefix("auc_")) for name in map(str, table)
    ]


def shown_columns(table: pd.DataFrame) -> list[tuple[str, Shown]]:
    """What people see of a table, from left to right: names of columns, and how they are shown."""
    shown = [(c.name, c.shown) for c in columns_in(table) if c.shown]
    filled = [(name, s) for name, s in shown if not s.if_any or table[name].notna().any()]
    return sorted(filled, key=lambda column: column[1].position)


# --- Rows ----------------------------------------------------------------------------------------


def build_table(comparison: Comparison) -> pd.DataFrame:
    """One row per job, then one per setting with several seeds, the ensembles, the baselines."""
    labels = dict.fromkeys(k for run in comparison.finished for k in run.fit.labels)
    after_auc = 1 + [c.name for c in COLUMNS].index("auc")
    columns = [*COLUMNS[:after_auc], *map(_auc_column, labels), *COLUMNS[after_auc:]]
    jobs = [_job_row(columns, run, comparison.setting_of(run)) for run in comparison.runs]
    # By identity: a run holds arrays and a config, which no dictionary takes as a key.
    row_of = {id(run): row for run, row in zip(comparison.runs, jobs, strict=True)}
    means = [
        _mean_row(columns, [row_of[id(run)] for run in setting.runs])
        for setting in comparison.settings
        if len(setting.runs) > 1
    ]
    rows = [*jobs, *means, *_ensemble_rows(comparison), *_baseline_rows(comparison)]
    known = {c.name for c in columns}
    rows = [{k: v for k, v in row.items() if k in known} for row in rows]
    table = pd.DataFrame(rows, columns=[c.name for c in columns])
    # Nullable integers: with one empty cell, pandas would make floats of a column, and 12.0 of 12.
    return table.astype({c.name: "Int64" for c in columns if c.whole})


def _job_row(columns: Sequence[Column], run: Run, setting: SettingResult | None) -> RowValues:
    values = {c.name: c.source(run, setting) for c in columns}
    return {name: value for name, value in values.items() if value is not None}


def _mean_row(columns: Sequence[Column], seeds: Sequence[RowValues]) -> RowValues:
    """Of a setting, whose runs have these rows."""
    # A seed without a value leaves the setting without one: the others are not its mean.
    means = pd.DataFrame(seeds).select_dtypes("number").mean(skipna=False)
    row: dict[str, object] = {"reason": f"mean of {len(seeds)} seeds"}
    for column in columns:
        if column.over_seeds == "mean":
            # None for a column of texts, as for one that no seed has a value in.
            row[column.name] = means.get(column.name)
        elif column.over_seeds == "same":
            row[column.name] = seeds[0].get(column.name)
    return row


def _ensemble_rows(comparison: Comparison) -> Iterator[RowValues]:
    """Of each set of scored rows: every metric that is a column, with intervals."""
    for rows in comparison.evaluation_sets:
        runs = {run.name: run for setting in rows.settings for run in setting.runs}
        for ensemble in rows.ensembles:
            predictions, members = ensemble.predictions, [runs[k] for k in ensemble.members]
            row: dict[str, object] = {
                "model": ensemble.name,
                "reason": f"{len(members)} of {len(runs)} networks: {'; '.join(ensemble.members)}",
                "params": sum(run.fit.params for run in members),
                "minutes": sum(run.fit.minutes for run in members),
                "scored_on": members[0].fit.cohort.scored,
                "rows": rows.fingerprint,
                "study_auc": predictions.study_metrics.get(RANKING_METRIC),
                **predictions.metrics,
            }
            for metric in COMPARED_METRICS:
                interval = ensemble.interval(metric)
                difference = ensemble.difference_from_best.get(metric, UNDEFINED)
                row |= {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
                row |= {f"{metric}_minus_best_low": difference.low}
                row |= {f"{metric}_minus_best_high": difference.high}
            yield row


def _baseline_rows(comparison: Comparison) -> list[RowValues]:
    """One per set of scored rows, as its baseline tells: a sweep over the cohort has several."""
    seen: list[Scores] = []
    rows: list[RowValues] = []
    for run in comparison.finished:
        scores = run.fit.always_negative
        if scores not in seen:
            seen.append(scores)
            reason = f"the rows of {run.name}" if len(seen) > 1 else ""
            rows.append({"model": BASELINE, "reason": reason, **scores})
    return rows


def best_cells(table: pd.DataFrame) -> set[tuple[int, str]]:
    """(row, column) of the best value of each column over the finished jobs; ties are all best."""
    jobs = table[table["status"] == FINISHED]
    # Runs whose predictions are gone have no rows: they are compared among themselves.
    on_same_rows = [part for _, part in jobs.groupby("rows", dropna=False)]
    best = set()
    for column in columns_in(table):
        if column.better is None:
            continue
        for part in [jobs] if column.is_cost else on_same_rows:
            # A column that some rows lack may hold objects.
            values = pd.to_numeric(part[column.name])
            # Alone, everything would be the best.
            if len(part) > 1 and values.notna().any():
                target = values.max() if column.better == "higher" else values.min()
                best |= {(int(i), column.name) for i in part.index[values == target]}
    return best


# --- Every metric --------------------------------------------------------------------------------


def metrics_table(comparison: Comparison) -> pd.DataFrame:
    """Every metric of every setting and ensemble: `setting, seeds, rows, level, metric, value, sd,
    low, high`.

    `rows` tells which were scored on the same rows, `level` is slice or study, `value` the mean
    over seeds and `sd` its standard deviation; `low` and `high` are the 95 % interval. An ensemble
    has no seeds.
    """
    names = ["setting", "seeds", "rows", "level", "metric", "value", "sd", "low", "high"]
    lines: list[tuple[object, ...]] = []
    for rows in comparison.evaluation_sets:
        for setting in rows.settings:
            lines += _metric_lines(setting)
        for ensemble in rows.ensembles:
            lines += _ensemble_lines(ensemble, rows.fingerprint)
    return pd.DataFrame(lines, columns=names).astype({"seeds": "Int64"})


def _metric_lines(setting: SettingResult) -> Iterator[tuple[object, ...]]:
    predictions = setting.predictions
    about = (setting.name, len(setting.runs), predictions.fingerprint)
    for metric in predictions.metrics:
        interval, spread = setting.interval(metric), setting.spread(metric)
        mean = setting.mean(metric)
        yield *about, "slice", metric, mean, spread, interval.low, interval.high
    for metric in predictions.study_metrics:
        interval, mean = setting.interval(f"study_{metric}"), setting.mean(metric, study=True)
        yield *about, "study", metric, mean, float("nan"), interval.low, interval.high


def _ensemble_lines(ensemble: EnsembleResult, rows: str) -> Iterator[tuple[object, ...]]:
    for key, value in ensemble.predictions.every_metric.items():
        level = "study" if key.startswith("study_") else "slice"
        interval = ensemble.interval(key)
        about = (ensemble.name, None, rows, level, key.removeprefix("study_"))
        yield *about, value, float("nan"), interval.low, interval.high

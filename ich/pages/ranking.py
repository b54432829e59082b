"""The comparison's ranking: a row per setting, which opens into its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ich.pages.description import interval_text
from ich.pages.page import Block, Cell, Ranking, Row
from ich.scoring.comparison import (
    BASELINE,
    COMPARED_METRICS,
    RANKING_METRIC,
    Comparison,
    EvaluationSet,
    Run,
    SettingResult,
)
from ich.scoring.ensembles import EnsembleResult
from ich.scoring.metrics import ANY
from ich.scoring.uncertainty import UNDEFINED

_MINUS_BEST = "minus_best"
# Entries of a run's result that tell what it cost, and the unit they are shown in.
_COSTS = {"params": 1e6, "minutes": 1, "images_per_s": 1}


@dataclass(frozen=True)
class _Column:
    """key: a metric, as `study_<metric>` of studies, a cost, or _MINUS_BEST."""

    heading: str
    key: str
    form: str = "{:.4f}"
    is_lower_better: bool = False

    def value(self, runs: Sequence[Run]) -> float:
        """The mean over runs; NaN where one has none."""
        return float(np.mean([self._value(run) for run in runs]))

    def _value(self, run: Run) -> float:
        assert run.predictions is not None
        if self.key in _COSTS:
            return float(getattr(run.fit, self.key)) / _COSTS[self.key]
        of_studies = self.key.startswith("study_")
        metrics = run.predictions.study_metrics if of_studies else run.predictions.metrics
        return metrics.get(self.key.removeprefix("study_"), np.nan)

    def cell(self, value: float) -> Cell:
        return Cell("") if np.isnan(value) else Cell(self.form.format(value), value)


def ranking(comparison: Comparison) -> list[Block]:
    """A table for each set of rows that were scored: between sets, no difference is given."""
    blocks: list[Block] = []
    for rows in comparison.evaluation_sets:
        several = len(comparison.evaluation_sets) > 1
        where = f" Scored on the rows of {rows.name}." if several else ""
        caption = (
            f"Click a heading to sort.{where} Second lines: 95 % intervals; for the difference, "
            f"this setting minus the best, on the same patients. \u2248: not distinguishable from "
            f"the best."
        )
        columns = _columns(rows)
        bests = _bests(rows, columns)
        ranked = [_row(setting, columns, bests) for setting in rows.settings]
        # By AUC, from the best on; a setting without one, as of a run with NaN logits, comes last.
        ranked.sort(key=lambda row: -np.nan_to_num(row.cells[0].value or np.nan, nan=-1))
        headings = ["setting", *(column.heading for column in columns)]
        ensembles = [_ensemble_row(e, columns, bests) for e in rows.ensembles]
        last = _baseline_row(rows, columns)
        blocks.append(Ranking(caption, headings, [*ranked, *ensembles, last]))
    return blocks


def _columns(rows: EvaluationSet) -> list[_Column]:
    # The few to choose by. Every metric stands in the page's tables, and in metrics.csv.
    has_any = ANY in rows.predictions.scored.labels
    columns = [
        _Column("AUC", "auc"),
        _Column("minus the best", _MINUS_BEST, "{:+.4f}"),
        _Column("accuracy", "accuracy"),
    ]
    if has_any:
        columns += [
            _Column("AUC any", f"auc_{ANY}"),
            _Column("sensitivity at 90 % specificity, any", f"sensitivity_at_90_{ANY}"),
        ]
    columns += [_Column("AUC macro", "auc_macro"), _Column("average precision", "ap_macro")]
    if (rows.predictions.study >= 0).any():
        columns.append(_Column("AUC per study", "study_auc"))
    return [
        *columns,
        # The competition's, where there is the label that it counts twice.
        _Column("log loss", "log_loss_weighted" if has_any else "log_loss", is_lower_better=True),
        _Column("calibration error", "ece", is_lower_better=True),
        _Column("trained M", "params", "{:.2f}", is_lower_better=True),
        _Column("minutes", "minutes", "{:.1f}", is_lower_better=True),
        _Column("images/s", "images_per_s", "{:.0f}"),
    ]


def _bests(rows: EvaluationSet, columns: Sequence[_Column]) -> dict[str, float]:
    """By key, the best value of a column; none of a single setting."""
    bests = {}
    for column in columns:
        if column.key != _MINUS_BEST and len(rows.settings) > 1:
            values = [column.value(s.runs) for s in rows.settings]
            if not np.isnan(values).all():  # of NaN alone, nanmax warns
                pick = np.nanmin if column.is_lower_better else np.nanmax
                bests[column.key] = float(pick(values))
    return bests


def _row(setting: SettingResult, columns: Sequence[_Column], bests: dict[str, float]) -> Row:
    # Of a single seed no difference from the best is given: resamples draw seeds too.
    seeds = [
        Row(
            f"seed {run.seed}",
            [Cell("") if c.key == _MINUS_BEST else c.cell(c.value([run])) for c in columns],
        )
        for run in setting.runs
    ]
    parts = seeds if len(seeds) > 1 else []
    same = setting.differs_from_best is False
    note = "best" if setting.is_best else "\u2248 best" if same else ""
    cells = [_cell(setting, column, bests) for column in columns]
    return Row(setting.name, cells, note, parts, f"{len(parts)} seeds")


def _cell(setting: SettingResult, column: _Column, bests: dict[str, float]) -> Cell:
    if column.key == _MINUS_BEST:
        difference = setting.mean(RANKING_METRIC) - bests.get(RANKING_METRIC, np.nan)
        if RANKING_METRIC not in setting.difference_from_best or np.isnan(difference):
            return Cell("")
        interval = setting.difference_from_best[RANKING_METRIC]
        return replace(column.cell(difference), below=interval_text(interval, "+.4f"))
    value = column.value(setting.runs)  # computed as for `bests`, so that it may be equal to it
    below = interval_text(setting.interval(column.key)) if column.key in setting.replicates else ""
    if len(setting.runs) > 1 and column.key in COMPARED_METRICS:
        below += f", sd {setting.spread(column.key):.4f}"
    return replace(column.cell(value), below=below, is_best=bests.get(column.key) == value)


def _ensemble_row(
    ensemble: EnsembleResult, columns: Sequence[_Column], bests: dict[str, float]
) -> Row:
    """Below the settings, which it is made of."""
    predictions, cells = ensemble.predictions, []
    metrics = predictions.every_metric
    for column in columns:
        if column.key == _MINUS_BEST:
            value = metrics[RANKING_METRIC] - bests.get(RANKING_METRIC, np.nan)
            interval = ensemble.difference_from_best.get(RANKING_METRIC, UNDEFINED)
            cell = replace(column.cell(value), below=interval_text(interval, "+.4f"))
        else:
            below = interval_text(ensemble.interval(column.key))
            cell = replace(column.cell(metrics.get(column.key, np.nan)), below=below)
        cells.append(cell)
    return Row(ensemble.name, cells, f"of {len(ensemble.members)}", is_last=True)


def _baseline_row(rows: EvaluationSet, columns: Sequence[_Column]) -> Row:
    metrics = rows.baseline() | {f"study_{k}": v for k, v in rows.baseline(study=True).items()}
    cells = [column.cell(metrics.get(column.key, np.nan)) for column in columns]
    return Row(BASELINE, cells, is_last=True)

"""The comparison's ranking: a forest plot whose lines are the rows of a table, one per setting.

Each row opens into its seeds. Columns beyond those to choose by are switched on by the reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ich.pages.description import decimals, interval_text, signed
from ich.pages.page import Block, Cell, Ranking, Row, Scale, Span
from ich.scoring.comparison import (
    BASELINE,
    RANKING_METRIC,
    Comparison,
    EvaluationSet,
    Run,
    SettingResult,
    ranked,
)
from ich.scoring.ensembles import EnsembleResult
from ich.scoring.equivalence import BEST, DIFFERENT, EQUAL, UNKNOWN
from ich.scoring.metrics import ANY
from ich.scoring.uncertainty import UNDEFINED, Interval

_MINUS_BEST, _VERDICT = "minus_best", "verdict"
# Entries of a run's result that tell what it cost, and the unit they are shown in.
_COSTS = {"params": 1e6, "minutes": 1, "images_per_s": 1}
# How a verdict looks, by its kind in `page.css`, and what the legend says of it.
_KINDS = {BEST: "best", EQUAL: "equal", UNKNOWN: "unknown", DIFFERENT: "different"}
_TOGETHER = "together"
_TICKS = 5  # of the plot's scale, at most
_MARGIN = 0.04  # of the plot's width, on either side


@dataclass(frozen=True)
class _Column:
    """key: a metric, as `study_<metric>` of studies, a cost, _MINUS_BEST or _VERDICT.
    form: of a number; None for as many decimals as the intervals allow."""

    heading: str
    key: str
    form: str | None = None
    is_lower_better: bool = False
    is_optional: bool = True

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


def ranking(comparison: Comparison) -> list[Block]:
    """A table for each set of rows that were scored: between sets, no difference is given."""
    blocks: list[Block] = []
    for rows in comparison.evaluation_sets:
        several = len(comparison.evaluation_sets) > 1
        where = f" On the rows of {rows.name}." if several else ""
        blocks.append(_Table(rows, comparison.margin).build(where))
    return blocks


class _Table:
    """Of settings that were scored on the same rows."""

    def __init__(self, rows: EvaluationSet, margin: float):
        self.rows, self.margin = rows, margin
        self.settings = ranked(rows.settings)
        self.columns = _columns(rows)
        self.bests = self._bests()
        self.forms = {c.key: c.form or self._form(c.key) for c in self.columns}
        self.low, self.high = self._limits()

    def build(self, where: str) -> Ranking:
        rows = [self._row(s) for s in self.settings]
        last = [self._ensemble_row(e) for e in self.rows.ensembles]
        baseline = self._baseline_row()
        caption = (
            f"AUC over all labels (micro).{where} Second lines, and lines of the plot: 95 % "
            f"intervals. The difference from the best is on the same patients."
        )
        headings = ["setting", *(c.heading for c in self.columns)]
        return Ranking(
            caption,
            headings,
            [*rows, *last, baseline],
            {c.heading for c in self.columns if c.is_optional},
            self._scale(),
        )

    # --- Numbers ---------------------------------------------------------------------------------

    def _bests(self) -> dict[str, float]:
        """By key, the best value of a column; none of a single setting."""
        bests = {}
        for column in self.columns:
            if column.key not in (_MINUS_BEST, _VERDICT) and len(self.settings) > 1:
                values = [column.value(s.runs) for s in self.settings]
                if not np.isnan(values).all():  # of NaN alone, nanmax warns
                    pick = np.nanmin if column.is_lower_better else np.nanmax
                    bests[column.key] = float(pick(values))
        return bests

    def _form(self, key: str) -> str:
        if key == _MINUS_BEST:
            intervals = [s.difference_from_best.get(RANKING_METRIC) for s in self.settings]
            return f"{{:+.{decimals(i for i in intervals if i)}f}}"
        return f"{{:.{decimals(s.interval(key) for s in self.settings)}f}}"

    def _cell(self, key: str, value: float, interval: Interval = UNDEFINED, more: str = "") -> Cell:
        if np.isnan(value):
            return Cell("")
        form = self.forms[key]
        below = interval_text(interval, form.strip("{:}"))
        return Cell(signed(form.format(value)), value, signed(f"{below}{more}"))

    # --- Rows ------------------------------------------------------------------------------------

    def _row(self, setting: SettingResult) -> Row:
        # Of a single seed no difference from the best is given: resamples draw seeds too.
        seeds = [
            Row(f"seed {run.seed}", [self._seed_cell(column, run) for column in self.columns])
            for run in setting.runs
        ]
        parts = seeds if len(seeds) > 1 else []
        cells = [self._setting_cell(setting, column) for column in self.columns]
        span = self._span(
            _KINDS[_verdict(setting)],
            setting.name,
            setting.mean(RANKING_METRIC),
            setting.interval(RANKING_METRIC),
            setting.values(RANKING_METRIC) if parts else [],
        )
        return Row(setting.name, cells, "", parts, f"{len(parts)} seeds", span=span)

    def _seed_cell(self, column: _Column, run: Run) -> Cell:
        if column.key in (_MINUS_BEST, _VERDICT):
            return Cell("")
        return self._cell(column.key, column.value([run]))

    def _setting_cell(self, setting: SettingResult, column: _Column) -> Cell:
        if column.key == _VERDICT:
            against = setting.against_best
            # Sorted by how likely it is the best.
            return Cell(against.verdict, against.chance_best) if against else Cell("")
        if column.key == _MINUS_BEST:
            difference = setting.difference_from_best.get(RANKING_METRIC)
            if difference is None:
                return Cell("")
            value = setting.mean(RANKING_METRIC) - self.bests.get(RANKING_METRIC, np.nan)
            return self._cell(_MINUS_BEST, value, difference)
        value = column.value(setting.runs)  # computed as for `bests`, so that it may be equal to it
        spread = setting.spread(column.key)
        more = "" if np.isnan(spread) or column.key in _COSTS else f"; sd {spread:.4f}"
        cell = self._cell(column.key, value, setting.interval(column.key), more)
        return replace(cell, is_best=self.bests.get(column.key) == value)

    def _ensemble_row(self, ensemble: EnsembleResult) -> Row:
        """Below the settings, which it is made of."""
        metrics, cells = ensemble.predictions.every_metric, []
        for column in self.columns:
            if column.key == _MINUS_BEST:
                value = metrics[RANKING_METRIC] - self.bests.get(RANKING_METRIC, np.nan)
                interval = ensemble.difference_from_best.get(RANKING_METRIC, UNDEFINED)
            else:
                value = metrics.get(column.key, np.nan)
                interval = ensemble.interval(column.key)
            cells.append(self._cell(column.key, value, interval))
        name, area = ensemble.name, ensemble.predictions.metrics[RANKING_METRIC]
        span = self._span(_TOGETHER, name, area, ensemble.interval(RANKING_METRIC), [])
        count = len(ensemble.members)
        note = f"of {count} networks" if count > 1 else f"of {ensemble.members[0]} alone"
        return Row(name, cells, note, is_last=True, span=span)

    def _baseline_row(self) -> Row:
        studies = self.rows.baseline(study=True)
        metrics = self.rows.baseline() | {f"study_{k}": v for k, v in studies.items()}
        cells = [self._cell(c.key, metrics.get(c.key, np.nan)) for c in self.columns]
        return Row(BASELINE, cells, is_last=True)

    # --- The plot --------------------------------------------------------------------------------

    def _limits(self) -> tuple[float, float]:
        """Of the plot's scale: all that is drawn lies within."""
        drawn = [ensemble.predictions.metrics[RANKING_METRIC] for ensemble in self.rows.ensembles]
        intervals = [s.interval(RANKING_METRIC) for s in self.settings]
        intervals += [e.interval(RANKING_METRIC) for e in self.rows.ensembles]
        drawn += [limit for i in intervals for limit in (i.low, i.high)]
        drawn += [value for s in self.settings for value in s.values(RANKING_METRIC)]
        finite = [value for value in drawn if np.isfinite(value)]
        if not finite:
            return 0.0, 1.0
        low, high = min(finite), max(finite)
        edge = _MARGIN * (high - low) or 0.01
        return low - edge, high + edge

    def _place(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def _span(
        self, kind: str, name: str, value: float, interval: Interval, dots: Iterable[float]
    ) -> Span | None:
        if np.isnan(value):
            return None
        form = self.forms[RANKING_METRIC].strip("{:}")
        between = interval_text(interval, form)
        each = ", ".join(f"{dot:{form}}" for dot in dots)
        text = f"{name}: AUC {value:{form}}{f' ({between})' if between else ''}"
        return Span(
            kind,
            self._place(value),
            (self._place(interval.low), self._place(interval.high)) if between else None,
            [self._place(dot) for dot in dots if np.isfinite(dot)],
            f"{text}; its seeds: {each}" if each else text,
        )

    def _scale(self) -> Scale:
        from matplotlib.ticker import MaxNLocator  # it knows round numbers

        values = MaxNLocator(_TICKS, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        places = max(2, -int(np.floor(np.log10(values[1] - values[0]) + 1e-9)))
        ticks = [(self._place(v), f"{v:.{places}f}") for v in values if self.low <= v <= self.high]
        best = self.bests.get(RANKING_METRIC)
        found = {_verdict(s) for s in self.settings}
        meanings = {
            BEST: "best",
            EQUAL: f"equal to it within {self.margin:g}",
            UNKNOWN: "not known to differ or to be equal",
            DIFFERENT: "different",
        }
        if not any(s.against_best for s in self.settings):
            meanings[UNKNOWN] = "not compared"
        kinds = {_KINDS[k]: text for k, text in meanings.items() if k in found}
        if self.rows.ensembles:
            kinds[_TOGETHER] = "several networks together"
        return Scale("AUC", ticks, None if best is None else self._place(best), kinds)


def _verdict(setting: SettingResult) -> str:
    if setting.against_best:
        return setting.against_best.verdict
    return BEST if setting.is_best else UNKNOWN


def _columns(rows: EvaluationSet) -> list[_Column]:
    # The few to choose by stand there at first. Every metric stands in the page's tables, and in
    # metrics.csv.
    has_any = ANY in rows.predictions.scored.labels
    columns = [_Column("AUC", RANKING_METRIC, is_optional=False)]
    if any(s.difference_from_best for s in rows.settings):
        columns.append(_Column("minus the best", _MINUS_BEST, is_optional=False))
    if any(s.against_best for s in rows.settings):
        columns.append(_Column("verdict", _VERDICT, "", is_optional=False))
    columns += [
        _Column("minutes", "minutes", "{:.1f}", is_lower_better=True, is_optional=False),
        _Column("trained M", "params", "{:.2f}", is_lower_better=True, is_optional=False),
        _Column("images/s", "images_per_s", "{:.0f}"),
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
    ]

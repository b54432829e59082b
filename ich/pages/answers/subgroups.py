"""The best setting in subgroups of patients: of the page, and as `subgroups.csv`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ich.base.config import DataConfig, UserError, select_value
from ich.base.records import SweepRecord
from ich.data.cohorts import CohortFiles
from ich.data.subgroups.reading import read_subgroups
from ich.pages.description import METRIC_NAMES, interval_text
from ich.pages.page import Block, Table, Text
from ich.scoring.comparison import Comparison, EvaluationSet, SettingResult
from ich.scoring.metrics import ANY
from ich.scoring.subgroups import SubgroupResult, subgroup_results
from ich.scoring.uncertainty import MIN_GROUPS, UNDEFINED


class Parting(NamedTuple):
    """What subgroups are made by: its name, and where that stands, in words."""

    name: str
    source: str


Found = list[tuple[SettingResult, Parting, SubgroupResult]]


def recorded_subgroups(records: Sequence[SweepRecord]) -> list[str]:
    """`report.subgroups` of the latest launches, of all sweeps together."""
    configs = [config for record in records for config in record.configs.values()]
    named = [select_value(config, "report.subgroups") for config in configs]
    return list(dict.fromkeys(str(n) for names in named if isinstance(names, list) for n in names))


def find_subgroups(comparison: Comparison, names: Sequence[str]) -> tuple[Found, list[str]]:
    """The best setting of each set of rows in each subgroup; and why some cannot be told.

    Args:
        comparison: of runs whose `data.labels` or `data.metadata` have the columns.
        names: of columns, or of what headers tell.
    """
    found: Found = []
    reasons: list[str] = []
    for rows in comparison.evaluation_sets if names else []:
        if rows.best is None:
            continue
        try:
            images = rows.predictions.image_id.tolist()
            subgroups = read_subgroups(_data(rows), names, images, _cohort(rows))
        except UserError as error:  # a report is not lost for a file that moved
            reasons.append(str(error))
            continue
        for name, subgroup in subgroups.items():
            results = subgroup_results(rows.best, subgroup.values, comparison.resamples)
            parting = Parting(name, subgroup.source)
            found += [(rows.best, parting, result) for result in results]
    return found, list(dict.fromkeys(reasons))


def _data(rows: EvaluationSet) -> DataConfig:
    # As plain values: a config of another version of ich has other keys.
    config = rows.settings[0].runs[0].config
    labels, metadata = (select_value(config, f"data.{key}") for key in ("labels", "metadata"))
    return DataConfig(labels=labels, metadata=metadata)


def _cohort(rows: EvaluationSet) -> CohortFiles | None:
    run = rows.settings[0].runs[0]
    folder = select_value(run.config, "data.cache_dir")
    return CohortFiles(Path(folder), run.paths.read_origin().cohort) if folder else None


def subgroups_table(found: Found) -> pd.DataFrame:
    """Every metric of every subgroup: `setting, rows, subgroup, group, patients, positives, level,
    metric, value, low, high, difference, difference_low, difference_high`."""
    names = ["setting", "rows", "subgroup", "group", "patients", "positives", "level", "metric"]
    names += ["value", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame([line for part in found for line in _lines(*part)], columns=names)


def _lines(
    setting: SettingResult, parting: Parting, result: SubgroupResult
) -> Iterator[tuple[object, ...]]:
    rows = setting.predictions.fingerprint
    about = (setting.name, rows, parting.name, result.name, result.patients, result.positives)
    for metric, value in result.value.items():
        level = "study" if metric.startswith("study_") else "slice"
        own = result.interval.get(metric, UNDEFINED)
        other = result.difference_interval.get(metric, UNDEFINED)
        difference = result.difference.get(metric)
        name = metric.removeprefix("study_")
        yield (*about, level, name, value, own.low, own.high, difference, other.low, other.high)


def subgroup_blocks(found: Found, reasons: Sequence[str]) -> Iterator[Block]:
    """A table for each parting; of the metrics those of the ranking, the rest is in the CSV."""
    for reason in reasons:
        yield Text(f"Not told: {reason}")
    for parting in dict.fromkeys(parting for _, parting, _ in found):
        lines = [_shown(s, r) for s, of, r in found if of == parting]
        caption = (
            f"By {parting.name} (from {parting.source}), the best setting. n: patients, of them "
            f"positive. In brackets 95 % intervals; last, minus all other subgroups. Subgroups "
            f"of fewer than {MIN_GROUPS} patients are not shown. Every metric is in subgroups.csv. "
            f"Of many subgroups, one in twenty differs by chance."
        )
        yield Table(caption, pd.DataFrame(lines))


def _shown(setting: SettingResult, result: SubgroupResult) -> dict[str, str]:
    metrics = {**METRIC_NAMES, f"auc_{ANY}": "AUC any", "brier": "Brier"}
    line = {"group": result.name, "n": f"{result.patients:,} ({result.positives:,})"}
    line["setting"] = setting.name
    for key, heading in metrics.items():
        if key in result.value:
            own = interval_text(result.interval.get(key, UNDEFINED))
            line[heading] = f"{result.value[key]:.4f}{f' ({own})' if own else ''}"
    difference = result.difference.get("auc")
    other = interval_text(result.difference_interval.get("auc", UNDEFINED), "+.4f")
    text = "" if difference is None else f"{difference:+.4f}{f' ({other})' if other else ''}"
    return {**line, "AUC minus others": text}

"""The comparison as one page, `report.html`: what can be decided from these runs, and what not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from ich.base.config import flatten_values
from ich.base.entry import public_command, without_paths
from ich.base.files import write_text
from ich.base.records import Hardware
from ich.base.results import SweepPaths
from ich.pages import figures
from ich.pages.against_report import against_the_report
from ich.pages.answers.patients import patients_needed
from ich.pages.answers.told_apart import told_apart
from ich.pages.columns import build_table
from ich.pages.description import METRIC_NAMES, cautions, interval_text
from ich.pages.forest import draw_forest
from ich.pages.hardest_cases import draw_hardest
from ich.pages.page import Block, Bullets, Heading, Link, Section, Table, Text, Verdict, to_html
from ich.pages.ranking import ranking
from ich.pages.writing.report import verdicts
from ich.scoring.comparison import (
    BASELINE,
    COMPARED_METRICS,
    Comparison,
    EvaluationSet,
    ranked,
)
from ich.scoring.effects import compute_effects
from ich.scoring.uncertainty import Interval


def write_page(
    comparison: Comparison,
    paths: SweepPaths,
    heading: Sequence[str],
    answers: Mapping[str, list[Block]],
) -> None:
    """Writes `report.html`, and its figures as PNG and SVG under `figures/`.

    Args:
        comparison: the runs.
        paths: the folder of the sweep, or of the report on several.
        heading: of `describe`.
        answers: what is said of subgroups and the like, by heading.
    """
    draw_forest(build_table(comparison), paths.figures)
    # The heading is written for Markdown, whose backticks would show here.
    compared = [text.replace("`", "") for text in heading]
    lead: list[Block] = [Verdict(" ".join(verdicts(comparison)), cautions(comparison))]
    compare: dict[str, list[Block]] = {"Not finished": _unfinished(comparison)}
    if comparison.settings:
        lead += ranking(comparison)
        compare |= {
            "What can be told apart": list(told_apart(comparison, paths.figures)),
            "How many patients it would take": list(patients_needed(comparison)),
            **answers,
            "What makes the difference": _effects(comparison),
            "Every metric": list(_metrics(comparison)),
            "Against the report": against_the_report(comparison),
        }
    why = figures.draw_all(comparison, paths.figures)
    why |= {"Hardest cases": _hardest_cases(comparison, paths)}
    how: dict[str, list[Block]] = {
        "What was compared": [Bullets(compared)],
        "Configuration": _configuration(comparison),
        "Provenance": _origin(comparison),
    }
    # A sweep over models alone has no effects of settings, one that failed no figures, and so on.
    sections: list[Section] = [
        (part, [b for name, blocks in topics.items() if blocks for b in (Heading(name), *blocks)])
        for part, topics in {"Compare": compare, "Why": why, "How": how}.items()
    ]
    facts = {
        "runs": f"{len(comparison.finished)} finished of {len(comparison.runs)}",
        "launched": ", ".join(r.started for r in comparison.records),
    }
    page = to_html(f"Comparison: {comparison.name}", facts, [s for s in sections if s[1]], lead)
    write_text(paths.page, page)


# --- What makes the difference ------------------------------------------------------------------


def _effects(comparison: Comparison) -> list[Block]:
    """Tables of what each varied setting is worth; nothing for a sweep over models alone."""
    if set(comparison.factors()) <= {"model"}:
        return []
    blocks: list[Block] = []
    for metric in COMPARED_METRICS:
        name = METRIC_NAMES[metric]
        lines = [
            {
                "setting": f"{e.factor} = {e.level}",
                "against": e.against,
                "pairs": e.pairs,
                f"difference in {name}": f"{e.mean:+.4f}",
                "95 % interval": interval_text(e.interval, "+.4f"),
                "verdict": _verdict(e.interval),
            }
            for e in compute_effects(comparison, metric)
        ]
        if lines:
            caption = (
                f"Mean difference in {name} over pairs of settings that differ in nothing else, on "
                f"the same patients."
            )
            blocks.append(Table(caption, pd.DataFrame(lines)))
    return blocks


def _verdict(interval: Interval) -> str:
    if np.isnan(interval.low):
        return ""
    if interval.contains_zero:
        return "cannot be told from none"
    return "higher" if interval.low > 0 else "lower"


# --- Every metric --------------------------------------------------------------------------------

_OVERALL = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "auc": "AUC micro",
    "auc_macro": "AUC macro",
    "ap_macro": "average precision",
    "log_loss": "log loss",
    "log_loss_weighted": "log loss, any twice",
    "brier": "Brier",
    "ece": "calibration error",
}
_PER_LABEL = {
    "auc": "AUC",
    "ap": "average precision",
    "accuracy": "accuracy",
    "sensitivity_at_90": "sensitivity at 90 % specificity",
    "sensitivity_at_95": "sensitivity at 95 % specificity",
    "specificity_at_90": "specificity at 90 % sensitivity",
    "specificity_at_95": "specificity at 95 % sensitivity",
    "f1": "best F1",
    "threshold": "its threshold",
}


def _metrics(comparison: Comparison) -> Iterator[Block]:
    yield Text(
        "Per slice, and per study: of each label a study's highest probability, positive if any "
        "slice is. F1 and its threshold are the best on the scored rows themselves, which "
        "flatters; the confusion below uses thresholds chosen on validation, which are other rows "
        "only where there is a test set. All in metrics.csv, and there with intervals, for which "
        "the best threshold is looked for in each resample anew."
    )
    for rows in comparison.evaluation_sets:
        where = f", rows of {rows.name}" if len(comparison.evaluation_sets) > 1 else ""
        yield from _metric_tables(rows, f"per slice{where}", study=False)
        if (rows.predictions.study >= 0).any():
            yield from _metric_tables(rows, f"per study{where}", study=True)


def _metric_tables(rows: EvaluationSet, where: str, study: bool) -> Iterator[Table]:
    baseline = rows.baseline(study)
    # Of all these tables, the first alone stands open.
    overall = _metric_table(rows, _OVERALL, study, baseline)
    yield Table(f"All labels, {where}", overall, folded=study)
    for label in rows.predictions.scored.labels:
        names = {f"{metric}_{label}": name for metric, name in _PER_LABEL.items()}
        yield Table(f"{label}, {where}", _metric_table(rows, names, study, baseline), folded=True)


def _metric_table(
    rows: EvaluationSet, names: dict[str, str], study: bool, baseline: dict[str, float]
) -> pd.DataFrame:
    lines = [
        {"setting": g.name, **{v: _number(g.mean(k, study)) for k, v in names.items()}}
        for g in ranked(rows.settings)
    ]
    last = {v: _number(baseline.get(k, np.nan)) for k, v in names.items()}
    return pd.DataFrame([*lines, {"setting": BASELINE, **last}])


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


# --- Cases and jobs ------------------------------------------------------------------------------


def _hardest_cases(comparison: Comparison, paths: SweepPaths) -> list[Block]:
    best = next((s.best for s in comparison.evaluation_sets if s.best), None)
    return [draw_hardest(best.runs[0], paths.figures)] if best else []


def _unfinished(comparison: Comparison) -> list[Block]:
    lines = [
        {
            "job": run.name,
            "status": run.result.status,
            "reason": without_paths(run.result.reason),
        }
        for run in comparison.runs
        if not run.is_finished
    ]
    return [Table("Jobs without a score, and why.", pd.DataFrame(lines))] if lines else []


# --- Where it comes from -------------------------------------------------------------------------

# Of a config: what names the run, and what is of the machine and of its user.
_LEFT_OUT = (
    *("job", "name", "data.root", "data.cache_dir", "data.labels", "data.metadata"),
    *("model.weights", "tracking", "sweep", "hydra"),
)


def _configuration(comparison: Comparison) -> list[Block]:
    """What all runs share, and what differs; no path of the machine."""
    configs = {run.name: flatten_values(run.config) for run in comparison.finished if run.config}
    keys = dict.fromkeys(key for values in configs.values() for key in values)
    # A run that lacks a key, as one of an earlier version, has an empty value of it.
    # `startswith` takes a tuple: with a group's name, all of its keys are left out.
    values_of = {
        key: {values.get(key, "") for values in configs.values()}
        for key in keys
        if not key.startswith(_LEFT_OUT)
    }
    shared = {key: values.pop() for key, values in values_of.items() if len(values) == 1}
    varied = [key for key in values_of if key not in shared]
    blocks: list[Block] = []
    if shared:
        frame = pd.DataFrame({"setting": list(shared), "value": list(shared.values())})
        blocks.append(Table("What all runs share", frame, folded=True))
    if varied:
        lines = [
            {"run": name, **{key: values.get(key, "") for key in varied}}
            for name, values in configs.items()
        ]
        blocks.append(Table("What differs", pd.DataFrame(lines), folded=True))
    return blocks


def _origin(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for record in comparison.records:
        hardware = record.provenance.hardware or Hardware()
        facts = {
            "sweep": record.name,
            "command": public_command(record.command),
            "started": record.started,
            "commit": record.provenance.commit or "unknown",
            "processor": hardware.processor,
            "GPUs": ", ".join(hardware.gpus) or "none",
            **record.provenance.versions,
        }
        frame = pd.DataFrame({"what": list(facts), "value": [str(v) for v in facts.values()]})
        blocks.append(Table(f"{record.name}: how it was made", frame))
        if len(comparison.records) == 1:  # of several sweeps the page stands in no sweep's folder
            blocks += [
                Link(
                    f"The data of cohort {key}: counts, balance, leak, pictures",
                    f"data-{key}/data_report.html",
                )
                for key in record.cohorts
            ]
    what = "Reporting checklist: what TRIPOD+AI and CLAIM 2024 ask, answered from the record"
    return [*blocks, Link(what, "checklist.html")]

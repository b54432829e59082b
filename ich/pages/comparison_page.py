"""The comparison as one page, `report.html`: what can be decided from these runs, and what not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from ich.base.config import flatten_values
from ich.base.files import write_text
from ich.base.results import SweepPaths
from ich.pages import figures
from ich.pages.page import Block, Bullets, Cell, Grid, Line, Link, Ranking, Section, Text, to_html
from ich.scoring.comparison import (
    BASELINE,
    COMPARED_METRICS,
    RANKING_METRIC,
    Comparison,
    EvaluationSet,
    Run,
    SettingResult,
)
from ich.scoring.effects import effects
from ich.scoring.findings import (
    REPORT_METRICS,
    REPORT_TABLE_1,
    REPORT_TABLE_2,
    SIMILAR,
    imagenet_trend,
    judge,
)
from ich.scoring.metrics import ANY
from ich.scoring.uncertainty import MIN_GROUPS, Interval

_NAMES = {"auc": "AUC", "accuracy": "accuracy"}


def write_page(comparison: Comparison, place: SweepPaths, heading: Sequence[str]) -> None:
    """Writes `report.html`, and its figures as PNG and SVG under `figures/`.

    Args:
        comparison: the runs.
        place: the folder of the sweep, or of the report on several.
        heading: of `describe`.
    """
    pictures = figures.draw_all(comparison, place.figures)
    sections: list[Section] = [
        ("What was compared", [Bullets([text.replace("`", "") for text in heading])])
    ]
    if comparison.settings:
        sections += [
            ("Ranking", _ranking(comparison)),
            ("What can be told apart", [Bullets(list(_told(comparison)))]),
        ]
        if worth := _effects(comparison):
            sections.append(("What makes the difference", worth))
        sections.append(("Every metric", _metrics(comparison)))
        if against := _against_the_report(comparison):
            sections.append(("Against the report", against))
    if pictures:
        sections.append(("Figures", list(pictures)))
    if best := next((s.best for s in comparison.evaluation_sets if s.best), None):
        shown = figures.draw_hardest(best.runs[0], place.figures)
        sections.append(("Hardest cases", [Text(shown) if isinstance(shown, str) else shown]))
    if unfinished := [r for r in comparison.runs if not r.is_finished]:
        sections.append(("Not finished", [_unfinished(unfinished)]))
    sections += [("Configuration", _configuration(comparison)), ("Provenance", _origin(comparison))]
    facts = {
        "runs": f"{len(comparison.finished)} finished of {len(comparison.runs)}",
        "launched": ", ".join(str(r["started"]) for r in comparison.records),
    }
    write_text(place.page, to_html(f"Comparison: {comparison.name}", facts, sections))


# --- What the reader must know first -------------------------------------------------------------


def describe(comparison: Comparison) -> list[str]:
    """What a table's reader must know: the cohort, the protocol, and what it does not show."""
    finished = comparison.finished
    if not finished:
        return ["No job has finished."]
    configs = [r.config for r in finished if r.config is not None]
    results = [r.result for r in finished]

    def setting(key: str) -> str:
        return _either(OmegaConf.select(c, key) for c in configs)

    distinct = {json.dumps(r["cohort"], sort_keys=True): r["cohort"] for r in results}
    lines = [
        f"Protocol `{c['protocol']}` on `{setting('data.source')}`: {cohort_text(c)}. "
        f"{scoring_text(c)}"
        for c in distinct.values()
    ]
    starts = _either(_start(c) for c in configs)
    lines.append(
        f"{setting('train.epochs')} epochs, batch {setting('train.batch_size')}, "
        f"{_either(_optimizer(c) for c in configs)}, {_either(_pixels(c) for c in configs)}, "
        f"{starts}, seed {setting('seed')}. Every metric is that of the epoch with the best "
        f"validation {setting('train.monitor')}. {_either(_computed(r) for r in results)}."
    )
    lines += _about_intervals(comparison)
    if "rsna" not in setting("data.source"):
        lines.append(
            "The report's columns are its own results on the RSNA set, for orientation; "
            "nothing here compares with them."
        )
    return lines


def _about_intervals(comparison: Comparison) -> list[str]:
    if not comparison.resamples or not comparison.settings:
        why = "" if comparison.settings else " (no run has predictions that can be read)"
        return [f"Intervals were not computed{why}: small differences mean nothing."]
    lines = []
    for rows in comparison.evaluation_sets:
        found = rows.predictions
        count, images = found.scored.group_count, len(set(found.image_id.tolist()))
        where = f" (the rows of {rows.name})" if len(comparison.evaluation_sets) > 1 else ""
        unit = (
            f"{count:,} patients"
            + (f", too few for any (at least {MIN_GROUPS})" if count < MIN_GROUPS else "")
            if found.unit == "patients"
            else f"{count:,} images: patients are unknown, and their slices resemble each other, "
            f"so the true intervals are wider"
        )
        lines.append(
            f"Intervals are 95 %, from {comparison.resamples:,} bootstrap resamples of {unit} "
            f"({len(found.image_id):,} scored rows of {images:,} images){where}."
        )
    seeds = {len(g.runs) for g in comparison.settings}
    if 1 in seeds:
        lines.append(
            "One seed per setting: intervals cover the choice of patients, not the luck of a "
            "training. seed=0,1,2 would show that too."
        )
    if max(seeds) > 1:
        lines.append(
            "Several seeds per setting: scores are means over them, and intervals cover patients "
            "and seeds, the latter as well as so few can."
        )
    if len(comparison.evaluation_sets) > 1:
        lines.append(
            f"The runs were scored on {len(comparison.evaluation_sets)} different sets of rows. "
            f"Within each they are paired; between them the comparison is unpaired, and no "
            f"difference is given."
        )
    return lines


def _either(values: Iterable[Any]) -> str:
    """The value that all share, or all the values there are."""
    return " or ".join(dict.fromkeys(str(v) for v in values))


_STEPS = {
    "oversampled": "rows after oversampling",
    "undersampled": "after undersampling negatives",
    "subset": "in the subset",
    "train": "for training",
    "val": "for validation",
    "test": "for testing",
}


def cohort_text(c: dict[str, Any]) -> str:
    """How many images and rows a cohort has; of its summary in a run's result."""
    parts = [f"{c['images']:,} images"]
    parts += [f"{c[step]:,} {text}" for step, text in _STEPS.items() if step in c]
    if c["quarantined"]:
        parts.append(f"{c['quarantined']} undecodable and left out")
    return ", ".join(parts)


def scoring_text(c: dict[str, Any]) -> str:
    """Which rows chose and which scored, and how many of those were seen before."""
    if c["scored"] == "val":
        text = "Selected and scored on the same validation rows: there is no test set. "
    else:
        text = "Epochs were chosen on the validation rows, and scored on the test rows. "
    known = {k: v for k, v in c["leak"].items() if v is not None}
    if known and not any(known.values()):
        return f"{text}No {' and no '.join(known)} of the scored rows stands in another set."
    shares = ", ".join(f"{v:.1%} the {k}" for k, v in known.items())
    text += f"Of the scored rows, these share with the training rows: {shares}."
    if unknown := [k for k, v in c["leak"].items() if v is None]:
        text += f" Unknown for {' and '.join(unknown)}: data.metadata or headers would tell."
    return text


def _computed(result: dict[str, Any]) -> str:
    """On what, and in which precision."""
    return ", ".join(str(result[k]) for k in ("device", "precision") if result.get(k))


def _optimizer(cfg: Any) -> str:
    name = str(OmegaConf.select(cfg, "optimizer._target_")).rsplit(".", 1)[-1]
    return f"{name} {float(OmegaConf.select(cfg, 'optimizer.lr')):g}"


def _pixels(cfg: Any) -> str:
    size = OmegaConf.select(cfg, "data.image_size")
    return f"{size} px" if size else "each model's own image size"


def _start(cfg: Any) -> str:
    if OmegaConf.select(cfg, "model.weights"):
        return "weights from a local file"
    if OmegaConf.select(cfg, "model.pretrained"):
        return "ImageNet weights"
    return "random initialization (no pretrained weights)"


# --- Ranking -------------------------------------------------------------------------------------


def _ranking(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for rows in comparison.evaluation_sets:
        where = (
            f" Scored on the rows of {rows.name}." if len(comparison.evaluation_sets) > 1 else ""
        )
        caption = (
            f"Click a heading to sort.{where} Second lines: 95 % intervals; for the difference, "
            f"this setting minus the best, on the same patients. \u2248: not distinguishable from "
            f"the best."
        )
        columns = ["setting", *(c for c, _ in _columns(rows))]
        bests = _bests(rows)
        lines = [_line(g, rows, bests) for g in rows.settings]
        lines.sort(key=lambda line: -np.nan_to_num(line.cells[0].value or np.nan, nan=-1))
        lines.append(_baseline_line(rows))
        blocks.append(Ranking(caption, columns, lines))
    return blocks


def _columns(rows: EvaluationSet) -> list[tuple[str, str]]:
    """Heading and key of each column; a key is a metric, a result's entry, or `minus_best`."""
    labels = rows.predictions.scored.labels
    found = [("AUC", "auc"), ("minus the best", "minus_best"), ("accuracy", "accuracy")]
    if ANY in labels:
        found += [
            ("AUC any", f"auc_{ANY}"),
            ("sensitivity at 90 % specificity, any", f"sensitivity_at_90_{ANY}"),
        ]
    found += [("AUC macro", "auc_macro"), ("average precision", "ap_macro")]
    if (rows.predictions.study >= 0).any():
        found.append(("AUC per study", "study_auc"))
    found += [
        ("log loss", "log_loss_weighted" if ANY in labels else "log_loss"),
        ("calibration error", "ece"),
        ("trained M", "params"),
        ("minutes", "minutes"),
        ("images/s", "images_per_s"),
    ]
    return found


_LOWER = ("log_loss", "log_loss_weighted", "ece", "brier", "params", "minutes")
_COSTS = {"params": "{:.2f}", "minutes": "{:.1f}", "images_per_s": "{:.0f}"}


def _value(runs: Sequence[Run], key: str) -> float:
    """The mean over runs of a metric or of a result's entry."""
    values = []
    for run in runs:
        assert run.predictions is not None
        if key in _COSTS:
            values.append(run.result[key] / (1e6 if key == "params" else 1))
        elif key.startswith("study_"):
            values.append(run.predictions.study_metrics.get(key.removeprefix("study_"), np.nan))
        else:
            values.append(run.predictions.metrics.get(key, np.nan))
    return float(np.mean(values))


def _bests(rows: EvaluationSet) -> dict[str, float]:
    bests = {}
    for _, key in _columns(rows):
        if key != "minus_best" and len(rows.settings) > 1:
            values = [_value(g.runs, key) for g in rows.settings]
            if not np.isnan(values).all():
                bests[key] = float((np.nanmin if key in _LOWER else np.nanmax)(values))
    return bests


def _line(group: SettingResult, rows: EvaluationSet, bests: dict[str, float]) -> Line:
    cells = [_cell(group, key, bests) for _, key in _columns(rows)]
    parts = []
    if len(group.runs) > 1:
        for run in group.runs:
            own = [
                Cell("") if key == "minus_best" else _plain_cell(_value([run], key), key)
                for _, key in _columns(rows)
            ]
            parts.append(Line(f"seed {run.seed}", own))
    note = "best" if group.is_best else "\u2248 best" if group.differs_from_best is False else ""
    return Line(group.name, cells, note, parts, f"{len(parts)} seeds")


def _cell(group: SettingResult, key: str, bests: dict[str, float]) -> Cell:
    if key == "minus_best":
        mean = group.mean(RANKING_METRIC) - bests.get(RANKING_METRIC, np.nan)
        if RANKING_METRIC not in group.difference_from_best or np.isnan(mean):
            return Cell("")
        return Cell(
            f"{mean:+.4f}", mean, _between(group.difference_from_best[RANKING_METRIC], "+.4f")
        )
    value = _value(group.runs, key)
    cell = _plain_cell(value, key)
    below = _between(group.interval(key)) if key in group.replicates else ""
    if len(group.runs) > 1 and key in COMPARED_METRICS:
        below += f", sd {group.spread(key):.4f}"
    return replace(cell, below=below, is_best=bests.get(key) == value)


def _plain_cell(value: float, key: str) -> Cell:
    if np.isnan(value):
        return Cell("")
    return Cell(_COSTS.get(key, "{:.4f}").format(value), value)


def _between(interval: Interval, form: str = ".3f") -> str:
    if np.isnan(interval.low):
        return ""
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _baseline_line(rows: EvaluationSet) -> Line:
    known = rows.baseline() | {f"study_{k}": v for k, v in rows.baseline(study=True).items()}
    cells = [_plain_cell(known.get(key, np.nan), key) for _, key in _columns(rows)]
    return Line(BASELINE, cells, is_last=True)


# --- Sentences -----------------------------------------------------------------------------------


def _told(comparison: Comparison) -> Iterable[str]:
    for rows in comparison.evaluation_sets:
        best = rows.best
        if best is None:
            yield "No setting has an AUC: there is no best."
            continue
        where = f"On the rows of {rows.name}: " if len(comparison.evaluation_sets) > 1 else ""
        between = _between(best.interval(RANKING_METRIC))
        yield (
            f"{where}{best.name} has the highest AUC, {best.mean(RANKING_METRIC):.4f}"
            + (f" ({between})." if between else ".")
        )
        others = [g for g in rows.settings if g is not best]
        if not others:
            continue
        if not best.replicates:
            yield "Without intervals, nothing says whether that is more than chance."
            continue
        same = [g.name for g in others if g.differs_from_best is False]
        worse = [g.name for g in others if g.differs_from_best]
        if same:
            yield f"Not distinguishable from it: {', '.join(same)}."
        if worse:
            yield f"Lower, by more than chance among patients explains: {', '.join(worse)}."
        yield (
            "The best was picked for its score, which flatters it; and of many comparisons at "
            "95 %, one in twenty errs."
        )


def _effects(comparison: Comparison) -> list[Block]:
    """Tables of what each varied setting is worth; nothing for a sweep over models alone."""
    if set(comparison.factors()) <= {"model"}:
        return []
    blocks: list[Block] = []
    for metric in COMPARED_METRICS:
        found = list(effects(comparison, metric))
        if not found:
            continue
        frame = pd.DataFrame(
            {
                "setting": [f"{e.factor} = {e.level}" for e in found],
                "against": [e.against for e in found],
                "pairs": [e.pairs for e in found],
                f"difference in {_NAMES[metric]}": [f"{e.mean:+.4f}" for e in found],
                "95 % interval": [_between(e.interval, "+.4f") for e in found],
                "verdict": [_verdict(e.interval) for e in found],
            }
        )
        caption = (
            f"Mean difference in {_NAMES[metric]} over pairs of settings that differ in nothing "
            f"else, on the same patients."
        )
        blocks.append(Grid(caption, frame))
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


def _metrics(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "Per slice, and per study: of each label a study's highest probability, positive if "
            "any slice is. F1 and its threshold are the best on the scored rows themselves, which "
            "flatters; the confusion below uses thresholds chosen on validation, which are other "
            "rows only where there is a test set. All in metrics.csv, and there with intervals: "
            "accuracy, exact match, AUC, average precision, log loss and Brier."
        )
    ]
    for rows in comparison.evaluation_sets:
        where = f", rows of {rows.name}" if len(comparison.evaluation_sets) > 1 else ""
        for study in (False, True):
            if study and not (rows.predictions.study >= 0).any():
                continue
            level = "study" if study else "slice"
            baseline = rows.baseline(study)
            table = _metric_table(rows, _OVERALL, study, baseline)
            blocks.append(Grid(f"All labels, per {level}{where}", table, folded=study))
            for label in rows.predictions.scored.labels:
                names = {f"{k}_{label}": v for k, v in _PER_LABEL.items()}
                table = _metric_table(rows, names, study, baseline)
                blocks.append(Grid(f"{label}, per {level}{where}", table, folded=True))
    return blocks


def _metric_table(
    rows: EvaluationSet, names: dict[str, str], study: bool, baseline: dict[str, float]
) -> pd.DataFrame:
    lines = [
        {"setting": g.name, **{v: _number(g.mean(k, study)) for k, v in names.items()}}
        for g in rows.settings
    ]
    last = {v: _number(baseline.get(k, np.nan)) for k, v in names.items()}
    return pd.DataFrame([*lines, {"setting": BASELINE, **last}])


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


# --- Against the report --------------------------------------------------------------------------


def _against_the_report(comparison: Comparison) -> list[Block]:
    """Where the report's networks stand once each on the same rows; else nothing."""
    for rows in comparison.evaluation_sets:
        by_model = rows.setting_per_model()
        ours = {k: g for k, g in by_model.items() if k in REPORT_TABLE_2}
        if len(ours) >= 2:
            return [*_report_tables(ours), *_findings(ours), *_trends(ours)]
    return []


def _report_tables(ours: dict[str, SettingResult]) -> list[Block]:
    lines = []
    for model, (accuracy, auc) in REPORT_TABLE_2.items():
        top1, _, millions = REPORT_TABLE_1[model]
        line: dict[str, Any] = {
            "model": model,
            "ImageNet top-1": f"{top1:.3f}",
            "ImageNet M": f"{millions:g}",
            "report's accuracy": f"{accuracy:.4f}",
            "report's AUC": f"{auc:.4f}",
            "trained M": "",
            "accuracy": "",
            "AUC": "",
            "accuracy - report's": "",
            "AUC - report's": "",
        }
        if group := ours.get(model):
            line |= {
                "trained M": f"{group.runs[0].result['params'] / 1e6:.2f}",
                "accuracy": f"{group.mean('accuracy'):.4f}",
                "AUC": f"{group.mean('auc'):.4f}",
                "accuracy - report's": f"{group.mean('accuracy') - accuracy:+.4f}",
                "AUC - report's": f"{group.mean('auc') - auc:+.4f}",
            }
        lines.append(line)
    caption = (
        "The report's Tables 1 and 2 beside ours. It counts the parameters of the ImageNet "
        "networks; trained are fewer, since the head is one layer. Its AUC is presumably "
        "micro-averaged; it does not say. Unless ours were trained and scored on the RSNA set, the "
        "differences are between data sets, not between methods."
    )
    return [Grid(caption, pd.DataFrame(lines))]


def _findings(ours: dict[str, SettingResult]) -> list[Block]:
    blocks: list[Block] = []
    for metric in REPORT_METRICS:
        replicates = {k: g.replicates[metric] for k, g in ours.items() if g.replicates}
        if not replicates:
            return [Text("Its findings are not tested: that takes intervals.")]
        verdicts = judge(metric, replicates)
        frame = pd.DataFrame(
            {
                "the report's finding": [v.finding.text for v in verdicts],
                "here": [v.ours for v in verdicts],
                "because": [v.why for v in verdicts],
                "in the report's own table": [v.theirs for v in verdicts],
            }
        )
        caption = (
            f"By {_NAMES[metric]}. A finding holds if the intervals of all its differences say so, "
            f"and cannot be told if one holds zero (several at once are not corrected for). "
            f"Similar: closer than {SIMILAR[metric]:.4f}, a third of the distance from the "
            f"report's worst to its best."
        )
        blocks.append(Grid(caption, frame))
    return blocks


def _trends(ours: dict[str, SettingResult]) -> list[Block]:
    lines = []
    for metric in REPORT_METRICS:
        scores = {k: g.mean(metric) for k, g in ours.items()}
        replicates = {k: g.replicates[metric] for k, g in ours.items() if g.replicates}
        trend = imagenet_trend(metric, scores, replicates)
        if trend:
            lines.append(
                f"Rank correlation (Spearman) of ImageNet top-1 accuracy with our {_NAMES[metric]} "
                f"over {trend.n} networks: {trend.correlation:+.2f} "
                f"({_between(trend.interval, '+.2f')} over patients and seeds, for these "
                f"networks); in the report's Table 2 {trend.theirs:+.2f}. So few networks say "
                f"little of others."
            )
    return [Bullets(lines)] if lines else []


# --- Where it comes from -------------------------------------------------------------------------


# In quotes a path may hold blanks.
_PATH = re.compile(r"(?<![\w.:/])~?(?:/[^\s/'\",;:=]+(?: [^\s/'\",;:=]+)*)+/([^\s/'\",;:=]+)")


def without_paths(text: str) -> str:
    """Of each absolute path its last part: the rest tells of the machine, and of its user."""
    return _PATH.sub(r"\1", text)


def _unfinished(runs: Sequence[Run]) -> Grid:
    frame = pd.DataFrame(
        {
            "job": [r.name for r in runs],
            "status": [r.result["status"] for r in runs],
            "reason": [without_paths(str(r.result.get("reason", ""))) for r in runs],
        }
    )
    return Grid("Jobs without a score, and why.", frame)


_LEFT_OUT = (
    *("job", "name", "data.root", "data.cache_dir", "data.labels", "data.metadata"),
    *("model.weights", "tracking", "sweep", "hydra"),
)


def _configuration(comparison: Comparison) -> list[Block]:
    """What all runs share, and what differs; no path of the machine."""
    flat = {
        r.name: flatten_values(OmegaConf.to_container(r.config))
        for r in comparison.finished
        if r.config
    }
    keys = dict.fromkeys(k for values in flat.values() for k in values)
    kept = [k for k in keys if not k.startswith(_LEFT_OUT)]
    shared = {k: {v.get(k, "") for v in flat.values()} for k in kept}
    same = {k: v.pop() for k, v in shared.items() if len(v) == 1}
    differ = [k for k in kept if k not in same]
    blocks: list[Block] = []
    if same:
        frame = pd.DataFrame({"setting": list(same), "value": list(same.values())})
        blocks.append(Grid("What all runs share", frame, folded=True))
    if differ:
        lines = [
            {"run": name, **{k: values.get(k, "") for k in differ}} for name, values in flat.items()
        ]
        blocks.append(Grid("What differs", pd.DataFrame(lines), folded=True))
    return blocks


def _origin(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for record in comparison.records:
        made = record.get("provenance", {})
        hardware = made.get("hardware", {})
        facts = {
            "sweep": record["name"],
            "command": without_paths(record["command"]),
            "started": record["started"],
            "commit": made.get("git", {}).get("commit", "unknown"),
            "processor": hardware.get("processor", "unknown"),
            "GPUs": ", ".join(map(str, hardware.get("gpus", []))) or "none",
            **made.get("versions", {}),
        }
        frame = pd.DataFrame({"what": list(facts), "value": [str(v) for v in facts.values()]})
        blocks.append(Grid(f"{record['name']}: how it was made", frame))
        if len(comparison.records) == 1:
            blocks += [
                Link(f"The data of cohort {key}: counts, balance, leak, pictures", target)
                for key in record.get("cohorts", [])
                for target in [f"data-{key}/data_report.html"]
            ]
    return blocks

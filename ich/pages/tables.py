"""Finished runs -> the comparison: table (CSV, Markdown, LaTeX, terminal), figures and report.html.

`python -m ich.report multirun_reports/<name>` makes it again, from the files alone; several folders
and `-o DIR` compare several sweeps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.measure import Measurement
from rich.table import Table

from ich.base.config import UserError
from ich.base.files import write_text
from ich.base.records import FINISHED, RunResult, Scores
from ich.base.results import SweepPaths
from ich.base.terminal import console
from ich.pages.comparison_page import write_page
from ich.pages.description import describe, without_paths
from ich.scoring.comparison import (
    BASELINE,
    COMPARED_METRICS,
    RANKING_METRIC,
    Comparison,
    SettingResult,
    load_comparison,
)
from ich.scoring.findings import REPORT_TABLE_2
from ich.scoring.uncertainty import RESAMPLES

log = logging.getLogger(__name__)

# Other people's scripts rely on these names and their order; auc_<label> follows auc.
_BEFORE = ["job", "model", "status", "reason", "accuracy", "auc"]
_AFTER = [
    "auc_macro",
    "auc_top",
    "params",
    "params_imagenet",
    "best_epoch",
    "minutes",
    "images_per_s",
    "report_accuracy",
    "report_auc",
    "scored_on",
    "val_accuracy",
    "val_auc",
    "leak_image",
    "leak_study",
    "leak_patient",
    "precision",
    # Per run, from its predictions:
    "seed",
    "exact_match",
    "ap_macro",
    "log_loss",
    "log_loss_weighted",
    "brier",
    "ece",
    "study_auc",
    # Per setting, over its seeds:
    "setting",
    "rows",
    "seeds",
    "auc_sd",
    "accuracy_sd",
    *(
        f"{m}_{k}"
        for m in COMPARED_METRICS
        for k in ("low", "high", "minus_best_low", "minus_best_high")
    ),
    "told_from_best",
]
_FROM_PREDICTIONS = ("exact_match", "ap_macro", "log_loss", "log_loss_weighted", "brier", "ece")
_LOWER = ["params", "minutes"]
_COSTS = [*_LOWER, "images_per_s"]  # which compare whatever was scored
SAME = "\u2248"
_MARKS = (
    f"Intervals are 95 %, by bootstrap over patients, or over images where those are unknown. "
    f"{SAME}: not distinguishable from the best, since the interval of the difference holds zero."
)
_SAME_IN_A_SETTING = (
    *("model", "status", "params", "params_imagenet", "report_accuracy", "report_auc"),
    *("scored_on", "precision", "setting", "rows", "told_from_best"),
)
_NO_SCORE = ("_low", "_high", "_sd")
_IF_ANY = ("auc_low", "auc_sd")  # columns that are shown only if there is something in them

# Heading, source column, format: what people read. The CSV holds all columns, unrounded.
_SHOWN: list[tuple[str, str, str]] = [
    ("accuracy", "accuracy", "{:.4f}"),
    ("AUC", "auc", "{:.4f}"),
    ("95 % interval", "auc_low", "{:.3f} to {:.3f}"),
    ("sd of seeds", "auc_sd", "{:.4f}"),
    ("AUC any", "auc_any", "{:.4f}"),  # where there is such a label
    ("AUC macro", "auc_macro", "{:.4f}"),
    ("trained M", "params", "{:.2f}"),
    ("ImageNet M", "params_imagenet", "{:.1f}"),
    ("best epoch", "best_epoch", "{:.0f}"),
    ("minutes", "minutes", "{:.1f}"),
    ("images/s", "images_per_s", "{:.0f}"),
    ("report accuracy", "report_accuracy", "{:.4f}"),
    ("report AUC", "report_auc", "{:.4f}"),
]
# What a narrow terminal leaves out, first to last; the files always have everything.
_OPTIONAL = [
    "auc_macro",
    "params_imagenet",
    "minutes",
    "images_per_s",
    "report_accuracy",
    "best_epoch",
    "report_auc",
]


def compare(
    *sweeps: SweepPaths,
    out: Path | None = None,
    resamples: int = RESAMPLES,
    page: bool = True,
) -> pd.DataFrame:
    """Writes `comparison.csv`, `.md` and `.tex`, `metrics.csv`, figures and `report.html`, and
    prints the table.

    Args:
        sweeps: their folders.
        out: where to; the sweep's own folder if there is one sweep.
        resamples: of the bootstrap; 0 for no intervals.
        page: also figures and `report.html`.

    Returns:
        The table as written: one row per job of the latest launch, then rows without a job, of
        settings with several seeds and of "always negative".

    Raises:
        UserError: a folder holds no sweep, or there are several and no `out`.
    """
    place = report_folder(sweeps, out)
    comparison = load_comparison(sweeps, resamples)
    table = build_table([replace(r.result, job=r.name) for r in comparison.runs], comparison)
    place.root.mkdir(parents=True, exist_ok=True)
    heading = describe(comparison)
    write_text(place.csv, table.to_csv(index=False))
    write_text(place.metrics, metrics_table(comparison).to_csv(index=False))
    write_text(place.latex, _latex(comparison, heading))
    write_text(place.markdown, _markdown(comparison, heading, table, page))
    _print(place, comparison.name, heading, table)
    if page:
        try:
            write_page(comparison, place, heading)
        except Exception:  # the tables are written, and a sweep's status is that of its jobs
            log.exception("report.html could not be made; the tables are whole")
    return table


def report_folder(sweeps: Sequence[SweepPaths], out: Path | None) -> SweepPaths:
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


def columns(results: list[RunResult]) -> list[str]:
    """The columns of a table of these results: one AUC for each label that any of them has."""
    labels = dict.fromkeys(k for r in results if r.fit for k in r.fit.labels)
    return [*_BEFORE, *(f"auc_{k}" for k in labels), *_AFTER]


def build_table(results: list[RunResult], comparison: Comparison | None = None) -> pd.DataFrame:
    """One row per result, in order, in `columns`; what a job does not have is empty."""
    rows = [_row(result) for result in results]
    if comparison:
        for row, run in zip(rows, comparison.runs, strict=True):
            if run.predictions is not None:
                row |= {k: run.predictions.metrics.get(k) for k in _FROM_PREDICTIONS}
                row |= {
                    "seed": run.seed,
                    "study_auc": run.predictions.study_metrics.get(RANKING_METRIC),
                }
            if group := comparison.setting_of(run):
                row |= _uncertainty(group)
        rows += [_mean_row(g, rows, comparison) for g in comparison.settings if len(g.runs) > 1]
    # One row per set of validation rows: a sweep over the cohort has several.
    seen: list[Scores] = []
    for result in results:
        if result.fit and result.fit.always_negative not in seen:
            seen.append(result.fit.always_negative)
            where = f"the rows of {result.job}" if len(seen) > 1 else ""
            rows.append({"model": BASELINE, "reason": where, **result.fit.always_negative})
    table = pd.DataFrame(rows, columns=columns(results))
    whole = ["params", "params_imagenet", "best_epoch", "seed", "seeds"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _uncertainty(group: SettingResult) -> dict[str, Any]:
    """Columns that all runs of a setting share."""
    found: dict[str, Any] = {"setting": group.name, "seeds": len(group.runs)}
    found["rows"] = group.predictions.fingerprint
    for metric in COMPARED_METRICS:
        interval = group.interval(metric)
        found |= {f"{metric}_sd": group.spread(metric)}
        found |= {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        if metric in group.difference_from_best:
            low, high = (
                group.difference_from_best[metric].low,
                group.difference_from_best[metric].high,
            )
            found |= {f"{metric}_minus_best_low": low, f"{metric}_minus_best_high": high}
    told = group.differs_from_best
    found["told_from_best"] = "best" if group.is_best else {True: "yes", False: "no"}.get(told)  # type: ignore[arg-type]
    return found


def _mean_row(
    group: SettingResult, rows: list[dict[str, Any]], comparison: Comparison
) -> dict[str, Any]:
    """The mean over the seeds of a setting."""
    members = [
        row
        for row, run in zip(rows, comparison.runs, strict=False)
        if any(run is r for r in group.runs)
    ]
    means = pd.DataFrame(members).select_dtypes("number").mean(skipna=False)
    numbers = {str(k): v for k, v in means.items()}
    same = {k: members[0].get(k) for k in _SAME_IN_A_SETTING}
    reason = f"mean of {len(group.runs)} seeds"
    return {**numbers, **same, "reason": reason, "seed": None, "best_epoch": None}


def metrics_table(comparison: Comparison) -> pd.DataFrame:
    """Every metric of every setting: `setting, seeds, rows, level, metric, value, sd, low, high`.

    `rows` tells which were scored on the same rows, `level` is slice or study, `value` the mean
    over seeds and `sd` its standard deviation; `low` and `high` are the 95 % interval.
    """
    lines = []
    for rows in comparison.evaluation_sets:
        for group in rows.settings:
            for level in ("slice", "study"):
                study = level == "study"
                known = group.predictions.study_metrics if study else group.predictions.metrics
                for metric in known:
                    interval = group.interval(f"study_{metric}" if study else metric)
                    lines.append(
                        {
                            "setting": group.name,
                            "seeds": len(group.runs),
                            "rows": rows.fingerprint,
                            "level": level,
                            "metric": metric,
                            "value": group.mean(metric, study),
                            "sd": float("nan") if study else group.spread(metric),
                            "low": interval.low,
                            "high": interval.high,
                        }
                    )
    names = ["setting", "seeds", "rows", "level", "metric", "value", "sd", "low", "high"]
    return pd.DataFrame(lines, columns=names)


def _row(result: RunResult) -> dict[str, Any]:
    model = result.model or result.job.split(",")[0]
    accuracy, auc = REPORT_TABLE_2.get(model, (None, None))
    row = {
        **result.to_json(),
        "model": model,
        "report_accuracy": accuracy,
        "report_auc": auc,
    }
    if result.fit:
        cohort = result.fit.cohort
        row |= {"scored_on": cohort.scored, **{f"leak_{k}": v for k, v in cohort.leak.items()}}
    return row


def best_cells(table: pd.DataFrame) -> set[tuple[int, str]]:
    """(row, column) of the best value of each column over the finished jobs; ties are all best."""
    jobs = table[table["status"] == FINISHED]
    best = set()
    names = [str(c) for c in table]
    scores = [c for c in names if c.startswith("auc") and not c.endswith(_NO_SCORE)]
    higher = ["accuracy", "images_per_s", *scores]
    for group, pick in ((higher, "max"), (_LOWER, "min")):
        for column in group:
            # Scores on other rows do not compare.
            parts = (
                [jobs] if column in _COSTS else [j for _, j in jobs.groupby("rows", dropna=False)]
            )
            for part in parts:
                values = pd.to_numeric(part[column])
                if len(part) > 1 and values.notna().any():
                    target = getattr(values, pick)()
                    best |= {(int(i), column) for i in part.index[values == target]}
    return best


def _shown(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    there = [shown for shown in _SHOWN if shown[1] in table]
    return [s for s in there if s[1] not in _IF_ANY or table[s[1]].notna().any()]


def _cells(table: pd.DataFrame, mark: str) -> list[list[str]]:
    """Rows as text; of a setting with several seeds, the mean alone."""
    table = table[~(table["job"].notna() & (table["seeds"].fillna(1) > 1))]
    best, rows = best_cells(table), []
    for i, row in table.iterrows():
        several = row["seeds"] > 1 if pd.notna(row["seeds"]) else False
        name = row["job"] if isinstance(row["job"], str) else row["model"]
        cells = [f"{row['setting']} ({row['seeds']} seeds)" if several else str(name)]
        for _, column, form in _shown(table):
            text = _format(row, column, form)
            cells.append(mark.format(text) if (i, column) in best and text else text)
        status = row["status"] if isinstance(row["status"], str) else ""
        reason = row["reason"] if isinstance(row["reason"], str) and not several else ""
        cells.append(": ".join(text for text in (status, reason) if text))
        rows.append(cells)
    return rows


def _format(row: pd.Series, column: str, form: str) -> str:
    if pd.isna(row[column]):
        return ""
    if column.endswith("_low"):
        text = form.format(row[column], row[column.replace("_low", "_high")])
        told = row["told_from_best"]
        return f"{text} {SAME}" if told == "no" else text
    return form.format(float(row[column]) / (1e6 if column.startswith("params") else 1))


def _markdown(comparison: Comparison, heading: list[str], table: pd.DataFrame, page: bool) -> str:
    names = ["job", *(name for name, _, _ in _shown(table)), "status"]
    lines = [f"# {comparison.name}", ""]
    for text in heading:
        lines += [text, ""]
    lines += ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 2) + " --- |"]
    for cells in _cells(table, "**{}**"):
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += [
        "",
        f"Best in each column in bold. AUC is micro-averaged over the labels. {_MARKS}",
        "",
    ]
    for key in dict.fromkeys(k for r in comparison.records for k in r.cohorts):
        if len(comparison.records) == 1:
            lines += [f"[The data: counts, balance, leak, pictures](data-{key}/data_report.html)"]
            lines += [""]
    if page and comparison.settings:
        lines += [
            "[Everything else: intervals, curves, calibration, hardest cases](report.html)",
            "",
            "![learning curves](figures/learning_curves.png)",
            "![AUC by size](figures/auc_by_size.png)",
            "",
        ]
    launches = [(r.started, without_paths(r.command)) for r in comparison.records]
    lines += [f"Launched {started} with `{command}`." for started, command in launches]
    return "\n".join(lines) + "\n"


def _latex(comparison: Comparison, heading: list[str]) -> str:
    """A booktabs table like the report's Table 2, one row per setting."""
    lines = [
        *(f"% {text}" for text in heading),
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{lrrr}",
        "\\toprule",
        "Model & Top-1 Acc. & AUC score (95\\,\\% interval) & \\#Params \\\\",
        "\\midrule",
    ]
    for rows in comparison.evaluation_sets:
        for group in rows.settings:
            interval = group.interval(RANKING_METRIC)
            between = (
                f" ({interval.low:.3f}--{interval.high:.3f})"
                if interval.low == interval.low
                else ""
            )
            same = "$^{\\approx}$" if group.differs_from_best is False else ""
            score = f"{group.mean(RANKING_METRIC):.4f}"
            score = f"\\textbf{{{score}}}" if group.is_best else score
            params = group.runs[0].fit.params / 1e6
            cells = [_escaped(group.name), f"{group.mean('accuracy'):.4f}"]
            cells += [f"{score}{between}{same}", f"{params:.1f} M"]
            lines.append(" & ".join(cells) + " \\\\")
        baseline = rows.baseline()
        lines += [
            "\\midrule",
            f"{BASELINE} & {baseline['accuracy']:.4f} & {baseline[RANKING_METRIC]:.4f} & \\\\",
        ]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    for character in "_%&#$":
        text = text.replace(character, f"\\{character}")
    return text


def _print(place: SweepPaths, name: str, heading: list[str], table: pd.DataFrame) -> None:
    console.print(f"\n[bold]{name}[/bold]")
    for text in heading:
        console.print(text, markup=False, soft_wrap=not console.is_terminal)
    cells = _cells(table, "[bold green]{}[/bold green]")
    dropped: list[str] = []
    shown = _shown(table)
    out = _terminal_table(cells, shown, dropped)
    unbounded = console.options.update(width=1000)
    while Measurement.get(console, unbounded, out).maximum > console.width and len(dropped) < len(
        _OPTIONAL
    ):
        dropped = _OPTIONAL[: len(dropped) + 1]
        out = _terminal_table(cells, shown, dropped)
    console.print(out)
    if (table["told_from_best"] == "no").any():
        console.print(_MARKS, markup=False)
    console.print(f"\nTables, figures, report.html: {place.root}/")
    console.print(
        "Next: open report.html; make ui compares the runs in MLflow; "
        f"python -m ich.report {place.root} rebuilds this."
    )


def _terminal_table(
    cells: list[list[str]], shown: list[tuple[str, str, str]], dropped: list[str]
) -> Table:
    kept = [i for i, (_, column, _) in enumerate(shown) if column not in dropped]
    out = Table(box=None, pad_edge=False)
    out.add_column("job", no_wrap=True)
    for i in kept:
        out.add_column(shown[i][0].replace(" ", "\n"), justify="right", no_wrap=True)
    out.add_column("status", overflow="fold", max_width=40)
    for row in cells:
        out.add_row(row[0], *(row[i + 1] for i in kept), row[-1])
    return out

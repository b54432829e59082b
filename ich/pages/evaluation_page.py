"""The page of an evaluation: scores here beside the validation, per label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich.base.files import csv_text, write_text
from ich.base.records import FINISHED, RunResult
from ich.base.results import RunPaths
from ich.pages import figures
from ich.pages.description import interval_text
from ich.pages.page import Block, Bullets, Section, Table, Text, Verdict, to_html, to_markdown
from ich.scoring.comparison import Comparison, EvaluationSet, Run, SettingResult
from ich.scoring.evaluation import DECISIONS, HERE, VALIDATION, Evaluation
from ich.scoring.metrics import sigmoid
from ich.scoring.uncertainty import Interval

OVERALL = (
    *("auc", "auc_macro", "accuracy", "exact_match", "ap_macro"),
    *("log_loss", "log_loss_weighted", "brier", "ece"),
)
PER_LABEL = ("auc", "ap", *DECISIONS)


def write_evaluation(
    evaluation: Evaluation, table: pd.DataFrame, folder: Path, recalibration: Sequence[Block] = ()
) -> Path:
    """Writes `evaluation.csv`, `.md` and `.html`, `predictions.csv`, figures, and, if any,
    `left_out.csv`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers first: whatever a figure stumbles over, they are on disk.
    write_text(folder / "evaluation.csv", csv_text(table))
    write_text(folder / "predictions.csv", csv_text(_rows(evaluation)))
    if len(evaluation.left_out):
        write_text(folder / "left_out.csv", csv_text(evaluation.left_out))
    else:
        (folder / "left_out.csv").unlink(missing_ok=True)  # of an earlier time
    pictures = figures.draw_some(_compared(evaluation), folder / "figures")
    sections: list[Section] = [("What was evaluated", [Bullets(evaluation.notes)])]
    if recalibration:
        sections.append(("Recalibrated", list(recalibration)))
    sections += [("Metrics", list(_tables(evaluation, table))), ("Figures", list(pictures))]
    facts = {"model": evaluation.model, "rows": f"{len(evaluation.here.image_id):,}"}
    title = "Evaluation"
    lead = [_verdict(evaluation, table)]
    write_text(folder / "evaluation.md", to_markdown(title, facts, sections, lead))
    page = folder / "evaluation.html"
    write_text(page, to_html(title, facts, sections, lead))
    return page


def _verdict(evaluation: Evaluation, table: pd.DataFrame) -> Verdict:
    """The AUC here, and whether it is that of validation."""
    row = table[(table["level"] == "slice") & (table["metric"] == "auc")].iloc[0]
    if np.isnan(row[HERE]):
        return Verdict("No AUC: these scans lack positives, or negatives.")

    def between(side: str, form: str) -> str:
        limits = Interval(row[f"{side}_low"], row[f"{side}_high"])
        text = interval_text(limits, form)
        return f" ({text})" if text else ""

    text = f"An AUC of {row[HERE]:.3f}{between(HERE, '.3f')} here"
    difference = row["difference"]
    if np.isnan(difference):
        return Verdict(f"{text}.")
    word = "higher" if difference > 0 else "lower"
    text += f", {abs(difference):.3f} {word} than in validation{between('difference', '+.3f')}"
    limits = Interval(row["difference_low"], row["difference_high"])
    if np.isnan(limits.low):
        return Verdict(f"{text}.")
    told = "which is not told from none" if limits.contains_zero else "by more than chance"
    return Verdict(f"{text}, {told}.")


def _rows(evaluation: Evaluation) -> pd.DataFrame:
    here, scored = evaluation.here, evaluation.here.scored
    frame = pd.DataFrame({"image_id": here.image_id, "study": here.study})
    for i, label in enumerate(scored.labels):
        frame[label] = sigmoid(scored.logits[:, i])
        frame[f"{label}_target"] = scored.target[:, i].astype(int)
    return frame


def shown_table(table: pd.DataFrame, metrics: Sequence[str], level: str) -> pd.DataFrame:
    """Some metrics as text: value and interval of both sides, and of their difference."""
    part = table[table["level"] == level].set_index("metric").to_dict("index")
    lines = []
    for name in metrics:
        if row := part.get(name):
            sides = {side: _cell(row, side, "") for side in (HERE, VALIDATION)}
            lines.append({"metric": name, **sides, "difference": _cell(row, "difference", "+")})
    return pd.DataFrame(lines, columns=["metric", HERE, VALIDATION, "difference"])


def _cell(row: dict[Any, Any], side: str, sign: str) -> str:
    if np.isnan(row[side]):
        return ""
    low, high = row[f"{side}_low"], row[f"{side}_high"]
    limits = "" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{row[side]:{sign}.4f}{limits}"


def _tables(evaluation: Evaluation, table: pd.DataFrame) -> Iterator[Block]:
    labels = evaluation.here.scored.labels
    pairs = (
        "Both are of the same rows, and differences are paired"
        if evaluation.is_paired
        else "Differences are of two sets of patients: their intervals are unpaired"
    )
    yield Text(
        f"Validation chose the epoch and the thresholds, which flatters its scores. {pairs}; where "
        f"an interval leaves out zero, the model does better or worse here by more than chance "
        f"among patients explains."
    )
    for level in ("slice", "study"):
        if not (table["level"] == level).any():
            continue
        folded = level == "study"  # as many tables again, which would bury the figures
        overall = shown_table(table, OVERALL, level)
        yield Table(f"All labels, per {level}", overall, folded)
        for label in labels:
            heading = f"{label}, per {level}, decided at {evaluation.thresholds[label]:.3f}"
            names = [f"{k}_{label}" for k in PER_LABEL]
            yield Table(heading, shown_table(table, names, level), folded)


def recalibration_blocks(
    table: pd.DataFrame, notes: Sequence[str], labels: Sequence[str]
) -> list[Block]:
    """What a recalibration changes, on the patients that it was not fitted on.

    Args:
        table: of `metrics_table`, `here` after it and `validation` before.
    """
    decided = [f"{m}_{k}" for k in labels for m in ("sensitivity", "specificity")]
    blocks: list[Block] = [Bullets(list(notes))]
    for level in ("slice", "study"):
        shown = shown_table(table, ["ece", "brier", "log_loss", *decided], level)
        if len(shown):
            shown = shown[["metric", VALIDATION, HERE, "difference"]]
            shown = shown.rename(columns={VALIDATION: "before", HERE: "after"})
            caption = (
                f"Per {level}, before and after, sensitivity and specificity each at its own "
                f"thresholds; intervals are 95 %, those of differences paired."
            )
            blocks.append(Table(caption, shown, folded=level == "study"))
    return blocks


def _compared(evaluation: Evaluation) -> Comparison:
    """As a comparison of two settings on different rows, for the figures."""
    sides = [(HERE, evaluation.here), (VALIDATION, evaluation.validation)]
    sets = []
    for name, predictions in sides:
        if predictions is not None:
            # Neither folder nor config: figures of predictions read neither.
            run = Run(name, RunPaths(Path(name)), RunResult(FINISHED), {}, predictions)
            sets.append(EvaluationSet(predictions.fingerprint, [SettingResult(name, [run])]))
    runs = [g.runs[0] for s in sets for g in s.settings]
    # No resamples: intervals stand in the table, and these figures have none.
    return Comparison(evaluation.model, runs, sets, 0, [])

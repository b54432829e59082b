"""The words that tables, pages and cards share: what was compared, and what that does not show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ich.base.config import select_value
from ich.base.records import CohortSummary, FitResult
from ich.scoring.comparison import Comparison
from ich.scoring.equivalence import DIFFERENT, EQUAL, UNKNOWN
from ich.scoring.predictions import Predictions
from ich.scoring.uncertainty import MIN_GROUPS, Interval

METRIC_NAMES = {"auc": "AUC", "accuracy": "accuracy"}


def describe(comparison: Comparison) -> list[str]:
    """What a table's reader must know: the cohort, the protocol, and what it does not show."""
    if not comparison.finished:
        return ["No job has finished."]
    configs = [r.config for r in comparison.finished if r.config]
    results = [r.fit for r in comparison.finished]

    def setting(key: str) -> str:
        return either(select_value(c, key) for c in configs)

    # A sweep over the cohort has a line for each.
    lines = [
        f"Protocol `{c.protocol}` on `{setting('data.source')}`: {cohort_text(c)}. "
        f"{scoring_text(c)}"
        for c in _cohorts(comparison)
    ]
    # What the runs do not share reads `a or b`.
    lines.append(
        f"{setting('train.epochs')} epochs, batch {setting('train.batch_size')}, "
        f"{either(optimizer_text(c) for c in configs)}, "
        f"{either(pixels_text(c) for c in configs)}, "
        f"{either(initial_weights(c) for c in configs)}, seed {setting('seed')}. Every metric is "
        f"that of the epoch with the best validation {setting('train.monitor')}. "
        f"{either(_computed(r) for r in results)}."
    )
    lines += describe_intervals(comparison)
    # Of several sweeps some may be on the RSNA set: it reads "rsna or phantom" then.
    if "rsna" not in setting("data.source"):
        lines.append(
            "The report's columns are its own results on the RSNA set, for orientation; "
            "nothing here compares with them."
        )
    return lines


def describe_intervals(comparison: Comparison) -> list[str]:
    """What intervals are of, and what they do not cover."""
    if not comparison.resamples or not comparison.settings:
        why = "" if comparison.settings else " (no run has predictions that can be read)"
        return [f"Intervals were not computed{why}: small differences mean nothing."]
    lines = []
    for rows in comparison.evaluation_sets:
        where = f" (the rows of {rows.name})" if len(comparison.evaluation_sets) > 1 else ""
        scored = rows.predictions
        images = len(set(scored.image_id.tolist()))
        lines.append(
            f"Intervals are 95 %, from {comparison.resamples:,} bootstrap resamples of "
            f"{_describe_unit(scored)} ({len(scored.image_id):,} scored rows of {images:,} images)"
            f"{where}."
        )
    seeds = {len(g.runs) for g in comparison.settings}
    # Both may be: a setting keeps one seed where its others failed.
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


def describe_verdicts(margin: float) -> str:
    """What the words of the column `against_best` mean."""
    return (
        f"Against the best, {EQUAL}: the 90 % interval of the difference in AUC lies within "
        f"\u00b1{margin:g}. {DIFFERENT.capitalize()}: there is a difference, after Holm's "
        f"correction over all pairs. {UNKNOWN.capitalize()}: neither is shown."
    )


def _describe_unit(predictions: Predictions) -> str:
    """What the bootstrap draws, how many, and what is wrong with that."""
    count = predictions.scored.group_count
    if predictions.unit != "patients":
        return (
            f"{count:,} images: patients are unknown, and their slices resemble each other, so the "
            f"true intervals are wider"
        )
    too_few = f", too few for any (at least {MIN_GROUPS})" if count < MIN_GROUPS else ""
    return f"{count:,} patients{too_few}"


def either(values: Iterable[Any]) -> str:
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


def cohort_text(cohort: CohortSummary) -> str:
    """How many images and rows a cohort has."""
    steps = cohort.steps
    parts = [f"{steps['images']:,} images"]
    parts += [f"{steps[step]:,} {text}" for step, text in _STEPS.items() if step in steps]
    if cohort.quarantined:
        parts.append(f"{cohort.quarantined} undecodable and left out")
    return ", ".join(parts)


def scoring_text(cohort: CohortSummary) -> str:
    """Which rows chose and which scored, and how many of those were seen before."""
    if cohort.scored == "val":
        text = "Selected and scored on the same validation rows: there is no test set. "
    else:
        text = "Epochs were chosen on the validation rows, and scored on the test rows. "
    known = {k: v for k, v in cohort.leak.items() if v is not None}
    if known and not any(known.values()):
        return f"{text}No {' and no '.join(known)} of the scored rows stands in another set."
    shares = ", ".join(f"{v:.1%} the {k}" for k, v in known.items())
    text += f"Of the scored rows, these share with the training rows: {shares}."
    if unknown := [k for k, v in cohort.leak.items() if v is None]:
        text += f" Unknown for {' and '.join(unknown)}: data.metadata or headers would tell."
    return text


def _computed(fit: FitResult) -> str:
    """On what, and in which precision."""
    return ", ".join(text for text in (fit.device, fit.precision) if text)


def optimizer_text(cfg: Any) -> str:
    """The optimizer's name and learning rate."""
    name = str(select_value(cfg, "optimizer._target_")).rsplit(".", 1)[-1]
    lr = select_value(cfg, "optimizer.lr")
    return f"{name} {lr:g}" if isinstance(lr, int | float) else name


def pixels_text(cfg: Any) -> str:
    """The side of a network's input."""
    size = select_value(cfg, "data.image_size")
    return f"{size} px" if size else "each model's own image size"


def initial_weights(cfg: Any) -> str:
    """What a training began with."""
    if select_value(cfg, "model.weights"):
        return "weights from a local file"
    if select_value(cfg, "model.pretrained"):
        return "ImageNet weights"
    return "random initialization (no pretrained weights)"


def cautions(comparison: Comparison) -> list[str]:
    """What must stand beside a verdict: sentences that its reader shall not miss."""
    lines = [_leak_caution(cohort) for cohort in _cohorts(comparison)]
    if comparison.settings and all(len(s.runs) == 1 for s in comparison.settings):
        lines.append("One seed per setting: another seed may give another order.")
    sources = {select_value(r.config, "data.source") for r in comparison.finished if r.config}
    if sources == {"phantom"}:
        lines.append("Synthetic slices: these show that everything works, and nothing of patients.")
    if missing := len(comparison.runs) - len(comparison.finished):
        lines.append(f"{missing} of {len(comparison.runs)} jobs have no score.")
    return [line for line in dict.fromkeys(lines) if line]


def _leak_caution(cohort: CohortSummary) -> str:
    """How far the scores of a cohort flatter; empty where they do not."""
    shares = [share for share in cohort.leak.values() if share is not None]
    if shares and max(shares) > 0:
        return (
            f"Scores flatter: {max(shares):.0%} of the scored rows show a patient who was also "
            f"trained on."
        )
    if cohort.scored == "val":
        return "Scores flatter: epochs were chosen on the rows that are scored."
    if cohort.leak.get("patient", 0) is None:
        return "Patients are unknown: whether one was both trained on and scored, nobody can tell."
    return ""


def _cohorts(comparison: Comparison) -> list[CohortSummary]:
    """Of the finished runs: those of one cohort have equal summaries."""
    cohorts: list[CohortSummary] = []
    for run in comparison.finished:
        if run.fit.cohort not in cohorts:
            cohorts.append(run.fit.cohort)
    return cohorts


def decimals(intervals: Iterable[Interval], without: int = 3) -> int:
    """How many a column shows: as few as tell a fifth of the narrowest half-width, since what lies
    below is noise; `without` where there is no interval."""
    widths = [(i.high - i.low) / 2 for i in intervals if i.high > i.low]
    if not widths:
        return without
    return int(np.clip(np.ceil(-np.log10(min(widths) / 5)), 2, 5))


def signed(text: str) -> str:
    """With the minus sign of typography, which is as wide as the plus."""
    return text.replace("-", "\u2212")


def interval_text(interval: Interval, form: str = ".3f") -> str:
    """As `0.912 to 0.934`; empty where there is none."""
    if np.isnan(interval.low):
        return ""
    return f"{interval.low:{form}} to {interval.high:{form}}"

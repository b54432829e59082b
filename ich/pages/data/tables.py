"""A cohort in tables: rows at each step, class balance, leaks. From its labels alone, so that a dry
run prints them too."""

from __future__ import annotations

import math

import pandas as pd

from ich.base.config import Source
from ich.data.protocol import ENOUGH, LEAKS, TEST, TOLERANCE, TRAIN, VAL, Cohort, audit

# The report's section 3.2: % positive before and after oversampling, as it prints them.
REPORT_PERCENT = {
    "any": (14.34, 17.26),
    "epidural": (0.42, 3.34),
    "subdural": (6.27, 6.94),
    "subarachnoid": (4.74, 5.27),
    "intraparenchymal": (4.8, 5.39),
    "intraventricular": (3.48, 3.69),
}
SPLIT_NAMES = {TRAIN: "training", VAL: "validation", TEST: "test"}


def counts_table(cohort: Cohort) -> pd.DataFrame:
    """Rows after each step there is, in order: `step`, `rows`, `what`."""
    repeated = cohort.steps.get("repeated_ids", 0)
    resampled = "" if is_report(cohort) else ", after resampling"
    what = {
        "images": "distinct labelled images"
        + (f" ({repeated:,} ids stood more than once)" if repeated else " (no id stood twice)"),
        "oversampled": "with the copies that oversampling adds",
        "undersampled": "without the negatives left out",
        "subset": "the stratified subset, copies included"
        if is_report(cohort)
        else "images of the patients that are used",
        TRAIN: f"training rows{resampled}",
        VAL: "validation rows",
        TEST: "test rows",
    }
    what[cohort.scored] += ", which are scored"
    steps = [(k, n, what.get(k, "")) for k, n in cohort.steps.items() if k != "repeated_ids"]
    return pd.DataFrame(steps, columns=["step", "rows", "what"])


def balance_table(cohort: Cohort, source: Source) -> pd.DataFrame:
    """One row per label: positive images, and percent positive at each step and in each split.

    With the report's protocol also "% as reported": the report divides the positives after
    oversampling by the images before it; "% after" divides by the rows there really are. For
    `sound` also how far the parts were apart, largest / smallest rate - 1, before resampling.

    Args:
        cohort: any cohort.
        source: the report's own percentages are shown beside `rsna`, and the report's protocol.
    """
    table = pd.DataFrame({"label": list(cohort.labels)})
    table["positives"] = _positives(cohort, "images")
    table["% before"] = percent_positive(cohort, "images")
    if is_report(cohort):
        table["positives after"] = _positives(cohort, "oversampled")
        table["% after"] = percent_positive(cohort, "oversampled")
        table["% as reported"] = percent_positive(cohort, "oversampled", "images")
        if source is Source.rsna:
            printed = [REPORT_PERCENT.get(k, (math.nan, math.nan)) for k in cohort.labels]
            table["report's % before"] = [before for before, _ in printed]
            table["report's % after"] = [after for _, after in printed]
    for split in cohort.splits:
        table[f"% {split}"] = percent_positive(cohort, split)
    if not is_report(cohort):
        table["parts apart"] = [
            _imbalance_text(cohort.imbalance[label], positives)
            for label, positives in zip(cohort.labels, _positives(cohort, "subset"), strict=True)
        ]
    return table


def leak_table(cohort: Cohort) -> list[str]:
    """One sentence each for image, study and patient: the share of scored rows seen elsewhere."""
    scored = cohort.split(cohort.scored)
    return [
        _leak_sentence(kind, share, int((scored[LEAKS[kind]] != "").sum()), cohort.scored)
        if share is not None
        else f"{kind.capitalize()}: unknown: give data.metadata=FILE, a CSV of image, patient "
        f"and study."
        for kind, share in audit(cohort.rows, cohort.scored).items()
    ]


def is_report(cohort: Cohort) -> bool:
    """Whether the report's protocol made it: `sound` copies inside the training set alone."""
    return "oversampled" in cohort.steps


def _positives(cohort: Cohort, step: str) -> list[int]:
    return [cohort.positives[step][k] for k in cohort.labels]


def percent_positive(cohort: Cohort, step: str, of: str | None = None) -> list[float]:
    """Per label the positives of a step, in percent of its rows, or of those of the step `of`."""
    rows = max(1, cohort.steps[of or step])  # a step may leave none
    return [100 * n / rows for n in _positives(cohort, step)]


def _imbalance_text(value: float, positives: int) -> str:
    if not positives:
        return "no positive"
    if math.isinf(value):
        return "a part has no positive"
    mark = " (too far)" if positives >= ENOUGH and value > TOLERANCE else ""
    return f"{100 * value:.1f} %{mark}"


def _leak_sentence(kind: str, share: float, known: int, split: str) -> str:
    # Rounded to 0.0 % a leak would pass for none.
    shown = f"{100 * share:.1f} %" if share >= 0.0005 else "less than 0.05 %" if share else "none"
    rows = f"{known:,} {SPLIT_NAMES[split]} rows" + ("" if kind == "image" else f" of known {kind}")
    return f"{kind.capitalize()}: {shown} of the {rows} share their {kind} with another split."

"""A sweep's report in MLflow: what its run shows first, its settings as metrics, where it is from.

All of it is read from the sweep's files, and can be copied again: what is there is not doubled.
"""

from __future__ import annotations

import re
import time
from urllib.parse import quote

import pandas as pd

from ich.base.config import select_value
from ich.base.files import DamagedError, read_bytes
from ich.base.results import SweepPaths
from ich.tracking.mirror import source_tags
from ich.tracking.store import MlflowStore

# MLflow's page lists folders before files, and each by name.
FIRST_FOLDER = "0-verdict"
_NOTE = "mlflow.note.content"  # Markdown, at the head of a run's page
_NOTE_LIMIT = 5000  # characters, of MLflow's earliest version that is supported
_IN_METRICS = ("auc", "auc_low", "auc_high", "accuracy", "accuracy_low", "accuracy_high")
_LONGEST = 200  # characters of a setting's name, so that a metric's stays within MLflow's 250


def copy_report(store: MlflowStore, run_id: str, sweep: SweepPaths) -> None:
    """Copies tables, figures and pages; the verdict becomes the run's description."""
    record = sweep.read_record()
    data_reports = [sweep.data(key) for key in record.cohorts]
    tables = (sweep.csv, sweep.markdown, sweep.latex, sweep.metrics)
    further = (sweep.pairs, sweep.subgroups, sweep.context)
    texts = (sweep.page, sweep.text, sweep.checklist)
    for path in (*tables, *further, *texts, sweep.record, sweep.figures, *data_reports):
        if path.exists():
            store.log_artifact(run_id, path)
    # Once more where they are seen first; links of the page lead on from its other copy alone.
    for path in (sweep.figures / "forest.png", sweep.page):
        if path.exists():
            store.log_artifact(run_id, path, FIRST_FOLDER)
    if note := sweep_note(sweep, run_id):
        store.tag(run_id, _NOTE, note)
    store.tag(run_id, "ich.cohort", ", ".join(record.cohorts))
    for key, value in source_tags(record.command, record.provenance).items():
        store.tag(run_id, key, value)
    for job, origin in record.origins.items():
        config = record.configs.get(job, {})
        data, protocol = (select_value(config, k) for k in ("data.source", "protocol.name"))
        if origin.cohort and isinstance(data, str):
            store.log_cohort(run_id, data, str(protocol), origin.cohort)
    # Of a later launch, what has changed follows what was: a step of its own for each.
    present = store.metrics(run_id)
    metrics = {k: v for k, v in setting_metrics(sweep).items() if present.get(k) != v}
    steps = [s for k in metrics if k in present for s in store.logged_steps(run_id, k)]
    store.log_metrics(run_id, metrics, 1 + max(steps, default=-1), time.time())


def sweep_note(sweep: SweepPaths, run_id: str) -> str:
    """The head of `report.md`, with links to the copies in MLflow; empty if there is none."""
    try:
        text = read_bytes(sweep.text).decode()
    except (FileNotFoundError, DamagedError, ValueError):
        return ""
    # Verdict, picture and table, and of a table that MLflow has no room for, neither.
    for heading in ("\n## Methods", "\n## "):
        note = text.partition(heading)[0].partition("\n")[2].strip()
        note = re.sub(r"\]\(([^():]+)\)", lambda m: f"]({_artifact(m[1], run_id)})", note)
        if len(note) <= _NOTE_LIMIT:
            return note
    return note[:_NOTE_LIMIT]


def _artifact(path: str, run_id: str) -> str:
    # Relative: MLflow's page stands at its server's root, wherever a proxy has put that.
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def setting_metrics(sweep: SweepPaths) -> dict[str, float]:
    """AUC and accuracy of each setting of `comparison.csv`, with their intervals, each under the
    setting's name; empty where there is no table that can be read."""
    try:
        table = pd.read_csv(sweep.csv, dtype={"setting": str})
        table = table[["job", "setting", "seeds", *_IN_METRICS]].dropna(subset="setting")
    except (OSError, ValueError, KeyError):
        return {}
    # The row of a job, or of several seeds the row of their mean, which has no job.
    settings = table[table["job"].isna() == (table["seeds"] > 1)]
    metrics: dict[str, float] = {}
    for row in settings.to_dict("records"):
        # What MLflow allows in a name.
        name = re.sub(r"[^\w\-. ]", " ", str(row["setting"]))[:_LONGEST]
        metrics |= {f"{name}/{k}": row[k] for k in _IN_METRICS if pd.notna(row[k])}
    return metrics

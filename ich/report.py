"""Finished runs -> the comparison table: CSV, Markdown, terminal, figures. From the files alone.

`python -m ich.report multirun_reports/<name>` makes it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from rich.measure import Measurement
from rich.table import Table

from ich.config import UserError
from ich.results import FINISHED, RunPaths, SweepPaths
from ich.terminal import console

# The report's Table 2: accuracy and AUC per network, best of 10 epochs on its validation set.
REPORT_TABLE_2 = {
    "vgg16": (0.9704, 0.9619),
    "resnet50": (0.9713, 0.9730),
    "inception_v3": (0.9727, 0.9761),
    "mobilenet_v2": (0.9700, 0.9714),
    "xception": (0.9728, 0.9769),
    "efficientnet_b0": (0.9711, 0.9733),
    "efficientnet_b2": (0.9728, 0.9756),
    "efficientnet_b3": (0.9729, 0.9790),
}

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
]
_LOWER = ["params", "minutes"]
BASELINE = "always negative"

# Heading, source column, format: what people read. The CSV holds all columns, unrounded.
_SHOWN: list[tuple[str, str, str]] = [
    ("accuracy", "accuracy", "{:.4f}"),
    ("AUC", "auc", "{:.4f}"),
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


def compare(sweep: SweepPaths) -> pd.DataFrame:
    """Writes `comparison.csv`, `comparison.md` and the figures, and prints the table.

    Returns:
        The table as written: one row per job of the latest launch, then "always negative".

    Raises:
        UserError: the folder holds no sweep.
    """
    record = sweep.read_record()
    if not record:
        raise UserError(
            f"{sweep.root} holds no sweep (no {sweep.record.name}). Give the folder of a sweep, "
            f"as in python -m ich.report multirun_reports/demo."
        )
    results = sweep.read_results()
    table = build_table(results)
    part = sweep.csv.with_suffix(".part")
    table.to_csv(part, index=False)
    part.rename(sweep.csv)
    heading = describe(sweep, results)
    figures = draw_figures(sweep, results)
    sweep.markdown.write_text(_markdown(record, heading, table, figures))
    _print(sweep, record, heading, table)
    return table


def columns(results: list[dict[str, Any]]) -> list[str]:
    """The columns of a table of these results: one AUC for each label that any of them has."""
    labels = dict.fromkeys(k for r in results for k in r.get("labels", []))
    return [*_BEFORE, *(f"auc_{k}" for k in labels), *_AFTER]


def build_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per result, in order, in `columns`; what a job does not have is empty."""
    rows = [_row(result) for result in results]
    # One row per set of validation rows: a sweep over the cohort has several.
    seen: list[dict[str, float]] = []
    for result in results:
        if result["status"] == FINISHED and result["always_negative"] not in seen:
            seen.append(result["always_negative"])
            where = f"the rows of {result['job']}" if len(seen) > 1 else ""
            rows.append({"model": BASELINE, "reason": where, **result["always_negative"]})
    table = pd.DataFrame(rows, columns=columns(results))
    whole = ["params", "params_imagenet", "best_epoch"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    model = result.get("model") or result["job"].split(",")[0]
    accuracy, auc = REPORT_TABLE_2.get(model, (None, None))
    cohort = result.get("cohort", {})
    return {
        **result,
        "model": model,
        "report_accuracy": accuracy,
        "report_auc": auc,
        "scored_on": cohort.get("scored"),
        **{f"leak_{k}": v for k, v in cohort.get("leak", {}).items()},
    }


def describe(sweep: SweepPaths, results: list[dict[str, Any]]) -> list[str]:
    """What the table's reader must know: the cohort, the protocol, and what it does not show."""
    finished = [r for r in results if r["status"] == FINISHED]
    if not finished:
        return ["No job has finished."]
    configs = [OmegaConf.load(sweep.run(r["job"]).config) for r in finished]

    def setting(key: str) -> str:
        return _either(OmegaConf.select(c, key) for c in configs)

    distinct = {json.dumps(r["cohort"], sort_keys=True): r["cohort"] for r in finished}
    cohorts = list(distinct.values())
    lines = [
        f"Protocol `{c['protocol']}` on `{setting('data.source')}`: {_cohort(c)}. {_scoring(c)}"
        for c in cohorts
    ]
    starts = _either(_start(c) for c in configs)
    lines.append(
        f"{setting('train.epochs')} epochs, batch {setting('train.batch_size')}, "
        f"{_either(_optimizer(c) for c in configs)}, {_either(_pixels(c) for c in configs)}, "
        f"{starts}, seed {setting('seed')}. Intervals are not computed: small differences mean "
        f"nothing. Every metric is that of the epoch with the best validation "
        f"{setting('train.monitor')}. {_either(_computed(r) for r in finished)}."
    )
    if "rsna" not in setting("data.source"):
        lines.append(
            "The report's columns are its own results on the RSNA set, for orientation; "
            "nothing here compares with them."
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


def _cohort(c: dict[str, Any]) -> str:
    parts = [f"{c['images']:,} images"]
    parts += [f"{c[step]:,} {text}" for step, text in _STEPS.items() if step in c]
    if c["quarantined"]:
        parts.append(f"{c['quarantined']} undecodable and left out")
    return ", ".join(parts)


def _scoring(c: dict[str, Any]) -> str:
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


def best_cells(table: pd.DataFrame) -> set[tuple[int, str]]:
    """(row, column) of the best value of each column over the finished jobs; ties are all best."""
    jobs = table[table["status"] == FINISHED]
    best = set()
    names = [str(c) for c in table]
    higher = [c for c in names if c in ("accuracy", "images_per_s") or c.startswith("auc")]
    for group, pick in ((higher, "max"), (_LOWER, "min")):
        for column in group:
            values = pd.to_numeric(jobs[column])
            if len(jobs) > 1 and values.notna().any():
                target = getattr(values, pick)()
                best |= {(int(i), column) for i in jobs.index[values == target]}
    return best


def _shown(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    return [shown for shown in _SHOWN if shown[1] in table]


def _cells(table: pd.DataFrame, mark: str) -> list[list[str]]:
    best, rows = best_cells(table), []
    for i, row in table.iterrows():
        cells = [str(row["job"] if isinstance(row["job"], str) else row["model"])]
        for _, column, form in _shown(table):
            text = _format(row[column], column, form)
            cells.append(mark.format(text) if (i, column) in best and text else text)
        status = row["status"] if isinstance(row["status"], str) else ""
        reason = row["reason"] if isinstance(row["reason"], str) else ""
        cells.append(": ".join(text for text in (status, reason) if text))
        rows.append(cells)
    return rows


def _format(value: Any, column: str, form: str) -> str:
    if pd.isna(value):
        return ""
    return form.format(float(value) / (1e6 if column.startswith("params") else 1))


def _markdown(
    record: dict[str, Any], heading: list[str], table: pd.DataFrame, figures: list[Path]
) -> str:
    names = ["job", *(name for name, _, _ in _shown(table)), "status"]
    lines = [f"# {record['name']}", ""]
    for text in heading:
        lines += [text, ""]
    lines += ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 2) + " --- |"]
    for cells in _cells(table, "**{}**"):
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += [
        "",
        "Best in each column in bold. AUC is micro-averaged over the labels. The report's own "
        "figures come from its Table 2.",
        "",
    ]
    for key in record.get("cohorts", []):
        lines += [f"[The data: counts, balance, leak, pictures](data-{key}/data_report.html)", ""]
    lines += [f"![{f.stem.replace('_', ' ')}](figures/{f.name})" for f in figures]
    lines += ["", f"Launched {record['started']} with `{record['command']}`."]
    return "\n".join(lines) + "\n"


def _print(
    sweep: SweepPaths, record: dict[str, Any], heading: list[str], table: pd.DataFrame
) -> None:
    console.print(f"\n[bold]{record['name']}[/bold]")
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
    console.print(f"\nTable and figures: {sweep.markdown.parent}/  (comparison.csv, comparison.md)")
    console.print(
        "Next: make ui compares the runs in MLflow; "
        f"python -m ich.report {sweep.root} rebuilds this table."
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


def draw_figures(sweep: SweepPaths, results: list[dict[str, Any]]) -> list[Path]:
    """Learning curves, and AUC against trained parameters, as PNG; none without a finished job."""
    finished = [r for r in results if r["status"] == FINISHED]
    if not finished:
        return []
    import matplotlib

    matplotlib.use("Agg")
    sweep.figures.mkdir(exist_ok=True)
    return [_learning_curves(sweep, finished), _auc_by_size(sweep, finished)]


def _learning_curves(sweep: SweepPaths, finished: list[dict[str, Any]]) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    panels = [
        ("train/loss", "training loss"),
        ("val/accuracy", "validation accuracy"),
        ("val/auc", "validation AUC (micro)"),
    ]
    for axis, (key, title) in zip(axes, panels, strict=True):
        for n, result in enumerate(finished):
            journal = RunPaths(sweep.root / result["job"]).read_metrics()
            points = [(line["step"], line[key]) for line in journal if line[key] is not None]
            style = "-o" if n < 10 else "--s"
            axis.plot(*zip(*points, strict=True), style, ms=3, label=result["job"])
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if finished[0]["cohort"]["scored"] == "val":  # the panels show validation
        baseline = finished[0]["always_negative"]["accuracy"]
        axes[1].axhline(baseline, color="grey", ls=":", label="always negative")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return _save(figure, sweep.figures / "learning_curves.png")


def _auc_by_size(sweep: SweepPaths, finished: list[dict[str, Any]]) -> Path:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for n, result in enumerate(sorted(finished, key=lambda r: int(r["params"]))):
        score = result.get("auc_any", result["auc"])
        if score is None:
            continue
        x, y = result["params"] / 1e6, score
        axis.scatter(x, y, s=40)
        axis.annotate(
            result["job"],
            (x, y),
            textcoords="offset points",
            xytext=(6, 5 if n % 2 else -11),
            fontsize=8,
        )
    axis.set(
        xlabel="trained parameters, millions",
        ylabel="AUC of any" if "auc_any" in finished[0] else "AUC (micro)",
        title=f"{sweep.root.name}: AUC against size",
    )
    axis.margins(x=0.2, y=0.15)
    axis.grid(alpha=0.3)
    return _save(figure, sweep.figures / "auc_by_size.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    """Rebuilds the table of one sweep."""
    parser = argparse.ArgumentParser(prog="python -m ich.report", description=__doc__)
    parser.add_argument("sweep", type=Path, help="the sweep's folder, multirun_reports/<name>")
    args = parser.parse_args(argv)
    try:
        compare(SweepPaths(args.sweep))
    except UserError as error:
        print(f"ich: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

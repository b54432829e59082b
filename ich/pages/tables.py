"""The comparison as files and at the terminal: from a sweep's folder to its tables and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ich.base.config import RESAMPLES, UserError
from ich.base.entry import printable, public_command, shell_command
from ich.base.files import csv_text, write_text
from ich.base.progress import stage
from ich.base.results import SweepPaths, free_shelf
from ich.base.terminal import Terminal, console, print_line, styled
from ich.pages.answers.context import context_blocks, context_table
from ich.pages.answers.pairs import pairs_table
from ich.pages.answers.subgroups import (
    find_subgroups,
    recorded_subgroups,
    subgroup_blocks,
    subgroups_table,
)
from ich.pages.columns import (
    INDISTINGUISHABLE,
    Shown,
    best_cells,
    build_table,
    metrics_table,
    shown_columns,
)
from ich.pages.comparison_page import write_page
from ich.pages.description import describe, describe_verdicts
from ich.pages.writing.checklist import write_checklist
from ich.pages.writing.report import write_latex, write_report
from ich.scoring.comparison import (
    Comparison,
    load_comparison,
)
from ich.scoring.context import worth_of_context
from ich.scoring.ensembles import GREEDY, MEAN
from ich.scoring.equivalence import BEST

_BEST = "\0"  # ends a best value on its way to the terminal

_LEGEND = (
    f"Intervals are 95 %, by bootstrap over patients, or over images where those are unknown. "
    f"{INDISTINGUISHABLE}: not distinguishable from the best, since the interval of the difference "
    f"holds zero."
)


def compare(
    *sweeps: SweepPaths,
    out: Path | None = None,
    resamples: int = RESAMPLES,
    page: bool = True,
    margin: float | None = None,
    subgroups: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Writes `comparison.csv`, `.md` and `.tex`, `metrics.csv`, `pairs.csv`, `report.md`,
    figures, `report.html` and `checklist.html`, and prints the table.

    Args:
        sweeps: their folders.
        out: where to; the sweep's own folder if there is one sweep.
        resamples: of the bootstrap; 0 for no intervals.
        page: also figures, `report.html` and `checklist.html`, after the tables.
        margin: of AUC, within which settings are equal; None for that of the sweeps' launches.
        subgroups: columns of labels or metadata, or what headers tell; None for the launches'.

    An earlier report with intervals that cannot be computed again is moved to `superseded/`.

    Returns:
        The table as written: one row per job of the latest launch, then rows without a job, of
        settings with several seeds and of "always negative".

    Raises:
        UserError: a folder holds no sweep, or there are several and no `out`.
        OSError: naming the file that cannot be written, as on a full disk.
    """
    folder = report_folder(sweeps, out)
    with Terminal().preparing("comparing runs", lasting=False) as report:
        comparison = load_comparison(sweeps, resamples, stage(report, "resampling"), margin)
        table = build_table(comparison)
        names = recorded_subgroups(comparison.records) if subgroups is None else subgroups
        found, reasons = find_subgroups(comparison, names)
        worth = worth_of_context(comparison)
    folder.root.mkdir(parents=True, exist_ok=True)
    _keep_intervals(folder, comparison)
    heading = describe(comparison)
    # Files, then the terminal, and last the page, which is the likeliest to fail.
    write_text(folder.csv, csv_text(table))
    write_text(folder.metrics, csv_text(metrics_table(comparison)))
    _write_or_drop(folder.pairs, pairs_table(comparison))
    _write_or_drop(folder.subgroups, subgroups_table(found))
    _write_or_drop(folder.context, context_table(worth))
    write_latex(comparison, folder, heading)
    _record_ensemble(sweeps, comparison)
    write_text(folder.markdown, _markdown(comparison, heading, table, page))
    write_report(comparison, folder, page)
    _print(comparison, heading, table)
    if page:
        with Terminal().preparing("drawing report.html"):
            answers = {
                "In subgroups": list(subgroup_blocks(found, reasons)),
                "What context is worth": list(context_blocks(worth, folder.figures)),
            }
            write_page(comparison, folder, heading, answers)
            write_checklist(comparison, folder)
    _print_files(folder, page)
    return table


def _write_or_drop(path: Path, table: pd.DataFrame) -> None:
    if len(table):
        write_text(path, csv_text(table))
    else:  # of an earlier report
        path.unlink(missing_ok=True)


def _record_ensemble(sweeps: Sequence[SweepPaths], comparison: Comparison) -> None:
    """Notes which networks of one sweep were chosen, for `ich predict --model SWEEP`."""
    if len(sweeps) > 1:
        return
    (sweep,) = sweeps
    found = [e for rows in comparison.evaluation_sets for e in rows.ensembles if e.name == GREEDY]
    if len(found) == 1:
        sweep.write_ensemble(found[0].members)
    else:  # of an earlier report, or of rows that are several sets
        sweep.ensemble.unlink(missing_ok=True)


def _keep_intervals(folder: SweepPaths, comparison: Comparison) -> None:
    """Moves an earlier report aside whose intervals are of predictions that are gone."""
    try:
        earlier = pd.read_csv(folder.csv, usecols=["job", "auc_low"])
    except (OSError, ValueError):  # there is none, or one of another version or of no use
        return
    known = set(earlier.loc[earlier["auc_low"].notna(), "job"])
    lost = [run.name for run in comparison.finished if run.predictions is None]
    if not known & set(lost):
        return
    shelf = free_shelf(folder.root, "report")
    shelf.mkdir(parents=True)
    tables = (folder.csv, folder.metrics, folder.pairs, folder.subgroups, folder.context)
    pages = (folder.latex, folder.text, folder.page, folder.checklist)
    for path in (*tables, folder.markdown, *pages, folder.figures):
        if path.exists():
            path.rename(shelf / path.name)
    print_line(
        f"The predictions of {', '.join(sorted(known & set(lost)))} are gone or damaged, so there "
        f"are no intervals of these any more. The earlier report, which has them, is kept in "
        f"{shelf}."
    )


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
            f"report, as in ich report A B -o multirun_reports/A-and-B."
        )
    return sweeps[0]


# --- Rows as text --------------------------------------------------------------------------------


def _cells(table: pd.DataFrame, mark: str) -> list[list[str]]:
    """Name, shown columns and status of each row, the best values in `mark`.

    Of a setting with several seeds there is the mean alone: which of its seeds was the luckiest is
    no news, and must not take the mark from a better setting.
    """
    table = table[~(table["job"].notna() & (table["seeds"].fillna(1) > 1))]
    best, shown = best_cells(table), shown_columns(table)
    return [
        [
            _name(row),
            *(_cell(row, name, s, mark if (i, name) in best else "{}") for name, s in shown),
            _status(row),
        ]
        for i, row in table.iterrows()
    ]


def _is_mean(row: pd.Series) -> bool:
    return bool(pd.notna(row["seeds"]) and row["seeds"] > 1)


def _name(row: pd.Series) -> str:
    if _is_mean(row):
        return f"{row['setting']} ({row['seeds']} seeds)"
    return str(row["job"] if isinstance(row["job"], str) else row["model"])


def _cell(row: pd.Series, name: str, shown: Shown, mark: str) -> str:
    return "" if pd.isna(row[name]) else mark.format(shown.text(row[name], row))


def _status(row: pd.Series) -> str:
    # A mean's reason says how many seeds it is of, as its name has done.
    # Of an ensemble, the CSV names the members.
    is_ensemble = row["model"] in (MEAN, GREEDY)
    texts = (row["status"], "" if _is_mean(row) or is_ensemble else row["reason"])
    text = ": ".join(text for text in texts if isinstance(text, str) and text)
    return printable(" ".join(text.split()))  # a line break of an error's would end the row


# --- Markdown --------------------------------------------------------------------------


def _markdown(comparison: Comparison, heading: list[str], table: pd.DataFrame, page: bool) -> str:
    names = ["job", *(shown.heading for _, shown in shown_columns(table)), "status"]
    lines = [f"# {comparison.name}", ""]
    for text in heading:
        lines += [text, ""]
    lines += ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 2) + " --- |"]
    for cells in _cells(table, "**{}**"):
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += [
        "",
        f"Best in each column in bold. AUC is micro-averaged over the labels. {_LEGEND} "
        f"{describe_verdicts(comparison.margin)}",
        "",
    ]
    for key in dict.fromkeys(k for r in comparison.records for k in r.cohorts):
        if len(comparison.records) == 1:
            # A report on several sweeps stands in none of their folders: links would lead nowhere.
            lines += [f"[The data: counts, balance, leak, pictures](data-{key}/data_report.html)"]
            lines += [""]
    # The figures to look at first; the last is drawn only where there are predictions.
    if page and comparison.settings:
        lines += [
            "[Everything else: intervals, curves, calibration, hardest cases](report.html)",
            "",
            "![AUC with intervals](figures/forest.png)",
            "![learning curves](figures/learning_curves.png)",
            "![AUC by cost](figures/cost.png)",
            "",
        ]
    launches = [(r.started, public_command(r.command)) for r in comparison.records]
    lines += [f"Launched {started} with `{command}`." for started, command in launches]
    return "\n".join(lines) + "\n"


# --- Terminal ------------------------------------------------------------------------------------


def _print(comparison: Comparison, heading: list[str], table: pd.DataFrame) -> None:
    console.print()
    print_line((comparison.name, "bold"))
    for text in heading:
        # Wrapped at a terminal alone: in a log, a line is a line.
        console.print(styled(text), soft_wrap=not console.is_terminal)
    console.print(_fitting_table(table))
    if (table["told_from_best"] == "no").any():
        console.print(styled(_LEGEND))
    if (table["against_best"].dropna() != BEST).any():
        console.print(styled(describe_verdicts(comparison.margin)))


def _print_files(folder: SweepPaths, page: bool) -> None:
    """What is there now, and what to do with it."""
    again = shell_command("ich", "report", folder.root)
    if page:
        lines = [
            f"Tables, figures, report.html: {folder.root}/",
            f"Next: open report.html; make ui compares the runs in MLflow; {again} rebuilds this.",
        ]
    else:
        lines = [
            f"Tables: {folder.root}/",
            f"Next: {again} makes intervals, figures and report.html too.",
        ]
    console.print()
    for line in lines:
        print_line(line)


def _fitting_table(table: pd.DataFrame) -> Table:
    """With as many columns as the terminal has room for: the files have all of them anyway."""
    cells = _cells(table, f"{{}}{_BEST}")
    shown = [s for _, s in shown_columns(table)]
    # Rich would squeeze a table into the terminal; its own width is what it has without one.
    unbounded = console.options.update(width=1000)
    # One column after the other, until it fits or none is left that could go.
    for dropped in range(1 + max(s.dropped or 0 for s in shown)):
        fitting = _terminal_table(cells, shown, dropped)
        if Measurement.get(console, unbounded, fitting).maximum <= console.width:
            break
    return fitting


def _terminal_table(cells: list[list[str]], shown: Sequence[Shown], dropped: int) -> Table:
    """Without the first `dropped` of the columns that can be left out."""
    kept = [i for i, s in enumerate(shown) if s.dropped is None or s.dropped > dropped]
    table = Table(box=None, pad_edge=False)
    table.add_column("job", no_wrap=True)
    for i in kept:
        # A word per line, for headings are wider than numbers.
        heading = Text("\n").join(map(styled, shown[i].heading.split(" ")))
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold", max_width=40)
    for name, *values, status in cells:
        marked = [
            styled((v.removesuffix(_BEST), "bold green" if v.endswith(_BEST) else ""))
            for v in values
        ]
        table.add_row(styled(name), *(marked[i] for i in kept), styled(status))
    return table

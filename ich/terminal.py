"""What a person at the terminal sees: progress with a time estimate, one line per epoch.

In a pipe or a log file there are no bars, only the lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ich.config import Config
from ich.results import FINISHED, RunPaths, SweepPaths

_LOG_WIDTH = 160  # where nothing tells the width: a pipe, a log file

console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)


class Terminal:
    """Prints to one console; a progress bar only where the console is a terminal."""

    def __init__(self, out: Console = console):
        self.out = out

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yields `report(what, done, total)`; a line when each kind of work is complete."""
        tasks: dict[str, TaskID] = {}
        with self._bar(MofNCompleteColumn()) as bar:

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)
                if done == total:
                    bar.remove_task(tasks.pop(what))
                    self._line(f"{what}: {total:,} done")

            yield report

    @contextmanager
    def watching(self, config: Config, run: RunPaths) -> Iterator[Callable[[], None]]:
        """Yields a function that shows what the child has written since it was last called."""
        with self._bar(TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task(f"{config.job} starting", total=None, note="")
            shown = 0

            def watch() -> None:
                nonlocal shown
                journal = run.read_metrics()
                for line in journal[shown:]:
                    self._line(_epoch_line(config, line))
                shown = len(journal)
                state = _read_progress(run)
                if state:
                    whole = state["steps"]
                    bar.update(
                        task,
                        total=state["epochs"],
                        completed=state["epoch"] - 1 + state["step"] / whole,
                        description=f"{config.job} epoch {state['epoch']}/{state['epochs']}",
                        note=f"{state['phase']} {state['step']}/{whole}",
                    )

            yield watch

    def _bar(self, *columns: TextColumn | MofNCompleteColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.out,
            transient=True,
            disable=not self.out.is_terminal,
        )

    def _line(self, text: str, markup: bool = True, end: str = "\n") -> None:
        # Never wrapped: a log is read with other tools, and a terminal folds long lines itself.
        self.out.print(text, markup=markup, end=end, soft_wrap=True)

    def cohort(
        self, title: str, tables: list[tuple[list[str], list[list[str]]]], sentences: list[str]
    ) -> None:
        """A cohort's tables, each as headings and rows, and what is to be said about it."""
        self._line(f"\n[bold]{title}[/bold]")
        for headings, rows in tables:
            out = Table(box=None, pad_edge=False)
            for n, heading in enumerate(headings):
                text = n == 0 or heading == "what"
                out.add_column(heading, justify="left" if text else "right", overflow="fold")
            for row in rows:
                out.add_row(*map(escape, row))
            self.out.print(out)
            self.out.print()
        for sentence in sentences:
            self._line(sentence, markup=False)

    def verified(self, damaged: list[str]) -> None:
        """One line on what the checksums said."""
        if damaged:
            shown = ", ".join(damaged[:5]) + (" ..." if len(damaged) > 5 else "")
            text = f"{len(damaged):,} slices did not match their checksum and were decoded again"
            self._line(f"[red]{text}[/red]: {escape(shown)}")
        else:
            self._line("every slice matches its checksum")

    def prepared(self, cache: Path, slices: int, quarantined: int, report: Path) -> None:
        """Where the decoded slices and the data report are."""
        self._line(f"\n{slices:,} slices decoded, {quarantined:,} in quarantine: {cache}")
        self._line(f"data report: {report}")

    def opened(self, sweep: SweepPaths, jobs: int, done: int) -> None:
        """One line as the jobs of a sweep begin."""
        self._line(f"{sweep.root}: {done} finished before, {jobs - done} to run")

    def started(self, number: int, total: int, config: Config, run: RunPaths) -> None:
        """One line as a job starts."""
        self._line(f"\n[bold]\\[{number}/{total}] {config.job}[/bold]  log: {run.log}")

    def ended(self, config: Config, result: dict[str, object], skipped: bool) -> None:
        """One line as a job ends."""
        if result["status"] != FINISHED:
            self._line(f"[red]{config.job} {result['status']}[/red]: ", end="")
            self._line(str(result["reason"]), markup=False)
            return
        word = "was finished before" if skipped else "finished"
        self._line(
            f"[green]{config.job} {word}[/green]: best epoch {result['best_epoch']}, accuracy "
            f"{_number(result['accuracy'])}, AUC {_number(result['auc'])}, "
            f"{_number(result['minutes'], 1)} min"
        )


def _epoch_line(config: Config, line: dict[str, float | None]) -> str:
    return (
        f"{config.job} epoch {line['step']}/{config.train.epochs}: "
        f"loss {_number(line['train/loss'])}, validation loss {_number(line['val/log_loss'])}, "
        f"accuracy {_number(line['val/accuracy'])}, AUC {_number(line['val/auc'])}, "
        f"{_number(line['train/images_per_s'], 0)} images/s"
    )


def _number(value: object, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "undefined"


def _read_progress(run: RunPaths) -> dict[str, int] | None:
    try:
        state: dict[str, int] = json.loads(run.progress.read_text())
    except FileNotFoundError:
        return None
    return state

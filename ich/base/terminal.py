"""What a person at the terminal sees: jobs with a time estimate, one line per epoch.

`Terminal` says what a command does, `Board` shows the jobs of a sweep while they run. In a pipe
or a log file there are no bars, only the lines.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.live import Live
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
from rich.progress_bar import ProgressBar
from rich.table import Table

from ich.base.config import Config
from ich.base.progress import StageCallback
from ich.base.records import FAILED, FINISHED, KILLED, EpochMetrics, JobProgress, RunResult
from ich.base.results import RunPaths, State, SweepPaths

_TEXTS = ("what", "state", "weights", "time from")  # columns that are not numbers
_LOG_WIDTH = 160  # where nothing tells the width: a pipe, a log file

# Without colours of its own for numbers and paths. Rich takes a pipe to be 80 wide.
console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)


class Terminal:
    """Prints to one console; a progress bar only where the console is a terminal."""

    def __init__(self, out: Console = console):
        self.out = out

    @contextmanager
    def preparing(self) -> Iterator[StageCallback]:
        """Yields `report(what, done, total)`; a line when each kind of work is complete."""
        tasks: dict[str, TaskID] = {}
        with self._bar(MofNCompleteColumn()) as bar:

            def report(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)
                if done == total:
                    # A finished kind of work is a line above the bars: it stays when they are gone.
                    bar.remove_task(tasks.pop(what))
                    self._line(f"{what}: {total:,} done")

            yield report

    def _bar(self, *columns: TextColumn | MofNCompleteColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.out,
            # Bars are no news afterwards, and would stand between the lines.
            transient=True,
            disable=not self.out.is_terminal,  # or a log would have a line for every step
        )

    def _line(self, text: str, markup: bool = True, end: str = "\n") -> None:
        # Never wrapped: a log is read with other tools, and a terminal folds long lines itself.
        self.out.print(printable(text), markup=markup, end=end, soft_wrap=True)

    def tables(
        self, title: str, tables: list[tuple[list[str], list[list[str]]]], sentences: list[str]
    ) -> None:
        """Tables, each as headings and rows, and what is to be said about them."""
        self._line(f"\n[bold]{escape(title)}[/bold]")
        for headings, rows in tables:
            out = Table(box=None, pad_edge=False)
            for n, heading in enumerate(headings):
                side: JustifyMethod = "left" if n == 0 or heading in _TEXTS else "right"
                out.add_column(escape(heading), justify=side, overflow="fold")
            for row in rows:
                out.add_row(*map(escape, row))
            self.out.print(out)
            self.out.print()
        for sentence in sentences:
            self._line(sentence, markup=False)

    def say(self, text: str) -> None:
        """One line as it is."""
        self._line(text, markup=False)

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
        counts = f"{slices:,} slices decoded, {quarantined:,} in quarantine"
        self._line(f"\n{counts}: {cache}", markup=False)
        self._line(f"data report: {report}", markup=False)

    def opened(self, sweep: SweepPaths, states: Sequence[State], other_code: Sequence[str]) -> None:
        """One line as the jobs of a sweep begin; and which finished runs are of other code."""
        words = {
            State.done: "finished before",
            State.resume: "to go on",
            State.retry: "to try again",
            State.new: "to run",
        }
        counts = [(states.count(state), word) for state, word in words.items()]
        parts = ", ".join(f"{n} {word}" for n, word in counts if n)
        self._line(f"{sweep.root}: {parts}", markup=False)
        if other_code:
            shown = ", ".join(other_code[:4]) + (" ..." if len(other_code) > 4 else "")
            self._line(
                f"[yellow]{len(other_code)} of them began with other code of ich[/yellow] and are "
                f"kept: {escape(shown)}. name=NEW runs everything with the code of now."
            )


class Board:
    """The jobs of a sweep while they run: what stays is printed, what changes is shown below it.

    Args:
        jobs: their names, in the order of the table.
        out: where to print; without a terminal only what stays is shown.
    """

    ROWS = 16  # of the changing part; running jobs come first

    def __init__(self, jobs: Sequence[str], out: Console = console):
        self._out = out
        self._rows = {job: _Row(job) for job in jobs}
        self._live = Live(
            console=out,
            get_renderable=self._render,
            refresh_per_second=4,
            transient=True,
            auto_refresh=out.is_terminal,
        )

    def __enter__(self) -> Board:
        if self._out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def started(self, config: Config, run: RunPaths, slot: str) -> Callable[[], None]:
        """A job starts; returns what shows the news its process has written."""
        # A job that was not announced, as an optimizing sweeper makes one after the other.
        row = self._rows.setdefault(config.job, _Row(config.job))
        row.status, row.began = "running", time.monotonic()
        number = list(self._rows).index(config.job) + 1
        on_slot = f"  on {slot}" if slot else ""
        title = escape(f"[{number}/{len(self._rows)}] {config.job}")
        self._line(f"[bold]{title}[/bold]{on_slot}  {escape(str(run.log))}")
        shown = len(run.read_metrics())  # of a resumed job, the epochs that were told before

        def watch() -> None:
            nonlocal shown
            journal = run.read_metrics()
            for line in journal[shown:]:
                self._line(_epoch_line(config, line))
            shown = max(shown, len(journal))  # a resumed training cuts its journal first
            row.follow(run.read_progress())

        return watch

    def ended(self, config: Config, result: RunResult, before: bool) -> None:
        """A job ended, or had ended before this launch."""
        row = self._rows.setdefault(config.job, _Row(config.job))
        row.status, fit = result.status, result.fit
        if fit is None:
            # In one line, as a row of the board is.
            row.note = " ".join(result.reason.split())
            self._line(f"[red]{config.job} {row.status}[/red]: {escape(row.note)}")
            return
        monitor = config.train.monitor.value
        row.note = f"{monitor} {_number(fit.scores.get(monitor))}"
        word = "was finished before" if before else "finished"
        self._line(
            f"[green]{config.job} {word}[/green]: best epoch {fit.best_epoch}, accuracy "
            f"{_number(fit.scores['accuracy'])}, AUC {_number(fit.scores['auc'])}, "
            f"{_number(fit.minutes, 1)} min"
        )

    def _line(self, text: str) -> None:
        self._out.print(printable(text), soft_wrap=True)

    def _render(self) -> Table:
        rows = sorted(self._rows.values(), key=lambda r: _ORDER.get(r.status, 1))
        counts = Counter(r.status for r in rows)
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(4):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for row in rows[: self.ROWS]:
            color = _COLORS.get(row.status, "dim")
            table.add_row(
                f"[{color}]{row.status}[/{color}]", escape(row.job), row.bar(), escape(row.note)
            )
        rest = f", {len(rows) - self.ROWS} not shown" if len(rows) > self.ROWS else ""
        totals = ", ".join(f"{n} {status}" for status, n in counts.items())
        table.add_row("", f"[bold]{len(rows)} jobs[/bold]: {totals}{rest}", "", "")
        return table


_ORDER = {"running": 0, "waiting": 1, FAILED: 2, FINISHED: 3}
_COLORS = {"running": "cyan", FAILED: "red", FINISHED: "green", KILLED: "yellow"}


@dataclass
class _Row:
    """One job on the board. fraction: of its training that is done, at first sight and now."""

    job: str
    status: str = "waiting"
    note: str = ""
    began: float = 0.0
    first_fraction: float | None = None  # a resumed training begins in its midst
    fraction: float = 0.0

    def follow(self, progress: JobProgress | None) -> None:
        """Takes over what the job's process says of itself."""
        if progress is None:
            self.note = "starting"
            return
        self.fraction = (progress.epoch - 1 + progress.step / progress.steps) / progress.epochs
        if self.first_fraction is None:
            self.first_fraction, self.began = self.fraction, time.monotonic()
        note = f"epoch {progress.epoch}/{progress.epochs}, {progress.phase}"
        # By what was done since it is seen here: before that it may have run elsewhere, or paused.
        gained = self.fraction - self.first_fraction
        if gained > 0:
            left = (time.monotonic() - self.began) * (1 - self.fraction) / gained
            note += f" {progress.step}/{progress.steps}, {format_duration(left)} left"
        self.note = note

    def bar(self) -> ProgressBar | str:
        if self.first_fraction is None:
            return ""
        return ProgressBar(total=1, completed=self.fraction, width=24)


def printable(text: str) -> str:
    """Text that moves no cursor and sets no colour, whatever a file is called."""
    # The escape character is not printable, so nothing of a name acts on the terminal.
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _epoch_line(config: Config, line: EpochMetrics) -> str:
    metrics = line.metrics
    return (
        f"{config.job} epoch {line.step}/{config.train.epochs}: "
        f"loss {_number(metrics['train/loss'])}, "
        f"validation loss {_number(metrics['val/log_loss'])}, "
        f"accuracy {_number(metrics['val/accuracy'])}, AUC {_number(metrics['val/auc'])}, "
        f"{_number(metrics['train/images_per_s'], 0)} images/s"
    )


def _number(value: object, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "undefined"

"""What a person at the terminal sees: jobs with a time estimate, one line per epoch.

`Terminal` says what a command does, `Board` shows the jobs of a sweep while they run. In a pipe, a
log file or a notebook there are no bars; what they would show is a line every half minute.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ich.base.config import Config
from ich.base.entry import printable
from ich.base.progress import Pace, StageCallback, repeating
from ich.base.records import FAILED, FINISHED, KILLED, EpochMetrics, JobProgress, RunResult
from ich.base.results import RunPaths, State, SweepPaths

_TEXTS = ("what", "state", "weights", "time from")  # columns that are not numbers
_LOG_WIDTH = 160  # where nothing tells the width: a pipe, a log file
# Between two lines of progress: at most 30 s are promised, and a busy machine is late.
LINE_SECONDS = 25.0

# Without colours of its own for numbers and paths, and without a meaning of [red] or :bomb:, which
# may be a name's. Rich takes a pipe to be 80 wide.
console = Console(
    highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _LOG_WIDTH
)


def styled(*parts: str | tuple[str, str]) -> Text:
    """One line, of texts and of texts with a style; the one way in which anything is printed.

    What came from a file is shown as it is: nothing of it acts on the terminal.
    """
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((printable(text), style) for text, style in pairs))


def print_line(*parts: str | tuple[str, str], out: Console = console) -> None:
    """Prints one line, see `styled`."""
    # Never wrapped: a log is read with other tools, and a terminal folds long lines itself.
    out.print(styled(*parts), soft_wrap=True)


def shows_bars(out: Console) -> bool:
    """Whether what changes can be drawn over: not in a file or a pipe, even if FORCE_COLOR asks for
    colours there, nor in a notebook, whose cells are terminals without a cursor to move."""
    return out.is_interactive and out.file.isatty() and "JPY_PARENT_PID" not in os.environ


class Terminal:
    """Prints to one console.

    Args:
        out: the console.
        seconds: between two lines of progress where no bar can be drawn.
    """

    def __init__(self, out: Console = console, seconds: float = LINE_SECONDS):
        self.out, self._seconds = out, seconds

    @contextmanager
    def preparing(
        self, otherwise: str = "preparing", lasting: bool = True
    ) -> Iterator[StageCallback]:
        """Yields `report(what, done, total)`: a bar for each kind of work, or lines.

        Args:
            otherwise: what is done where nothing reports, as while weights are downloaded or
                another process is waited for.
            lasting: whether a line stays of each kind of work that is complete.
        """
        tasks: dict[str, TaskID] = {}
        bar, whole = self._bar(), Pace()

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                pace = Pace(done / total if total else 0.0)
                tasks[what] = bar.add_task(what, total=total, pace=pace)
            bar.update(tasks[what], completed=done)
            if done == total:
                # A finished kind of work is a line above the bars: it stays when they are gone.
                bar.remove_task(tasks.pop(what))
                if lasting:
                    self.say(f"{what}: {total:,} done")

        def tell() -> None:
            nothing = [f"{otherwise}: {format_duration(whole.seconds)} so far"]
            for line in [_task_line(task) for task in bar.tasks] or nothing:
                self.say(line)

        with bar if shows_bars(self.out) else repeating(tell, self._seconds):
            yield report

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.out,
            # Bars are no news afterwards, and would stand between the lines.
            transient=True,
        )

    def tables(
        self, title: str, tables: list[tuple[list[str], list[list[str]]]], sentences: list[str]
    ) -> None:
        """Tables, each as headings and rows, and what is to be said about them."""
        self.out.print()
        print_line((title, "bold"), out=self.out)
        for headings, rows in tables:
            out = Table(box=None, pad_edge=False)
            for n, heading in enumerate(headings):
                side: JustifyMethod = "left" if n == 0 or heading in _TEXTS else "right"
                out.add_column(styled(heading), justify=side, overflow="fold")
            for row in rows:
                out.add_row(*map(styled, row))
            self.out.print(out)
            self.out.print()
        for sentence in sentences:
            self.say(sentence)

    def say(self, text: str) -> None:
        """One line as it is."""
        print_line(text, out=self.out)

    def verified(self, damaged: list[str], changed: list[str]) -> None:
        """What the checksums said of slices, and of the files that they were decoded from."""
        for paths, text in (
            (damaged, "slices did not match their checksum and were decoded again"),
            (changed, "files have other bytes than when they were decoded, and were decoded again"),
        ):
            if paths:
                shown = ", ".join(paths[:5]) + (" ..." if len(paths) > 5 else "")
                print_line((f"{len(paths):,} {text}", "red"), f": {shown}", out=self.out)
        if changed:
            self.say("Runs that finished before saw the earlier ones; name=NEW trains all again.")
        if not (damaged or changed):
            self.say("every slice matches its checksum, and every file what was decoded from it")

    def prepared(self, cache: Path, slices: int, quarantined: int, report: Path) -> None:
        """Where the decoded slices and the data report are."""
        self.out.print()
        self.say(f"{slices:,} slices decoded, {quarantined:,} in quarantine: {cache}")
        self.say(f"data report: {report}")

    def opened(
        self,
        sweep: SweepPaths,
        states: Sequence[State],
        other_code: Sequence[str],
        superseded: Sequence[str],
    ) -> None:
        """One line as the jobs of a sweep begin; which finished runs are of other code; and in
        sentences, which are moved aside and why."""
        words = {
            State.done: "finished before",
            State.resume: "to go on",
            State.retry: "to try again",
            State.new: "to run",
        }
        counts = [(states.count(state), word) for state, word in words.items()]
        parts = ", ".join(f"{n} {word}" for n, word in counts if n)
        self.say(f"{sweep.root}: {parts}")
        if other_code:
            shown = ", ".join(other_code[:4]) + (" ..." if len(other_code) > 4 else "")
            print_line(
                (f"{len(other_code)} of them began with other code of ich", "yellow"),
                f" and are kept: {shown}. name=NEW runs everything with the code of now.",
                out=self.out,
            )
        for sentence in superseded:
            print_line((sentence, "yellow"), out=self.out)


class Board:
    """The jobs of a sweep while they run: what stays is printed, what changes is shown below it.

    Without a terminal what changes is a line now and then.

    Args:
        jobs: their names, in the order of the table.
        out: where to print.
        seconds: between two lines of what changes.
        others: how the jobs stand that this process does not run.
    """

    ROWS = 16  # of the changing part; running jobs come first
    NAMED = 4  # running jobs in a line: with more, a line could not be read

    def __init__(
        self,
        jobs: Sequence[str],
        out: Console = console,
        seconds: float = LINE_SECONDS,
        others: Mapping[str, str] = {},
    ):
        self._out = out
        self._rows = {job: _Row(job, others.get(job, "waiting")) for job in jobs}
        self._display: AbstractContextManager[object] = repeating(self._tell, seconds)
        if shows_bars(out):
            self._display = Live(
                console=out, get_renderable=self._render, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> Board:
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)

    def started(self, config: Config, run: RunPaths, slot: str) -> Callable[[], None]:
        """A job starts; returns what shows the news its process has written."""
        # A job that was not announced, as an optimizing sweeper makes one after the other.
        row = self._rows.setdefault(config.job, _Row(config.job))
        row.status, row.note = "running", _STARTING
        number = list(self._rows).index(config.job) + 1
        on_slot = f"  on {slot}" if slot else ""
        title = f"[{number}/{len(self._rows)}] {config.job}"
        self._line((title, "bold"), f"{on_slot}  {run.log}")
        shown = len(run.read_metrics())  # of a resumed job, the epochs that were told before

        def watch() -> None:
            nonlocal shown
            journal = run.read_metrics()
            for line in journal[shown:]:
                self._line(_epoch_line(config, line))
            shown = max(shown, len(journal))  # a resumed training cuts its journal first
            # Its process says nothing while it imports, nor while it writes to MLflow at its end.
            row.follow(run.read_progress(), "ending" if run.result.exists() else _STARTING)

        return watch

    def ended(self, config: Config, result: RunResult, before: bool) -> None:
        """A job ended, or had ended before this launch."""
        row = self._rows.setdefault(config.job, _Row(config.job))
        row.status, fit = result.status, result.fit
        if fit is None:
            # In one line, as a row of the board is.
            row.note = " ".join(result.reason.split())
            self._line((f"{config.job} {row.status}", "red"), f": {row.note}")
            return
        monitor = config.train.monitor.value
        row.note = f"{monitor} {_number(fit.scores.get(monitor))}"
        word = "was finished before" if before else "finished"
        self._line(
            (f"{config.job} {word}", "green"),
            f": best epoch {fit.best_epoch}, accuracy "
            f"{_number(fit.scores['accuracy'])}, AUC {_number(fit.scores['auc'])}, "
            f"{_number(fit.minutes, 1)} min",
        )

    def _line(self, *parts: str | tuple[str, str]) -> None:
        print_line(*parts, out=self._out)

    def _tell(self) -> None:
        """One line of what `_render` would show."""
        rows = list(self._rows.values())
        running = [f"{row.job} {row.note}" for row in rows if row.status == "running"]
        parts = [f"{len(rows)} jobs: {_totals(rows)}"] if len(rows) > 1 else []
        parts += running[: self.NAMED]
        if len(running) > self.NAMED:
            parts.append(f"{len(running) - self.NAMED} more are running")
        if parts:  # not between the start of a rerun and that of its one job
            self._line("; ".join(parts))

    def _render(self) -> Table:
        rows = sorted(self._rows.values(), key=lambda r: _ORDER.get(r.status, 1))
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(4):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for row in rows[: self.ROWS]:
            status = styled((row.status, _COLORS.get(row.status, "dim")))
            table.add_row(status, styled(row.job), row.bar(), styled(row.note))
        rest = f", {len(rows) - self.ROWS} not shown" if len(rows) > self.ROWS else ""
        totals = styled((f"{len(rows)} jobs", "bold"), f": {_totals(rows)}{rest}")
        table.add_row("", totals, "", "")
        return table


def _totals(rows: Sequence[_Row]) -> str:
    """How many of the jobs are in each state."""
    return ", ".join(f"{n} {status}" for status, n in Counter(r.status for r in rows).items())


_STARTING = "starting"
# What validating takes of an epoch, about: rows are 15 % as many as those that are trained on, and
# need no backward pass.
_VALIDATION = 0.05
_ORDER = {"running": 0, "waiting": 1, FAILED: 2, FINISHED: 3}
_COLORS = {"running": "cyan", FAILED: "red", FINISHED: "green", KILLED: "yellow"}


@dataclass
class _Row:
    """One job on the board. fraction: of its training that is done. pace: since it is seen here,
    for before that it may have run elsewhere, or paused."""

    job: str
    status: str = "waiting"
    note: str = ""
    pace: Pace | None = None
    fraction: float = 0.0

    def follow(self, progress: JobProgress | None, otherwise: str) -> None:
        """Takes over what the job's process says of itself, or `otherwise`."""
        if progress is None:
            self.note = otherwise
            return
        part = progress.step / progress.steps
        if progress.phase in ("training", "head"):
            part *= 1 - _VALIDATION
        else:
            part = 1 - _VALIDATION * (1 - part)
        self.fraction = (progress.epoch - 1 + part) / progress.epochs
        self.pace = self.pace or Pace(self.fraction)
        step = f"{progress.phase} {progress.step}/{progress.steps}"
        left = _left(self.pace.seconds_left(self.fraction))
        self.note = f"epoch {progress.epoch}/{progress.epochs}, {step}{left}"

    def bar(self) -> ProgressBar | str:
        if self.pace is None:
            return ""
        return ProgressBar(total=1, completed=self.fraction, width=24)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _task_line(task: Task) -> str:
    """What the bar of a task of `Terminal.preparing` would show."""
    pace: Pace = task.fields["pace"]
    total, so_far = task.total or 0, format_duration(pace.seconds)
    left = _left(pace.seconds_left(task.percentage / 100))
    return f"{task.description}: {task.completed:,.0f} of {total:,.0f} done in {so_far}{left}"


def _left(seconds: float | None) -> str:
    """The end of a line of progress; empty while nothing tells the time left."""
    return "" if seconds is None else f", {format_duration(seconds)} left"


def _epoch_line(config: Config, line: EpochMetrics) -> str:
    metrics = line.metrics
    if "head/lr" in metrics:
        epoch = f"{line.step - config.train.epochs}/{config.context.epochs}"
        heads = [
            f"over {inputs} validation loss {_number(metrics.get(f'head/{inputs}/val/log_loss'))}, "
            f"AUC {_number(metrics.get(f'head/{inputs}/val/auc'))}"
            for inputs in ("logits", "features")
        ]
        return f"{config.job} head, epoch {epoch}: {'; '.join(heads)}"
    return (
        f"{config.job} epoch {line.step}/{config.train.epochs}: "
        f"loss {_number(metrics.get('train/loss'))}, "
        f"validation loss {_number(metrics.get('val/log_loss'))}, "
        f"accuracy {_number(metrics.get('val/accuracy'))}, AUC {_number(metrics.get('val/auc'))}, "
        f"{_number(metrics.get('train/images_per_s'), 0)} images/s"
    )


def _number(value: object, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "undefined"

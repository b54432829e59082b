"""What came from files is shown as it is, and nothing of it acts on the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ich.base.config import Config
from ich.base.records import FAILED, RunResult
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.terminal import Board, Terminal

# Markup to rich: a color, the end of what never began (an error to it), a style that it leaves out.
HOSTILE = "/data/[red]scans [/b] [batch]"


def console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def shown(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_paths_and_texts_with_brackets_are_shown_whole() -> None:
    out = console()
    terminal, place = Terminal(out), Path(HOSTILE)
    terminal.prepared(place, 3, 0, place / "report.html")
    terminal.opened(SweepPaths(place), [State.new], [HOSTILE])
    terminal.verified([HOSTILE])
    terminal.tables(HOSTILE, [([HOSTILE, "n"], [[HOSTILE, "1"]])], [HOSTILE])
    terminal.say(HOSTILE)
    assert shown(out).count(HOSTILE) == 10


def test_a_jobs_lines_show_its_folder_and_its_error_whole(composed: Callable[..., Config]) -> None:
    out, config = console(), composed()
    with Board([config.job], out) as board:
        board.started(config, RunPaths(Path(HOSTILE)), "")
        board.ended(config, RunResult(FAILED, f"{HOSTILE}\x1b[2J"), before=False)
    assert shown(out).count(HOSTILE) == 2
    assert "\x1b" not in shown(out)

"""What came from files is shown as it is, and nothing of it acts on the terminal."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ich.base.config import Config
from ich.base.records import FAILED, RunResult
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.terminal import Board, Terminal

# Markup to rich: a color, the end of what never began (an error to it), a style that it leaves out,
# an emoji, and a backslash before what follows.
HOSTILE = "/data/[red]scans [/b] [batch] :bomb: \\"
# What acts on a terminal or begins a line: escape sequences of 7 and of 8 bits, a line break, a
# return, a turn of the writing's direction, a bell; and half a pair, which cannot be encoded.
ACTING = "\x1b[2J\x9b2J\n\r\u202e\a\udce9\u2028"
SHOWN = r"\x1b[2J\x9b2J\n\r\u202e\x07\udce9\u2028"


def console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def shown(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_paths_and_texts_with_brackets_are_shown_whole() -> None:
    out = console()
    terminal, name = Terminal(out), HOSTILE + ACTING
    place = Path(name)
    terminal.prepared(place, 3, 0, place / "report.html")
    terminal.opened(SweepPaths(place), [State.new], [name], [name])
    terminal.verified([name], [name])
    terminal.tables(name, [([name, "n"], [[name, "1"]])], [name])
    terminal.say(name)
    assert shown(out).count(HOSTILE + SHOWN) == 12
    assert set(shown(out)) & set(ACTING) == {"\n", *"[2J"}
    assert len(shown(out).splitlines()) == 16  # twelve with a name, one without, and three empty


def test_a_jobs_lines_show_its_folder_and_its_error_whole(composed: Callable[..., Config]) -> None:
    out, config = console(), composed()
    with Board([config.job], out) as board:
        board.started(config, RunPaths(Path(HOSTILE)), "")
        board.ended(config, RunResult(FAILED, f"{HOSTILE}\x1b[2J"), before=False)
        out.print(board._render())
    assert shown(out).count(HOSTILE) == 3
    assert "\x1b" not in shown(out)


def test_everything_is_printed_through_the_function_that_makes_it_harmless() -> None:
    """`print` is for what holds nothing of a file: help, completions, a report of ours."""
    own = {"cli.py", "completion.py", "bench.py", "entry.py", "timing.py", "parts.py"}
    own |= {"mps.py", "side_by_side.py"}  # JSON, to the process that started them
    safe = {"styled", "_fitting_table"}
    package = Path(__file__).parents[2] / "ich"
    for path in (p for p in package.rglob("*.py") if p.name != "terminal.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id == "print":
                assert path.name in own, f"{path.name}:{node.lineno}"
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "print":
                names = {ast.unparse(arg).partition("(")[0] for arg in node.args}
                assert names <= safe, f"{path.name}:{node.lineno}"

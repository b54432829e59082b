"""What commands end with."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from ich.base.config import UserError
from ich.base.entry import (
    Parser,
    PrintableFormatter,
    Status,
    exit_status,
    recorded_command,
    shell_command,
)
from ich.cli import COMMANDS

Capture = pytest.CaptureFixture[str]


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_the_exit_status_says_what_happened(capsys: Capture) -> None:
    assert [*map(int, Status)] == [0, 1, 2, 3, 130, 143]
    assert exit_status(lambda: Status.LEFT_OUT) == 3
    assert exit_status(raising(UserError("no such thing"))) == 2
    assert capsys.readouterr().err == "ich: no such thing\n"
    assert exit_status(raising(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError()))


def test_what_reads_like_a_full_disk_keeps_its_traceback(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_status(raising(OSError(28, "No space left on device"))) == 2
    err = capsys.readouterr().err
    assert "a folder or file cannot be used: [Errno 28] No space left on device. If that" in err
    assert err.count("\n") == 1
    (log,) = tmp_path.glob("ich-*.log")
    assert err.rstrip().endswith(f"the traceback is in {log}")
    assert "in command\n    raise error" in log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert exit_status(raising(OSError(28, "No space left on device"))) == 2
    assert "Nor can a log with the traceback be written." in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(capsys: Capture, number: int) -> None:
    assert exit_status(raising(OSError(number, os.strerror(number), "/theirs/.ich-cache"))) == 2
    err = capsys.readouterr().err
    wanted = f"ich: /theirs/.ich-cache cannot be used ({os.strerror(number)}). Give this command in"
    assert err.startswith(wanted)
    assert err.count("\n") == 1
    assert exit_status(raising(PermissionError("cannot write ph: no permission"))) == 2
    assert capsys.readouterr().err == "ich: cannot write ph: no permission\n"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", r"/home/a b\1")
    parser = Parser("predict", None)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("inputs", nargs="*")
    args = parser.parse_args(["--cache-dir=~/c", "~/scans", "data.root=~/x", "a~/b", "~user", "~"])
    home = os.environ["HOME"]
    assert args.cache_dir == Path(home, "c")
    assert args.inputs == [f"{home}/scans", f"data.root={home}/x", "a~/b", "~user", "~"]


def test_a_notebooks_backend_is_not_taken_over() -> None:
    """Set before matplotlib is imported, and handed down to whatever a command starts."""
    code = "import os, ich.train, matplotlib; print(matplotlib.get_backend(), os.environ['%s'])"
    kernel = {**os.environ, "MPLBACKEND": "module://matplotlib_inline_of_nobody"}
    command = [sys.executable, "-c", code % "MPLBACKEND"]
    done = subprocess.run(command, env=kernel, capture_output=True, text=True)
    assert done.stdout == "agg agg\n", done.stderr


def test_every_command_sets_it() -> None:
    for name in COMMANDS:
        source = Path(import_module(f"ich.{name}").__file__ or "").read_text()
        assert "from ich.base.entry import" in source, name


def test_an_option_that_is_misspelt_suggests_the_nearest(capsys: Capture) -> None:
    parser = Parser("predict", "Predicts.")
    parser.add_argument("--threshold")
    for given, hint in (("--treshold", " Did you mean --threshold?"), ("--quick", "")):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([given, "0.5"])
        assert ended.value.code == Status.MISTAKE
        message = f"ich: unrecognized arguments: {given} 0.5.{hint} See ich predict --help.\n"
        assert capsys.readouterr().err == message


# What came from a file


def test_a_mistake_is_one_line_whatever_the_file_is_called(capsys: Capture) -> None:
    name = "a\nich: all is well\r\x1b[2J"
    assert exit_status(raising(UserError(f"{name} is no file"))) == 2
    assert capsys.readouterr().err == "ich: a\\nich: all is well\\r\\x1b[2J is no file\n"
    with pytest.raises(SystemExit):
        Parser("predict", "Predicts.").parse_args([f"--{name}"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert not set(err) & {"\r", "\x1b"}


def test_a_log_line_is_one_line_and_a_traceback_keeps_its_own() -> None:
    try:
        raise ValueError("\x1b[2Jone\ntwo")
    except ValueError:
        record = logging.LogRecord("ich", 30, "", 0, "%s", ("a\nb\x1bc",), sys.exc_info())
    first, *trace = PrintableFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first == r"WARNING a\nb\x1bc"
    assert trace[-2:] == [r"ValueError: \x1b[2Jone", "two"]


@pytest.mark.parametrize("word", ["plain", "a b", "x; echo no", "$(id)", "it's", "a\nb'\\\t$x", ""])
def test_a_command_to_paste_gives_the_shell_its_words(word: str) -> None:
    command = shell_command("printf", "<%s>", word)
    assert command.isprintable()
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert told.stdout == f"<{word}>"


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ("ich sweep -m 'model=a,b' seed=0", "ich sweep -m model=a,b seed=0"),
        ("ich sweep x; rm -rf ~", "ich sweep 'x;' rm -rf '~'"),
        ("ich sweep `id`", "ich sweep '`id`'"),
        ("rm -rf ~", "ich sweep ..."),
        ("ich sweep 'never", "ich sweep ..."),
        (None, "ich sweep ..."),
    ],
)
def test_a_recorded_command_is_told_so_that_pasting_it_runs_nothing_else(
    recorded: str | None, told: str
) -> None:
    assert recorded_command(recorded) == told

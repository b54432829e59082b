"""What commands end with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ich.base.config import UserError
from ich.base.entry import Parser, Status, exit_status

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
    assert exit_status(raising(PermissionError(13, "Permission denied", "/x"))) == 2
    assert "Nor can a log with the traceback be written." in capsys.readouterr().err


def test_an_option_that_is_misspelt_suggests_the_nearest(capsys: Capture) -> None:
    parser = Parser("predict", "Predicts.")
    parser.add_argument("--threshold")
    for given, hint in (("--treshold", " Did you mean --threshold?"), ("--quick", "")):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([given, "0.5"])
        assert ended.value.code == Status.MISTAKE
        message = f"ich: unrecognized arguments: {given} 0.5.{hint} See ich predict --help.\n"
        assert capsys.readouterr().err == message

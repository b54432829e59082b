"""What a log has in the place of bars: a line now and then, whatever is waited for."""

from __future__ import annotations

import io
import os
import pty
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ich.base.config import Config
from ich.base.progress import Pace, repeating
from ich.base.records import FAILED, FINISHED, JobProgress, RunResult
from ich.base.results import RunPaths
from ich.base.terminal import LINE_SECONDS, Board, Terminal, shows_bars

SHORT = 0.01  # seconds between lines, in place of LINE_SECONDS


class Log(io.StringIO):
    """A log file that can be waited for."""

    def wait_for(self, *texts: str) -> None:
        end = time.monotonic() + 20
        while not all(text in self.getvalue() for text in texts):
            assert time.monotonic() < end, self.getvalue()
            time.sleep(SHORT)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def out(log: Log) -> Console:
    return Console(file=log, width=160, highlight=False)


def test_the_time_left_rests_on_what_was_done_since_it_is_watched() -> None:
    now = 100.0
    pace = Pace(0.5, lambda: now)
    assert pace.seconds_left(0.5) is None
    now += 60
    assert pace.seconds == 60
    assert pace.seconds_left(0.75) == pytest.approx(60)
    assert pace.seconds_left(0.625) == pytest.approx(180)
    assert pace.seconds_left(0.4) is None  # taken back, as by a training that is tried again
    assert pace.seconds_left(1.0) == 0


def test_what_repeats_ends_with_its_block() -> None:
    called, before = threading.Event(), threading.active_count()
    with repeating(called.set, SHORT):
        assert called.wait(20)
    assert threading.active_count() == before
    with pytest.raises(KeyError), repeating(called.set, 3600):
        raise KeyError
    assert threading.active_count() == before


def test_a_line_comes_at_least_every_thirty_seconds() -> None:
    assert LINE_SECONDS < 30


def test_a_log_is_told_how_far_work_is_while_nothing_completes(log: Log, out: Console) -> None:
    with Terminal(out, SHORT).preparing() as report:
        log.wait_for("preparing: 0:00 so far\n")
        report("decoding slices", 0, 4000)
        log.wait_for("decoding slices: 0 of 4,000 done in 0:00\n")
        report("decoding slices", 1000, 4000)
        log.wait_for("decoding slices: 1,000 of 4,000 done in 0:00, 0:00 left\n")
        report("decoding slices", 4000, 4000)
    assert log.getvalue().count("decoding slices: 4,000 done\n") == 1


def test_a_log_has_no_line_for_every_step(log: Log, out: Console) -> None:
    with Terminal(out).preparing() as report:
        for done in range(100):
            report("decoding slices", done, 100)
    with Terminal(out).preparing(lasting=False) as report:
        report("resampling", 1, 1)
    assert log.getvalue() == ""


def test_a_log_is_told_of_running_jobs(
    log: Log, out: Console, composed: Callable[..., Config], tmp_path: Path
) -> None:
    run, config = RunPaths(tmp_path / "[a]"), replace(composed(), job="[a]")
    run.root.mkdir()
    jobs, others = [config.job, "b", "c", "d"], {"c": FINISHED, "d": FAILED}
    with Board(jobs, out, SHORT, others) as board:
        log.wait_for("4 jobs: 2 waiting, 1 finished, 1 failed\n")
        watch = board.started(config, run, "GPU 0")
        totals = "4 jobs: 1 running, 1 waiting, 1 finished, 1 failed; [a]"
        log.wait_for(f"{totals} starting\n")
        run.write_progress(JobProgress("training", 3, 10, 20, 40))
        watch()
        log.wait_for(f"{totals} epoch 3/10, training 20/40\n")
        run.write_progress(JobProgress("training", 3, 10, 30, 40))
        watch()
        log.wait_for(f"{totals} epoch 3/10, training 30/40, 0:0")
        run.write_progress(JobProgress("validating", 3, 10, 1, 8))  # goes on, not back
        watch()
        log.wait_for(f"{totals} epoch 3/10, validating 1/8, 0:0")
        run.progress.unlink()
        run.write_result(RunResult(FAILED, "why"))
        watch()
        log.wait_for(f"{totals} ending\n")
        board.ended(config, run.read_result(), before=False)
        log.wait_for("4 jobs: 2 failed, 1 waiting, 1 finished\n")


def test_one_job_is_told_of_by_itself_and_of_many_the_first(
    log: Log, out: Console, composed: Callable[..., Config], tmp_path: Path
) -> None:
    with Board(["job"], out, SHORT) as board:
        board.started(composed(), RunPaths(tmp_path), "")
        log.wait_for("\njob starting\n")
    names = [f"j{n}" for n in range(6)]
    with Board(names, out, SHORT) as board:
        for name in names:
            board.started(replace(composed(), job=name), RunPaths(tmp_path), "")
        log.wait_for(
            "6 jobs: 6 running; j0 starting; j1 starting; j2 starting; j3 starting; 2 more"
        )
    assert "\n\n" not in log.getvalue()


def test_bars_are_drawn_at_a_terminal_alone(
    log: Log, monkeypatch: pytest.MonkeyPatch, composed: Callable[..., Config], tmp_path: Path
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as screen:
        out = Console(file=screen, width=100)
        with Terminal(out, SHORT).preparing() as report:
            report("decoding slices", 1, 4)
            time.sleep(20 * SHORT)  # lines would have come
        with Board(["job"], out, SHORT) as board:
            board.started(composed(), RunPaths(tmp_path), "")
            time.sleep(20 * SHORT)
        shown = os.read(leader, 1 << 16).decode()
        assert "━" in shown
        assert "running" in shown  # a row of the board
        assert "1 of 4" not in shown
        assert "job starting" not in shown
        monkeypatch.setenv("JPY_PARENT_PID", "1")  # a cell of a notebook
        assert not shows_bars(Console(file=screen))
        monkeypatch.delenv("JPY_PARENT_PID")
        monkeypatch.setenv("TERM", "dumb")
        assert not shows_bars(Console(file=screen))
    os.close(leader)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many set it for CI
    assert not shows_bars(Console(file=log))

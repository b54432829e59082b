"""Tab completion: what may follow, and the shells that ask for it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ich.cli import COMMANDS
from ich.completion import complete, main

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ich s", ["sweep"]),
        ("ich completion ", ["bash", "zsh", "fish"]),
        ("ich nothing ", []),
        ("ich predict --t", ["--threshold", "--tta", "--tracking-uri"]),
        ("ich predict --tta ", ["none", "flips"]),
        ("ich predict --tta flips ", []),  # files, by the shell
        ("ich bench --parts step s", ["step", "slots", "sweep", "start"]),
        ("ich rerun --q", []),
        ("ich sweep --mu", ["--multirun"]),
        ("ich sweep model=re", ["model=resnet50"]),
        ("ich sweep -m seed=0,1 model=vgg16,re", ["model=vgg16,resnet50"]),
        ("ich sweep 'optimizer.lr=interval(1e-5, 1e-2)' optimizer.l", ["optimizer.lr="]),
        ("ich sweep train.monitor=a", ["train.monitor=accuracy", "train.monitor=auc"]),
        ("ich sweep hydra/launcher=ich_slurm hydra.launcher.pa", ["hydra.launcher.partition="]),
        ("ich prepare verify=", ["verify=true", "verify=false"]),
        ("ich evaluate rows=t", ["rows=train", "rows=test"]),
    ],
)
def test_what_may_follow(line: str, found: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert complete(line) == found
    assert main(["--query", line]) == 0
    assert capsys.readouterr().out.split() == found


def test_every_command_and_group_is_offered_within_two_seconds() -> None:
    assert set(COMMANDS) <= set(complete("ich "))
    before = os.times().children_user
    asked = [sys.executable, "-m", "ich", "completion", "--query", "ich sweep "]
    offered = subprocess.check_output(asked, text=True).split()
    for group in ("model", "data", "experiment", "optimizer", "windows"):
        assert f"{group}=" in offered
    assert os.times().children_user - before < 2  # of a processor: other tests run beside this one


def test_half_a_quotation_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--query", "ich sweep 'data.root=/a b"]) == 1
    assert capsys.readouterr() == ("", "")


def test_the_help_has_the_line_for_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for shell in ("bash", "zsh"):
        assert f'eval "$(ich completion {shell})"' in text
    assert "ich completion fish | source" in text


# The shells themselves


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with `ich` on its path."""
    script = tmp_path / "bin" / "ich"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ich "$@"\n')
    script.chmod(0o755)
    return tmp_path


class Shell:
    """A shell in a terminal of its own."""

    def __init__(self, home: Path, *command: str):
        if not shutil.which(command[0]):
            pytest.skip(f"{command[0]} is not installed")
        self.terminal, terminal = pty.openpty()
        env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"}
        env["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=home,
            start_new_session=True,
        )  # fmt: skip
        os.close(terminal)

    def say(self, keys: str, answer: str) -> None:
        """Types, and waits for an answer."""
        os.write(self.terminal, keys.encode())
        text, end = "", time.monotonic() + 30
        while answer not in text.replace("\a", ""):  # zsh rings where more may follow
            assert time.monotonic() < end, repr(text)
            if select.select([self.terminal], [], [], 0.1)[0]:
                text += os.read(self.terminal, 65536).decode(errors="replace")


LINES = [
    ("ich sw", "eep"),
    ("ich sweep -m seed=0,1 model=vgg16,res", "net50"),
    ("ich predict bi", "n/"),
]
# Bash alone begins a new word at = and : .
BASH = [
    ("ich sweep model=res", "net50"),
    ("ich sweep data=rsna optimizer.l", "r="),
    ("ich predict --tt", "a"),
]


@pytest.mark.parametrize(
    "command", [["bash", "--norc", "--noprofile", "-i"], ["zsh", "-f", "-i"]], ids=["bash", "zsh"]
)
def test_a_shell_completes_as_its_line_in_the_help_says(home: Path, command: list[str]) -> None:
    shell = Shell(home, *command)
    try:
        shell.say(f'eval "$(ich completion {command[0]})"; echo rea""dy\n', "ready\r")
        for line, rest in LINES + (BASH if command[0] == "bash" else []):
            shell.say(f"{line}\t", line + rest)
            shell.say("\x15echo nex''t\n", "next\r")  # Ctrl-U: the line is not run
    finally:
        shell.process.kill()
        shell.process.wait()
        os.close(shell.terminal)


def test_fish_completes_as_its_line_in_the_help_says(home: Path) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    asked = "; ".join(f"complete -C '{line}'" for line, _ in LINES)
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    env["PATH"] = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    script = ["fish", "--no-config", "-c", f"ich completion fish | source; {asked}"]
    done = subprocess.run(script, cwd=home, env=env, capture_output=True, text=True, check=True)
    expected = [(line + rest).split()[-1] for line, rest in LINES]
    assert done.stdout.split() == expected

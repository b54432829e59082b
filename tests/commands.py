"""The commands of ich as their user gives them: each in a process of its own, in a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command_of(module: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"ich.{module}", *map(str, args)]


def run_module(
    module: str, *args: object, cwd: Path, env: Mapping[str, str] = {}, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Waits for `python -m ich.MODULE ARGS`; `env` is added to the environment of the tests."""
    return subprocess.run(
        command_of(module, *args),
        cwd=cwd,
        env={**os.environ, **env},
        timeout=timeout,  # below pytest's, which would leave the process behind
        capture_output=True,
        text=True,
    )


def start_module(
    module: str, *args: object, cwd: Path, env: Mapping[str, str] = {}, **options: Any
) -> subprocess.Popen[str]:
    """The same command, not waited for; what it says, also about mistakes, is one stream."""
    return subprocess.Popen(
        command_of(module, *args),
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # pytest in the background of a shell (CI) ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )

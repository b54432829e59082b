"""The commands of ich as their user gives them: each in a process of its own, in a folder."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Processes are forked off one that has imported these, which takes seconds in each otherwise. None
# of them is ours: `ich` itself starts anew each time.
_PRELOADED = ["torch", "timm", "mlflow", "sqlalchemy", "alembic", "pandas", "scipy.stats"]
_PRELOADED += ["hydra", "pydicom", "rich.live", "matplotlib.figure", "jinja2"]
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(_PRELOADED)


def command_of(module: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"ich.{module}", *map(str, args)]


def run_module(
    module: str, *args: object, cwd: Path, env: Mapping[str, str] = {}, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Waits for `python -m ich.MODULE ARGS`; `env` is added to the environment of the tests."""
    command, env = command_of(module, *args), {**os.environ, **env}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = forkserver.Process(target=_run, args=(command[2:], cwd, env, out, err))
        process.start()
        process.join(timeout)  # below pytest's, which would leave the process behind
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        texts = out.read_text(), err.read_text()
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _run(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    """What a new process does that was told `python -m WORDS`."""
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = words
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


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

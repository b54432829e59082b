"""Every process that ich starts ends with the one that started it, however that ends."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeps import wait_for

import ich
from ich.base.config import Config, to_dict
from ich.base.records import SweepRecord
from ich.base.results import SweepPaths

PACKAGE = Path(ich.__file__).parent
# What starts a process, and why nothing of it lives on.
STARTED = {
    "launch.jobs.supervise": "a training watches: tests/launch/test_jobs.py",
    "training.timing.select_modes": "watches: below",
    "launch.side_by_side._started": "watches: below",
    "launch.mps.multi_process_service": "looks for its parent itself: tests/launch/test_mps.py",
    "launch.mps.main": "NVIDIA's daemon, which the kernel tells: tests/launch/test_mps.py",
    "launch.mps._obeys": "a question to that daemon, for 25 seconds at most",
    "tracking.sweep_run.close_sweep_run": "watches: below",
    "base.workers.__init__": "a worker watches: tests/data/test_cache.py",
    "base.provenance._git": "git, for ten seconds at most",
    "base.provenance.nvidia_smi": "nvidia-smi, for ten seconds at most",
    "benchmarks.jobs.bench_start": "imports libraries, and ends",
    "benchmarks.jobs._busy_process": "looks for its parent itself",
    "benchmarks.jobs._training": "a training watches",
    "benchmarks.jobs._prediction_peak": "watches, as the timing does",
    "benchmarks.commands._run": "watches, as the timing does",
    "benchmarks.parts.in_own_process": "watches, as the timing does",
}
STARTING = {"Popen", "run", "call", "check_call", "check_output", "Process", "fork", "system"}
OWNERS = {"subprocess", "os", "multiprocessing", "context"}


def test_this_lists_all_that_is_started() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                called = node.func if isinstance(node, ast.Call) else None
                owner = getattr(getattr(called, "value", None), "id", "")
                name = getattr(called, "attr", getattr(called, "id", ""))
                if name == "ProcessPoolExecutor" or (name in STARTING and owner in OWNERS):
                    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
                    found.add(f"{module}.{function.name}")
    assert found == {*STARTED}


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([*sys.argv[1:], str(os.getpid())])
print(child.pid, flush=True)
time.sleep(600)
"""


def ends_with_its_parent(*command: object) -> None:
    """Starts a command that would wait for ever by a process that is killed then."""
    words = [sys.executable, "-S", "-c", PARENT, sys.executable, *map(str, command)]
    # Its standard input stays open, so that no end of that ends it.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        # Until it has read what it is: a process that has just been forked has its parent's words.
        wait_for(lambda: b"ich" in (child / "cmdline").read_bytes())
        parent.kill()
        parent.wait()
        wait_for(lambda: has_ended(child), 60)


def has_ended(process: Path) -> bool:
    """Whether a process is gone; one that nobody has asked for its exit status counts."""
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("module", ["training.timing", "launch.side_by_side"])
def test_what_times_networks_ends_with_its_sweep(module: str) -> None:
    """It lived on for minutes, with all the machine's cores."""
    ends_with_its_parent("-m", f"ich.{module}")


def test_what_copies_to_mlflow_ends_with_its_sweep(
    composed: Callable[..., Config], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never answers
        uri = f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}"
        config = to_dict(composed("model=mobilenet_v2", "tracking=mlflow", uri))
        SweepPaths(tmp_path).write_record(SweepRecord("s", ("job",), configs={"job": config}))
        ends_with_its_parent("-m", "ich.tracking.sweep_run", tmp_path, "FINISHED")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),  # with a count, the policy would not count
    ],
)
def test_threads_spin_for_a_moment_alone_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    """Beside a busy process they would spin its core's other half away. Set by whatever imports any
    of `ich`, since torch reads it once, when it is loaded."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    code = "import sys, os, ich; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", code], env=bare | given, text=True)
    assert said == f"{expected} False\n"

"""Whole commands, as their user gives them, each in a process that ends with this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

import ich
from ich.base.results import SweepPaths
from ich.base.workers import available_cores
from ich.benchmarks import peers
from ich.benchmarks.measure import PartResult, compare, compose_job
from ich.benchmarks.peers import rate_of
from ich.benchmarks.predictions import phantom_slices, write_random_weights
from ich.benchmarks.settings import Settings
from ich.data.phantom.spec import LABELS
from ich.training.devices import pick_device
from ich.training.model import build_model

# `python -m MODULE ARGS`.
_WATCHED = """import runpy, sys
from ich.base.processes import watch_supervisor
watch_supervisor(int(sys.argv[1]))
sys.argv[:2] = []
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""
_GPU_TESTS = ("training/test_gpu.py", "training/test_timing.py", "training/test_loader.py")
# Of the demo on a GPU, by estimate: its launch and table, and each of its networks.
_LAUNCH_SECONDS, _NETWORK_SECONDS = 20, 15


def watched(module: str, *args: object) -> list[str]:
    """The command of a module of Python, for a process that ends with this one."""
    return [sys.executable, "-c", _WATCHED, str(os.getpid()), module, *map(str, args)]


def _run(settings: Settings, module: str, *args: object) -> tuple[int | None, list[str]]:
    """Exit status, None if there was no time for the command to end by itself; and the lines that
    it said."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(watched(module, *args), stdout=said, stderr=subprocess.STDOUT)
        status = None
        try:
            # Before this process is ended itself, which has to say what became of the command.
            left = (settings.until + settings.limit) / 2 - time.monotonic()
            status = child.wait(None if left == float("inf") else max(left, 0))
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        said.seek(0)
        return status, said.read().strip().splitlines()


def bench_tests(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """The tests of the GPU path, by pytest: those that need a GPU run where there is one."""
    tests = Path(ich.__file__).parents[1] / "tests"
    if not tests.exists():
        raise FileNotFoundError("there are no tests: they are in a checkout alone")
    files = [tests / name for name in _GPU_TESTS]
    own: list[object] = ["-q", "-m", "not faults", "-p", "no:cacheprovider", "-W", "default"]
    own += ["--basetemp", folder / "pytest"]
    if importlib.util.find_spec("xdist"):
        own += ["-n", min(4, available_cores())]
    status, said = _run(settings, "pytest", *own, *files)
    failed = [f"tests: {line}" for line in said if line.startswith(("FAILED", "ERROR"))]
    last = " ".join(said[-1:]).strip("= ")
    if status == 0:
        yield PartResult(notes=[f"Tests of the GPU path: {last}."])
    else:
        yield PartResult(failures=[f"tests: pytest {_how(status)}: {last}", *failed])


def _how(status: int | None) -> str:
    return "was ended for want of time" if status is None else f"ended with status {status}"


def bench_demo(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """The demo sweep, with its table; of as many networks as there is time for."""
    models = settings.models
    if settings.until < float("inf"):
        fit = (settings.seconds_left - _LAUNCH_SECONDS) / _NETWORK_SECONDS
        models = models[: max(1, int(fit))]
    paths = SweepPaths(folder / "demo")
    database = f'tracking.uri="sqlite:///{folder / "demo.db"}"'
    status, said = _run(
        settings,
        "ich.sweep",
        *("experiment=demo", f"model={','.join(models)}", "name=demo", database),
        # No larger than what else is measured: a demo on a phantom of a test is a test.
        f"data.image_size={min(80, *settings.image_size)}",
        f"data.phantom.patients={min(96, settings.patients)}",
        f'data.cache_dir="{folder / "cache"}"',
        f'sweep.output="{folder}"',
    )
    if not paths.csv.exists():  # `ich report` makes it of what has ended
        _run(settings, "ich.report", paths.root, "--resamples", 0)
    tables = {}
    if paths.csv.exists():
        tables["The demo sweep"] = demo_table(paths)
    failures = [] if status == 0 else [f"demo: ich sweep {_how(status)}: {' '.join(said[-3:])}"]
    missing = ", ".join(settings.models[len(models) :])
    note = [f"For want of time not in the demo: {missing}."] if missing else []
    yield PartResult(notes=note, tables=tables, failures=failures)


def demo_table(sweep: SweepPaths) -> list[list[str]]:
    """What a comparison says of how it was computed, and the scores that came of it."""
    table = pd.read_csv(sweep.csv)
    shown = ["job", "status", "auc", "precision", "images_per_s", "minutes"]
    lines = [shown]
    for row in table[table["job"].notna()][shown].itertuples(index=False):
        lines.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row])
    return lines


def bench_evaluate(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Slices per second of `ich evaluate`, with the process's start, scores, intervals and page,
    against a plain loop that decodes, windows and predicts one by one and scores nothing."""
    model, size = settings.models[0], max(settings.image_size)
    config = compose_job(model, size, folder)
    weights = folder / f"evaluate-{model}.safetensors"
    write_random_weights(config, weights, LABELS)
    files = phantom_slices(folder)
    own = (f'data.root="{folder / "phantom"}"', f'data.cache_dir="{folder / "keys"}"')
    out = ("tracking=none", f'output="{folder / "evaluations"}"', f'models="{weights}"')

    def evaluate() -> None:
        status, said = _run(settings, "ich.evaluate", *own, *out)
        if status != 0:
            raise RuntimeError(f"ich evaluate {_how(status)}: {' '.join(said[-3:])}")

    network = build_model(config.model)
    device = pick_device(config.train.device)
    plain = peers.plain_predictions(files[: settings.images], size, network.to(device), device)
    row = compare(rate_of(evaluate, len(files)), plain, 1)
    yield PartResult({f"evaluate, {model}, {size} px: ours, process and all / one by one": row})

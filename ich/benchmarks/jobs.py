"""A job's start, and the peak memory of trainings and predictions by the size of their cohort."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from ich.base.config import Config, Precision
from ich.base.provenance import nvidia_smi
from ich.base.records import Origin
from ich.base.results import RunPaths
from ich.benchmarks.commands import watched
from ich.benchmarks.measure import (
    PartResult,
    alternate,
    chosen_mode,
    compare_rates,
    compose_job,
)
from ich.benchmarks.peers import BATCH, Rate, rate_of
from ich.benchmarks.predictions import write_random_weights
from ich.benchmarks.settings import Settings
from ich.data.dataset import load_dataset
from ich.launch.jobs import VISIBLE, gpu_slots, visible_gpus
from ich.launch.mps import multi_process_service
from ich.launch.side_by_side import Kind, measure
from ich.tracking.places import sqlite_uri
from ich.training.devices import pick_device
from ich.training.model import model_cost
from ich.training.timing import select_mode

_COHORTS = (2_000, 20_000)  # rows, in `memory`
_AT_ONCE = (2, 4)  # jobs, in `slots`


# Jobs


def bench_start(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Starts per second: of a job, from its process to its first step, MLflow included, against
    importing the libraries that it needs."""
    database = f'tracking.uri="{sqlite_uri(folder / "m.db")}"'
    config = compose_job("mobilenet_v2", 96, folder, "tracking=mlflow", database)
    # As before a sweep's jobs, which find their slices decoded.
    load_dataset(config)

    def start() -> float:
        with _training(config, folder) as (child, run):
            begin = time.perf_counter()
            while not ((progress := run.read_progress()) and progress.step):
                assert child.poll() is None, run.log.read_text()
                time.sleep(0.01)
            return 1 / (time.perf_counter() - begin)

    command = [sys.executable, "-c", "import torch, timm, mlflow, pandas, omegaconf"]
    imports = rate_of(lambda: subprocess.run(command, check=True), 1)
    for side in (start, imports):
        side()  # the database is made, and files come into memory
    rates = alternate({"start": start, "imports": imports}, settings.rounds)
    seconds = [statistics.median(1 / r for r in rates[k]) for k in ("start", "imports")]
    note = (
        f"A job took {seconds[0]:.1f} s to its first step; importing torch, timm, MLflow, pandas "
        f"and OmegaConf took {seconds[1]:.1f} s of them."
    )
    name = "start, per s: a job to its first step / importing its libraries"
    yield PartResult({name: compare_rates(rates["start"], rates["imports"])}, [note])


@contextmanager
def _training(
    config: Config, folder: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[tuple[subprocess.Popen[bytes], RunPaths]]:
    """A job in a process of its own, which is ended on leaving."""
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        run = RunPaths(Path(run_folder) / "run")
        run.root.mkdir()
        run.write_config(config)
        # A named precision: `auto` is timed once per sweep, and is no part of a job's start.
        train = replace(config.train, precision=Precision.fp32)
        mode = select_mode(replace(config, train=train), None)
        run.write_origin(Origin(mode=mode))  # as a sweep has chosen it
        command = [sys.executable, "-m", "ich.train", str(run.root)]
        command += ["--watched-by", str(os.getpid())]
        with run.log.open("wb") as log_file:
            child = subprocess.Popen(
                command, stdout=log_file, stderr=subprocess.STDOUT, env=environment
            )
            try:
                yield child, run
            finally:
                child.kill()
                child.wait()


def bench_busy(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Images per second of a training of MobileNetV2, alone and beside a process that never rests,
    with threads that wait as `ich` has them wait, against threads that spin as OpenMP's do."""
    size = min(settings.image_size)
    config = compose_job("mobilenet_v2", size, folder, "train.epochs=1", "tracking=none")
    load_dataset(config)
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    # libgomp's env.c: 300,000 where neither the policy nor the count is given.
    spinning = bare | {"GOMP_SPINCOUNT": "300000"}

    sides: dict[str, Rate] = {
        f"{who}, {where}": partial(_images_per_s, config, folder, environment, where == "busy")
        for where in ("alone", "busy")
        for who, environment in (("ours", bare), ("spinning", spinning))
    }
    rates = alternate(sides, settings.rounds)
    rows = {
        f"busy, {size} px: {what}": compare_rates(rates[one], rates[other])
        for what, one, other in (
            ("alone, ours / spinning", "ours, alone", "spinning, alone"),
            ("beside a busy process, ours / spinning", "ours, busy", "spinning, busy"),
            ("ours, beside a busy process / alone", "ours, busy", "ours, alone"),
        )
    }
    yield PartResult(rows)


@contextmanager
def _busy_process() -> Iterator[None]:
    # As long as this one lives, which may be killed.
    busy = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**5))"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        try:
            yield
        finally:
            process.kill()


def _images_per_s(
    config: Config, folder: Path, environment: Mapping[str, str], busy: bool
) -> float:
    with _training(config, folder, environment) as (child, run):
        # Until its first step, whose rate is no part of it, it imports, for longer beside another.
        while child.poll() is None and not run.read_progress():
            time.sleep(0.05)
        with _busy_process() if busy else nullcontext():
            assert child.wait() == 0, run.log.read_text()
        fit = run.read_result().fit
        assert fit is not None
        return fit.images_per_s


def bench_slots(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Images per second of two and of four trainings that share the device, against one alone: what
    jobs one after another do. As `jobs_per_gpu=auto` measures it, and on a GPU once more with MPS.
    Of the network that keeps the device least busy."""
    size = max(settings.image_size)
    configs = [compose_job(model, size, folder) for model in settings.models]
    costs = [model_cost(c.model, len(c.windows.channels), size, BATCH).macs for c in configs]
    config = configs[costs.index(min(costs))]
    kind = Kind(config, chosen_mode(config, folder), 1)
    name = f"slots, {config.model.name}, {size} px"
    if pick_device(config.train.device).type == "cpu":
        yield _beside_each_other(kind, {}, name)
        return
    (gpu, *_), uuids = visible_gpus(), nvidia_smi("uuid")
    (slot, *_) = gpu_slots([gpu], _AT_ONCE[-1])
    yield _beside_each_other(kind, slot.environment, name)
    with multi_process_service(uuids[:1]) as (environment, how):
        # Words that say why there is none, or that all was by one that ran before.
        yield PartResult(notes=[f"Trainings that share a GPU: {how}."])
        if environment:
            found = slot.environment | {VISIBLE: uuids[0]} | environment
            yield _beside_each_other(kind, found, f"{name}, with MPS")


def _beside_each_other(kind: Kind, environment: Mapping[str, str], name: str) -> PartResult:
    seconds, died = measure([kind], _AT_ONCE[-1], environment)
    rates = {jobs: [1 / s] for jobs, s in seconds.items()}
    rows = {
        f"{name}: {jobs} jobs at once / one after another": compare_rates(rates[jobs], rates[1])
        for jobs in _AT_ONCE
        if {1, jobs} <= rates.keys()
    }
    return PartResult(rows, failures=[f"{name}: a training ended: {died}"] if died else [])


def bench_memory(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Peak memory of a training, and of a prediction, of its own (not of files it has mapped), with
    ten times the rows over with the rows. The rows' files repeat the phantom's slices."""
    rows, notes = {}, []
    for what, peak in (("training", _training_peak), ("prediction", _prediction_peak)):
        few, many = (peak(folder, n) / 1e6 for n in _COHORTS)
        name = f"memory of a {what}, MB: {_COHORTS[1]:,} / {_COHORTS[0]:,} rows"
        rows[name] = compare_rates([many], [few])
        notes.append(
            f"A {what} with MobileNetV2 at 64 px took {few:,.0f} MB of its own with "
            f"{_COHORTS[0]:,} rows and {many:,.0f} MB with {_COHORTS[1]:,}."
        )
    yield PartResult(rows, [" ".join(notes)])


def _cohort(folder: Path, rows: int) -> Config:
    root = folder / f"cohort{rows}"
    root.mkdir()
    files = sorted((folder / "phantom").rglob("*.dcm"))
    names = [f"slice{n:06d}" for n in range(rows)]
    for n, name in enumerate(names):
        os.link(files[n % len(files)], root / f"{name}.dcm")  # takes no space
    csv = folder / f"{root.name}.csv"
    # Of 21 slices in a row seven are positive, so that each patient of 30 has both kinds.
    labels = {c: [n // 7 % 3 // 2 for n in range(rows)] for c in "ab"}
    patients = [n // 30 for n in range(rows)]
    table = pd.DataFrame({"image_id": names, "patient_id": patients, **labels})
    table.to_csv(csv, index=False)
    own = ("data=folder", f'data.root="{root}"', f'data.labels="{csv}"', "protocol.oversample=null")
    config = compose_job("mobilenet_v2", 64, folder, *own, "train.epochs=1", "tracking=none")
    load_dataset(config)
    return config


def _training_peak(folder: Path, rows: int) -> int:
    with _training(_cohort(folder, rows), folder) as (child, run):
        peak = _peak_memory(child)
        assert child.returncode == 0, run.log.read_text()
    return peak


def _prediction_peak(folder: Path, rows: int) -> int:
    """Of the process that predicts, not of those that decode for it."""
    weights = folder / "memory.safetensors"
    write_random_weights(compose_job("mobilenet_v2", 64, folder), weights)
    paths = [folder / f"cohort{rows}", "-o", folder / "out.csv", "--cache-dir", folder / "keys"]
    command = watched("ich.predict", "--model", weights, "--engine", "torch", *paths)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        peak = _peak_memory(child)
    assert child.returncode == 0
    return peak


def _peak_memory(child: subprocess.Popen[bytes]) -> int:
    """Bytes of anonymous memory of a process at its highest, looked at twenty times a second."""
    # VmHWM, the kernel's own peak, would count pages of mapped files, which cost nothing: the
    # system takes them back at need.
    peak, status = 0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.05)
    return peak

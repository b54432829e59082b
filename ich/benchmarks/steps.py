"""Speed as ratios measured side by side in one run: `python -m ich.bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Eight parts: `prepare` (decoding), `input` (batches for the
network), `step` (one training step), `sweep` (an epoch of all eight networks), `predict` (from
files to probabilities), `start` (of a job), `memory` (of a training, by the size of its cohort) and
`intervals` (of a comparison). Prints a table and saves it, with versions and hardware, under
multirun_reports/benchmarks/. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir

from ich import peers, provenance
from ich.cache import build_cache
from ich.config import CONF_DIR, Config, Precision, image_size, register, to_yaml, typed
from ich.data import Dataset, load_dataset, open_store
from ich.inputs import Inputs
from ich.launcher import register_resolvers
from ich.model import Metadata, build_model, input_spec, model_cost, save_weights
from ich.peers import BATCH, Rate
from ich.phantom import PhantomSpec, write_phantom
from ich.pool import available_cores, keep_memory
from ich.precision import CHANNELS_LAST, CONTIGUOUS, Mode, fastest, resolve, time_modes
from ich.predictor import Ensemble, load_ensemble, predict_files
from ich.results import RunPaths, write_json
from ich.store import SliceStore, read_bytes
from ich.train import Progress, Trainer, build_optimizer, device_name, pick_device
from ich.uncertainty import RESAMPLES, Scored, bootstrap, draw_counts, group_rows

MODELS = (
    "vgg16",
    "resnet50",
    "inception_v3",
    "mobilenet_v2",
    "xception",
    "efficientnet_b0",
    "efficientnet_b2",
    "efficientnet_b3",
)
PARTS = ("prepare", "input", "step", "sweep", "predict", "start", "memory", "intervals")
_SIZES = (320, 128)  # sides of the decoded slices in `prepare`; 320 is the default of data=rsna
_CACHED = {96: 128, 224: 320}  # side of the network's input -> of the decoded slices it comes from
# Trained rows, epochs and networks of the report's sweep, and the rows it validates on.
_COHORTS = (2_000, 20_000)  # rows, in `memory`
_AT_A_TIME = 8  # steps between two looks at the clock on a GPU, which is asked to finish then
_REPORT = {"train": 65_859, "val": 11_623, "epochs": 10}

Row = dict[str, float]


def alternate(sides: dict[str, Rate], rounds: int) -> dict[str, list[float]]:
    """Times some functions in turn, several times; each returns items per second."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side())
    return rates


def row(ours: Sequence[float], plain: Sequence[float]) -> Row:
    """Medians of both, and the median, smallest and largest ratio ours / plain over the rounds."""
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    return {
        "ours": statistics.median(ours),
        "plain": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def ratio(ours: Rate, plain: Rate, rounds: int) -> Row:
    """Times two functions alternately; see `row`."""
    rates = alternate({"ours": ours, "plain": plain}, rounds)
    return row(rates["ours"], rates["plain"])


def geometric_mean(rows: Sequence[Row]) -> Row:
    """The mean of ratios, and the smallest and largest of their medians; no rates of its own."""
    ratios = [row["ratio"] for row in rows]
    mean = statistics.geometric_mean(ratios)
    return {"ratio": mean, "lowest": min(ratios), "highest": max(ratios)}


def job(model: str, size: int, folder: Path, *overrides: str) -> Config:
    """The config of a job as a sweep composes it, from scratch, on slices under `folder`."""
    register()
    register_resolvers()
    own = [
        f"model={model}",
        "model.pretrained=false",
        f"data.image_size={size}",
        f"data.cache_size={_CACHED.get(size, size)}",
        f'data.cache_dir="{folder / "cache"}"',
        f'data.root="{folder / "phantom"}"',
        "name=bench",
        "job=bench",
        *overrides,
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return typed(compose("config", overrides=own))


# Prepare


def bench_prepare(folder: Path, rounds: int) -> dict[str, Row]:
    """Slices decoded per second, from a folder and a zip: the cache's build, with all it takes,
    against a plain loop in one process, and against reading the files' bytes."""
    rows = {}
    for store in (SliceStore(folder / "phantom"), SliceStore(_zipped(folder / "phantom"))):
        paths = [p for p in store.paths if p.endswith(".dcm")]
        kind = f"{'zip' if store.is_zip else 'folder'} of {len(paths):,}"
        read = _reader(store, paths)
        read()  # all sides then read from the page cache
        for size in _SIZES:
            ours, plain = (
                _cache_build(store, paths, size, folder),
                peers.plain_loop(store, paths, size),
            )
            name = f"prepare, {kind}, {size} px: cache build"
            rows[f"{name} / plain loop"] = ratio(ours, plain, rounds)
            rows[f"{name} / reading the bytes"] = ratio(ours, read, rounds)
    return rows


def _zipped(root: Path) -> Path:
    target = root.with_suffix(".zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.dcm")):
            archive.write(file, file.relative_to(root).as_posix())
    return target


def _cache_build(store: SliceStore, paths: list[str], size: int, folder: Path) -> Rate:
    images = pd.DataFrame({"image_id": [Path(p).stem for p in paths], "path": paths})

    def rate() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            start = time.perf_counter()
            # A store of its own: an archive's directory is read again.
            cache = build_cache(images, SliceStore(store.root), Path(place), size, 0.0)
            seconds = time.perf_counter() - start
        assert len(cache.row) == len(paths)
        return len(paths) / seconds

    return rate


def _reader(store: SliceStore, paths: list[str]) -> Rate:
    """Reads the files, inflating those of an archive, and does nothing with them."""

    def rate() -> float:
        start = time.perf_counter()
        for location in SliceStore(store.root).locate(paths):
            read_bytes(store.root, location)
        return len(paths) / (time.perf_counter() - start)

    return rate


# Input


def bench_input(folder: Path, sizes: Sequence[int], rounds: int, images: int) -> dict[str, Row]:
    """Augmented, windowed, normalized batches per second, without a network. See `ich.peers`.

    The last row is what is left: the images per second if an image's bytes were only copied.
    """
    rows = {}
    for size in sizes:
        config = job("mobilenet_v2", size, folder)
        dataset = load_dataset(config)
        files, decoded = _files(config, images), config.data.cache_size
        ours = _ours(config, dataset)
        others = {
            "plain DICOM Dataset": peers.dicom_loader(files, size),
            "MONAI CacheDataset": peers.monai_loader(files, size),
            "timm loader over PNGs": peers.timm_loader(files, size, decoded, folder),
        }
        for name, peer in others.items():
            for side in (ours, peer):
                side()  # worker processes import, caches fill, files come into memory
            rows[f"input, {size} px: ours / {name}"] = ratio(ours, peer, rounds)
        size_in, size_out = dataset.hu[0].nbytes, 4 * len(config.windows.channels) * size**2
        copy = _copy_rate(pick_device(config.train.device), size_in + size_out)
        rows[f"input, {size} px: copying the bytes / ours"] = ratio(copy, ours, rounds)
    return rows


def _files(config: Config, images: int) -> list[Path]:
    store = open_store(config.data)
    assert store is not None
    return [store.root / p for p in store.paths if p.endswith(".dcm")][:images]


def _ours(config: Config, dataset: Dataset) -> Rate:
    device = pick_device(config.train.device)
    trainer = Trainer.build(config, dataset, device, Mode("fp32", CHANNELS_LAST))

    def rate() -> float:
        rows = len(dataset.train.row)
        draws = trainer.resample.draws(0, 1, rows)
        start, seen = time.perf_counter(), 0
        for batch in trainer.train_loader.epoch(0, 1, draws):
            seen += len(trainer.windows(trainer.resample(batch.hu, batch.draws)))
        _wait(device)
        return seen / (time.perf_counter() - start)

    return rate


# Step


def bench_step(
    models: Sequence[str], size: int, folder: Path, seconds: float, rounds: int
) -> tuple[dict[str, Row], float]:
    """Training steps of batch 32 with fused Adam: ours, in the mode `auto` picks, against float32
    NCHW; ours with its data against ours on one batch that is ready; on a GPU a captured step
    against one that is launched kernel by kernel; and a matrix product's multiply-adds per second
    against ours.

    Returns:
        The rows, and the hours that the training steps of the report's sweep would take.
    """
    faster, fed, graph, roof = {}, {}, {}, {}
    hours = 0.0
    for name in models:
        config = job(name, size, folder)
        device, dataset = pick_device(config.train.device), load_dataset(config)
        mode = fastest(time_modes(config), "")
        ours = Trainer.build(config, dataset, device, mode)
        plain = Trainer.build(config, dataset, device, Mode("fp32", CONTIGUOUS))
        sides = {
            "ours": _resident_rate(ours, seconds),
            "plain": _resident_rate(plain, seconds),
            "fed": _fed_rate(ours, seconds),
            "product": _product_rate(device, mode, min(seconds, 1.0)),
        }
        if device.type == "cuda":
            captured = job(name, size, folder, "train.graph=on")
            sides["eager"] = _advance_rate(ours, seconds)
            sides["graph"] = _advance_rate(Trainer.build(captured, dataset, device, mode), seconds)
        rates = alternate(sides, rounds)
        how = f"{name}, {size} px"
        chosen = f"ours ({mode.precision}, {mode.layout})"
        faster[f"step, {how}: {chosen} / fp32 NCHW"] = row(rates["ours"], rates["plain"])
        fed[f"step, {how}: ours with data / on one resident batch"] = row(
            rates["fed"], rates["ours"]
        )
        if "graph" in rates:
            graph[f"step, {how}: as one graph / eager"] = row(rates["graph"], rates["eager"])
        # Backward takes two multiply-adds for each forward.
        macs = 3e-9 * model_cost(config.model, len(config.windows.channels), size, BATCH).macs
        done = [rate * macs for rate in rates["ours"]]
        roof[f"roofline, {how}, GMAC/s: a matrix product / ours"] = row(rates["product"], done)
        hours += _REPORT["epochs"] * _REPORT["train"] / statistics.median(rates["fed"]) / 3600
    means = {"ours / fp32 NCHW": faster, "with data / resident": fed, "graph / eager": graph}
    summary = {
        f"step, {size} px, geometric mean: {what}": geometric_mean([*rows.values()])
        for what, rows in means.items()
        if rows
    }
    return faster | fed | graph | roof | summary, hours


def _resident_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of steps on one batch that has been made before."""
    batch = next(trainer.train_loader.in_order())
    x = trainer.windows(trainer.resample(batch.hu))

    def step() -> None:
        loss = trainer.loss(trainer.network(x), batch.target)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()

    return _repeated(trainer, step, len(x), seconds)


def _advance_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of whole steps, resampling and windows included, on one resident batch."""
    draws = trainer.resample.draws(0, 1, len(trainer.train_loader.split.row))
    batch = next(trainer.train_loader.epoch(0, 1, draws))
    return _repeated(trainer, lambda: trainer.advance(batch), len(batch.target), seconds)


def _repeated(trainer: Trainer, step: Callable[[], object], images: int, seconds: float) -> Rate:
    device = trainer.device
    at_a_time = _AT_A_TIME if device.type == "cuda" else 1

    def rate() -> float:
        trainer.model.train()
        step()
        _wait(device)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or steps < 2:
            for _ in range(at_a_time):
                step()
            _wait(device)
            steps += at_a_time
        return images * steps / (time.perf_counter() - start)

    return rate


def _fed_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of a training as it is: batches from the cache, always new ones."""

    def rate() -> float:
        trainer.model.train()
        draws = trainer.resample.draws(0, 1, len(trainer.train_loader.split.row))
        seen, start = 0, 0.0
        for number, batch in enumerate(trainer.train_loader.epoch(0, 1, draws)):
            if number == 1:  # the first is not counted
                _wait(trainer.device)
                start = time.perf_counter()
            trainer.advance(batch)
            seen += len(batch.target) if number else 0
            if trainer.device.type == "cuda" and number % _AT_A_TIME:
                continue
            _wait(trainer.device)
            if number > 2 and time.perf_counter() - start > seconds:
                break
        _wait(trainer.device)
        return seen / (time.perf_counter() - start)

    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _product_rate(device: torch.device, mode: Mode, seconds: float) -> Rate:
    """Multiply-adds per second, in 1e9, of a matrix product in a mode's precision."""
    dtype = torch.bfloat16 if mode.precision == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=device, dtype=dtype)

    def rate() -> float:
        torch.mm(a, a)
        _wait(device)
        start, products = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            torch.mm(a, a)
            _wait(device)
            products += 1
        return products * 2048**3 / 1e9 / (time.perf_counter() - start)

    return rate


def _copy_rate(device: torch.device, item: int) -> Rate:
    """Items of so many bytes copied per second."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.zeros_like(source)

    def rate() -> float:
        target.copy_(source)
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        _wait(device)
        return 10 * source.nbytes / item / (time.perf_counter() - start)

    return rate


# Sweep


def bench_sweep(
    models: Sequence[str], size: int, folder: Path, images: int, rounds: int
) -> tuple[dict[str, Row], float]:
    """Rows trained per second over an epoch of all networks, one after another: ours against the
    plain way (pydicom in a DataLoader, float32 NCHW, eager).

    Returns:
        The row, and the hours that the report's sweep would take, validation included.
    """
    trainers = []
    for name in models:
        config = job(name, size, folder, f"data.subset={images / 4000:.3f}")
        dataset, device = load_dataset(config), pick_device(config.train.device)
        trainers.append(Trainer.build(config, dataset, device, fastest(time_modes(config), "")))
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    hours = []
    for _ in range(rounds):
        ours, plain, report = zip(*(_epochs(t, dataset) for t in trainers), strict=True)
        rows = len(models) * len(dataset.train.row)
        rates["ours"].append(rows / sum(ours))
        rates["plain"].append(rows / sum(plain))
        hours.append(sum(report))
    name = f"sweep, an epoch of {len(models)} networks, {size} px: ours / the plain way"
    return {name: row(rates["ours"], rates["plain"])}, statistics.median(hours)


def _epochs(trainer: Trainer, dataset: Dataset) -> tuple[float, float, float]:
    """Seconds of an epoch, ours and the plain way's, and hours of the report's training."""
    progress, count = Progress(), len(dataset.train.row)
    trainer.train_one_epoch(progress, lambda *_: None)
    begin = time.perf_counter()
    trainer.evaluate(dataset.val, 1, lambda *_: None)
    evaluated = (time.perf_counter() - begin) / len(dataset.val.row)
    trained = progress.epoch_seconds / count
    per_epoch = _REPORT["train"] * trained + _REPORT["val"] * evaluated
    config = trainer.cfg
    files = _files(config, count)
    model = build_model(config.model).to(trainer.device)
    seconds = peers.plain_epoch(
        (files * (1 + count // len(files)))[:count],
        image_size(config),
        trainer.device,
        model,
        build_optimizer(config.optimizer, model),
    )
    return progress.epoch_seconds, seconds, _REPORT["epochs"] * per_epoch / 3600


# Jobs


def bench_start(folder: Path, rounds: int) -> tuple[dict[str, Row], str]:
    """Starts per second: of a job, from its process to its first step, MLflow included, against
    importing the libraries that it needs."""
    config = job(
        "mobilenet_v2", 96, folder, "tracking=mlflow", f'tracking.uri="sqlite:///{folder}/m.db"'
    )
    load_dataset(config)

    def start() -> float:
        with _training(config, folder) as (child, run):
            begin = time.perf_counter()
            while not (run.progress.exists() and json.loads(run.progress.read_text())["step"]):
                assert child.poll() is None, run.log.read_text()
                time.sleep(0.01)
            return 1 / (time.perf_counter() - begin)

    def imports() -> float:
        begin = time.perf_counter()
        libraries = "import torch, timm, mlflow, pandas, omegaconf"
        subprocess.run([sys.executable, "-c", libraries], check=True)
        return 1 / (time.perf_counter() - begin)

    for side in (start, imports):
        side()
    rates = alternate({"start": start, "imports": imports}, rounds)
    seconds = [statistics.median(1 / r for r in rates[k]) for k in ("start", "imports")]
    note = (
        f"A job took {seconds[0]:.1f} s to its first step; importing torch, timm, MLflow, pandas "
        f"and OmegaConf took {seconds[1]:.1f} s of them."
    )
    name = "start, per s: a job to its first step / importing its libraries"
    return {name: row(rates["start"], rates["imports"])}, note


@contextmanager
def _training(config: Config, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], RunPaths]]:
    """A job in a process of its own, which is ended on leaving."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = RunPaths(Path(place) / "run")
        run.root.mkdir()
        run.config.write_text(to_yaml(config))
        mode = resolve(replace(config, train=replace(config.train, precision=Precision.fp32)), None)
        write_json(run.origin, {"mode": asdict(mode)})  # as a sweep has chosen it
        command = [sys.executable, "-m", "ich.train", str(run.root)]
        with run.log.open("wb") as log_file:
            child = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT)
            try:
                yield child, run
            finally:
                child.kill()
                child.wait()


def bench_memory(folder: Path) -> tuple[dict[str, Row], str]:
    """Peak memory of a training, and of a prediction, of its own (not of files it has mapped), with
    ten times the rows over with the rows. The rows' files repeat the phantom's slices."""
    peaks = [(_training_peak(folder, n), _prediction_peak(folder, n)) for n in _COHORTS]
    rows, notes = {}, []
    for at, what in enumerate(("training", "prediction")):
        few, many = peaks[0][at] / 1e6, peaks[1][at] / 1e6
        rows[f"memory of a {what}, MB: {_COHORTS[1]:,} / {_COHORTS[0]:,} rows"] = row([many], [few])
        notes.append(
            f"A {what} with MobileNetV2 at 64 px took {few:,.0f} MB of its own with "
            f"{_COHORTS[0]:,} rows and {many:,.0f} MB with {_COHORTS[1]:,}."
        )
    return rows, " ".join(notes)


def _cohort(folder: Path, rows: int) -> Config:
    root = folder / f"cohort{rows}"
    root.mkdir()
    files = sorted((folder / "phantom").rglob("*.dcm"))
    names = [f"slice{n:06d}" for n in range(rows)]
    for n, name in enumerate(names):
        os.link(files[n % len(files)], root / f"{name}.dcm")
    labels = folder / f"{root.name}.csv"
    frame = {"image_id": names, "patient_id": [n // 30 for n in range(rows)]}
    pd.DataFrame(frame | {c: [n // 7 % 3 // 2 for n in range(rows)] for c in "ab"}).to_csv(
        labels, index=False
    )
    config = job(
        "mobilenet_v2",
        64,
        folder,
        "data=folder",
        f'data.root="{root}"',
        f'data.labels="{labels}"',
        "protocol.oversample=null",
        "train.epochs=1",
        "tracking=none",
    )
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
    _write_random_weights(job("mobilenet_v2", 64, folder), weights)
    command = [sys.executable, "-m", "ich.predict", "--model", str(weights), "--engine", "torch"]
    paths = [str(folder / f"cohort{rows}"), "-o", str(folder / "out.csv")]
    keys = ["--cache-dir", str(folder / "keys")]
    with subprocess.Popen(command + paths + keys, stdout=subprocess.DEVNULL) as child:
        peak = _peak_memory(child)
    assert child.returncode == 0
    return peak


def _peak_memory(child: subprocess.Popen[bytes]) -> int:
    """Bytes of anonymous memory of a process at its highest, looked at twenty times a second."""
    peak, status = 0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.05)
    return peak


# Intervals


def bench_intervals(rounds: int) -> tuple[dict[str, Row], str]:
    """Bootstrap resamples per second of a run of the report's size (11,623 rows, six labels, some
    7,000 patients): ours, all metrics, against drawing rows and scikit-learn's AUCs alone. Also the
    seconds that eight such runs take."""
    rng = np.random.default_rng(0)
    rates_of_labels = [0.033, 0.054, 0.037, 0.053, 0.069, 0.17]
    target = (rng.random((_REPORT["val"], 6)) < rates_of_labels).astype(np.float32)
    logits = (rng.normal(size=target.shape) + 3 * target).astype(np.float32)
    group, _ = group_rows(rng.integers(0, 7_000, len(target)), target[:, 0])
    scored = Scored((*"abcde", "any"), target, logits, group)
    counts = draw_counts(int(group.max()) + 1, RESAMPLES)

    def ours() -> float:
        begin = time.perf_counter()
        bootstrap(scored, counts)
        return RESAMPLES / (time.perf_counter() - begin)

    rates = alternate({"ours": ours, "plain": lambda: peers.plain_bootstrap(scored)}, rounds)
    begin = time.perf_counter()
    with ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(lambda _: bootstrap(scored, counts), range(8)))
    seconds = time.perf_counter() - begin
    note = (
        f"{RESAMPLES:,} resamples of eight runs of {_REPORT['val']:,} rows and six labels took "
        f"{seconds:.1f} s."
    )
    return {
        "intervals, resamples per s: ours / scikit-learn": row(rates["ours"], rates["plain"])
    }, note


# Predict


def bench_predict(
    models: Sequence[str], size: int, folder: Path, images: int, rounds: int
) -> tuple[dict[str, Row], str]:
    """Slices predicted per second from DICOM files, process start included: `ich.predict` against a
    plain loop that decodes, windows and predicts one by one, with the same network."""
    rows = {}
    files = sorted((folder / "phantom" / "stage_2_train").glob("*.dcm"))
    for name in models:
        config = job(name, size, folder)
        weights = folder / f"{name}-{size}.safetensors"
        _write_random_weights(config, weights)
        device = pick_device(config.train.device)
        cpu = device.type == "cpu"
        ensemble = load_ensemble([str(weights)], device, None, folder / "onnx" if cpu else None)
        plain = build_model(config.model).to(device)
        rows[f"predict, {name}, {size} px: ours / one by one"] = ratio(
            _prediction_rate(ensemble, files[0].parent, len(files)),
            peers.plain_predictions(files[:images], size, plain, device),
            rounds,
        )
    mean = geometric_mean(list(rows.values()))
    rows[f"predict, {size} px: geometric mean"] = mean
    note = (
        f"Predictions were of {len(files):,} files of 512 x 512 in a folder, one by one of "
        f"{min(images, len(files)):,} of them; on a CPU by --engine onnx, already converted."
    )
    return rows, note


def _write_random_weights(config: Config, path: Path) -> None:
    spec = input_spec(config.model)
    labels = tuple("abcdef")
    metadata = Metadata(
        config.model.name,
        config.model.timm,
        labels,
        tuple(config.windows.channels),
        config.data.cache_size,
        image_size(config),
        spec.mean,
        spec.std,
        dict.fromkeys(labels, 0.5),
    )
    save_weights(build_model(config.model), path, metadata)


def _prediction_rate(ensemble: Ensemble, place: Path, files: int) -> Rate:
    def rate() -> float:
        start = time.perf_counter()
        inputs = Inputs.find([str(place)])
        predict_files(ensemble, inputs, lambda _, identifier: identifier, lambda *_: None)
        assert len(inputs) == files
        return files / (time.perf_counter() - start)

    return rate


# Report


def write_report(rows: dict[str, Row], out: Path, settings: str, notes: list[str]) -> Path:
    """Saves the rows as JSON and Markdown, named by date and device."""
    device = pick_device(job("mobilenet_v2", 96, Path()).train.device)
    made_with = provenance.record()
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        **{k: made_with["hardware"][k] for k in ("processor", "cores", "memory_gib", "gpus")},
        "versions": made_with["versions"],
        "commit": made_with["git"].get("commit", "none"),
        "settings": settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{head['date']}-{device.type}"
    (out / f"{stem}.json").write_text(json.dumps({**head, "rows": rows, "notes": notes}, indent=1))
    shown = {k: v for k, v in head.items() if k not in ("date", "device", "versions")}
    lines = [
        f"# {head['date']}, {head['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in shown.items()),
        "",
        ", ".join(f"{k} {v}" for k, v in made_with["versions"].items()),
        "",
        "| what | ours, per s | other, per s | ratio | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        rates = [f"{row[k]:,.1f}" if k in row else "" for k in ("ours", "plain")]
        ratios = [f"{row[k]:.3g}" for k in ("ratio", "lowest", "highest")]
        lines.append(f"| {' | '.join([name, *rates, *ratios])} |")
    path = out / f"{stem}.md"
    path.write_text("\n".join([*lines, "", "\n\n".join(notes)]) + "\n")
    return path


def _projection(hours: float, models: Sequence[str], size: int, what: str) -> str:
    networks = "eight networks" if len(models) == len(MODELS) else ", ".join(models)
    return (
        f"The report's sweep ({networks}, {_REPORT['epochs']} epochs, {_REPORT['train']:,} "
        f"training and {_REPORT['val']:,} validation rows) at {size} px would take {hours:.1f} "
        f"hours at these rates, {what}."
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(prog="python -m ich.bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--image-size", type=int, nargs="+", default=[96, 224], help="pixels")
    parser.add_argument("--patients", type=int, default=120, help="phantom patients to decode")
    parser.add_argument("--images", type=int, default=1000, help="files that other loaders read")
    parser.add_argument("--rounds", type=int, default=3, help="alternations per pair")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one timing of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("multirun_reports/benchmarks"))
    args = parser.parse_args(argv)
    rows: dict[str, Row] = {}
    notes: list[str] = []

    def add(found: dict[str, Row]) -> None:
        rows.update(found)
        for name, row in found.items():  # a long run is watched
            print(f"{name}: {row['ratio']:.3g}", file=sys.stderr, flush=True)

    keep_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_phantom(folder / "phantom", PhantomSpec(patients=args.patients, seed=0, size=512))
        if "prepare" in args.parts:
            add(bench_prepare(folder, args.rounds))
        if "input" in args.parts:
            add(bench_input(folder, args.image_size, args.rounds, args.images))
        for size in args.image_size if "step" in args.parts else ():
            found, hours = bench_step(args.models, size, folder, args.seconds, args.rounds)
            add(found)
            notes.append(_projection(hours, args.models, size, "its training steps alone"))
        if "sweep" in args.parts:
            size = args.image_size[0]
            found, hours = bench_sweep(args.models, size, folder, args.images, args.rounds)
            add(found)
            notes.append(_projection(hours, args.models, size, "validation included"))
        for size in args.image_size if "predict" in args.parts else ():
            found, note = bench_predict(args.models, size, folder, args.images, args.rounds)
            add(found)
            notes.append(note)
        for part, measure in (
            ("start", lambda: bench_start(folder, args.rounds)),
            ("memory", lambda: bench_memory(folder)),
            ("intervals", lambda: bench_intervals(args.rounds)),
        ):
            if part in args.parts:
                found, note = measure()
                add(found)
                notes.append(note)
    settings = " ".join(sys.argv[1:] if argv is None else argv) or "defaults"
    path = write_report(rows, args.out, settings, notes)
    print(path.read_text())
    print(f"saved as {path} and {path.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

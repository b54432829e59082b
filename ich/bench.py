"""Speed as ratios measured side by side in one run: `python -m ich.bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Four parts: `prepare` (decoding), `input` (batches for the network),
`step` (one training step) and `sweep` (an epoch of all eight networks). Prints a table and saves
it, with versions and hardware, under multirun_reports/benchmarks/. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from ich import provenance
from ich.cache import build_cache
from ich.config import CONF_DIR, Config, image_size, register, typed
from ich.data import Dataset, load_dataset, open_store
from ich.launcher import register_resolvers
from ich.model import build_model
from ich.phantom import PhantomSpec, write_phantom
from ich.precision import CHANNELS_LAST, CONTIGUOUS, Mode, fastest, time_modes
from ich.store import SliceStore, read_bytes
from ich.train import Progress, Trainer, build_optimizer, device_name, pick_device

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
PARTS = ("prepare", "input", "step", "sweep")
_SIZES = (320, 128)  # sides of the decoded slices in `prepare`; 320 is the default of data=rsna
_CACHED = {96: 128, 224: 320}  # side of the network's input -> of the decoded slices it comes from
_BATCH = 32
# Trained rows, epochs and networks of the report's sweep, and the rows it validates on.
_REPORT = {"train": 65_859, "val": 11_623, "epochs": 10}

Rate = Callable[[], float]
Row = dict[str, float]


def ratio(ours: Rate, plain: Rate, rounds: int) -> Row:
    """Times two functions alternately; each returns items per second.

    Returns:
        Medians of both, and the median, smallest and largest ratio ours / plain over the rounds.
    """
    pairs = [(ours(), plain()) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "plain": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


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
            ours, plain = _cache_build(store, paths, size, folder), _plain_loop(store, paths, size)
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


def _plain_loop(store: SliceStore, paths: list[str], size: int) -> Rate:
    """What most scripts do: pixel_array, rescale in float, resize with OpenCV."""
    import cv2

    def rate() -> float:
        start = time.perf_counter()
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(store.root)) if store.is_zip else None
            for path in paths:
                file = archive.open(path) if archive else store.root / path
                dataset = pydicom.dcmread(file)
                slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
                hu = dataset.pixel_array * slope + intercept
                cv2.resize(hu, (size, size), interpolation=cv2.INTER_AREA)
        return len(paths) / (time.perf_counter() - start)

    return rate


# Input


def bench_input(folder: Path, sizes: Sequence[int], rounds: int, images: int) -> dict[str, Row]:
    """Augmented, windowed, normalized batches per second, without a network.

    The others do per image what ours does per batch, in two worker processes, with their own
    flips and crops of the same probabilities. MONAI's and timm's begin where decoding is done: in
    memory, and with PNGs on disk.
    """
    rows = {}
    for size in sizes:
        config = job("mobilenet_v2", size, folder)
        dataset = load_dataset(config)
        files = _files(config, images)
        ours = _ours(config, dataset)
        peers = {
            "plain DICOM Dataset": _dicom_loader(files, size),
            "MONAI CacheDataset": _monai_loader(files, size),
            "timm loader over PNGs": _timm_loader(files, size, folder),
        }
        for name, peer in peers.items():
            for side in (ours, peer):
                side()  # worker processes import, caches fill, files come into memory
            rows[f"input, {size} px: ours / {name}"] = ratio(ours, peer, rounds)
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


def _epoch_rate(loader: Any) -> Rate:
    """Images per second of one pass over a DataLoader, its workers' start not counted."""

    def rate() -> float:
        seen, start = 0, 0.0
        for batch in loader:
            x = batch["image"] if isinstance(batch, dict) else batch[0]
            if not start:
                start = time.perf_counter()
                continue
            seen += len(x)
        return seen / (time.perf_counter() - start)

    return rate


_WINDOWS = ((40, 80), (80, 200), (40, 380))


class DicomDataset(torch.utils.data.Dataset):
    """What a first version looks like: decode, rescale, window, resize and flip file by file."""

    def __init__(self, files: Sequence[Path], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import cv2

        dataset = pydicom.dcmread(self.files[index])
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        hu = dataset.pixel_array.astype(np.float32) * slope + intercept
        side = len(hu)
        if np.random.rand() < 0.25:
            side = int(len(hu) * np.random.uniform(0.8, 1))
            y, x = np.random.randint(0, len(hu) - side + 1, 2)
            hu = hu[y : y + side, x : x + side]
        hu = cv2.resize(hu, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if np.random.rand() < 0.25:
            hu = hu[:, ::-1]
        if np.random.rand() < 0.1:
            hu = hu[::-1]
        channels = [np.clip((hu - (c - w / 2)) / w, 0, 1) for c, w in _WINDOWS]
        image = (np.stack(channels) - 0.45) / 0.225
        return torch.from_numpy(image.astype(np.float32)), torch.zeros(6)


def _dicom_loader(files: Sequence[Path], size: int) -> Rate:
    return _epoch_rate(
        torch.utils.data.DataLoader(
            DicomDataset(files, size), _BATCH, shuffle=True, num_workers=2, persistent_workers=True
        )
    )


def _monai_loader(files: Sequence[Path], size: int) -> Rate:
    """Decoded once into memory; random crop, resize, flips and windows on each access."""
    from monai import data, transforms

    def window(hu: torch.Tensor) -> torch.Tensor:
        channels = [((hu[0] - (c - w / 2)) / w).clamp(0, 1) for c, w in _WINDOWS]
        return (torch.stack(channels) - 0.45) / 0.225

    chain = transforms.Compose(
        [
            transforms.LoadImaged("image", reader="PydicomReader", ensure_channel_first=True),
            transforms.Lambdad("image", lambda x: x.as_tensor().reshape(1, *x.shape[-2:])),
            transforms.ToDeviced("image", "cpu"),
            transforms.RandFlipd("image", 0.25, 1),
            transforms.RandFlipd("image", 0.1, 0),
            transforms.RandZoomd("image", 0.25, 1.0, 1.25, mode="bilinear", keep_size=True),
            transforms.Resized("image", (size, size), mode="bilinear", anti_aliasing=False),
            transforms.Lambdad("image", lambda x: window(x.as_tensor())),
        ]
    )
    cached = data.CacheDataset([{"image": str(f)} for f in files], chain, progress=False)
    return _epoch_rate(data.DataLoader(cached, batch_size=_BATCH, shuffle=True, num_workers=2))


def _timm_loader(files: Sequence[Path], size: int, folder: Path) -> Rate:
    """PNGs with the three windows as colours, written beforehand at twice the input's side."""
    import cv2
    import timm.data

    place = folder / f"png{size}" / "one class"
    if not place.exists():
        place.mkdir(parents=True)
        for file in files:
            dataset = pydicom.dcmread(file)
            hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            hu = cv2.resize(hu, (_CACHED.get(size, size),) * 2, interpolation=cv2.INTER_AREA)
            colours = [255 * np.clip((hu - (c - w / 2)) / w, 0, 1) for c, w in _WINDOWS]
            cv2.imwrite(str(place / f"{file.stem}.png"), np.stack(colours, -1).astype(np.uint8))
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(place.parent)),
        (3, size, size),
        _BATCH,
        is_training=True,
        no_aug=False,
        scale=(0.64, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.25,
        vflip=0.1,
        color_jitter=0.0,
        num_workers=2,
        use_prefetcher=False,
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    return _epoch_rate(loader)


# Step


def bench_step(
    models: Sequence[str], size: int, folder: Path, seconds: float, rounds: int
) -> dict[str, Row]:
    """Training steps of batch 32 with fused Adam: ours, in the mode `auto` picks, against float32
    NCHW; and ours with its data against ours on one batch that is ready."""
    faster, fed = {}, {}
    for name in models:
        config = job(name, size, folder)
        device, dataset = pick_device(config.train.device), load_dataset(config)
        mode = fastest(time_modes(config), "")
        ours = Trainer.build(config, dataset, device, mode)
        plain = Trainer.build(config, dataset, device, Mode("fp32", CONTIGUOUS))
        how = f"{name}, {size} px"
        row = ratio(_resident_rate(ours, seconds), _resident_rate(plain, seconds), rounds)
        faster[f"step, {how}: ours ({mode.precision}, {mode.layout}) / fp32 NCHW"] = row
        row = ratio(_fed_rate(ours, seconds), _resident_rate(ours, seconds), rounds)
        fed[f"step, {how}: ours with data / on one resident batch"] = row
    means = {
        f"step, {size} px, geometric mean: ours / fp32 NCHW": geometric_mean([*faster.values()]),
        f"step, {size} px, geometric mean: with data / resident": geometric_mean([*fed.values()]),
    }
    return faster | fed | means


def _resident_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of steps on one batch that has been made before."""
    batch = next(trainer.train_loader.in_order())
    x = trainer.windows(trainer.resample(batch.hu))

    def step() -> None:
        loss = trainer.loss(trainer.network(x), batch.target)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        loss.detach()

    def rate() -> float:
        trainer.model.train()
        step()
        _wait(trainer.device)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or steps < 2:
            step()
            _wait(trainer.device)
            steps += 1
        return len(x) * steps / (time.perf_counter() - start)

    return rate


def _fed_rate(trainer: Trainer, seconds: float) -> Rate:
    """Images per second of a training as it is: batches from the cache, always new ones."""

    def rate() -> float:
        trainer.model.train()
        draws = trainer.resample.draws(0, 1, len(trainer.train_loader.split.row))
        seen, start = 0, 0.0
        for number, batch in enumerate(trainer.train_loader.epoch(0, 1, draws)):
            if number == 1:  # the first is not counted
                start = time.perf_counter()
            trainer.advance(batch)
            _wait(trainer.device)
            seen += len(batch.target) if number else 0
            if number > 2 and time.perf_counter() - start > seconds:
                break
        return seen / (time.perf_counter() - start)

    return rate


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bench_roofline(seconds: float) -> dict[str, Row]:
    """What the machine can do at most: multiply-adds of a matrix product, and bytes copied, per
    second, in float32 and, as ratio, bfloat16 over float32."""
    device = pick_device(job("mobilenet_v2", 96, Path()).train.device)

    def product(dtype: torch.dtype) -> Rate:
        a = torch.randn(2048, 2048, device=device, dtype=dtype)

        def rate() -> float:
            torch.mm(a, a)
            _wait(device)
            start, n = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                torch.mm(a, a)
                _wait(device)
                n += 1
            return n * 2048**3 / 1e9 / (time.perf_counter() - start)

        return rate

    return {
        "roofline, GMAC/s of a matrix product: bfloat16 / float32": ratio(
            product(torch.bfloat16), product(torch.float32), 3
        )
    }


# Sweep


def bench_sweep(
    models: Sequence[str], size: int, folder: Path, images: int
) -> tuple[dict[str, Row], float]:
    """Rows trained per second over an epoch of all networks, one after another: ours against the
    plain way (pydicom in a DataLoader, float32 NCHW, eager). Also the hours that the report's sweep
    would take at our rate on this machine."""
    ours, plain = 0.0, 0.0
    counts = [0, 0]
    hours = 0.0
    for name in models:
        config = job(name, size, folder, f"data.subset={images / 4000:.3f}")
        dataset = load_dataset(config)
        device = pick_device(config.train.device)
        trainer = Trainer.build(config, dataset, device, fastest(time_modes(config), ""))
        progress = Progress()
        trainer.train_one_epoch(progress, lambda *_: None)
        begin = time.perf_counter()
        trainer.evaluate(dataset.val, 1, lambda *_: None)
        evaluated = (time.perf_counter() - begin) / len(dataset.val.row)
        trained = progress.epoch_seconds / len(dataset.train.row)
        ours, counts[0] = ours + progress.epoch_seconds, counts[0] + len(dataset.train.row)
        per_epoch = _REPORT["train"] * trained + _REPORT["val"] * evaluated
        hours += _REPORT["epochs"] * per_epoch / 3600
        seconds, rows = _plain_epoch(config, len(dataset.train.row))
        plain, counts[1] = plain + seconds, counts[1] + rows
    a, b = counts[0] / ours, counts[1] / plain
    row = {"ours": a, "plain": b, "ratio": a / b, "lowest": a / b, "highest": a / b}
    return {
        f"sweep, an epoch of {len(models)} networks, {size} px: ours / the plain way": row
    }, hours


def _plain_epoch(config: Config, rows: int) -> tuple[float, int]:
    files = (_files(config, rows) * (1 + rows // 1000))[:rows]
    device = pick_device(config.train.device)
    model = build_model(config.model).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    loader = torch.utils.data.DataLoader(
        DicomDataset(files, image_size(config)), _BATCH, shuffle=True, num_workers=2
    )
    start = time.perf_counter()
    for x, target in loader:
        loss = F.binary_cross_entropy_with_logits(model(x.to(device)), target.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(device)
    return time.perf_counter() - start, rows


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
    path.write_text("\n".join([*lines, "", *notes]) + "\n")
    return path


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

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_phantom(folder / "phantom", PhantomSpec(patients=args.patients, seed=0, size=512))
        if "prepare" in args.parts:
            add(bench_prepare(folder, args.rounds))
        if "input" in args.parts:
            add(bench_input(folder, args.image_size, args.rounds, args.images))
        for size in args.image_size if "step" in args.parts else ():
            add(bench_step(args.models, size, folder, args.seconds, args.rounds))
        if "step" in args.parts:
            add(bench_roofline(args.seconds))
        if "sweep" in args.parts:
            found, hours = bench_sweep(args.models, args.image_size[0], folder, args.images)
            add(found)
            notes.append(
                f"The report's sweep (8 networks, {_REPORT['epochs']} epochs, {_REPORT['train']:,} "
                f"training and {_REPORT['val']:,} validation rows) at {args.image_size[0]} px "
                f"would take {hours * len(MODELS) / len(args.models):.1f} hours at these rates."
            )
    settings = " ".join(sys.argv[1:] if argv is None else argv) or "defaults"
    path = write_report(rows, args.out, settings, notes)
    print(path.read_text())
    print(f"saved as {path} and {path.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

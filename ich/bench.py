"""Speed as ratios measured side by side in one run: `python -m ich.bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Prints a table and saves it, with versions and hardware, under
multirun_reports/benchmarks/. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pydicom
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from ich.cache import build_cache
from ich.config import CONF_DIR, ModelConfig, OptimizerConfig
from ich.model import build_model
from ich.phantom import PhantomSpec, write_phantom
from ich.store import SliceStore, read_bytes
from ich.train import build_optimizer, device_name

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
_SIZES = (320, 128)  # sides of the decoded slices in `prepare`; 320 is the default of data=rsna

Rate = Callable[[], float]


def ratio(ours: Callable[[], float], plain: Callable[[], float], rounds: int) -> dict[str, float]:
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


def bench_prepare(folder: Path, patients: int, rounds: int) -> dict[str, dict[str, float]]:
    """Slices decoded per second, from a folder and a zip: the cache's build, with all it takes,
    against a plain loop in one process, and against reading the files' bytes."""
    root = write_phantom(folder / "phantom", PhantomSpec(patients=patients, seed=0, size=512))
    rows = {}
    for store in (SliceStore(root), SliceStore(_zipped(root))):
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


def bench_step(name: str, size: int, seconds: float, rounds: int) -> dict[str, float]:
    """Images per second of a training step: channels_last against NCHW, float32, batch 32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = _model_config(name)

    def stepper(layout: torch.memory_format) -> Callable[[], float]:
        model = build_model(cfg).to(device, memory_format=layout)  # type: ignore[call-overload]
        optimizer = build_optimizer(OptimizerConfig("torch.optim.Adam", 1e-4), model)
        x = torch.randn(32, 3, size, size, device=device).contiguous(memory_format=layout)
        target = torch.randint(0, 2, (32, 6), device=device).float()

        def step() -> None:
            loss = F.binary_cross_entropy_with_logits(model(x), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        def rate() -> float:
            step()
            _wait(device)
            start, steps = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                step()
                _wait(device)
                steps += 1
            return 32 * steps / (time.perf_counter() - start)

        return rate

    return ratio(stepper(torch.channels_last), stepper(torch.contiguous_format), rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _model_config(name: str) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    return ModelConfig(**{**values, "pretrained": False})  # type: ignore[dict-item]


def write_report(rows: dict[str, dict[str, float]], out: Path, settings: str) -> Path:
    """Saves the rows as JSON and Markdown, named by date and device."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pydicom": pydicom.__version__,
        "settings": settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{head['date']}-{'cuda' if torch.cuda.is_available() else 'cpu'}"
    (out / f"{stem}.json").write_text(json.dumps({**head, "rows": rows}, indent=1))
    lines = [
        f"# {head['date']}, {device}",
        "",
        ", ".join(f"{k} {v}" for k, v in head.items() if k not in ("date", "device")),
        "",
        "| what | ours, items/s | plain, items/s | ratio | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {r['ours']:.1f} | {r['plain']:.1f} | {r['ratio']:.2f} | "
        f"{r['lowest']:.2f} | {r['highest']:.2f} |"
        for name, r in rows.items()
    ]
    path = out / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(prog="python -m ich.bench", description=__doc__)
    parser.add_argument("--image-size", type=int, default=96, help="input of the step, pixels")
    parser.add_argument("--patients", type=int, default=120, help="phantom patients to decode")
    parser.add_argument("--rounds", type=int, default=3, help="alternations per pair")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one timing of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("multirun_reports/benchmarks"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = bench_prepare(Path(folder), args.patients, args.rounds)
    for name in args.models:
        rows[f"step: {name}, channels_last / NCHW"] = bench_step(
            name, args.image_size, args.seconds, args.rounds
        )
    settings = (
        f"image size {args.image_size}, {args.patients} patients, {args.rounds} rounds, "
        f"{args.seconds:g} s"
    )
    path = write_report(rows, args.out, settings)
    print(path.read_text())
    print(f"saved as {path} and {path.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

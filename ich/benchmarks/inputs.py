"""Decoding, and batches for the network: images per second beside other loaders."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from ich.base.config import Config, input_channels
from ich.base.records import ComputeMode
from ich.benchmarks import peers
from ich.benchmarks.measure import (
    InTurn,
    PartResult,
    compare,
    compose_job,
    copy_rate,
    wait_for_device,
)
from ich.benchmarks.peers import Rate, rate_of
from ich.benchmarks.settings import Settings
from ich.data.cache import build_cache
from ich.data.cohorts import open_store
from ich.data.dataset import Dataset, load_dataset
from ich.data.store import SliceStore, read_bytes
from ich.training.devices import pick_device
from ich.training.mode import CHANNELS_LAST
from ich.training.trainer import Trainer

_SIZES = (320, 128)  # sides of the decoded slices in `prepare`; 320 is the default of data=rsna


# Prepare


def bench_prepare(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Slices decoded per second, from a folder and a zip: the cache's build, with all it takes,
    against a plain loop in one process, and against reading the files' bytes."""
    rows = {}
    for store in (SliceStore(folder / "phantom"), SliceStore(_zipped(folder / "phantom"))):
        paths = [p for p in store.paths if p.endswith(".dcm")]
        kind = f"{'zip' if store.is_zip else 'folder'} of {len(paths):,}"
        read = _reader(store, paths)
        read()  # all sides then read from the page cache
        for size in _SIZES:
            ours = _cache_build(store, paths, size, folder)
            others = {"plain loop": peers.plain_loop(store, paths, size), "reading the bytes": read}
            for name, other in others.items():
                what = f"prepare, {kind}, {size} px: cache build / {name}"
                rows[what] = compare(ours, other, settings.rounds)
    yield PartResult(rows)


def _zipped(root: Path) -> Path:
    target = root.with_suffix(".zip")
    # Deflated: to inflate a slice is part of what reading an archive costs.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.dcm")):
            archive.write(file, file.relative_to(root).as_posix())
    return target


def _cache_build(store: SliceStore, paths: list[str], size: int, folder: Path) -> Rate:
    images = pd.DataFrame({"image_id": [Path(p).stem for p in paths], "path": paths})

    def rate() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache_folder:
            start = time.perf_counter()
            # A store of its own: an archive's directory is read again.
            # 0.0: no file may go to quarantine, or fewer are decoded than are counted.
            cache = build_cache(images, SliceStore(store.root), Path(cache_folder), size, 0.0)
            seconds = time.perf_counter() - start
        assert len(cache.row) == len(paths)
        return len(paths) / seconds

    return rate


def _reader(store: SliceStore, paths: list[str]) -> Rate:
    """Reads the files, inflating those of an archive, and does nothing with them."""

    def read() -> None:
        for location in SliceStore(store.root).locate(paths):
            read_bytes(store.root, location)

    return rate_of(read, len(paths))


# Input


def bench_input(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Augmented, windowed, normalized batches per second, without a network. See
    `ich.benchmarks.peers`.

    The last row is what is left: the images per second if an image's bytes were only copied.
    """
    for size in settings.image_size:
        yield from _input_rows(size, settings, folder)


def _input_rows(size: int, settings: Settings, folder: Path) -> Iterator[PartResult]:
    config = compose_job("mobilenet_v2", size, folder)
    dataset = load_dataset(config)
    files, decoded = phantom_files(config, settings.images), config.data.cache_size
    ours = _ours(config, dataset)
    others = {
        "plain DICOM Dataset": partial(peers.dicom_loader, files, size),
        "MONAI CacheDataset": partial(peers.monai_loader, files, size),
        "timm loader over PNGs": partial(peers.timm_loader, files, size, decoded, folder),
    }

    def measured(name: str) -> PartResult:
        peer = others[name]()
        for side in (ours, peer):
            side()  # worker processes import, caches fill, files come into memory
        row = compare(ours, peer, settings.rounds)
        return PartResult({f"input, {size} px: ours / {name}": row})

    in_turn = InTurn("input", [*others], settings)
    yield from in_turn.measure(measured)
    yield in_turn.remarks
    # Read once as int16, written once as float32: no loader moves less.
    size_in, size_out = dataset.hu[0].nbytes, 4 * input_channels(config) * size**2
    copy = copy_rate(pick_device(config.train.device), size_in + size_out)
    row = compare(copy, ours, settings.rounds)
    yield PartResult({f"input, {size} px: copying the bytes / ours": row})


def phantom_files(config: Config, images: int) -> list[Path]:
    store = open_store(config.data)
    return [store.root / p for p in store.paths if p.endswith(".dcm")][:images]


def _ours(config: Config, dataset: Dataset) -> Rate:
    device = pick_device(config.train.device)
    trainer = Trainer.build(config, dataset, device, ComputeMode("fp32", CHANNELS_LAST))

    def rate() -> float:
        rows = len(dataset.train.row)
        draws = trainer.resample.draws(0, 1, rows)
        start, seen = time.perf_counter(), 0
        for batch in trainer.train_loader.epoch(0, 1, draws):
            seen += len(trainer.windows(trainer.resample(batch.hu, batch.draws)))
        wait_for_device(device)
        return seen / (time.perf_counter() - start)

    return rate

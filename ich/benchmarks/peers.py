"""What people would otherwise use, for `ich.bench` to compare with: plain loops over pydicom, a
`DataLoader` with a pydicom `Dataset`, MONAI's `CacheDataset` and timm's loader over PNGs.

The loaders do per image what ours does per batch, in two worker processes, with flips and crops of
the same probabilities. MONAI's and timm's begin where decoding is done: in memory, and with PNGs on
disk. They come with the extra `bench`.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
import torch.nn.functional as F

from ich.data.store import SliceStore
from ich.scoring.uncertainty import ScoredRows

Rate = Callable[[], float]  # a timing: items per second

BATCH = 32
_WINDOWS = ((40, 80), (80, 200), (40, 380))  # those of the report, by hand: no code of ours here


def rate_of(work: Callable[[], object], items: int) -> Rate:
    """Of a function that deals with so many items at each call."""

    def rate() -> float:
        start = time.perf_counter()
        work()
        return items / (time.perf_counter() - start)

    return rate


def plain_loop(store: SliceStore, paths: list[str], size: int) -> Rate:
    """What most scripts do: pixel_array, rescale in float, resize with OpenCV."""
    import cv2

    def decode() -> None:
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(store.root)) if store.is_zip else None
            for path in paths:
                file = archive.open(path) if archive else store.root / path
                dataset = pydicom.dcmread(file)
                slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
                hu = dataset.pixel_array * slope + intercept
                cv2.resize(hu, (size, size), interpolation=cv2.INTER_AREA)

    return rate_of(decode, len(paths))


def _epoch_rate(loader: Any) -> Rate:
    """Images per second of one pass over a DataLoader, its workers' start not counted."""

    def rate() -> float:
        seen, start = 0, 0.0
        for batch in loader:
            x = batch["image"] if isinstance(batch, dict) else batch[0]
            if not start:  # with the first batch
                start = time.perf_counter()
                continue
            seen += len(x)
        return seen / (time.perf_counter() - start)

    return rate


class DicomDataset(torch.utils.data.Dataset[Any]):
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
        # conf/augment/report.yaml's numbers, by hand as the windows are.
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
        # About the mean and the deviation of timm's ImageNet networks, one for all channels.
        image = (np.stack(channels) - 0.45) / 0.225
        return torch.from_numpy(image.astype(np.float32)), torch.zeros(6)


def dicom_loader(files: Sequence[Path], size: int) -> Rate:
    return _epoch_rate(
        torch.utils.data.DataLoader(
            DicomDataset(files, size), BATCH, shuffle=True, num_workers=2, persistent_workers=True
        )
    )


def monai_loader(files: Sequence[Path], size: int) -> Rate:
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
            # A zoom by 1.25 shows a square of 0.8.
            transforms.RandZoomd("image", 0.25, 1.0, 1.25, mode="bilinear", keep_size=True),
            transforms.Resized("image", (size, size), mode="bilinear", anti_aliasing=False),
            transforms.Lambdad("image", lambda x: window(x.as_tensor())),
        ]
    )
    # It keeps what comes before the first random transform: decoded slices.
    cached = data.CacheDataset([{"image": str(f)} for f in files], chain, progress=False)
    return _epoch_rate(data.DataLoader(cached, batch_size=BATCH, shuffle=True, num_workers=2))


def timm_loader(files: Sequence[Path], size: int, decoded: int, folder: Path) -> Rate:
    """PNGs of `decoded` pixels with the three windows as colours, written beforehand."""
    import cv2
    import timm.data

    pictures = folder / f"png{size}" / "one class"  # timm takes a class per folder
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for file in files:
            dataset = pydicom.dcmread(file)
            hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            hu = cv2.resize(hu, (decoded, decoded), interpolation=cv2.INTER_AREA)
            colours = [255 * np.clip((hu - (c - w / 2)) / w, 0, 1) for c, w in _WINDOWS]
            cv2.imwrite(str(pictures / f"{file.stem}.png"), np.stack(colours, -1).astype(np.uint8))
    # timm's scale is a share of the area: 0.64 is a side of 0.8.
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(pictures.parent)),
        (3, size, size),
        BATCH,
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


def plain_epoch(
    files: Sequence[Path],
    size: int,
    device: torch.device,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Seconds of a training epoch in float32 NCHW, step by step."""
    loader = torch.utils.data.DataLoader(
        DicomDataset(files, size), BATCH, shuffle=True, num_workers=2
    )
    model.train()
    start = time.perf_counter()
    for x, target in loader:
        loss = F.binary_cross_entropy_with_logits(model(x.to(device)), target.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_predictions(
    files: Sequence[Path], size: int, model: torch.nn.Module, device: torch.device
) -> Rate:
    """What most scripts do with a trained network: decode, window and predict one by one."""
    import cv2

    model = model.eval()

    @torch.inference_mode()
    def predict() -> None:
        for file in files:
            dataset = pydicom.dcmread(file)
            slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
            hu = dataset.pixel_array.astype(np.float32) * slope + intercept
            hu = cv2.resize(hu, (size, size), interpolation=cv2.INTER_AREA)
            channels = [np.clip((hu - (c - w / 2)) / w, 0, 1) for c, w in _WINDOWS]
            image = ((np.stack(channels) - 0.45) / 0.225).astype(np.float32)
            torch.sigmoid(model(torch.from_numpy(image)[None].to(device))).cpu().numpy()

    return rate_of(predict, len(files))


def plain_bootstrap(scored: ScoredRows, resamples: int = 5) -> Rate:
    """Resamples per second of drawing groups, gathering their rows, and scikit-learn's AUCs."""
    from sklearn.metrics import roc_auc_score

    groups = scored.group_count
    rows = np.split(np.argsort(scored.group), np.cumsum(np.bincount(scored.group))[:-1])

    def bootstrap() -> None:
        rng = np.random.default_rng(0)
        for _ in range(resamples):
            drawn = np.concatenate([rows[g] for g in rng.integers(0, groups, groups)])
            for average in ("micro", "macro"):
                roc_auc_score(scored.target[drawn], scored.logits[drawn], average=average)

    return rate_of(bootstrap, resamples)

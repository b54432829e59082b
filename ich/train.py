"""One training, in a process of its own: `python -m ich.train RUN_DIR [--parent MLFLOW_RUN]`.

`ich.sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.results`), whatever becomes of the process.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ich.config import (
    OPTIMIZER_SETTINGS,
    Config,
    Device,
    Monitor,
    OptimizerConfig,
    SchedulerConfig,
    SchedulerName,
    UserError,
    flatten,
    image_size,
    load,
)
from ich.data import Dataset, Split, load_dataset
from ich.loader import Batch, Loader
from ich.losses import Loss, build_loss
from ich.metrics import always_negative, multilabel_metrics
from ich.model import (
    Classifier,
    build_model,
    count_parameters,
    input_spec,
    load_weights,
    save_weights,
)
from ich.results import FAILED, FINISHED, KILLED, RunPaths, write_json
from ich.tracking import Tracker, open_store, open_tracker
from ich.transforms import Augment, CTWindows, Normalize, resize, stream_seed

log = logging.getLogger("ich.train")

Tick = Callable[[str, int, int, int], None]  # phase, epoch, step, steps


def fit(cfg: Config, run: RunPaths, tracker: Tracker, tick: Tick) -> dict[str, Any]:
    """Trains one network by the config and keeps the weights of its best epoch.

    Returns:
        The run's result: metrics of the best-weights epoch (the first on ties) on the test set, or
        on validation where there is none; the same on validation as `val_<metric>`; `auc_top` (the
        highest validation AUC over the epochs), sizes, speed, and the cohort.

    Raises:
        UserError: bad data, or a loss that is not finite.
    """
    device = pick_device(cfg.train.device)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    dataset = load_dataset(cfg, build=False)
    labels = dataset.labels
    trainer = Trainer.build(cfg, dataset, device)
    log.info(
        "%s on %s: %d training rows, %d validation rows",
        cfg.model.timm,
        device_name(device),
        len(dataset.train.row),
        len(dataset.val.row),
    )
    started = time.perf_counter()
    best = train_epochs(cfg, run, tracker, trainer, dataset, tick)
    scores, target = best.scores, dataset.val.target
    if dataset.test is not None:
        load_weights(trainer.model, run.best)
        logits = trainer.evaluate(dataset.test, best.epoch, tick, "testing")
        target = dataset.test.target
        scores = multilabel_metrics(logits, target, labels)
        keep_predictions(run, dataset, {"val": best.logits, "test": logits})
    params, params_imagenet = count_parameters(cfg.model, len(labels))
    return {
        **scores,
        **{f"val_{k}": v for k, v in best.scores.items()},
        "best_epoch": best.epoch,
        "auc_top": best.auc_top,
        "labels": list(labels),
        "params": params,
        "params_imagenet": params_imagenet,
        "epochs": cfg.train.epochs,
        "minutes": (time.perf_counter() - started) / 60,
        "images_per_s": best.images_per_s,
        "device": device_name(device),
        "cohort": dataset.summary,
        "always_negative": always_negative(target, labels),
    }


@dataclass
class Best:
    """The epoch whose weights were kept: validation metrics and logits; and the whole training's
    highest validation AUC and speed."""

    epoch: int
    scores: dict[str, float]
    logits: np.ndarray
    auc_top: float = math.nan
    images_per_s: float = math.nan


def train_epochs(
    cfg: Config, run: RunPaths, tracker: Tracker, trainer: Trainer, dataset: Dataset, tick: Tick
) -> Best:
    """All epochs, each validated and logged; keeps weights and predictions of the best."""
    best: Best | None = None
    auc_top, train_seconds = math.nan, 0.0
    for epoch in range(1, cfg.train.epochs + 1):
        begin, lr = time.perf_counter(), trainer.optimizer.param_groups[0]["lr"]
        train_loss = trainer.train_one_epoch(epoch, tick)
        seconds = time.perf_counter() - begin
        train_seconds += seconds
        logits = trainer.evaluate(dataset.val, epoch, tick)
        scores = multilabel_metrics(logits, dataset.val.target, dataset.labels)
        speed = {"train/lr": lr, "train/images_per_s": len(dataset.train.row) / seconds}
        validation = {f"val/{k}": v for k, v in scores.items()}
        tracker.log({"train/loss": train_loss, **speed, **validation}, epoch)
        log.info(
            "epoch %d of %d: loss %.4f, validation loss %.4f, accuracy %.4f, AUC %.4f",
            epoch,
            cfg.train.epochs,
            train_loss,
            *(scores[k] for k in ("log_loss", "accuracy", "auc")),
        )
        auc_top = float(np.fmax(auc_top, scores["auc"]))
        if best is None or is_better(scores, best.scores, cfg.train.monitor):
            best = Best(epoch, scores, logits)
            keep_best(run, trainer.model, dataset, logits, cfg)
    assert best is not None
    best.auc_top = auc_top
    best.images_per_s = len(dataset.train.row) * cfg.train.epochs / train_seconds
    return best


@dataclass
class Trainer:
    """Model, data and optimizer of one training, on one device."""

    cfg: Config
    device: torch.device
    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loss: Loss
    train_loader: Loader
    augment: Augment
    windows: CTWindows
    normalize: Normalize
    image_size: int

    @staticmethod
    def build(cfg: Config, dataset: Dataset, device: torch.device) -> Trainer:
        """Everything a training needs, seeded by `cfg.seed`."""
        torch.manual_seed(stream_seed(cfg.seed, 0, "init"))
        channels, spec = len(cfg.windows.channels), input_spec(cfg.model)
        model = build_model(cfg.model, channels, len(dataset.labels))
        # channels_last was faster for all eight networks on CPU (and on GPUs for convolutions).
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        train = Loader(dataset.hu, dataset.train, cfg.train.batch_size, device)
        optimizer = build_optimizer(cfg.optimizer, model)
        size = image_size(cfg)
        if size > dataset.hu.shape[-1]:
            log.warning(
                "slices of %d pixels are enlarged to %d; data.cache_size=%d would decode "
                "them at full detail",
                dataset.hu.shape[-1],
                size,
                size,
            )
        return Trainer(
            cfg=cfg,
            device=device,
            model=model,
            optimizer=optimizer,
            scheduler=build_scheduler(cfg.scheduler, optimizer, len(train) * cfg.train.epochs),
            loss=build_loss(cfg.loss, torch.from_numpy(dataset.train.target.mean(0))),
            train_loader=train,
            augment=Augment(cfg.augment),
            windows=CTWindows(cfg.windows.channels, device),
            normalize=Normalize(spec.mean, spec.std, channels, device),
            image_size=size,
        )

    def channels(self, hu: torch.Tensor) -> torch.Tensor:
        """float32 HU [B, 1, H, W] -> the network's input, float32 [B, C, H, W]."""
        x = self.normalize(self.windows(hu))
        return x.contiguous(memory_format=torch.channels_last)

    def train_one_epoch(self, epoch: int, tick: Tick) -> float:
        """One pass over the training rows; returns the mean loss.

        Raises:
            UserError: the loss is not finite, naming epoch and step.
        """
        self.model.train()
        rows, steps = len(self.train_loader.split.row), len(self.train_loader)
        draws = self.augment.draws(self.cfg.seed, epoch, rows)
        losses: list[torch.Tensor] = []
        for step, batch in enumerate(self.train_loader.epoch(self.cfg.seed, epoch), start=1):
            losses.append(self._step(batch, draws[batch.position]) * len(batch.position))
            if self.device.type == "cpu":  # elsewhere looking would wait for the device
                _require_finite(losses[-1:], epoch, step)
            tick("training", epoch, step, steps)
        _require_finite(losses, epoch, 1)
        return float(torch.stack(losses).sum()) / rows

    def _step(self, batch: Batch, draws: torch.Tensor) -> torch.Tensor:
        hu = self.augment(resize(batch.hu, self.image_size), draws)
        loss = self.loss(self.model(self.channels(hu)), batch.target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    @torch.inference_mode()
    def evaluate(
        self, split: Split, epoch: int, tick: Tick, phase: str = "validating"
    ) -> np.ndarray:
        """Logits of a split's rows, float32 [N, L], in the cohort's order.

        Raises:
            UserError: a logit is not finite; it would score like a confident "no bleed".
        """
        self.model.eval()
        loader = Loader(self.train_loader.hu, split, self.cfg.train.batch_size, self.device)
        parts, steps = [], len(loader)
        for step, batch in enumerate(loader.in_order(), start=1):
            parts.append(self.model(self.channels(resize(batch.hu, self.image_size))))
            tick(phase, epoch, step, steps)
        logits = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise UserError(
                f"the logits are not finite while {phase} after epoch {epoch}. Lower optimizer.lr; "
                f"the weights of the best epoch before it are kept."
            )
        return logits


def _require_finite(losses: list[torch.Tensor], epoch: int, first_step: int) -> None:
    bad = ~torch.isfinite(torch.stack(losses))
    if bad.any():
        step = first_step + int(bad.int().argmax())
        raise UserError(
            f"the loss is not finite in epoch {epoch}, step {step}. Lower optimizer.lr; the "
            f"weights of the best epoch before it are kept."
        )


def is_better(scores: dict[str, float], best: dict[str, Any], monitor: Monitor) -> bool:
    """Strictly better, so that the first of equal epochs is kept; anything beats NaN."""
    new, old = scores[monitor.value], best[monitor.value]
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return bool(new < old) if monitor is Monitor.log_loss else bool(new > old)


def keep_best(
    run: RunPaths, model: Classifier, dataset: Dataset, logits: np.ndarray, cfg: Config
) -> None:
    """Replaces `best.safetensors` and `predictions.npz` by this epoch's."""
    # One entry: safetensors writes several in no fixed order, and equal runs have equal files.
    metadata = {"model": cfg.model.name, "timm": cfg.model.timm, "labels": dataset.labels}
    save_weights(model, run.best, {"ich": json.dumps(metadata)})
    keep_predictions(run, dataset, {"val": logits})


def keep_predictions(run: RunPaths, dataset: Dataset, logits: dict[str, np.ndarray]) -> None:
    """Writes `predictions.npz`: per split `<split>_image_id`, `_patient`, `_target`, `_logits`.

    Patients are numbers that mean nothing outside the file; -1 is unknown.
    """
    arrays: dict[str, Any] = {"labels": np.array(dataset.labels)}
    for name, values in logits.items():
        split: Split = getattr(dataset, name)
        arrays |= {
            f"{name}_image_id": split.image_id,
            f"{name}_patient": split.patient,
            f"{name}_target": split.target,
            f"{name}_logits": values,
        }
    part = run.predictions.with_name("predictions.part.npz")
    np.savez_compressed(part, **arrays)
    part.rename(run.predictions)


def build_optimizer(cfg: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer of a config, over all parameters."""
    kind = {
        "torch.optim.Adam": torch.optim.Adam,
        "torch.optim.AdamW": torch.optim.AdamW,
        "torch.optim.SGD": torch.optim.SGD,
    }[cfg._target_]
    given = {k: getattr(cfg, k) for k in OPTIMIZER_SETTINGS[cfg._target_]}
    settings = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None
    }
    return kind(model.parameters(), fused=True, **settings)


def build_scheduler(
    cfg: SchedulerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A factor on the learning rate as a function of the step; 1 throughout for `none`."""
    warmup = cfg.warmup * steps

    def factor(step: int) -> float:
        if cfg.name is SchedulerName.none:
            return 1.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pick_device(device: Device) -> torch.device:
    """The configured device.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch finds no GPU. Use train.device=auto.")
    return torch.device(device.value)


def device_name(device: torch.device) -> str:
    """What a table calls the device: the GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


class ProgressFile:
    """Tells the supervising process where the training is, at most four times a second."""

    def __init__(self, path: Path, epochs: int):
        self.path, self.epochs, self.last = path, epochs, 0.0

    def __call__(self, phase: str, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.last >= 0.25 or step == steps:
            self.last = now
            place = {"epoch": epoch, "epochs": self.epochs, "step": step, "steps": steps}
            write_json(self.path, {"phase": phase, **place}, sync=False)


class Terminated(BaseException):
    """SIGTERM. No `Exception`, so that nothing on the way mistakes it for an error of its own."""


def _on_sigterm(*_: object) -> None:
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    """Trains the run in RUN_DIR and writes its result, whatever happens."""
    parser = argparse.ArgumentParser(prog="python -m ich.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", help="MLflow run of the sweep")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _on_sigterm)
    run = RunPaths(args.run_dir)
    cfg = load(run.config)
    tracker = open_tracker(
        open_store(cfg.tracking), run.metrics, cfg.job, args.parent, flatten(cfg), _tags(cfg)
    )
    result = _outcome(lambda: fit(cfg, run, tracker, ProgressFile(run.progress, cfg.train.epochs)))
    _close(cfg, run, tracker, result)
    return 0 if result["status"] == FINISHED else 1


def _outcome(training: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A training's result, or how it ended: the table has a row for whatever it was."""
    try:
        return {"status": FINISHED, "reason": "", **training()}
    except (Terminated, KeyboardInterrupt):
        return {"status": KILLED, "reason": "ended by SIGTERM or an interrupt"}
    except SystemExit as error:
        return {"status": FAILED, "reason": f"called sys.exit({error.code!r})"}
    except Exception as error:
        traceback.print_exc()
        prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {"status": FAILED, "reason": f"{prefix}{' '.join(str(error).split())}"}


def _tags(cfg: Config) -> dict[str, str]:
    return {
        "ich.kind": "job",
        "ich.sweep": cfg.name,
        "ich.job": cfg.job,
        "ich.model": cfg.model.name,
        "ich.protocol": cfg.protocol.name.value,
        "ich.data": cfg.data.source.value,
    }


def _summary(result: dict[str, Any]) -> dict[str, float]:
    """A finished run's numbers for MLflow: what its weights score, and what its cohort leaks."""
    plain = ("best_epoch", "minutes", "images_per_s", "params")
    scores = [k for k in result if k.startswith(("accuracy", "auc", "val_"))]
    leak = {f"data/leak_{k}": v for k, v in result["cohort"]["leak"].items() if v is not None}
    return {**{f"best/{k}": float(result[k]) for k in (*scores, *plain)}, **leak}


def _close(cfg: Config, run: RunPaths, tracker: Tracker, result: dict[str, Any]) -> None:
    identity = {"job": cfg.job, "model": cfg.model.name, "mlflow_run": tracker.run_id}
    run.write_result({**identity, **result})
    run.progress.unlink(missing_ok=True)
    if result["status"] == FINISHED:
        tracker.summary(_summary(result))
    for path in (run.config, run.best, run.predictions, run.log):
        if path.exists():
            tracker.artifact(path)
    tracker.finish(result["status"].upper())


if __name__ == "__main__":
    sys.exit(main())

"""One training, in a process of its own: `python -m ich.train RUN_DIR`.

`ich.sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.base.results`), whatever becomes of the process.
"""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ich.base.config import (
    Config,
    Monitor,
    UserError,
)
from ich.base.files import write_json
from ich.base.results import FAILED, FINISHED, KILLED, RunPaths
from ich.data.dataset import Dataset, load_dataset
from ich.scoring.metrics import always_negative, multilabel_metrics
from ich.tracking.journal import Journal
from ich.tracking.mirror import Mirror
from ich.training.checkpoint import drop_checkpoints
from ich.training.devices import device_name, pick_device
from ich.training.keeper import Keeper, keep_best, keep_predictions
from ich.training.mode import Mode
from ich.training.model import (
    count_parameters,
    load_weights,
)
from ich.training.timing import resolve
from ich.training.trainer import Best, Progress, Tick, Trainer

log = logging.getLogger("ich.train")
_MIRROR_SECONDS, _MIRROR_SECONDS_KILLED = 60, 4  # what an ended training waits for MLflow


class Terminated(BaseException):
    """SIGTERM. No `Exception`, so that nothing on the way mistakes it for an error of its own."""


def fit(cfg: Config, run: RunPaths, journal: Journal, tick: Tick) -> dict[str, Any]:
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
    mode = settle_mode(cfg, run)
    trainer = Trainer.build(cfg, dataset, device, mode)
    log.info(
        "%s on %s, %s, %s: %d training rows, %d validation rows",
        cfg.model.timm,
        device_name(device),
        mode.precision,
        mode.layout,
        len(dataset.train.row),
        len(dataset.val.row),
    )
    progress = Keeper.resume(cfg, run, trainer, dataset, journal)
    started = time.perf_counter() - progress.wall_seconds
    best = train_epochs(cfg, run, journal, trainer, dataset, progress, tick)
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
        "auc_top": progress.auc_top,
        "labels": list(labels),
        "params": params,
        "params_imagenet": params_imagenet,
        "epochs": cfg.train.epochs,
        "minutes": (time.perf_counter() - started) / 60,
        "images_per_s": len(dataset.train.row) * cfg.train.epochs / progress.train_seconds,
        "resumed": progress.resumed,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": mode.precision,
        "layout": mode.layout,
        "cohort": dataset.summary,
        "always_negative": always_negative(target, labels),
    }


def settle_mode(cfg: Config, run: RunPaths) -> Mode:
    """What this run computes in: as it began, or as its sweep chose; noted for whoever resumes."""
    origin = run.read_origin()
    mode = resolve(cfg, origin.get("mode"))
    write_json(run.origin, origin | {"mode": asdict(mode)})
    return mode


def train_epochs(
    cfg: Config,
    run: RunPaths,
    journal: Journal,
    trainer: Trainer,
    dataset: Dataset,
    progress: Progress,
    tick: Tick,
) -> Best:
    """The epochs that are left, each validated and logged; keeps weights and predictions of the
    best, and checkpoints from which the training goes on as if nothing had happened."""
    keeper = Keeper(cfg, run, trainer, dataset, progress)
    try:
        while progress.epoch <= cfg.train.epochs:
            epoch = progress.epoch
            train_loss = trainer.train_one_epoch(progress, tick, keeper.save_if_due)
            logits = trainer.evaluate(dataset.val, epoch, tick)
            scores = multilabel_metrics(logits, dataset.val.target, dataset.labels)
            rows_per_s = len(dataset.train.row) / progress.epoch_seconds
            speed = {"train/lr": progress.lr, "train/images_per_s": rows_per_s}
            validation = {f"val/{k}": v for k, v in scores.items()}
            journal.log({"train/loss": train_loss, **speed, **validation}, epoch)
            log.info(
                "epoch %d of %d: loss %.4f, validation loss %.4f, accuracy %.4f, AUC %.4f",
                epoch,
                cfg.train.epochs,
                train_loss,
                *(scores[k] for k in ("log_loss", "accuracy", "auc")),
            )
            progress.auc_top = float(np.fmax(progress.auc_top, scores["auc"]))
            best = progress.best
            if best is None or is_better(scores, best.scores, cfg.train.monitor):
                progress.best = Best(epoch, scores, logits)
                keep_best(run, trainer.model, dataset, logits, cfg)
            progress.next_epoch()
            keeper.save()
    except Terminated:
        keeper.save()
        raise
    assert progress.best is not None
    return progress.best


def is_better(scores: dict[str, float], best: dict[str, Any], monitor: Monitor) -> bool:
    """Strictly better, so that the first of equal epochs is kept; anything beats NaN."""
    new, old = scores[monitor.value], best[monitor.value]
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return bool(new < old) if monitor is Monitor.log_loss else bool(new > old)


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


class Stop:
    """Handles SIGTERM: at once while a job starts; once it trains, between two steps, where its
    state is whole; not while its results are written."""

    def __init__(self, tick: Tick) -> None:
        self._tick, self._trains, self._asked = tick, False, False

    def __call__(self, *_: object) -> None:
        if not self._trains:
            raise Terminated
        self._asked = True

    def tick(self, phase: str, epoch: int, step: int, steps: int) -> None:
        """Stands between the training and the one who is told of its steps."""
        self._trains = True
        self._tick(phase, epoch, step, steps)
        if self._asked:
            raise Terminated


def train_and_close(cfg: Config, run: RunPaths, mirror: Mirror, stop: Stop) -> int:
    """Trains in a folder that is this process's alone; returns the exit status."""
    result = _outcome(lambda: fit(cfg, run, Journal(run.metrics, mirror.notify), stop.tick))
    _close(cfg, run, result)
    patience = _MIRROR_SECONDS if result["status"] != KILLED else _MIRROR_SECONDS_KILLED
    mirrored = mirror.finish(patience)
    status = 0 if result["status"] == FINISHED else 1
    if not mirrored:  # its thread is inside MLflow: leave without waiting for it
        logging.shutdown()
        os._exit(status)
    return status


def _outcome(training: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A training's result, or how it ended: the table has a row for whatever it was."""
    try:
        return {"status": FINISHED, "reason": "", **training()}
    except (Terminated, KeyboardInterrupt):
        return {"status": KILLED, "reason": "ended by SIGTERM or an interrupt"}
    except SystemExit as error:
        return {"status": FAILED, "reason": f"called sys.exit({error.code!r})"}
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        return {
            "status": FAILED,
            "reason": f"out of GPU memory: {str(error).splitlines()[0]} Lower train.batch_size or "
            f"data.image_size, or hydra.launcher.jobs_per_gpu if jobs share the GPU.",
        }
    except Exception as error:
        traceback.print_exc()
        prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {"status": FAILED, "reason": f"{prefix}{' '.join(str(error).split())}"}


def _close(cfg: Config, run: RunPaths, result: dict[str, Any]) -> None:
    run.write_result({"job": cfg.job, "model": cfg.model.name, **result})
    run.progress.unlink(missing_ok=True)
    if result["status"] == FINISHED:
        drop_checkpoints(run.root)

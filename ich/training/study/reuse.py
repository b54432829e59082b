"""The slice network of a finished `context=slice` job, for the head of an equal job."""

from __future__ import annotations

import logging
import math

import torch

from ich.base.config import Config, load_config
from ich.base.files import DamagedError, write_bytes
from ich.base.naming import identity
from ich.base.results import RunPaths
from ich.data.dataset import Dataset
from ich.scoring.predictions import read_arrays
from ich.tracking.journal import Journal
from ich.training.devices import device_name
from ich.training.saving import save_predictions
from ich.training.trainer import BestEpoch, Trainer, TrainingState

log = logging.getLogger("ich.train")


def take_slice_run(
    trainer: Trainer, run: RunPaths, dataset: Dataset, journal: Journal
) -> TrainingState | None:
    """Takes weights, predictions and journal of a finished run in the same sweep's folder that was
    trained as this one's slice network is to be: of the same config but for its context, the same
    cohort, initial weights, code, packages, mode, device and threads.

    Returns:
        The state after its last epoch; None if there is no such run.
    """
    cfg = trainer.cfg
    for folder in sorted(p for p in run.root.parent.iterdir() if p.is_dir() and p != run.root):
        source = RunPaths(folder)
        if not _is_equal(trainer, run, source):
            continue
        try:
            weights, lines = source.best.read_bytes(), source.read_metrics()
            logits = read_arrays(source.predictions)["val_logits"]
        except (OSError, KeyError):  # DamagedError is one
            continue
        fit = source.read_result().fit
        shape = len(dataset.val.row), len(dataset.labels)
        if fit is None or logits.shape != shape or len(lines) != cfg.train.epochs:
            continue
        log.info("the slice network is that of %s, which was trained alike", folder.name)
        write_bytes(run.best, weights)
        save_predictions(run, dataset, {"val": {"logits": logits}})
        journal.replace(lines)
        # NaN is null in a file.
        scores = {k: math.nan if v is None else v for k, v in fit.val_scores.items()}
        rows = len(dataset.train.row) * cfg.train.epochs
        return TrainingState(
            epoch=cfg.train.epochs + 1,
            train_seconds=rows / fit.images_per_s,
            wall_seconds=fit.minutes * 60,
            auc_top=math.nan if fit.auc_top is None else fit.auc_top,
            best=BestEpoch(fit.best_epoch, scores, logits),
        )
    return None


def _is_equal(trainer: Trainer, run: RunPaths, source: RunPaths) -> bool:
    fit, here = source.read_result().fit, (torch.get_num_threads(), device_name(trainer.device))
    if fit is None or (fit.threads, fit.device) != here:
        return False
    own, theirs = run.read_origin(), source.read_origin()
    made_from = [(o.cohort, o.weights, o.code) for o in (own, theirs)]
    if made_from[0] != made_from[1] or theirs.mode != trainer.mode or not own.code:
        return False
    if run.read_provenance().versions != source.read_provenance().versions:
        return False
    try:
        other = load_config(source.config)
    except (FileNotFoundError, DamagedError):
        return False
    return other.context.is_slice and _training(other) == _training(trainer.cfg)


def _training(cfg: Config) -> dict[str, str]:
    """The settings of a slice network's training."""
    # A job's name has its context, and the folder is the same.
    values = identity(cfg).items()
    return {k: v for k, v in values if k != "job" and not k.startswith("context.")}

"""The method of one training: what it computes, which epoch is kept, and what is said of it.

`fit` is a training from its config to its result, `train_epochs` the loop within. Signals, locks
and the result file are `ich.training.run`'s.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from ich.base.config import Config, ContextName
from ich.base.records import ComputeMode, FitResult
from ich.base.results import RunPaths
from ich.data.dataset import Dataset, load_dataset
from ich.scoring.metrics import always_negative, multilabel_metrics
from ich.tracking.journal import Journal
from ich.training.devices import device_name, pick_device
from ich.training.model import count_parameters, load_weights
from ich.training.saving import (
    CheckpointWriter,
    resume_training,
    save_best,
    save_model,
    save_predictions,
)
from ich.training.study.fit import TrainedHead, train_head
from ich.training.study.reuse import take_slice_run
from ich.training.timing import select_mode
from ich.training.trainer import BestEpoch, StepCallback, Trainer, TrainingState, is_better

log = logging.getLogger("ich.train")


class Terminated(BaseException):
    """SIGTERM. No `Exception`, so that nothing on the way mistakes it for an error of its own."""


def fit(cfg: Config, run: RunPaths, journal: Journal, on_step: StepCallback) -> FitResult:
    """Trains one network by the config and keeps the weights of its best epoch.

    Returns:
        Metrics of the best epoch's weights (the first on ties) on the test set, or on validation
        where there is none; the same on validation; sizes, speed, and the cohort.

    Raises:
        UserError: bad data, or a loss that is not finite.
    """
    device = pick_device(cfg.train.device)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    # The launch has decoded the slices: jobs that start at once must not do so side by side.
    dataset = load_dataset(cfg, build=False, key=run.read_origin().cohort)
    labels = dataset.labels
    mode = select_and_record_mode(cfg, run, cfg.train.epochs * len(dataset.train.row))
    trainer = Trainer.build(cfg, dataset, device, mode)
    where = f"{device_name(device)}, {mode}"
    rows = len(dataset.train.row), len(dataset.val.row)
    log.info("%s on %s: %d training rows, %d validation rows", cfg.model.timm, where, *rows)
    _tell_why(mode)
    state, generations = resume_training(run, trainer, dataset, journal)
    is_study, is_new = cfg.context.name is ContextName.study, (state.epoch, state.step) == (1, 0)
    taken = take_slice_run(trainer, run, dataset, journal) if is_study and is_new else None
    state = taken or state
    # As if it had begun earlier: the minutes of a resumed run are those of all its processes.
    started = time.perf_counter() - state.wall_seconds
    writer = CheckpointWriter(run, trainer, dataset, state, generations)
    if taken:  # once: a resumed run goes on with it, whatever has become of the other
        writer.save()
    best = train_epochs(run, journal, trainer, dataset, state, writer, on_step)
    slice_seconds = time.perf_counter() - started
    head = train_head(run, journal, trainer, dataset, on_step) if is_study else None
    ended = time.perf_counter()
    target, scores = score(run, trainer, dataset, best, head, on_step)
    seconds = slice_seconds + (head.all_seconds if head else 0.0) + time.perf_counter() - ended
    params, params_imagenet = count_parameters(cfg.model, len(labels))
    return FitResult(
        scores=scores["logits"],
        val_scores=head.best.scores if head else best.scores,
        best_epoch=best.epoch,
        auc_top=state.auc_top,
        labels=labels,
        params=params + (head.params if head else 0),
        params_imagenet=params_imagenet,
        epochs=cfg.train.epochs,
        minutes=seconds / 60,
        # Of training steps alone: validation, checkpoints and start-up have other rates.
        images_per_s=len(dataset.train.row) * cfg.train.epochs / state.train_seconds,
        resumed=state.resumed,
        device=device_name(device),
        threads=torch.get_num_threads(),
        precision=mode.precision,
        layout=mode.layout,
        graph=trainer.graphed_step is not None,
        cohort=dataset.summary,
        always_negative=always_negative(target, labels),
        head=head.result(scores, slice_seconds / 60) if head else None,
    )


def _tell_why(mode: ComputeMode) -> None:
    for what, rate in mode.timed.items():
        log.info("timed: %s, %.1f images/s", what, rate)
    if mode.reason:
        log.info("no graph: %s", mode.reason)
    if mode.compiling:
        log.info("compile: %s", mode.compiling)


def score(
    run: RunPaths,
    trainer: Trainer,
    dataset: Dataset,
    best: BestEpoch,
    head: TrainedHead | None,
    on_step: StepCallback,
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """Looks at the test set, once, when nothing is left to choose by it; saves all predictions, and
    with a head the weights of both.

    Returns:
        The targets of the rows that tables come from, test or else validation, float32 [N, L]; and
        the metrics there of `logits`, and with a head of `slice_logits` and `smoothed_logits`.
    """
    predicted = {"val": {"logits": best.logits}}
    if dataset.test is not None or head:
        # The model is at its last epoch; what follows is of the weights of its best.
        load_weights(trainer.model, run.best)
    if dataset.test is not None:
        logits = trainer.evaluate(dataset.test, best.epoch, on_step, "testing")
        predicted["test"] = {"logits": logits}
    if head:
        predicted = {
            name: head.predict(getattr(dataset, name), of_split["logits"])
            for name, of_split in predicted.items()
        }
        trainer.model.study = head.model
        save_model(run, trainer.model, dataset, predicted["val"]["logits"], trainer.cfg)
    if len(predicted) > 1 or head:  # else they are saved already
        save_predictions(run, dataset, predicted)
    name, of_split = list(predicted.items())[-1]
    target: np.ndarray = getattr(dataset, name).target
    if name == "val" and not head:
        return target, {"logits": best.scores}
    metrics = {k: multilabel_metrics(v, target, dataset.labels) for k, v in of_split.items()}
    return target, metrics


def select_and_record_mode(cfg: Config, run: RunPaths, images: int = 0) -> ComputeMode:
    """The mode that this run began in or its sweep chose, else one timed for so many images to
    train on.

    It is written down, so that the run is resumed and repeated in the same.
    """
    origin = run.read_origin()
    mode = select_mode(cfg, origin.mode, images)
    run.write_origin(replace(origin, mode=mode))
    return mode


def train_epochs(
    run: RunPaths,
    journal: Journal,
    trainer: Trainer,
    dataset: Dataset,
    state: TrainingState,
    writer: CheckpointWriter,
    on_step: StepCallback,
) -> BestEpoch:
    """Trains the epochs that are left, validates and logs each, and returns the best one.

    Saves weights and predictions of the best, and checkpoints from which the training goes on as if
    nothing had happened.
    """
    cfg = trainer.cfg
    try:
        while state.epoch <= cfg.train.epochs:
            epoch = state.epoch
            train_loss = trainer.train_one_epoch(state, on_step, writer.save_if_due)
            logits = trainer.evaluate(dataset.val, epoch, on_step)
            scores = multilabel_metrics(logits, dataset.val.target, dataset.labels)
            rows_per_s = len(dataset.train.row) / state.epoch_seconds
            speed = {"train/lr": state.lr, "train/images_per_s": rows_per_s}
            validation = {f"val/{k}": v for k, v in scores.items()}
            # In this order, the journal, the best weights, the checkpoint: whatever a kill leaves,
            # the checkpoint is the oldest of the three, and a resumed training takes the others
            # back to it.
            journal.log({"train/loss": train_loss, **speed, **validation}, epoch)
            log.info(
                "epoch %d of %d: loss %.4f, validation loss %.4f, accuracy %.4f, AUC %.4f",
                epoch,
                cfg.train.epochs,
                train_loss,
                *(scores[k] for k in ("log_loss", "accuracy", "auc")),
            )
            state.auc_top = float(np.fmax(state.auc_top, scores["auc"]))  # fmax passes over NaN
            best = state.best
            # The first epoch's in any case, so that a finished run has weights even where no epoch
            # has a score, as on validation rows of one class.
            if best is None or is_better(scores, best.scores, cfg.train.monitor):
                state.best = BestEpoch(epoch, scores, logits)
                save_best(run, trainer.model, dataset, logits, cfg)
            state.next_epoch()
            writer.save()
    except Terminated:  # raised between two steps, where the state is whole
        writer.save()
        raise
    assert state.best is not None
    return state.best

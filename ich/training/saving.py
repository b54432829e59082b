"""What a training saves: best weights, predictions, and checkpoints from which it goes on."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ich.base.config import Config, ContextName, image_size, windows_shown
from ich.base.files import replacing, write_bytes
from ich.base.metadata import Metadata
from ich.base.results import RunPaths
from ich.data.dataset import Dataset, Split
from ich.scoring.metrics import best_thresholds
from ich.tracking.journal import Journal
from ich.training.checkpoint import Checkpoint, CheckpointError, Generations
from ich.training.model import (
    Classifier,
    input_spec,
    save_weights,
)
from ich.training.trainer import BestEpoch, Trainer, TrainingState

log = logging.getLogger("ich.train")
# What of a state is no tensor; the others stand in a checkpoint beside its facts, which are JSON.
_PROGRESS = [f.name for f in fields(TrainingState) if f.name not in ("losses", "best")]


class CheckpointWriter:
    """Writes the checkpoints of a training, every few minutes and whenever it is told to."""

    def __init__(
        self,
        run: RunPaths,
        trainer: Trainer,
        dataset: Dataset,
        state: TrainingState,
        generations: Generations,
    ) -> None:
        self._run, self._trainer, self._dataset, self._state = run, trainer, dataset, state
        self._generations = generations
        self._begin = self._saved = time.monotonic()
        self._earlier_seconds = state.wall_seconds

    def save_if_due(self) -> None:
        """Saves when `train.checkpoint_minutes` have passed since the last time."""
        if time.monotonic() - self._saved >= self._trainer.cfg.train.checkpoint_minutes * 60:
            self.save()

    def save(self) -> None:
        """Writes the whole state; a full disk costs this checkpoint and not the training."""
        state = self._state
        state.wall_seconds = self._earlier_seconds + time.monotonic() - self._begin
        tensors = {f"state/{k}": v for k, v in self._trainer.tensors().items()}
        # Where the training goes on in this epoch, its mean loss is still over all of its steps.
        if state.step:
            tensors["losses"] = state.losses[: state.step]
        # The best weights too: those on disk may be of an epoch that this state has not reached.
        if state.best is not None:
            weights = np.frombuffer(self._run.best.read_bytes(), np.uint8)
            tensors["best/weights"] = torch.from_numpy(weights.copy())  # which may be written to
            tensors["best/logits"] = torch.from_numpy(state.best.logits)
        facts = {
            # Which of two generations is newer; `resumed`, since a step may be taken twice.
            "order": [state.epoch, state.step, state.resumed],
            "cohort": self._dataset.summary.cohort,
            "progress": {name: getattr(state, name) for name in _PROGRESS},
            "best": state.best and {"epoch": state.best.epoch, "scores": state.best.scores},
            "schedule": self._trainer.schedule(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        try:
            self._generations.write(Checkpoint(tensors, facts))
        except OSError as error:
            log.warning("a checkpoint could not be written (%s); the training goes on", error)
        self._saved = time.monotonic()


def resume_training(
    run: RunPaths, trainer: Trainer, dataset: Dataset, journal: Journal
) -> tuple[TrainingState, Generations]:
    """Sets the trainer to the newest good checkpoint of the run, if there is one, and the run's
    files to what they were then; returns its state, and the checkpoints, of which this one is the
    newest."""
    generations = Generations(run.root)
    checkpoint = generations.read(lambda found: _require_own(found, trainer, dataset))
    if checkpoint is None:
        if run.has_checkpoint():
            log.warning("no checkpoint can be used: the training starts anew")
        # Nothing of an attempt that is not continued may pass for this one's.
        generations.drop()
        shutil.rmtree(run.study, ignore_errors=True)
        journal.rewind(0)
        return TrainingState(), generations
    facts, tensors = checkpoint.facts, checkpoint.tensors
    state = TrainingState(**facts["progress"])
    state.resumed += 1
    trainer.restore(checkpoint.group("state"), facts["schedule"])
    if "losses" in tensors:
        state.losses = tensors["losses"]
    if facts["best"]:
        state.best = BestEpoch(**facts["best"], logits=tensors["best/logits"].numpy())
        # The best weights of that moment: those of a later epoch would stand beside its scores.
        write_bytes(run.best, tensors["best/weights"].numpy().tobytes())
        save_predictions(run, dataset, {"val": {"logits": state.best.logits}})
    # With all epochs done, what follows are those of a head, which rewinds them itself.
    if state.epoch <= trainer.cfg.train.epochs or trainer.cfg.context.name is not ContextName.study:
        journal.rewind(state.epoch - 1)
    # Sums in another order, or of other kernels: the training goes on, but not to the same bits.
    now = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for what, value in now.items():
        if (before := facts.get(what)) != value:
            log.warning("%s: %s before, %s now; the last digits may differ", what, before, value)
    log.info("goes on after step %d of epoch %d", state.step, state.epoch)
    return state, generations


def _require_own(checkpoint: Checkpoint, trainer: Trainer, dataset: Dataset) -> None:
    """Refuses what is not of this training, before anything is set to it.

    Raises:
        CheckpointError: it is of other data, or of another version of ich, timm or torch.
    """
    facts, tensors = checkpoint.facts, checkpoint.tensors
    # Orders and augmentations are by position: with other rows, the epoch would go on with other
    # slices than it began with.
    if facts.get("cohort") != dataset.summary.cohort:
        raise CheckpointError("it is of another cohort")
    other = "it is of another version of ich, or of what it stands on"
    progress, best, schedule = (facts.get(k) for k in ("progress", "best", "schedule"))
    if not isinstance(progress, dict) or {*progress} != {*_PROGRESS} or "best" not in facts:
        raise CheckpointError(f"{other} (its facts are others)")
    needed = {"losses"} if progress["step"] else set()
    if best is not None:
        needed |= {"best/weights", "best/logits"}
        if not isinstance(best, dict) or {*best} != {"epoch", "scores"}:
            raise CheckpointError(f"{other} (its facts are others)")
    if missing := needed - tensors.keys():
        raise CheckpointError(f"{other} (it lacks {', '.join(sorted(missing))})")
    try:
        trainer.require_own(checkpoint.group("state"), schedule)
    except ValueError as error:
        raise CheckpointError(f"{other} ({error})") from None


def save_best(
    run: RunPaths, model: Classifier, dataset: Dataset, logits: np.ndarray, cfg: Config
) -> None:
    """Replaces `best.safetensors` and `predictions.npz` by this epoch's; logits float32 [N, L]."""
    save_model(run, model, dataset, logits, cfg)
    save_predictions(run, dataset, {"val": {"logits": logits}})


def save_model(
    run: RunPaths, model: Classifier, dataset: Dataset, logits: np.ndarray, cfg: Config
) -> None:
    """Replaces `best.safetensors` by a model, and what it says of itself by how it did on
    validation; logits float32 [N, L]."""
    spec, target = input_spec(cfg.model), dataset.val.target
    metadata = Metadata(
        model=cfg.model.name,
        timm=cfg.model.timm,
        labels=dataset.labels,
        windows=tuple(windows_shown(cfg)),
        cache_size=cfg.data.cache_size,
        image_size=image_size(cfg),
        mean=spec.mean,
        std=spec.std,
        # With the weights, so that whoever predicts needs no other file. Chosen on validation, as
        # the epoch was.
        thresholds=best_thresholds(logits, target, dataset.labels),
        **_context(model, cfg),
    )
    save_weights(model, run.best, metadata)


def _context(model: Classifier, cfg: Config) -> dict[str, str]:
    if model.study is not None:
        return {"context": "study", "head": "features" if model.study.features else "logits"}
    # Without its head, the network of context=study is one of slices.
    name = ContextName.slice if cfg.context.name is ContextName.study else cfg.context.name
    return {"context": name.value}


def save_predictions(
    run: RunPaths,
    dataset: Dataset,
    predicted: dict[str, dict[str, np.ndarray]],
) -> None:
    """Writes `predictions.npz`: per split `<split>_image_id`, `_patient`, `_study`, `_target`, and
    what was predicted, `<split>_logits` and, with `context=study`, `_slice_logits` and
    `_smoothed_logits`.

    Patients and studies are numbers that mean nothing outside the file; -1 is unknown.
    """
    arrays: dict[str, Any] = {"labels": np.array(dataset.labels)}
    for name, of_split in predicted.items():
        split: Split = getattr(dataset, name)
        arrays |= {
            f"{name}_image_id": split.image_id,
            f"{name}_patient": split.patient,
            f"{name}_study": split.study,
            f"{name}_target": split.target,
            **{f"{name}_{kind}": values for kind, values in of_split.items()},
        }
    with replacing(run.predictions) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # to a file, since it would append a suffix to a name

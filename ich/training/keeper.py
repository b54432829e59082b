"""A training's files: best weights, predictions, and checkpoints from which it goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ich.base.config import (
    Config,
    image_size,
)
from ich.base.metadata import Metadata
from ich.base.results import RunPaths
from ich.data.dataset import Dataset, Split
from ich.scoring.metrics import best_thresholds
from ich.tracking.journal import Journal
from ich.training.checkpoint import Checkpoint, drop_checkpoints, read_checkpoint, write_checkpoint
from ich.training.model import (
    Classifier,
    input_spec,
    save_weights,
)
from ich.training.trainer import Best, Progress, Trainer

log = logging.getLogger("ich.train")


class Keeper:
    """Writes a training's checkpoints, and takes it up again from one."""

    def __init__(
        self, cfg: Config, run: RunPaths, trainer: Trainer, dataset: Dataset, progress: Progress
    ) -> None:
        self._cfg, self._run, self._trainer = cfg, run, trainer
        self._dataset, self._progress = dataset, progress
        self._begin = self._saved = time.monotonic()
        self._earlier = progress.wall_seconds

    def save_if_due(self) -> None:
        """Saves when `train.checkpoint_minutes` have passed since the last time."""
        if time.monotonic() - self._saved >= self._cfg.train.checkpoint_minutes * 60:
            self.save()

    def save(self) -> None:
        """Writes the whole state; a full disk costs this checkpoint and not the training."""
        p = self._progress
        p.wall_seconds = self._earlier + time.monotonic() - self._begin
        tensors = {f"state/{k}": v for k, v in self._trainer.tensors().items()}
        if p.step:
            tensors["losses"] = p.losses[: p.step]
        # The best weights too: those on disk may be of an epoch that this state has not reached.
        if p.best is not None:
            weights = np.frombuffer(self._run.best.read_bytes(), np.uint8)
            tensors["best/weights"] = torch.from_numpy(weights.copy())
            tensors["best/logits"] = torch.from_numpy(p.best.logits)
        plain = {f.name: getattr(p, f.name) for f in fields(p) if f.name not in ("losses", "best")}
        facts = {
            "order": [p.epoch, p.step, p.resumed],
            "cohort": self._dataset.summary["cohort"],
            "progress": plain,
            "best": p.best and {"epoch": p.best.epoch, "scores": p.best.scores},
            "schedule": self._trainer.schedule(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        try:
            write_checkpoint(self._run.root, Checkpoint(tensors, facts))
        except OSError as error:
            log.warning("a checkpoint could not be written (%s); the training goes on", error)
        self._saved = time.monotonic()

    @staticmethod
    def resume(
        cfg: Config, run: RunPaths, trainer: Trainer, dataset: Dataset, journal: Journal
    ) -> Progress:
        """Sets the trainer to the newest good checkpoint of the run, if there is one, and the
        run's files to what they were then."""
        found = read_checkpoint(run.root)
        if found is not None and found.facts["cohort"] != dataset.summary["cohort"]:
            log.warning("the checkpoint is of another cohort: the training starts anew")
            found = None
        if found is None:
            drop_checkpoints(run.root)
            journal.rewind(0)
            return Progress()
        facts = found.facts
        progress = Progress(**facts["progress"])
        progress.resumed += 1
        trainer.restore(found.group("state"), facts["schedule"])
        if "losses" in found.tensors:
            progress.losses = found.tensors["losses"]
        if facts["best"]:
            progress.best = Best(**facts["best"], logits=found.tensors["best/logits"].numpy())
            part = run.best.with_suffix(".part")
            part.write_bytes(found.tensors["best/weights"].numpy().tobytes())
            part.replace(run.best)
            keep_predictions(run, dataset, {"val": progress.best.logits})
        journal.rewind(progress.epoch - 1)
        now = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        for what, value in now.items():
            if facts[what] != value:
                log.warning(
                    "%s: %s before, %s now; the last digits may differ", what, facts[what], value
                )
        log.info("goes on after step %d of epoch %d", progress.step, progress.epoch)
        return progress


def keep_best(
    run: RunPaths, model: Classifier, dataset: Dataset, logits: np.ndarray, cfg: Config
) -> None:
    """Replaces `best.safetensors` and `predictions.npz` by this epoch's."""
    spec, target = input_spec(cfg.model), dataset.val.target
    metadata = Metadata(
        model=cfg.model.name,
        timm=cfg.model.timm,
        labels=dataset.labels,
        windows=tuple(cfg.windows.channels),
        cache_size=cfg.data.cache_size,
        image_size=image_size(cfg),
        mean=spec.mean,
        std=spec.std,
        thresholds=best_thresholds(logits, target, dataset.labels),
    )
    save_weights(model, run.best, metadata)
    keep_predictions(run, dataset, {"val": logits})


def keep_predictions(run: RunPaths, dataset: Dataset, logits: dict[str, np.ndarray]) -> None:
    """Writes `predictions.npz`: per split `<split>_image_id`, `_patient`, `_study`, `_target`,
    `_logits`.

    Patients and studies are numbers that mean nothing outside the file; -1 is unknown.
    """
    arrays: dict[str, Any] = {"labels": np.array(dataset.labels)}
    for name, values in logits.items():
        split: Split = getattr(dataset, name)
        arrays |= {
            f"{name}_image_id": split.image_id,
            f"{name}_patient": split.patient,
            f"{name}_study": split.study,
            f"{name}_target": split.target,
            f"{name}_logits": values,
        }
    part = run.predictions.with_name("predictions.part.npz")
    np.savez_compressed(part, **arrays)
    part.rename(run.predictions)

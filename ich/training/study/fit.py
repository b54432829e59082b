"""The second training of `context=study`: the head, on whole studies, after the slice network.

`train_head` goes from the kept weights of the slice network to the head's best epoch. Checkpoints
and features lie in a folder of their own within the run's, until the run is finished.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ich.base.config import Config, UserError
from ich.base.records import HeadResult, Scores
from ich.base.results import RunPaths
from ich.data.dataset import Dataset, Split
from ich.data.order import Sequences
from ich.scoring.metrics import multilabel_metrics
from ich.tracking.journal import Journal
from ich.training.checkpoint import Checkpoint, CheckpointError, Generations
from ich.training.losses import build_loss
from ich.training.study.features import SliceFeatures, read_features
from ich.training.study.head import StudyHead
from ich.training.trainer import BestEpoch, StepCallback, Trainer, is_better
from ich.training.transforms import stream_seed

log = logging.getLogger("ich.train")
_WARMUP = 0.1  # share of the head's steps in which its learning rate rises
_WEIGHT_DECAY = 0.01
_LONGEST_GRADIENT = 1.0


class Studies(NamedTuple):
    """A split as sequences of slices.

    numbers: int64 [S], of its sequences. copies: int64 [S], how often each is trained on: as often
    as oversampling repeats one slice of its study, whichever series that lies in. at: int64 [N],
    where each row of the split stands in the order of all sequences.
    """

    numbers: np.ndarray
    copies: np.ndarray
    at: np.ndarray

    @staticmethod
    def of(split: Split, sequences: Sequences) -> Studies:
        """
        Raises:
            UserError: a slice of the split is in no sequence, or only part of a sequence in the
                split.
        """
        order = np.argsort(sequences.rows)
        at = order[
            np.searchsorted(sequences.rows, split.row, sorter=order).clip(max=len(order) - 1)
        ]
        times = np.bincount(at, minlength=len(order))
        copies = np.maximum.reduceat(times, sequences.start[:-1])
        numbers = np.flatnonzero(copies)
        # A series whose study nothing names is a study by itself.
        study = np.full(len(order), -1)
        study[at] = split.study
        study = study[sequences.start[numbers]]
        own = np.where(study < 0, study.max() + 1 + np.arange(len(study)), study)
        of_study = np.zeros(own.max() + 1, np.int64)
        np.maximum.at(of_study, own, copies[numbers])
        lengths = np.diff(sequences.start)[numbers]
        whole = int((times > 0).sum()) == int(lengths.sum())
        if not (whole and (sequences.rows[at] == split.row).all()):
            raise UserError(
                "context=study needs whole studies, but one of this cohort is torn apart. Prepare "
                "the data again with ich prepare and the same settings."
            )
        return Studies(numbers, of_study[own], at)


class _Batch(NamedTuple):
    """Sequences of a batch, padded to the longest: see `StudyHead.forward`. target: [B, T, L]."""

    features: torch.Tensor
    logits: torch.Tensor
    place: torch.Tensor
    is_slice: torch.Tensor
    target: torch.Tensor


@dataclass
class _State:
    """How far the head's training is: `epoch` epochs are done. best: the epoch whose weights are
    kept, of the head that takes `inputs`. seconds: of training, and feature_seconds, of making what
    it is trained on, in all processes so far."""

    best: BestEpoch
    inputs: str
    weights: dict[str, torch.Tensor]
    epoch: int = 0
    seconds: float = 0.0
    feature_seconds: float = 0.0


@dataclass(frozen=True)
class TrainedHead:
    """A head at its best epoch. inputs: what it takes, `logits`, or `features` too. best: that
    epoch, 0 for the untrained head, with its metrics and logits on validation. seconds,
    feature_seconds: of its training and of making its features."""

    trainer: HeadTrainer
    inputs: str
    best: BestEpoch
    seconds: float
    feature_seconds: float

    @property
    def model(self) -> StudyHead:
        return self.trainer.heads[self.inputs]

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def all_seconds(self) -> float:
        return self.seconds + self.feature_seconds

    def predict(self, split: Split, slice_logits: np.ndarray) -> dict[str, np.ndarray]:
        """Logits of a split's rows, float32 [N, L] each: the head's own, `logits`, those of the
        slice network, `slice_logits`, and these averaged over a slice and its two neighbours,
        `smoothed_logits`, which is what a head has to beat."""
        trainer = self.trainer
        by_row = np.zeros((int(split.row.max()) + 1, slice_logits.shape[1]), np.float32)
        by_row[split.row] = slice_logits
        return {
            "logits": trainer.evaluate(Studies.of(split, trainer.sequences), self.inputs),
            "slice_logits": slice_logits,
            "smoothed_logits": by_row[trainer.sequences.neighbours(split.row)].mean(1),
        }

    def result(self, scores: Mapping[str, Scores], slice_minutes: float) -> HeadResult:
        """What is said of it; scores: of what `predict` returns, on the rows of the tables."""
        return HeadResult(
            slice_scores=scores["slice_logits"],
            smoothed_scores=scores["smoothed_logits"],
            inputs=self.inputs,
            epoch=self.best.epoch,
            epochs=self.trainer.epochs,
            params=self.params,
            studies=len(self.trainer.train.numbers),
            slice_minutes=slice_minutes,
            feature_minutes=self.feature_seconds / 60,
            minutes=self.seconds / 60,
        )


class HeadTrainer:
    """Two heads side by side, one over logits alone and one over features too, their optimizer, and
    the studies that they are trained on, on one device.

    Which of them is better depends on how much of the training slices the slice network knows by
    heart, and is left to validation, as the epoch is.

    Args:
        cfg: the job.
        dataset: its cohort, with the order of its slices.
        features: of the cohort's slices.
        device: where the head is trained.
    """

    def __init__(
        self, cfg: Config, dataset: Dataset, features: SliceFeatures, device: torch.device
    ):
        own = cfg.context
        # Every one is there with context=study (`ich.base.validation`).
        assert dataset.sequences is not None
        assert own.epochs is not None
        assert own.lr is not None
        assert own.batch_size is not None
        self.epochs, self.lr, self.batch_size = own.epochs, own.lr, own.batch_size
        self.cfg, self.device = cfg, device
        self.features, self.sequences = features, dataset.sequences
        torch.manual_seed(stream_seed(cfg.seed, 0, "head"))
        width, labels = features.sizes
        self.heads = {"logits": StudyHead(0, labels), "features": StudyHead(width, labels)}
        self.modules = torch.nn.ModuleDict(self.heads).to(device)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=own.lr, weight_decay=_WEIGHT_DECAY, fused=True
        )
        self.train, self.val = (Studies.of(s, self.sequences) for s in (dataset.train, dataset.val))
        # By place in the order of all sequences, in which a slice stands once.
        self.target = np.zeros((len(self.sequences.rows), len(dataset.labels)), np.float32)
        self.target[self.train.at] = dataset.train.target
        lengths = np.diff(self.sequences.start)[self.train.numbers]
        # A slice that is alone has no context: it keeps the slice network's logits.
        copies = np.where(lengths > 1, self.train.copies, 0)
        self.trained = np.repeat(self.train.numbers, copies)
        rate = torch.from_numpy(dataset.train.target.mean(0)).to(device)
        self.loss = build_loss(cfg.loss, rate)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.trained) / self.batch_size)

    def train_one_epoch(self, epoch: int, on_step: StepCallback) -> dict[str, float]:
        """One pass over the training studies; returns the mean loss of a batch of each head.

        Args:
            epoch: from 1.
            on_step: called after every step.

        Raises:
            UserError: the loss is not finite.
        """
        self.modules.train()
        total, steps = self.epochs * self.steps, self.steps
        generator = torch.Generator().manual_seed(stream_seed(self.cfg.seed, epoch, "studies"))
        order = torch.randperm(len(self.trained), generator=generator).numpy()
        losses = torch.zeros(steps, len(self.heads), device=self.device)
        for step in range(steps):
            number = (epoch - 1) * steps + step
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(number, total)
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            losses[step] = self._step(self._batch(self.trained[chosen]))
            on_step("head", self.cfg.train.epochs + 1, number + 1, total)
        if not torch.isfinite(losses).all():
            raise UserError(
                f"the head's loss is not finite in its epoch {epoch}. Lower context.lr; the slice "
                f"network's weights are kept."
            )
        return dict(zip(self.heads, losses.mean(0).tolist(), strict=True))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: up from 0 in a straight line, then down along a cosine."""
        warmup = _WARMUP * steps
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1.0, steps - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))

    def _step(self, batch: _Batch) -> torch.Tensor:
        target = batch.target[batch.is_slice]
        losses = torch.stack(
            [self.loss(head(*batch[:4])[batch.is_slice], target) for head in self.heads.values()]
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # they have no weight in common
        for head in self.heads.values():
            torch.nn.utils.clip_grad_norm_(head.parameters(), _LONGEST_GRADIENT)
        self.optimizer.step()
        return losses.detach()

    def _batch(self, numbers: np.ndarray) -> _Batch:
        spans = [(int(self.sequences.start[n]), int(self.sequences.start[n + 1])) for n in numbers]
        shape = len(spans), max(stop - start for start, stop in spans)
        width, labels = self.features.sizes
        batch = _Batch(
            features=torch.zeros(*shape, width),
            logits=torch.zeros(*shape, labels),
            place=torch.zeros(shape, dtype=torch.int64),
            is_slice=torch.zeros(shape, dtype=torch.bool),
            target=torch.zeros(*shape, labels),
        )
        for row, (start, stop) in enumerate(spans):
            values, slices = self.features.values[start:stop], slice(0, stop - start)
            batch.features[row, slices] = torch.from_numpy(values["features"].astype(np.float32))
            batch.logits[row, slices] = torch.from_numpy(values["logits"].copy())
            batch.place[row, slices] = torch.from_numpy(self.sequences.place[start:stop])
            batch.target[row, slices] = torch.from_numpy(self.target[start:stop])
            batch.is_slice[row, slices] = True
        return _Batch(*(part.to(self.device) for part in batch))

    @torch.inference_mode()
    def evaluate(self, studies: Studies, inputs: str) -> np.ndarray:
        """Logits of a split's rows by one of the heads, float32 [N, L].

        Raises:
            UserError: one is not finite.
        """
        head = self.heads[inputs].eval()
        logits = self.slice_logits()
        lengths = np.diff(self.sequences.start)[studies.numbers]
        # The longest together: little is padded then.
        numbers = studies.numbers[np.argsort(lengths, kind="stable")][(lengths == 1).sum() :]
        for first in range(0, len(numbers), self.batch_size):
            chosen = numbers[first : first + self.batch_size]
            batch = self._batch(chosen)
            predicted = head(*batch[:4]).cpu().numpy()
            for number, values in zip(chosen, predicted, strict=True):
                start, stop = self.sequences.start[number : number + 2]
                logits[start:stop] = values[: stop - start]
        if not np.isfinite(logits).all():
            raise UserError(
                "the head's logits are not finite. Lower context.lr; the slice network's weights "
                "are kept."
            )
        return np.asarray(logits[studies.at])

    def slice_logits(self) -> np.ndarray:
        """Of the slice network, float32 [M, L], in the order of all sequences."""
        return np.array(self.features.values["logits"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What an epoch changes."""
        state = {f"heads/{k}": v for k, v in self.modules.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}/{k}": v for k, v in values.items()}
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Sets everything to what `tensors` returned."""
        self.modules.load_state_dict(checkpoint.group("heads"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in checkpoint.group("optimizer").items():
            number, _, key = name.partition("/")
            moments.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(checkpoint.tensors["random/cpu"])
        if self.device.type == "cuda" and "random/cuda" in checkpoint.tensors:
            torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"], self.device)


def train_head(
    run: RunPaths, journal: Journal, slices: Trainer, dataset: Dataset, on_step: StepCallback
) -> TrainedHead:
    """Trains the head on the features of the run's kept weights, or goes on with it.

    Args:
        run: its folder, with the slice network's best weights.
        journal: gets a line for each epoch of the head, numbered on from the slice network's.
        slices: the trainer of the slice network.
        dataset: the cohort.
        on_step: called after every step.

    Raises:
        UserError: a loss or a logit is not finite.
    """
    cfg, begin = slices.cfg, time.perf_counter()
    assert dataset.sequences is not None
    features = read_features(
        run, slices.slices, dataset.sequences, slices.device, on_step, cfg.train.epochs
    )
    feature_seconds = time.perf_counter() - begin
    trainer = HeadTrainer(cfg, dataset, features, slices.device)
    log.info(
        "features of %d slices in %.0f s; the head is trained on %d studies",
        len(features.values),
        feature_seconds,
        len(trainer.train.numbers),
    )
    generations = Generations(run.study)
    state = _resume(run, trainer, dataset, generations)
    state.feature_seconds += feature_seconds
    journal.rewind(cfg.train.epochs + state.epoch)
    begin = time.perf_counter() - state.seconds
    while state.epoch < trainer.epochs:
        epoch = state.epoch + 1
        metrics: dict[str, float] = {}
        for inputs, loss in trainer.train_one_epoch(epoch, on_step).items():
            logits, scores = _validated(trainer, dataset, inputs)
            metrics[f"head/{inputs}/loss"] = loss
            metrics |= {f"head/{inputs}/val/{k}": v for k, v in scores.items()}
            shown = [scores[k] for k in ("log_loss", "accuracy", "auc")]
            log.info(
                "head over %s, epoch %d of %d: loss %.4f, validation loss %.4f, accuracy %.4f, "
                "AUC %.4f",
                *(inputs, epoch, trainer.epochs, loss, *shown),
            )
            if is_better(scores, state.best.scores, cfg.train.monitor):
                state.best, state.inputs = BestEpoch(epoch, scores, logits), inputs
                state.weights = _weights(trainer.heads[inputs])
        metrics["head/lr"] = float(trainer.optimizer.param_groups[0]["lr"])
        # As for the slice network: the journal first, so that a checkpoint is never newer.
        journal.log(metrics, cfg.train.epochs + epoch)
        state.epoch, state.seconds = epoch, time.perf_counter() - begin
        _save(trainer, state, dataset, generations)
    if state.best.epoch == 0:
        log.warning("no epoch of the head is better on validation than smoothing, which is kept")
    trainer.heads[state.inputs].load_state_dict(state.weights)
    return TrainedHead(trainer, state.inputs, state.best, state.seconds, state.feature_seconds)


def _weights(head: StudyHead) -> dict[str, torch.Tensor]:
    """A copy of them."""
    return {k: v.detach().clone() for k, v in head.state_dict().items()}


def _validated(
    trainer: HeadTrainer, dataset: Dataset, inputs: str
) -> tuple[np.ndarray, dict[str, float]]:
    """Logits of the validation rows by one of the heads, float32 [N, L], and their metrics."""
    logits = trainer.evaluate(trainer.val, inputs)
    return logits, multilabel_metrics(logits, dataset.val.target, dataset.labels)


def _resume(
    run: RunPaths, trainer: HeadTrainer, dataset: Dataset, generations: Generations
) -> _State:
    """The state of the newest good checkpoint, to which the trainer is set, or the untrained
    head's."""
    lines = {line.step for line in run.read_metrics()}

    def require_own(found: Checkpoint) -> None:
        facts = found.facts
        if facts.get("features") != trainer.features.key:
            raise CheckpointError("it is of another slice network")
        best = trainer.heads.get(str(facts.get("inputs")))
        for group, own in (("heads", trainer.modules), ("best/head", best)):
            kept = {k: v.shape for k, v in found.group(group).items()}
            if own is None or kept != {k: v.shape for k, v in own.state_dict().items()}:
                raise CheckpointError("it is of another version of ich")
        # Else the journal would have a gap.
        if not {trainer.cfg.train.epochs + n for n in range(1, facts["order"][0] + 1)} <= lines:
            raise CheckpointError("the journal lacks its epochs")

    checkpoint = generations.read(require_own)
    if checkpoint is None:
        generations.drop()
        # Both are the same before they are trained.
        logits, scores = _validated(trainer, dataset, "logits")
        weights = _weights(trainer.heads["logits"])
        return _State(BestEpoch(0, scores, logits), "logits", weights)
    trainer.restore(checkpoint)
    facts = checkpoint.facts
    best = BestEpoch(**facts["best"], logits=checkpoint.tensors["best/logits"].numpy())
    log.info("the head goes on after its epoch %d", facts["order"][0])
    weights = checkpoint.group("best/head")
    return _State(best, facts["inputs"], weights, facts["order"][0], *facts["seconds"])


def _save(trainer: HeadTrainer, state: _State, dataset: Dataset, generations: Generations) -> None:
    """Writes the whole state; a full disk costs this checkpoint and not the training."""
    tensors = trainer.tensors() | {f"best/head/{k}": v for k, v in state.weights.items()}
    tensors["best/logits"] = torch.from_numpy(state.best.logits)
    facts = {
        "order": [state.epoch],
        "features": trainer.features.key,
        "inputs": state.inputs,
        "best": {"epoch": state.best.epoch, "scores": state.best.scores},
        "seconds": [state.seconds, state.feature_seconds],
    }
    try:
        generations.write(Checkpoint(tensors, facts))
    except OSError as error:
        log.warning("a checkpoint could not be written (%s); the training goes on", error)

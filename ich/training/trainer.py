"""One training, in a process of its own: `python -m ich.train RUN_DIR`.

`ich.sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.results`), whatever becomes of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ich.checkpoint import Checkpoint, drop_checkpoints, read_checkpoint, write_checkpoint
from ich.config import (
    OPTIMIZER_SETTINGS,
    Config,
    Device,
    Graph,
    Monitor,
    OptimizerConfig,
    SchedulerConfig,
    SchedulerName,
    UserError,
    image_size,
    load,
)
from ich.data import Dataset, Split, load_dataset
from ich.jobs import hold, watch_supervisor
from ich.loader import Batch, Loader, Slices, place_slices
from ich.losses import Loss, build_loss
from ich.metrics import always_negative, best_thresholds, multilabel_metrics
from ich.model import (
    Classifier,
    Metadata,
    build_model,
    count_parameters,
    input_spec,
    load_weights,
    model_cost,
    save_weights,
)
from ich.pool import keep_memory
from ich.precision import CHANNELS_LAST, Mode, resolve
from ich.results import FAILED, FINISHED, KILLED, RunPaths, write_json
from ich.tracking import Journal, Mirror
from ich.transforms import CTWindows, Resample, stream_seed

log = logging.getLogger("ich.train")
_EARLIER_PROCESS_SECONDS = 30
_EVALUATED_AT_ONCE = 4  # training batches, on a GPU: without gradients a batch takes less memory
_WARM_UP_STEPS = 3  # before a CUDA graph is captured, as torch asks for
_MIRROR_SECONDS, _MIRROR_SECONDS_KILLED = 60, 4  # what an ended training waits for MLflow

Tick = Callable[[str, int, int, int], None]  # phase, epoch, step, steps


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


@dataclass
class Best:
    """The epoch whose weights were kept: validation metrics and logits."""

    epoch: int
    scores: dict[str, float]
    logits: np.ndarray


def _no_losses() -> torch.Tensor:
    return torch.zeros(0)


@dataclass
class Progress:
    """Where a training is: `step` steps of `epoch` are done. All of it is in a checkpoint.

    lr: learning rate at the epoch's beginning. losses: of each of its steps, times the step's rows.
    train_seconds: of training steps alone, `epoch_seconds` of them in this epoch. wall_seconds:
    everything, in the processes before this one. auc_top: highest validation AUC so far.
    """

    epoch: int = 1
    step: int = 0
    lr: float = math.nan
    losses: torch.Tensor = field(default_factory=_no_losses)
    train_seconds: float = 0.0
    epoch_seconds: float = 0.0
    wall_seconds: float = 0.0
    auc_top: float = math.nan
    best: Best | None = None
    resumed: int = 0

    def next_epoch(self) -> None:
        self.train_seconds += self.epoch_seconds
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.losses = _no_losses()


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


@dataclass
class Trainer:
    """Model, data and optimizer of one training, on one device."""

    cfg: Config
    device: torch.device
    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loss: Loss
    slices: Slices
    train_loader: Loader
    resample: Resample
    windows: CTWindows
    mode: Mode
    graphed: bool

    @staticmethod
    def build(cfg: Config, dataset: Dataset, device: torch.device, mode: Mode) -> Trainer:
        """Everything a training needs, seeded by `cfg.seed`."""
        torch.manual_seed(stream_seed(cfg.seed, 0, "init"))
        channels, spec = len(cfg.windows.channels), input_spec(cfg.model)
        model = build_model(cfg.model, channels, len(dataset.labels))
        layout = memory_format(mode)
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        set_up(device, mode)
        needed = 0 if device.type == "cpu" else training_bytes(cfg, len(dataset.labels))
        slices = place_slices(dataset, cfg.train.feed, device, needed)
        train = Loader(slices, dataset.train, cfg.train.batch_size, device)
        graphed = wants_graph(cfg.train.graph, device)
        optimizer = build_optimizer(cfg.optimizer, model, graphed)
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
            slices=slices,
            train_loader=train,
            resample=Resample(size, cfg.augment),
            windows=CTWindows(cfg.windows.channels, device, spec.mean, spec.std, layout),
            mode=mode,
            graphed=graphed,
        )

    def __post_init__(self) -> None:
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        if self.cfg.train.compile:
            self._forward = torch.compile(self.model)
        self.advance: Callable[[Batch], torch.Tensor] = self._step
        if self.graphed:
            self.advance = GraphedStep(self)

    def logits(self, hu: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """int16 HU [B, S, S], and what augmentation draws for it -> float32 logits [B, L]."""
        return self.network(self.windows(self.resample(hu, draws)))

    def network(self, x: torch.Tensor) -> torch.Tensor:
        """The network's input [B, C, H, W] -> float32 logits [B, L], in the mode's precision."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.mode.precision == "bf16"
        ):
            return self._forward(x)

    def train_one_epoch(
        self, progress: Progress, tick: Tick, between: Callable[[], None] = lambda: None
    ) -> float:
        """One pass over the training rows, or what is left of it; returns the mean loss.

        Args:
            progress: where to begin; kept up to date, and true, whenever `tick` or `between` is
                called.
            tick: told of every step.
            between: called after every step.

        Raises:
            UserError: the loss is not finite, naming epoch and step.
        """
        self.model.train()
        rows, steps = len(self.train_loader.split.row), len(self.train_loader)
        epoch, first = progress.epoch, progress.step + 1
        if progress.step == 0:
            progress.lr = float(self.optimizer.param_groups[0]["lr"])
        draws = self.resample.draws(self.cfg.seed, epoch, rows)
        # One tensor: so many small ones, each where it was made, would scatter the free memory.
        losses = torch.zeros(steps, device=self.device)
        losses[: progress.step] = progress.losses[: progress.step]
        progress.losses = losses
        begin = time.perf_counter() - progress.epoch_seconds
        tick("training", epoch, progress.step, steps)
        batches = self.train_loader.epoch(self.cfg.seed, epoch, draws, progress.step)
        for step, batch in enumerate(batches, start=first):
            loss = self.advance(batch) * len(batch.target)
            self.scheduler.step()
            if self.device.type == "cpu":  # elsewhere looking would wait for the device
                _require_finite(loss[None], epoch, step)
            progress.losses[step - 1] = loss
            progress.step, progress.epoch_seconds = step, time.perf_counter() - begin
            tick("training", epoch, step, steps)
            between()
        _require_finite(progress.losses, epoch, 1)
        return float(progress.losses.sum()) / rows

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes and that is a tensor, by name; no copies."""
        state = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}/{k}": v for k, v in values.items() if v is not None}
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def schedule(self) -> dict[str, Any]:
        """What the scheduler and the optimizer's groups hold beside tensors."""
        state = {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"}
        return {"scheduler": state, "lr": [float(g["lr"]) for g in self.optimizer.param_groups]}

    def restore(self, tensors: dict[str, torch.Tensor], schedule: dict[str, Any]) -> None:
        """Sets model, optimizer, scheduler and random state to what the other two returned.

        Raises:
            RuntimeError: they are of another network.
        """
        state: dict[int, dict[str, torch.Tensor]] = {}
        weights = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                weights[rest] = value
            elif kind == "optimizer":
                number, _, key = rest.partition("/")
                like = parameters[int(number)]
                if value.shape == like.shape:  # in the parameter's own memory layout
                    value = torch.empty_like(like, dtype=value.dtype).copy_(value)
                state.setdefault(int(number), {})[key] = value
        self.model.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, schedule["lr"], strict=True):
            now = group["lr"]
            group["lr"] = torch.full_like(now, lr) if isinstance(now, torch.Tensor) else lr
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.scheduler.load_state_dict({**schedule["scheduler"], "lr_lambdas": [None]})
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def _step(self, batch: Batch) -> torch.Tensor:
        loss = self.loss(self.logits(batch.hu, batch.draws), batch.target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def time_step(self) -> float:
        """Seconds of one epoch, which is one step if there are no more rows than in a batch."""
        begin = time.perf_counter()
        self.train_one_epoch(Progress(), lambda *_: None)  # its end waits for the device
        return time.perf_counter() - begin

    @torch.inference_mode()
    def evaluate(
        self, split: Split, epoch: int, tick: Tick, phase: str = "validating"
    ) -> np.ndarray:
        """Logits of a split's rows, float32 [N, L], in the cohort's order.

        Raises:
            UserError: a logit is not finite; it would score like a confident "no bleed".
        """
        self.model.eval()
        at_once = self.cfg.train.batch_size * (
            _EVALUATED_AT_ONCE if self.device.type != "cpu" else 1
        )
        loader = Loader(self.slices, split, at_once, self.device)
        parts, steps = [], len(loader)
        for step, batch in enumerate(loader.in_order(), start=1):
            parts.append(self.logits(batch.hu))
            tick(phase, epoch, step, steps)
        logits = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise UserError(
                f"the logits are not finite while {phase} after epoch {epoch}. Lower optimizer.lr; "
                f"the weights of the best epoch before it are kept."
            )
        return logits


class GraphedStep:
    """A training step as one CUDA graph: launched as a whole, where an eager step launches hundreds
    of kernels one by one, and the GPU waits for the host.

    Batches of another size than the first, as the last of an epoch, are taken eagerly.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._loss = torch.zeros(())

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self._graph is None:
            self._capture(batch)
        assert self._batch is not None
        assert self._graph is not None
        if batch.hu.shape != self._batch.hu.shape:
            return self._trainer._step(batch)
        self._fill(batch)
        self._graph.replay()
        return self._loss.clone()

    def _fill(self, batch: Batch) -> None:
        assert self._batch is not None
        for name in ("hu", "target", "draws"):
            getattr(self._batch, name).copy_(getattr(batch, name), non_blocking=True)

    def _capture(self, batch: Batch) -> None:
        """Records a step. The steps that warm up and the recording leave no trace in the state."""
        assert batch.draws is not None
        self._batch = Batch(batch.hu.clone(), batch.target.clone(), batch.draws.clone())
        trainer, before = self._trainer, self._copy()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                trainer._step(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        trainer.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = trainer._step(self._batch)
        for name, tensor in trainer.tensors().items():
            if not name.startswith("random/"):  # moments that did not exist before begin at 0
                tensor.copy_(before[name]) if name in before else tensor.zero_()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self._trainer.tensors().items()}


def wants_graph(choice: Graph, device: torch.device) -> bool:
    """Whether steps are captured; `on` without a GPU falls back, and the log says so."""
    if choice is not Graph.on:
        return False
    if device.type != "cuda":
        log.warning("train.graph is on, but there is no GPU: steps are taken one by one")
        return False
    return True


def memory_format(mode: Mode) -> torch.memory_format:
    """The layout of a mode as torch names it."""
    return torch.channels_last if mode.layout == CHANNELS_LAST else torch.contiguous_format


def set_up(device: torch.device, mode: Mode) -> None:
    """Makes torch's convolutions on a GPU compute in the mode's precision, by the fastest way."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = mode.precision == "tf32"


def training_bytes(cfg: Config, outputs: int) -> int:
    """About what a training takes of a device's memory: weights, gradients, moments, activations,
    and as much again as a quarter of them for what a step needs on the way."""
    size, channels = image_size(cfg), len(cfg.windows.channels)
    cost = model_cost(cfg.model, channels, size, cfg.train.batch_size, outputs)
    return int(1.25 * (16 * cost.params + cost.activations))


def made_up_dataset(cfg: Config) -> Dataset:
    """One batch of random slices, int16 HU, with random labels, for timing steps."""
    batch, size = cfg.train.batch_size, cfg.data.cache_size
    rng = np.random.default_rng(0)
    labels = tuple(cfg.data.label_columns or "abcdef")
    hu = rng.integers(-1024, 1024, (batch, size, size), dtype=np.int16)
    target = rng.integers(0, 2, (batch, len(labels))).astype(np.float32)
    row = np.arange(batch)
    split = Split(row.astype(str), row, target, row, row)
    return Dataset(hu, labels, split, split, None, {})


def _require_finite(losses: torch.Tensor, epoch: int, first_step: int) -> None:
    bad = ~torch.isfinite(losses)
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


def build_optimizer(
    cfg: OptimizerConfig, model: torch.nn.Module, graphed: bool = False
) -> torch.optim.Optimizer:
    """The torch optimizer of a config, over all parameters.

    Args:
        cfg: its name and settings.
        model: whose parameters it moves.
        graphed: for a captured step, whose every number lies on the device, the learning rate too.
    """
    kind = {
        "torch.optim.Adam": torch.optim.Adam,
        "torch.optim.AdamW": torch.optim.AdamW,
        "torch.optim.SGD": torch.optim.SGD,
    }[cfg._target_]
    given = {k: getattr(cfg, k) for k in OPTIMIZER_SETTINGS[cfg._target_]}
    settings = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None
    }
    if graphed:
        settings["lr"] = torch.tensor(cfg.lr, device=next(model.parameters()).device)
        if "SGD" not in cfg._target_:  # which counts no steps
            settings["capturable"] = True
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
        raise UserError("the device is cuda, but torch finds no GPU. Set it to auto or cpu.")
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


def main(argv: list[str] | None = None) -> int:
    """Trains the run in RUN_DIR and writes its result, whatever happens."""
    parser = argparse.ArgumentParser(prog="python -m ich.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", help="MLflow run of the sweep")
    parser.add_argument("--watched-by", type=int, help="process without which this one ends")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keep_memory()
    run = RunPaths(args.run_dir)
    cfg = load(run.config)
    stop = Stop(ProgressFile(run.progress, cfg.train.epochs))
    for asks_to_end in (signal.SIGTERM, signal.SIGUSR2):  # the second comes from Slurm
        signal.signal(asks_to_end, stop)
    if args.watched_by:
        watch_supervisor(args.watched_by)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(run, _EARLIER_PROCESS_SECONDS))
        except BlockingIOError:
            log.error("another process trains in this folder, and did not end")
            return 1
        return _train(cfg, run, Mirror(cfg, run, args.parent), stop)


def _train(cfg: Config, run: RunPaths, mirror: Mirror, stop: Stop) -> int:
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


if __name__ == "__main__":
    sys.exit(main())

"""Model, data and optimizer of one training: its steps, an epoch, an evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ich.base.config import (
    OPTIMIZER_SETTINGS,
    Config,
    OptimizerConfig,
    SchedulerConfig,
    SchedulerName,
    UserError,
    image_size,
)
from ich.data.dataset import Dataset, Split
from ich.training.devices import memory_format, set_up, training_bytes, wants_graph
from ich.training.loader import Batch, Loader, Slices, place_slices
from ich.training.losses import Loss, build_loss
from ich.training.mode import Mode
from ich.training.model import (
    Classifier,
    build_model,
    input_spec,
)
from ich.training.transforms import CTWindows, Resample, stream_seed

log = logging.getLogger("ich.train")
_EVALUATED_AT_ONCE = 4  # training batches, on a GPU: without gradients a batch takes less memory
_WARM_UP_STEPS = 3  # before a CUDA graph is captured, as torch asks for

Tick = Callable[[str, int, int, int], None]  # phase, epoch, step, steps


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
    optimizer: torch.optim.Optimizer = kind(model.parameters(), fused=True, **settings)
    return optimizer


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

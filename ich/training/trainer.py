"""Model, data and optimizer of one training: its steps, an epoch, an evaluation.

`TrainingState` is how far a training is, `Trainer` what it computes with. Epochs in a row, and
which of them is kept, are `ich.training.fit`'s; files are `ich.training.saving`'s.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ich.base.config import (
    Config,
    CudaGraph,
    Monitor,
    UserError,
    image_size,
    input_channels,
    slices_shown,
    windows_shown,
)
from ich.base.records import ComputeMode
from ich.data.dataset import Dataset, Split
from ich.training.cuda_graph import CaptureError, GraphedStep
from ich.training.devices import (
    configure_cudnn,
    memory_format,
    training_bytes,
)
from ich.training.loader import Batch, Loader, SliceSource, open_slice_source
from ich.training.losses import Loss, build_loss
from ich.training.model import Classifier, build_model, input_spec
from ich.training.optimizer import build_optimizer, build_scheduler
from ich.training.transforms import CTWindows, Resample, stream_seed

log = logging.getLogger("ich.train")
_EVALUATED_AT_ONCE = 4  # training batches, on a GPU: without gradients a batch takes less memory

StepCallback = Callable[[str, int, int, int], None]  # phase, epoch, step, steps


@dataclass
class BestEpoch:
    """The epoch whose weights were kept: validation metrics and logits."""

    epoch: int
    scores: dict[str, float]
    logits: np.ndarray


def is_better(scores: dict[str, float], best: dict[str, float], monitor: Monitor) -> bool:
    """Strictly better, so that the first of equal epochs is kept; anything beats NaN."""
    new, old = scores[monitor.value], best[monitor.value]
    # Every comparison with NaN is false: one undefined epoch would be kept for good.
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return bool(new < old) if monitor is Monitor.log_loss else bool(new > old)


def _no_losses() -> torch.Tensor:
    return torch.zeros(0)


@dataclass
class TrainingState:
    """How far a training is: `step` steps of `epoch` are done. All of it is in a checkpoint.

    lr: learning rate at the epoch's beginning. losses: of each of its steps, times the step's rows.
    train_seconds: of training steps alone, `epoch_seconds` of them in this epoch. wall_seconds:
    everything, in the processes before this one. auc_top: highest validation AUC so far. resumed:
    how often the training was taken up again from a checkpoint.
    """

    epoch: int = 1
    step: int = 0
    lr: float = math.nan
    losses: torch.Tensor = field(default_factory=_no_losses)
    train_seconds: float = 0.0
    epoch_seconds: float = 0.0
    wall_seconds: float = 0.0
    auc_top: float = math.nan
    best: BestEpoch | None = None
    resumed: int = 0

    def next_epoch(self) -> None:
        self.train_seconds += self.epoch_seconds
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.losses = _no_losses()


@dataclass
class Trainer:
    """Model, data and optimizer of one training, on one device.

    forward: the model, or what torch compiled it to, for whole training batches. graphed_step: the
    step as one CUDA graph, or None; not_graphed: why it is not, where that was tried and failed.
    """

    cfg: Config
    device: torch.device
    model: Classifier
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loss: Loss
    slices: SliceSource
    train_loader: Loader
    resample: Resample
    windows: CTWindows
    mode: ComputeMode
    graphed_step: GraphedStep | None
    not_graphed: str = ""

    @staticmethod
    def build(cfg: Config, dataset: Dataset, device: torch.device, mode: ComputeMode) -> Trainer:
        """Everything a training needs, seeded by `cfg.seed`."""
        # The first weights and dropout; orders and augmentations have generators of their own.
        torch.manual_seed(stream_seed(cfg.seed, 0, "init"))
        channels, spec = input_channels(cfg), input_spec(cfg.model)
        model = build_model(cfg.model, channels, len(dataset.labels))
        layout = memory_format(mode)
        model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        configure_cudnn(device, mode)
        needed = 0
        if device.type == "cuda":
            needed = training_bytes(cfg, len(dataset.labels), mode)
        slices = open_slice_source(dataset, cfg.train.feed, device, needed)
        train = Loader(slices, dataset.train, cfg.train.batch_size, device)
        optimizer = build_optimizer(cfg.optimizer, model, mode.graph)
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
            forward=torch.compile(model, dynamic=False) if mode.compiled else model,
            optimizer=optimizer,
            scheduler=build_scheduler(cfg.scheduler, optimizer, len(train) * cfg.train.epochs),
            # Over the rows that the loss is taken of, copies of oversampling among them.
            loss=build_loss(cfg.loss, torch.from_numpy(dataset.train.target.mean(0)).to(device)),
            slices=slices,
            train_loader=train,
            resample=Resample(size, cfg.augment),
            windows=CTWindows(
                windows_shown(cfg), device, spec.mean, spec.std, layout, slices_shown(cfg)
            ),
            mode=mode,
            graphed_step=GraphedStep(optimizer, cfg.train.batch_size) if mode.graph else None,
        )

    def logits(self, hu: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """The HU of a batch, and what augmentation draws for it -> float32 logits [B, L]."""
        return self.network(self.windows(self.resample(hu, draws)))

    def network(self, x: torch.Tensor) -> torch.Tensor:
        """The network's input [B, C, H, W] -> float32 logits [B, L], in the mode's precision."""
        # Compiled for one shape: which code runs would otherwise depend on the shapes seen before,
        # and a resumed training has seen others.
        whole = self.model.training and len(x) == self.cfg.train.batch_size
        # The weights stay float32: autocast converts what a convolution or product takes of them.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.mode.precision == "bf16"
        ):
            return self.forward(x) if whole else self.model(x)

    def train_one_epoch(
        self,
        state: TrainingState,
        on_step: StepCallback,
        after_step: Callable[[], None] = lambda: None,
    ) -> float:
        """One pass over the training rows, or what is left of it; returns the mean loss.

        Args:
            state: where to begin; kept up to date, and true, whenever one of the two is called.
            on_step: called before the first step and after every one.
            after_step: called after that, between two steps, where everything can be saved.

        Raises:
            UserError: the loss is not finite, naming epoch and step.
        """
        self.model.train()
        rows, steps = len(self.train_loader.split.row), len(self.train_loader)
        epoch, first = state.epoch, state.step + 1
        # For an epoch that goes on, the checkpoint has it: the schedule has moved since it began.
        if state.step == 0:
            state.lr = float(self.optimizer.param_groups[0]["lr"])
        # One tensor: a small one for each step, between large freed blocks, cost 0.5 MB a step.
        losses = torch.zeros(steps, device=self.device)
        losses[: state.step] = state.losses[: state.step]
        state.losses = losses
        # An epoch that was taken up in its middle has run before.
        begin = time.perf_counter() - state.epoch_seconds
        on_step("training", epoch, state.step, steps)
        for step, batch in enumerate(self.batches(state), start=first):
            # Times its rows: in the epoch's mean, the tail must not weigh as much as a full batch.
            loss = self.train_step(batch) * len(batch.target)
            # After each step, not each epoch: warm-up and cosine are counted in steps.
            self.scheduler.step()
            if self.device.type == "cpu":  # elsewhere looking would wait for the device
                _require_finite(loss[None], epoch, step)
            state.losses[step - 1] = loss
            state.step, state.epoch_seconds = step, time.perf_counter() - begin
            on_step("training", epoch, step, steps)
            after_step()
        _require_finite(state.losses, epoch, 1)  # on a GPU only here, where the host waits anyway
        # Again, for until here a GPU was only told what to do.
        state.epoch_seconds = time.perf_counter() - begin
        return float(state.losses.sum()) / rows

    def batches(self, state: TrainingState) -> Iterator[Batch]:
        """What is left of an epoch's training batches, with their draws, on the device."""
        seed, rows = self.cfg.seed, len(self.train_loader.split.row)
        draws = self.resample.draws(seed, state.epoch, rows)
        return self.train_loader.epoch(seed, state.epoch, draws, state.step)

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate, in place where a captured step reads it from the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One step of the optimizer, captured or eager; returns the mean loss, float32 []."""
        if self.graphed_step is None:
            return self.eager_step(batch)
        try:
            return self.graphed_step(batch, self.eager_step, self.tensors)
        except CaptureError as error:
            if self.cfg.train.graph is CudaGraph.on:
                raise
            self.graphed_step, self.not_graphed = None, f"capture failed: {error}"
            log.warning("%s; steps are taken one by one", self.not_graphed)
        return self.eager_step(batch)

    def eager_step(self, batch: Batch) -> torch.Tensor:
        """One step of the optimizer, operation by operation; returns the mean loss, float32 []."""
        loss = self.loss(self.logits(batch.hu, batch.draws), batch.target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes and that is a tensor, by name; no copies."""
        state = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            # SGD without momentum keeps a None for each parameter.
            state |= {f"optimizer/{number}/{k}": v for k, v in values.items() if v is not None}
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def schedule(self) -> dict[str, Any]:
        """What the scheduler and the optimizer's groups hold beside tensors."""
        left_out = ("lr_lambdas", "_last_lr")  # a function; rates, which may be tensors
        state = {k: v for k, v in self.scheduler.state_dict().items() if k not in left_out}
        return {"scheduler": state, "lr": [float(g["lr"]) for g in self.optimizer.param_groups]}

    def require_own(self, tensors: dict[str, torch.Tensor], schedule: object) -> None:
        """Refuses what `restore` could not take, or only in part.

        Raises:
            ValueError: they are not what `tensors` and `schedule` return for such a training.
        """
        own = {k: v.shape for k, v in self.tensors().items() if not k.startswith("optimizer/")}
        kept = {k: v.shape for k, v in tensors.items() if not k.startswith("optimizer/")}
        # A training that began on a CPU may go on on a GPU, and the other way round.
        differing = {k for k in own | kept if own.get(k) != kept.get(k)} - {"random/cuda"}
        if differing:
            raise ValueError(f"{min(differing)} is another")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name in tensors.keys() - kept.keys():
            number = name.split("/")[1]
            if not number.isdigit() or int(number) >= len(parameters):
                raise ValueError(f"{name} is of no parameter")
        groups = self.schedule()
        if not isinstance(schedule, dict) or schedule.keys() != groups.keys():
            raise ValueError("its schedule is another")
        if schedule["scheduler"].keys() != groups["scheduler"].keys():
            raise ValueError("its schedule is another")
        if len(schedule["lr"]) != len(groups["lr"]):
            raise ValueError("its optimizer has other groups")

    def restore(self, tensors: dict[str, torch.Tensor], schedule: dict[str, Any]) -> None:
        """Sets model, optimizer, scheduler and random state to what the other two returned.

        Args:
            tensors, schedule: of which `require_own` says nothing.
        """
        state: dict[int, dict[str, torch.Tensor]] = {}
        weights = {}
        # In the optimizer's own numbering, which runs through its groups.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in tensors.items():
            owner, _, rest = name.partition("/")
            if owner == "model":
                weights[rest] = value
            elif owner == "optimizer":
                number, _, key = rest.partition("/")
                like = parameters[int(number)]
                # In the parameter's own memory layout, which a file does not keep.
                if value.shape == like.shape:
                    value = torch.empty_like(like, dtype=value.dtype).copy_(value)
                state.setdefault(int(number), {})[key] = value
        self.model.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, schedule["lr"], strict=True):
            # A captured step reads the rate from a tensor on the device, and has to find one there.
            now = group["lr"]
            group["lr"] = torch.full_like(now, lr) if isinstance(now, torch.Tensor) else lr
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        # `schedule` leaves the function out, which no JSON holds; None keeps the one built here.
        self.scheduler.load_state_dict({**schedule["scheduler"], "lr_lambdas": [None]})
        torch.set_rng_state(tensors["random/cpu"])
        # A training that began on a CPU may go on on a GPU; it has no such state to set.
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def time_epoch(self) -> float:
        """Seconds of an epoch's training."""
        begin = time.perf_counter()
        self.train_one_epoch(TrainingState(), lambda *_: None)  # its end waits for the device
        return time.perf_counter() - begin

    @torch.inference_mode()
    def evaluate(
        self, split: Split, epoch: int, on_step: StepCallback, phase: str = "validating"
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
        # Logits stay on the device until the end: to fetch each batch's would wait for each.
        for step, batch in enumerate(loader.in_order(), start=1):
            parts.append(self.logits(batch.hu))
            on_step(phase, epoch, step, steps)
        logits = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise UserError(
                f"the logits are not finite while {phase} after epoch {epoch}. Lower optimizer.lr; "
                f"the weights of the best epoch before it are kept."
            )
        return logits


def _require_finite(losses: torch.Tensor, epoch: int, first_step: int) -> None:
    bad = ~torch.isfinite(losses)
    if bad.any():
        step = first_step + int(bad.int().argmax())
        raise UserError(
            f"the loss is not finite in epoch {epoch}, step {step}. Lower optimizer.lr; the "
            f"weights of the best epoch before it are kept."
        )

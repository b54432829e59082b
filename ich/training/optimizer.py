"""The torch optimizer and the learning-rate schedule of a config."""

from __future__ import annotations

import math

import torch

from ich.base.config import OPTIMIZER_SETTINGS, OptimizerConfig, SchedulerConfig, SchedulerName


def build_optimizer(
    cfg: OptimizerConfig, model: torch.nn.Module, graphed: bool = False
) -> torch.optim.Optimizer:
    """The torch optimizer of a config, over all parameters.

    Args:
        cfg: its name and settings.
        model: whose parameters it moves.
        graphed: for a captured step, whose every number lies on the device, the learning rate too.
    """
    # A closed list: whatever else a config names is not imported.
    cls = {
        "torch.optim.Adam": torch.optim.Adam,
        "torch.optim.AdamW": torch.optim.AdamW,
        "torch.optim.SGD": torch.optim.SGD,
    }[cfg._target_]
    given = {k: getattr(cfg, k) for k in OPTIMIZER_SETTINGS[cfg._target_]}
    # null leaves torch its own default. Betas are a list in YAML, and a tuple for torch.
    settings = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None
    }
    if graphed and "SGD" not in cfg._target_:  # which counts no steps
        settings["capturable"] = True
    # fused: one pass over a parameter, where the default makes one for each operation of the rule.
    optimizer: torch.optim.Optimizer = cls(model.parameters(), fused=True, **settings)
    for group in optimizer.param_groups if graphed else ():
        # A number would be recorded as it is, and the schedule would move nothing.
        group["lr"] = torch.tensor(cfg.lr, device=next(model.parameters()).device)
    return optimizer


def build_scheduler(
    cfg: SchedulerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A factor on the learning rate as a function of the step; 1 throughout for `none`."""
    warmup = cfg.warmup * steps

    def factor(step: int) -> float:
        if cfg.name is SchedulerName.none:
            return 1.0
        # Neither 0 at the first step, which would be lost, nor 1 before the warm-up ends.
        if step < warmup:
            return (step + 1) / (warmup + 1)
        # From 1 down to 0 along half a cosine; a warm-up of all steps leaves none to divide by.
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))

    # A function of the step's number alone: a resumed training needs to know nothing else.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # Numbers, also where a captured step has the rate in a tensor: no JSON holds these.
    scheduler.base_lrs = [float(rate) for rate in scheduler.base_lrs]
    return scheduler

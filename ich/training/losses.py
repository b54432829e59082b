"""Losses of logits and targets, both float [B, L]; each returns the mean over all B x L."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ich.base.config import LossConfig, LossName

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(cfg: LossConfig, positive_rate: torch.Tensor) -> Loss:
    """The configured loss.

    Args:
        cfg: its name and settings.
        positive_rate: float32 [L] on the training's device, share of training rows positive for
            each label (`weighted_bce`).
    """
    if cfg.name is LossName.weighted_bce:
        # A label without a positive keeps weight 1: there is nothing its weight could multiply.
        weight = torch.where(positive_rate > 0, (1 - positive_rate) / positive_rate, 1.0)
        return lambda logits, target: F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=weight
        )
    if cfg.name is LossName.focal:
        # The defaults are the paper's own.
        gamma = 2.0 if cfg.gamma is None else cfg.gamma
        alpha = 0.25 if cfg.alpha is None else cfg.alpha
        return lambda logits, target: focal_loss(logits, target, gamma, alpha)
    return F.binary_cross_entropy_with_logits


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, gamma: float, alpha: float
) -> torch.Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017, equation 5), averaged over B x L."""
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # The cross-entropy is -log p_t for either target, so that nothing branches, and no probability
    # is rounded to 0 before its logarithm is taken.
    p_t = torch.exp(-bce)
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    return (alpha_t * (1 - p_t) ** gamma * bce).mean()

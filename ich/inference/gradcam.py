"""Grad-CAM: what moved a label's logit up, and where in the slice that was.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) weights the last feature maps by the gradient of
a label's logit and keeps what is positive; Captum computes it. It shows what moved the number, on a
grid as coarse as these maps, and not where the blood is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from ich.inference.ensemble import Ensemble, Network
from ich.training.model import Classifier

_OPACITY = 0.55  # of the map where it is highest


class _Head(nn.Module):
    """What follows a network's last feature maps, these as a layer that Captum can find."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.maps, self.head = nn.Identity(), model.head

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.maps(maps).mean((2, 3)))
        return logits


def grad_cams(network: Network, hu: np.ndarray, labels: Sequence[int], size: int) -> np.ndarray:
    """The Grad-CAM maps of some labels.

    Args:
        network: the network.
        hu: int16 HU as `Network.planes` takes it; of several slices at once there is one map, of
            what all of them moved, to be laid over the middle one.
        labels: indices of K labels.
        size: side of the maps, pixels.

    Returns:
        float32 [K, B, size, size], each 0..1 with its own maximum at 1; all 0 where nothing moved
        the logit up.
    """
    with torch.no_grad():  # gradients are needed from the maps on: one pass serves all labels
        # By torch, also where a converted network predicted: onnxruntime gives no gradients.
        x = network.windows(network.planes(torch.from_numpy(hu)))
        maps = network.model.base.forward_features(x).float()
    head = _Head(network.model)
    cam = LayerGradCam(head, head.maps)
    coarse = [cam.attribute(maps, k, relu_attributions=True).detach() for k in labels]
    cams = torch.stack(
        [LayerAttribution.interpolate(c, (size, size), "bilinear")[:, 0] for c in coarse]
    )
    # Each by itself: where in the slice, not how much, is what a map can tell.
    highest = cams.amax((2, 3), keepdim=True)
    scaled = torch.where(highest > 0, cams / highest.clamp(min=1e-12), 0)
    return scaled.float().cpu().numpy()


def ensemble_cams(
    model: Ensemble, hu: dict[int, np.ndarray], labels: Sequence[int], size: int
) -> np.ndarray:
    """The mean of the members' maps, float32 [K, B, size, size], of what `Ensemble.logits` takes;
    see `grad_cams`."""
    each = [grad_cams(m.network, model.seen_by(m, hu), labels, size) for m in model.members]
    return np.asarray(np.mean(each, axis=0))


def overlay(grey: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """uint8 [S, S] with a map [S, S] of 0..1 over it: uint8 [S, S, 3]."""
    from matplotlib import colormaps

    color = colormaps["autumn"](cam)[..., :3] * 255
    # Where nothing moved the logit the slice stays as it is.
    share = _OPACITY * cam[..., None]
    mixed = grey[..., None] * (1 - share) + color * share
    return np.asarray(mixed.round(), np.uint8)

"""HU slices -> normalized channels: resize, augment, windows, normalize. Batched, on the device.

Geometry comes first, on one HU plane instead of one plane per window; windows follow. Random
numbers are drawn for a whole epoch from (seed, epoch), one row per position in the epoch, so what
happens to a slice depends on (seed, epoch, position) and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ich.config import AugmentConfig, WindowConfig

_DRAWS = 6  # horizontal flip, vertical flip, crop?, crop side, crop x, crop y


class CTWindows:
    """Clips HU to each window and scales it to 0..1 (report, section 3.3).

    A window of center c and width w maps c - w/2 to 0 and c + w/2 to 1, linearly.
    """

    def __init__(self, windows: Sequence[WindowConfig], device: torch.device | str = "cpu"):
        center = torch.tensor([w.center for w in windows], device=device)
        width = torch.tensor([w.width for w in windows], device=device)
        self.lower = (center - width / 2).view(1, -1, 1, 1)
        self.width = width.view(1, -1, 1, 1)

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """float32 HU [B, 1, H, W] -> float32 [B, C, H, W] in 0..1."""
        return ((hu - self.lower) / self.width).clamp_(0, 1)


class Normalize:
    """Subtracts the mean and divides by the standard deviation the pretrained network expects.

    With another number of windows than three, each channel takes the average of the three.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        device: torch.device | str = "cpu",
    ):
        self.mean = _per_channel(mean, channels, device)
        self.std = _per_channel(std, channels, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, C, H, W] in 0..1 -> float32 [B, C, H, W]."""
        return (x - self.mean) / self.std


def _per_channel(
    values: Sequence[float], channels: int, device: torch.device | str
) -> torch.Tensor:
    v = torch.tensor(values, device=device)
    if len(v) != channels:
        v = v.mean().expand(channels)
    return v.reshape(1, -1, 1, 1)


class Augment:
    """Horizontal and vertical flips and square crops, each with its probability (section 3.5)."""

    def __init__(self, cfg: AugmentConfig):
        self.cfg = cfg

    def draws(self, seed: int, epoch: int, rows: int) -> torch.Tensor:
        """Uniform numbers of one epoch, float32 [rows, 6], a function of (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch, "augment"))
        return torch.rand(rows, _DRAWS, generator=generator)

    def __call__(self, hu: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """float32 HU [B, 1, H, W] and its draws [B, 6] -> float32 HU [B, 1, H, W].

        A crop keeps a square of side `crop_min`..1 of the image, at a random place, and enlarges
        it to the full size. Flips and crop are one affine map, sampled once, bilinearly.
        """
        moved = (
            draws[:, :3] < draws.new_tensor([self.cfg.hflip, self.cfg.vflip, self.cfg.crop])
        ).any(1)
        picked = moved.nonzero().squeeze(1)
        if not len(picked):
            return hu
        theta = self._theta(draws[picked]).to(hu)
        part = hu[picked]
        grid = F.affine_grid(theta, list(part.shape), align_corners=False)
        out = hu.clone()
        out[picked] = F.grid_sample(part, grid, padding_mode="border", align_corners=False)
        return out

    def _theta(self, u: torch.Tensor) -> torch.Tensor:
        """Draws [B, 6] -> affine maps [B, 2, 3] from output to input, in -1..1 coordinates."""
        side = torch.where(
            u[:, 2] < self.cfg.crop,
            self.cfg.crop_min + (1 - self.cfg.crop_min) * u[:, 3],
            torch.ones_like(u[:, 3]),
        )
        shift = (1 - side)[:, None] * (2 * u[:, 4:6] - 1)
        sign = 1 - 2 * (u[:, :2] < u.new_tensor([self.cfg.hflip, self.cfg.vflip])).to(u.dtype)
        theta = torch.zeros(len(u), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = sign[:, 0] * side, sign[:, 1] * side
        theta[:, :, 2] = shift
        return theta


def resize(hu: torch.Tensor, size: int) -> torch.Tensor:
    """int16 HU [B, S, S] -> float32 HU [B, 1, size, size], bilinear with antialiasing."""
    x = hu.unsqueeze(1).to(torch.float32)
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def stream_seed(seed: int, epoch: int, stream: str) -> int:
    """A seed for one named stream of random numbers in one epoch; streams do not overlap.

    splitmix64's finalizer (Steele et al. 2014, doi 10.1145/2660193.2660195) spreads the bits.
    """
    x = (
        seed * 0x9E3779B97F4A7C15
        + epoch * 0xBF58476D1CE4E5B9
        + int.from_bytes(stream.encode()[:8], "little")
    ) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFF

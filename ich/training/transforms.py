"""HU slices -> the network's input: resampling, augmentation, windows, normalization.

Geometry comes first, on one HU plane instead of one plane per window; windows follow. Resizing,
flips and crops of a slice are one resampling from its decoded pixels, along one axis and then the
other: each output row is a weighted sum of the few rows under its filter. A batch is a handful of
operations on whatever device it is on, without a branch and without a number that the host would
have to wait for. Random numbers are drawn for a whole epoch from (seed, epoch), one row per
position in the training set, so what happens to a slice depends on (seed, epoch, position) and on
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ich.base.config import AugmentConfig, WindowConfig

_DRAWS = 6  # horizontal flip, vertical flip, crop?, crop side, crop x, crop y


class CTWindows:
    """Clips HU to each window, scales it to 0..1 (report, section 3.3), and normalizes it.

    A window of center c and width w maps c - w/2 to 0 and c + w/2 to 1, linearly. From that the
    mean is subtracted and the standard deviation divided, which a pretrained network expects; with
    another number of channels than of means, each slice's channels have the means of as many
    windows, and where their number is another too, each takes the average of the means.

    Channels are slice after slice, each in all windows in their order: so ImageNet's first layer,
    repeated for more than three channels (`ich.training.model.build_model`), meets each slice's
    windows as it meets those of a single slice.

    All of it is one multiplication, one addition and one clamp per channel.
    """

    def __init__(
        self,
        windows: Sequence[WindowConfig],
        device: torch.device | str = "cpu",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        memory_format: torch.memory_format = torch.channels_last,
        slices: int = 1,
    ):
        channels = [(plane, w) for plane in range(slices) for w in windows]
        mean_, std_ = (_per_channel(values, len(windows), slices) for values in (mean, std))
        self.planes = [plane for plane, _ in channels]
        self.memory_format = memory_format
        # (hu - lower end) / width, minus the mean, over the deviation: one slope and one intercept
        # per channel. The window's ends, 0 and 1, become the limits of the clamp.
        self.maps = [
            (
                torch.tensor(1 / (w.width * s), dtype=torch.float32, device=device),
                torch.tensor(-(w.center - w.width / 2) / (w.width * s) - m / s, device=device),
                (-m / s, (1 - m) / s),
            )
            for (_, w), m, s in zip(channels, mean_, std_, strict=True)
        ]

    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """Slope, intercept, lowest and highest value of each channel, float32 [C]."""
        slope, intercept = (torch.stack([m[i] for m in self.maps]) for i in (0, 1))  # type: ignore[misc]
        limits = torch.tensor([m[2] for m in self.maps], dtype=torch.float32)
        return slope, intercept, limits[:, 0], limits[:, 1]

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """float32 HU [B, slices, H, W] -> float32 [B, C, H, W] in the layout asked for."""
        shape = (hu.shape[0], len(self.maps), *hu.shape[2:])
        # In the network's layout from the start: to convert a batch is to copy it.
        x = torch.empty(shape, device=hu.device, memory_format=self.memory_format)
        # A channel at a time: over all at once, channels_last leaves nothing to vectorize over.
        for channel, (slope, intercept, (lowest, highest)) in enumerate(self.maps):
            windowed = torch.addcmul(intercept, hu[:, self.planes[channel]], slope)
            torch.clamp(windowed, lowest, highest, out=x[:, channel])
        return x


def _per_channel(values: Sequence[float], windows: int, slices: int) -> list[float]:
    """The values if there are as many as channels, else for each slice the values, or as often as
    there are windows their mean."""
    if len(values) == windows * slices:
        return list(values)
    own = list(values) if len(values) == windows else [sum(values) / len(values)] * windows
    return own * slices


class Resample:
    """Slices of any size -> square images of one size, flipped and cropped (section 3.5).

    A crop keeps a square of side `crop_min`..1 of the image, at a random place, and enlarges it to
    the full size. The filter is a triangle, stretched where pixels are lost, as in Pillow and in
    torch's antialiased bilinear interpolation.
    """

    def __init__(self, size: int, cfg: AugmentConfig):
        self.size, self.cfg = size, cfg

    def draws(self, seed: int, epoch: int, rows: int) -> torch.Tensor:
        """Uniform numbers of one epoch, float32 [rows, 6], a function of (seed, epoch) alone."""
        # On the CPU whatever the device is: the two kinds of generators give different numbers.
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch, "augment"))
        return torch.rand(rows, _DRAWS, generator=generator)

    def __call__(self, hu: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """int16 HU [B, S, S], or [B, P, S, S] of P slices each, and their draws [B, 6] -> float32
        HU [B, P, size, size]; the slices of one image are flipped and cropped alike.

        Without draws the whole slice is resized, as for validation.
        """
        if draws is None:
            draws = hu.new_ones((len(hu), _DRAWS), dtype=torch.float32)  # no flip, no crop
        taps, weights = self._taps(draws, hu.shape[-1])
        slices = 1
        if hu.dim() == 4:
            slices = hu.shape[1]
            # [2, B, size, K] -> [2, B * P, size, K]
            taps, weights = (t.repeat_interleave(slices, 1) for t in (taps, weights))
            hu = hu.flatten(0, 1)
        x = _weighted_rows(hu.to(torch.float32), taps[0], weights[0])
        x = _weighted_rows(x.transpose(1, 2), taps[1], weights[1])
        x = x.transpose(1, 2).contiguous()
        return x.view(-1, slices, self.size, self.size)

    def matrix(self, pixels: int) -> torch.Tensor:
        """What a call without draws does along one axis, float32 [size, pixels]."""
        draws = torch.ones(1, _DRAWS)
        (rows, _), (weights, _) = self._taps(draws, pixels)
        return _weighted_rows(torch.eye(pixels).unsqueeze(0), rows, weights)[0]

    def _taps(self, u: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Source pixels under each output pixel's triangle, and their weights, which sum to 1.

        Args:
            u: draws, [B, 6].
            pixels: of the slice along each axis.

        Returns:
            int64 and float32, each [2, B, size, K], of rows and of columns.
        """
        # Both axes at once: on a CPU most of the time is the calls, not the numbers.
        flip = torch.stack([u[:, 1] < self.cfg.vflip, u[:, 0] < self.cfg.hflip])[..., None]
        offset = torch.stack([u[:, 5], u[:, 4]])[..., None]  # of the crop, as a share of the rest
        side = self.cfg.crop_min + (1 - self.cfg.crop_min) * u[:, 3]
        side = torch.where(u[:, 2] < self.cfg.crop, side, 1.0)[:, None]  # a share of the slice
        out = torch.arange(self.size, device=u.device, dtype=torch.float32)
        out = torch.where(flip, self.size - 1 - out, out)
        scale = side * (pixels / self.size)  # source pixels per output pixel
        # A pixel's center is at its half (+ 0.5, and - 0.5 back): the image keeps its place when
        # its size changes. A crop takes `offset` of what it leaves over to its left, and the rest
        # to its right.
        center = ((out + 0.5) * scale + (1 - side) * offset * pixels - 0.5)[..., None]
        reach = scale.clamp(min=1)[..., None]  # half a triangle's base; enlarging interpolates
        widest = math.ceil(2 * max(1.0, pixels / self.size))  # that of a slice without crop
        # The pixels inside the base of the triangle: as many for every output pixel as the widest
        # needs, so that shapes are fixed; those beyond a narrower base weigh nothing.
        source = (center - reach).floor() + torch.arange(1, widest + 1, device=u.device)
        # Beyond the edge something has to be read, but it weighs nothing either.
        inside = source.clamp(0, pixels - 1)
        weights = (1 - (source - center).abs_() / reach).clamp_(min=0) * (inside == source)
        return inside.long(), weights / weights.sum(-1, keepdim=True)


def _weighted_rows(x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of images [B, H, W], numbers [B, size, K] of them weighted and added: [B, size, W].

    A matrix product with the same weights, nearly all of them zero, takes three times as long.
    """
    batch, height, width = x.shape
    # embedding_bag gathers from one table: here the rows of all images, one below the other.
    first = height * torch.arange(batch, device=x.device)[:, None, None]
    bags, taps = (rows + first).flatten(0, 1), weights.flatten(0, 1)
    table = x.reshape(-1, width)
    return F.embedding_bag(bags, table, mode="sum", per_sample_weights=taps).view(batch, -1, width)


def stream_seed(seed: int, epoch: int, stream: str) -> int:
    """A seed for one named stream of random numbers in one epoch; streams do not overlap.

    splitmix64's finalizer (Steele et al. 2014, doi 10.1145/2660193.2660195) spreads the bits.
    """
    # By its first eight letters, within which the names of all streams differ.
    x = (
        seed * 0x9E3779B97F4A7C15
        + epoch * 0xBF58476D1CE4E5B9
        + int.from_bytes(stream.encode()[:8], "little")
    ) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    # 63 bits: generators take a seed up to there without a sign.
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFF

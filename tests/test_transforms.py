"""Windows, augmentation and resizing against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ich.config import AugmentConfig, WindowConfig
from ich.transforms import Augment, CTWindows, Normalize, resize, stream_seed

WINDOWS = [
    WindowConfig("brain", 40, 80),
    WindowConfig("subdural", 80, 200),
    WindowConfig("soft_tissue", 40, 380),
]
NONE = AugmentConfig(hflip=0, vflip=0, crop=0, crop_min=1)


def picture(rows: int = 4, size: int = 9) -> torch.Tensor:
    return torch.randn(rows, 1, size, size, generator=torch.Generator().manual_seed(0)) * 100


def test_windows_against_a_numpy_ramp() -> None:
    ramp = np.arange(-1024, 3072, dtype=np.int16).reshape(1, 64, 64)
    got = CTWindows(WINDOWS)(torch.from_numpy(ramp).unsqueeze(1).float())[0].numpy()
    for channel, window in zip(got, WINDOWS, strict=True):
        lower, upper = window.center - window.width / 2, window.center + window.width / 2
        want = np.interp(ramp[0].astype(np.float64), [lower, upper], [0, 1])
        np.testing.assert_allclose(channel, want, atol=1e-6)


def test_normalize_is_per_channel_and_averages_for_other_counts() -> None:
    x = torch.full((1, 3, 2, 2), 0.5)
    got = Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), 3)(x)
    torch.testing.assert_close(got[0, :, 0, 0], torch.tensor([0.4, 0.15, 0.05]))
    one = Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 1)(x[:, :1])
    torch.testing.assert_close(one[0, 0, 0, 0], torch.tensor((0.5 - 0.2) / 2.0))


@pytest.mark.parametrize(("key", "axis"), [("hflip", 3), ("vflip", 2)])
def test_flips_are_exact(key: str, axis: int) -> None:
    hu = picture()
    cfg = AugmentConfig(**{**vars(NONE), key: 1.0})
    got = Augment(cfg)(hu, torch.rand(4, 6))
    torch.testing.assert_close(got, hu.flip(axis), atol=1e-3, rtol=0)


def test_no_augmentation_returns_the_same_slices() -> None:
    hu = picture()
    assert torch.equal(Augment(NONE)(hu, torch.rand(4, 6)), hu)


def test_a_crop_is_the_enlarged_square_at_its_place() -> None:
    # A ramp in x: a crop of side s at the right edge shows s of its range, ending at its maximum.
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
    cfg = AugmentConfig(hflip=0, vflip=0, crop=1.0, crop_min=0.5)
    draws = torch.tensor([[0.9, 0.9, 0.0, 0.0, 1.0, 0.5]])  # shortest side, all the way right
    got = Augment(cfg)(ramp, draws)[0, 0, 32]
    assert got[0] == pytest.approx(0.5, abs=0.02)
    assert got[-1] == pytest.approx(1.0, abs=0.02)


def test_augmentation_probabilities() -> None:
    cfg = AugmentConfig(hflip=0.25, vflip=0.1, crop=0.25, crop_min=0.8)
    draws = Augment(cfg).draws(0, 1, 4000)
    hu = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, 1, 2, 2).contiguous()
    only_flips = AugmentConfig(hflip=0.25, vflip=0.1, crop=0, crop_min=1)
    got = Augment(only_flips)(hu, draws)[:, 0]
    left_right = (got[:, 0, 0] > got[:, 0, 1]).float().mean()
    up_down = (got[:, 0, 0] > got[:, 1, 0]).float().mean()
    assert left_right == pytest.approx(0.25, abs=0.03)
    assert up_down == pytest.approx(0.10, abs=0.02)
    assert (draws[:, 2] < cfg.crop).float().mean() == pytest.approx(0.25, abs=0.03)


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    augment = Augment(NONE)
    assert torch.equal(augment.draws(3, 5, 10), augment.draws(3, 5, 10))
    assert not torch.equal(augment.draws(3, 5, 10), augment.draws(3, 6, 10))
    assert not torch.equal(augment.draws(3, 5, 10), augment.draws(4, 5, 10))
    seeds = {
        stream_seed(s, e, name)
        for s in range(20)
        for e in range(20)
        for name in ("order", "augment", "init")
    }
    assert len(seeds) == 20 * 20 * 3


def test_resize_keeps_the_mean_and_the_same_size_untouched() -> None:
    hu = torch.randint(-1000, 1000, (2, 64, 64), dtype=torch.int16)
    assert torch.equal(resize(hu, 64), hu.unsqueeze(1).float())
    small = resize(hu, 16)
    assert small.shape == (2, 1, 16, 16)
    assert small.mean() == pytest.approx(hu.float().mean().item(), abs=5)

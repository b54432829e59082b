"""Windows, augmentation and resizing against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ich.base.config import AugmentConfig, WindowConfig
from ich.training.transforms import CTWindows, Resample, stream_seed

WINDOWS = [
    WindowConfig("brain", 40, 80),
    WindowConfig("subdural", 80, 200),
    WindowConfig("soft_tissue", 40, 380),
]
NONE = AugmentConfig(hflip=0, vflip=0, crop=0, crop_min=1)


def slices(rows: int = 4, size: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1024, 3072, (rows, size, size), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_windows_against_a_numpy_ramp(layout: torch.memory_format) -> None:
    ramp = np.arange(-1024, 3072, dtype=np.int16).reshape(1, 64, 64)
    got = CTWindows(WINDOWS, memory_format=layout)(torch.from_numpy(ramp).unsqueeze(1).float())
    assert got.is_contiguous(memory_format=layout)
    for channel, window in zip(got[0].numpy(), WINDOWS, strict=True):
        lower, upper = window.center - window.width / 2, window.center + window.width / 2
        want = np.interp(ramp[0].astype(np.float64), [lower, upper], [0, 1])
        np.testing.assert_allclose(channel, want, atol=1e-6)


def test_normalization_is_per_channel_and_averages_for_other_counts() -> None:
    hu, mean, std = torch.full((1, 1, 2, 2), 60.0), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    same = [WindowConfig(str(n), 40, 80) for n in range(3)]  # 60 HU is 0.75 in each
    got = CTWindows(same, "cpu", mean, std)(hu)
    torch.testing.assert_close(got[0, :, 0, 0], torch.tensor([0.65, 0.275, 0.1125]))
    one = CTWindows(same[:1], "cpu", mean, (1.0, 2.0, 3.0))(hu)
    torch.testing.assert_close(one[0, 0, 0, 0], torch.tensor((0.75 - 0.2) / 2.0))
    # Outside the window it is what black and white are after normalization.
    far = CTWindows(same, "cpu", mean, std)(torch.tensor([[[[-1024.0, 3071.0]]]]))
    torch.testing.assert_close(far[0, :, 0, 0], -torch.tensor(mean) / torch.tensor(std))
    torch.testing.assert_close(far[0, :, 0, 1], (1 - torch.tensor(mean)) / torch.tensor(std))


def test_of_several_slices_channels_are_slice_after_slice() -> None:
    hu, mean = torch.randn(2, 3, 4, 4) * 50 + 40, (0.1, 0.2, 0.3)
    std = (1.0, 2.0, 4.0)
    for windows in (WINDOWS[:1], WINDOWS[:3], WINDOWS[:2]):
        count = len(windows)
        got = CTWindows(windows, "cpu", mean, std, slices=3)(hu)
        assert got.shape[1] == 3 * count
        for channel in range(3 * count):
            plane, n = divmod(channel, count)
            own = CTWindows(windows[n : n + 1], "cpu", (0.0,), (1.0,))(hu[:, plane : plane + 1])
            # Three channels, or three windows, have the three means; others their average.
            which = {1: plane, 3: n}.get(count)
            m, s = (sum(v) / 3 if which is None else v[which] for v in (mean, std))
            torch.testing.assert_close(got[:, channel], (own[:, 0] - m) / s)


def test_slices_of_one_image_are_augmented_alike() -> None:
    resample = Resample(8, AugmentConfig(0.5, 0.5, 0.5, 0.6))
    hu, draws = slices(12, 9).unflatten(0, (4, 3)), resample.draws(0, 1, 4)
    got = resample(hu, draws)
    assert got.shape == (4, 3, 8, 8)
    for plane in range(3):
        assert torch.equal(got[:, plane : plane + 1], resample(hu[:, plane], draws))
        assert torch.equal(resample(hu)[:, plane : plane + 1], resample(hu[:, plane]))


@pytest.mark.parametrize("size", [16, 63, 64, 96, 224])
def test_resizing_is_torchs_antialiased_interpolation(size: int) -> None:
    hu = slices(3, 64)
    want = F.interpolate(hu[:, None].float(), size=(size, size), mode="bilinear", antialias=True)
    got = Resample(size, NONE)(hu)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    draws = torch.rand(3, 6)
    torch.testing.assert_close(Resample(size, NONE)(hu, draws), want, atol=2e-3, rtol=0)


def test_the_same_size_is_left_as_it_is() -> None:
    hu = slices()
    assert torch.equal(Resample(9, NONE)(hu)[:, 0], hu.float())
    assert torch.equal(Resample(9, NONE)(hu, torch.rand(4, 6))[:, 0], hu.float())


@pytest.mark.parametrize(("key", "axis"), [("hflip", 2), ("vflip", 1)])
def test_flips_are_exact(key: str, axis: int) -> None:
    hu = slices()
    cfg = AugmentConfig(**{**vars(NONE), key: 1.0})
    assert torch.equal(Resample(9, cfg)(hu, torch.rand(4, 6))[:, 0], hu.flip(axis).float())


@pytest.mark.parametrize(("size", "pixels", "side"), [(64, 64, 0.5), (48, 100, 0.8), (90, 40, 0.9)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_the_enlarged_square_at_its_place(
    size: int, pixels: int, side: float, flip: bool
) -> None:
    """A ramp in x stays a ramp, between the edges of the crop, reversed by a flip."""
    ramp = (torch.arange(pixels) * 10).to(torch.int16).expand(1, pixels, pixels)
    cfg = AugmentConfig(hflip=float(flip), vflip=0, crop=1.0, crop_min=side)
    x = 0.3  # of the way from the left edge to the right
    draws = torch.tensor([[0.5, 0.5, 0.0, 0.0, x, 0.5]])
    got = Resample(size, cfg)(ramp, draws)[0, 0, size // 2]
    center = (np.arange(size) + 0.5) / size
    center = center[::-1] if flip else center
    want = 10 * (pixels * ((1 - side) * x + side * center) - 0.5)
    inside = slice(2, -2)  # at a slice's edge the filter is cut
    np.testing.assert_allclose(got[inside].numpy(), want[inside], atol=1.0)  # a tenth of a pixel


def test_augmentation_probabilities() -> None:
    cfg = AugmentConfig(hflip=0.25, vflip=0.1, crop=0.25, crop_min=0.8)
    draws = Resample(2, cfg).draws(0, 1, 4000)
    hu = torch.arange(4, dtype=torch.int16).view(1, 2, 2).expand(4000, 2, 2)
    only_flips = AugmentConfig(hflip=0.25, vflip=0.1, crop=0, crop_min=1)
    got = Resample(2, only_flips)(hu, draws)[:, 0]
    left_right = (got[:, 0, 0] > got[:, 0, 1]).float().mean()
    up_down = (got[:, 0, 0] > got[:, 1, 0]).float().mean()
    assert left_right == pytest.approx(0.25, abs=0.03)
    assert up_down == pytest.approx(0.10, abs=0.02)
    assert (draws[:, 2] < cfg.crop).float().mean() == pytest.approx(0.25, abs=0.03)


def test_what_happens_to_a_slice_does_not_depend_on_its_batch() -> None:
    hu, resample = slices(8, 20), Resample(12, AugmentConfig(0.5, 0.5, 0.5, 0.7))
    draws = resample.draws(0, 1, 8)
    whole, order = resample(hu, draws), torch.tensor([5, 2, 7])
    torch.testing.assert_close(resample(hu[order], draws[order]), whole[order])


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    augment = Resample(8, NONE)
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

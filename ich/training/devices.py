"""Where a training runs: the device, its settings, and what it needs of the memory."""

from __future__ import annotations

import logging

import torch

from ich.base.config import Config, CudaGraph, Device, UserError, image_size
from ich.base.records import ComputeMode
from ich.training.mode import CHANNELS_LAST
from ich.training.model import model_cost

log = logging.getLogger("ich.train")


def uses_cuda_graph(choice: CudaGraph, device: torch.device) -> bool:
    """Whether steps are captured; `on` without a GPU falls back, and the log says so."""
    if choice is not CudaGraph.on:
        return False
    if device.type != "cuda":
        log.warning("train.graph is on, but there is no GPU: steps are taken one by one")
        return False
    return True


def memory_format(mode: ComputeMode) -> torch.memory_format:
    """The layout of a mode as torch names it."""
    return torch.channels_last if mode.layout == CHANNELS_LAST else torch.contiguous_format


def configure_cudnn(device: torch.device, mode: ComputeMode) -> None:
    """Makes torch's convolutions on a GPU compute in the mode's precision, by the fastest way."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # nearly all batches have one shape
        # On by default in torch: what is called float32 would be computed with a mantissa of 10
        # bits. It is of convolutions; matrix products have a switch of their own, which is off.
        torch.backends.cudnn.allow_tf32 = mode.precision == "tf32"


def estimate_training_bytes(cfg: Config, outputs: int) -> int:
    """About what a training takes of a device's memory: weights, gradients, moments, activations,
    and as much again as a quarter of them for what a step needs on the way."""
    size, channels = image_size(cfg), len(cfg.windows.channels)
    # The factor of 1.25 below was measured, on the CPU (`ich.launch.plan`). A captured step keeps a
    # pool of memory of its own, which an emulated GPU showed to make it up to 1.8 times as much.
    cost = model_cost(cfg.model, channels, size, cfg.train.batch_size, outputs)
    # Four float32 for each parameter; the optimizer may keep fewer moments than Adam's two.
    return int(1.25 * (16 * cost.params + cost.activations))


def pick_device(device: Device) -> torch.device:
    """The configured device.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if device is Device.auto:
        # Without a number: a slot lets a job see one GPU, which is number 0 there.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("the device is cuda, but torch finds no GPU. Set it to auto or cpu.")
    return torch.device(device.value)


def device_name(device: torch.device) -> str:
    """What a table calls the device: the GPU's name, or the CPU with its threads."""
    # With its threads, since a CPU's speed and last digits depend on them.
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"

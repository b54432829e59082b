"""Where a training runs: the device, its settings, and what it needs of the memory."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch

from ich.base import provenance
from ich.base.config import (
    Config,
    CudaGraph,
    Device,
    UserError,
    image_size,
    input_channels,
)
from ich.base.records import ComputeMode
from ich.training.mode import CHANNELS_LAST, JOBS_PER_GPU
from ich.training.model import model_cost

log = logging.getLogger("ich.train")
_EAGER_FACTOR, _GRAPHED_FACTOR = 1.25, 2.0
_CONTEXT_BYTES = 3 << 29  # CUDA's context and cuDNN's workspaces; estimated, not measured


def uses_cuda_graph(choice: CudaGraph, device: torch.device) -> bool | None:
    """Whether steps are captured, None if that is still to be found out; `on` without a GPU falls
    back, and the log says so."""
    if device.type != "cuda":
        if choice is CudaGraph.on:
            log.warning("train.graph is on, but there is no GPU: steps are taken one by one")
        return False
    return None if choice is CudaGraph.auto else choice is CudaGraph.on


def memory_format(mode: ComputeMode) -> torch.memory_format:
    """The layout of a mode as torch names it."""
    return torch.channels_last if mode.layout == CHANNELS_LAST else torch.contiguous_format


def configure_cudnn(device: torch.device, mode: ComputeMode) -> None:
    """Makes torch's convolutions on a GPU compute in the mode's precision, by the fastest way."""
    if device.type != "cuda":
        return
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark = True  # nearly all batches have one shape
    # On by default in torch: what is called float32 would be computed with a mantissa of 10 bits.
    # It is of convolutions; matrix products have a switch of their own, which is off.
    is_tf32 = mode.precision == "tf32"
    cudnn.allow_tf32 = is_tf32
    # Newer torch has a switch per kind of operation, which is asked first, and which the older one
    # does not always move. Both kinds: torch refuses to read the older one if they differ.
    for kind in ("conv", "rnn") if hasattr(cudnn, "conv") else ():
        getattr(cudnn, kind).fp32_precision = "tf32" if is_tf32 else "ieee"


def training_bytes(cfg: Config, outputs: int, mode: ComputeMode) -> int:
    """What a training takes of a GPU's memory: as it was measured where the mode was timed, else
    about: weights, gradients, moments, activations, and what a step needs on the way. And what CUDA
    and cuDNN need for themselves."""
    if mode.memory:
        return mode.memory + _CONTEXT_BYTES
    size, channels = image_size(cfg), input_channels(cfg)
    cost = model_cost(cfg.model, channels, size, cfg.train.batch_size, outputs)
    # Four float32 for each parameter; the optimizer may keep fewer moments than Adam's two.
    own = 16 * cost.params + cost.activations
    # A quarter more was measured, on the CPU (`ich.launch.plan`). A captured step has a pool of its
    # own: on an emulated GPU it reserved up to 1.8 times as much.
    return int(own * (_GRAPHED_FACTOR if mode.graph else _EAGER_FACTOR)) + _CONTEXT_BYTES


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that are free for this job: all, or its part where jobs share the GPU. Those
    that start at once all see the same memory free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free // int(os.environ.get(JOBS_PER_GPU, "1"))


@cache
def count_usable_gpus() -> int:
    """How many GPUs are visible; no context is made on any.

    Raises:
        UserError: there are some, and torch cannot use them: without a word it would take the CPU.
    """
    # The first asks the driver's management library, the second CUDA itself.
    count = torch.cuda.device_count()
    if count and not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "CUDA does not say why"
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
        raise UserError(
            f"there is a GPU, but torch {torch.__version__} cannot use it: {reason} Mend that, or "
            f"compute on the CPU (train.device=cpu, device=cpu, --device cpu)."
        )
    built = torch.cuda.get_arch_list()  # such as sm_90, and compute_90 for what a driver compiles
    for capability in sorted(_compute_capabilities() if count else ()):
        if not any(_has_kernels(arch, *capability) for arch in built):
            raise UserError(
                f"there is a GPU of compute capability {capability[0]}.{capability[1]}, for which "
                f"torch {torch.__version__} has no kernels ({', '.join(built)}). Install a torch "
                f"that has, hide the GPU with CUDA_VISIBLE_DEVICES, or compute on the CPU "
                f"(train.device=cpu, device=cpu, --device cpu)."
            )
    return count


def _compute_capabilities() -> set[tuple[int, int]]:
    """Of the visible GPUs, as nvidia-smi tells them: to ask CUDA makes a context."""
    capabilities = set()
    for line in provenance.nvidia_smi("compute_cap"):
        major, _, minor = line.strip().partition(".")
        if major.isdigit() and minor.isdigit():
            capabilities.add((int(major), int(minor)))
    return capabilities


def _has_kernels(arch: str, major: int, minor: int) -> bool:
    """Whether what torch was built for runs there: binaries within a generation and upwards, code
    that the driver compiles on every later one (CUDA C++ Programming Guide, 3.1)."""
    kind, _, number = arch.partition("_")
    digits = "".join(c for c in number if c.isdigit())  # sm_90a
    if not digits:
        return False
    built = divmod(int(digits), 10)
    if kind == "compute":
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def pick_device(device: Device) -> torch.device:
    """The configured device.

    Raises:
        UserError: `cuda` was asked for and there is none, or there is one that torch cannot use.
    """
    if device is Device.auto:
        # Without a number: a slot lets a job see one GPU, which is number 0 there.
        return torch.device("cuda" if count_usable_gpus() else "cpu")
    if device is Device.cuda and not count_usable_gpus():
        raise UserError("the device is cuda, but torch finds no GPU. Set it to auto or cpu.")
    return torch.device(device.value)


def device_name(device: torch.device) -> str:
    """What a table calls the device: the GPU's name, or the CPU with its threads."""
    # With its threads, since a CPU's speed and last digits depend on them.
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"

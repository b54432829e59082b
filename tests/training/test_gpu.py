"""The GPU path, as far as it can be shown without one: devices, waits, captures, refusals.

Results and speed need a GPU. Of the nine networks and three losses the forward pass and the
optimizer's step run on made-up tensors of device `cuda` (backward needs a driver); whole epochs and
captures on a pretended GPU, where `../shared/gpu` and a compiler are at hand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ich.base.config import CONF_DIR, Config, Device, UserError
from ich.base.records import ComputeMode
from ich.launch.jobs import gpu_slots, visible_gpus
from ich.training import devices
from ich.training.cuda_graph import CaptureError, State, TrainingStep
from ich.training.devices import configure_cudnn, count_usable_gpus, free_memory, pick_device
from ich.training.graph_check import why_not_graphed
from ich.training.loader import Batch
from ich.training.losses import build_loss
from ich.training.model import build_model, input_spec
from ich.training.optimizer import build_optimizer
from ich.training.run import _outcome
from ich.training.timing import Timing, _fastest_mode, random_dataset, time_training_steps
from ich.training.transforms import CTWindows, Resample

GPU = torch.device("cuda")
NETWORKS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
EMULATE = Path(__file__).resolve().parents[3] / "shared" / "gpu" / "emulate.sh"


class _NoCopies(TorchDispatchMode):
    """Refuses copies between devices, for each of which the host or the GPU would wait."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            used = {a.device.type for a in (*args, out) if isinstance(a, torch.Tensor)}
            assert len(used) == 1, f"{func} between {used}"
        return out


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_stays_on_the_gpu(network: str, composed: Callable[..., Config]) -> None:
    """No copy to or from the host, and nothing that would have to know a number."""
    config = composed(f"model={network}", "model.pretrained=false", "data.image_size=96")
    with FakeTensorMode():
        with GPU:
            model = build_model(config.model)
            hu = torch.zeros((2, 128, 128), dtype=torch.int16)
            draws, target, rate = torch.rand(2, 6), torch.rand(2, 6), torch.rand(6)
        spec = input_spec(config.model)
        windows = CTWindows(config.windows.channels, GPU, spec.mean, spec.std)
        resample = Resample(96, config.augment)
        optimizer = build_optimizer(config.optimizer, model)
        losses = [
            build_loss(composed(f"loss={name}").loss, rate)
            for name in ("bce", "weighted_bce", "focal")
        ]
        with _NoCopies():
            logits = model.train()(windows(resample(hu, draws)))
            assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
            assert {loss(logits, target).shape for loss in losses} == {()}
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `tests/emulated_gpu.py` printed, by case."""
    if not EMULATE.exists():
        pytest.skip("no pretended GPU: ../shared/gpu is absent")
    if not shutil.which("g++"):
        pytest.skip("no pretended GPU: g++ is absent")
    script = Path(__file__).resolve().parents[1] / "emulated_gpu.py"
    folder = tmp_path_factory.mktemp("emulated")
    # Not the coverage of this process: the pretended GPU is loaded before anything else.
    done = subprocess.run(
        [str(EMULATE), sys.executable, str(script), str(folder)],
        env={**os.environ, "ICH_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode and "cuda_runtime_api.h" in done.stderr:
        pytest.skip("no pretended GPU: the headers of torch's CUDA wheels are absent")
    assert done.returncode == 0, done.stderr[-3000:]
    return {case.pop("case"): case for case in map(json.loads, done.stdout.splitlines())}


CASES = ("off resident", "off mapped", "on resident", "on mapped")


def _waits(counts: dict[str, int]) -> int:
    return sum(n for name, n in counts.items() if name == "SYNC cudaStreamSynchronize")


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_gpu_within_an_epoch(
    emulated: dict[str, dict[str, Any]], case: str
) -> None:
    """With weighted_bce, of four and of eight whole steps."""
    four, eight = emulated[case]["counts"]
    assert _waits(four) == _waits(eight) < 8
    # Of slices in files each batch is copied once, from page-locked memory, and the host is never
    # more than some steps ahead of the GPU: which takes no new memory for it.
    copies = "cudaMemcpyAsync pinned>dev"
    mapped = "mapped" in case
    assert [n.get(copies, 0) for n in (four, eight)] == ([5, 9] if mapped else [0, 0])
    assert all(not name.startswith("cudaHostAlloc") for name in eight)


@pytest.mark.parametrize("case", CASES[2:])
def test_whole_batches_are_one_launch_and_nothing_forbidden_is_captured(
    emulated: dict[str, dict[str, Any]], case: str
) -> None:
    four, eight = emulated[case]["counts"]
    assert [n["cudaGraphLaunch"] for n in (four, eight)] == [4, 8]
    assert all(text.startswith("captured ") for text in emulated[case]["said"])


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_plain_and_the_memory_goes_with_the_last_name(
    emulated: dict[str, dict[str, Any]], case: str
) -> None:
    """Rates of a captured step are tensors, and a cycle would keep the network until Python next
    looks for such."""
    assert all(isinstance(rate, float) for rate in emulated[case]["rates"])
    assert emulated[case]["freed"]


def test_a_training_taken_up_before_its_tail_captures_whole_batches(
    emulated: dict[str, dict[str, Any]],
) -> None:
    (counts,) = emulated["tail first"]["counts"]
    assert counts["cudaGraphLaunch"] == 4


def test_a_step_that_cannot_be_captured_is_taken_eagerly(
    emulated: dict[str, dict[str, Any]],
) -> None:
    failed = emulated["failed capture"]
    assert failed["why"].startswith("capture failed: ")
    assert failed["step"] == 2


def test_on_a_gpu_precision_and_graph_are_timed_together_with_their_memory(
    emulated: dict[str, dict[str, Any]],
) -> None:
    eager = {f"{precision}, channels_last" for precision in ("fp32", "tf32", "bf16")}
    timed = emulated["timed"]["modes"]
    assert set(timed) == eager | {f"{mode}, graphed" for mode in eager}
    assert emulated["timed"]["refused"] == {}
    assert min(timed.values()) > 1 << 20


def test_the_benchmark_of_a_gpu_compares_all_modes_and_trains_an_epoch(
    emulated: dict[str, dict[str, Any]],
) -> None:
    bench = emulated["bench"]
    assert bench["failures"] == []
    modes = [name for name in bench["rows"] if name.startswith("modes, ")]
    assert len(modes) == 5  # three precisions, eager and as one graph, against one of them
    projected, trained = bench["tables"]
    assert [line[2] for line in trained] == ["measured", "a whole epoch"]
    assert projected[1][1].endswith("channels_last, graphed")


class _Faithful:
    """Stands for a captured step that does what an eager one does, on a CPU."""

    def __init__(self, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.optimizer = optimizer

    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        return eager_step(batch)


class _FirstRate(_Faithful):
    """Recorded its first learning rate as a number."""

    rate: torch.Tensor | None = None

    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        (group,) = self.optimizer.param_groups
        self.rate = group["lr"].clone() if self.rate is None else self.rate
        group["lr"].copy_(self.rate)
        return eager_step(batch)


class _FirstBatch(_Faithful):
    """Computes on the batch that was recorded."""

    first: Batch | None = None

    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        self.first = self.first or batch
        return eager_step(self.first)


class _WarmMoments(_Faithful):
    """Leaves in the moments what warming up put there."""

    warm = False

    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        if not self.warm:
            before = {k: v.clone() for k, v in state().items() if k.startswith("model/")}
            eager_step(batch)
            for name, value in before.items():
                state()[name].copy_(value)
            self.warm = True
        return eager_step(batch)


class _Unfit(_Faithful):
    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        raise CaptureError("RuntimeError: operation not permitted")


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (_Faithful, ""),
        (_FirstRate, "a captured step (differs: weights|keeps its first learning rate)"),
        (_FirstBatch, "a captured step differs: a loss of "),
        (_WarmMoments, "a captured step differs: "),
        (_Unfit, "capture failed: RuntimeError: operation not permitted"),
    ],
)
def test_a_graph_that_does_something_else_is_found_out(
    step: type[_Faithful],
    why: str,
    composed: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ich.training.trainer.GraphedStep", step)
    own = ("model=mobilenet_v2", "model.pretrained=false", "train.batch_size=8")
    config = composed(*own, "data.image_size=32", "data.cache_size=32", "optimizer.lr=0.01")
    mode = ComputeMode("fp32", "channels_last", graph=True)
    found = why_not_graphed(config, random_dataset(config, 2), torch.device("cpu"), mode)
    assert re.match(why or "$", found)


def test_auto_takes_the_next_best_where_a_graph_is_refused(
    composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("model=mobilenet_v2", "model.pretrained=false")
    bf16, fp32 = ComputeMode("bf16", "channels_last"), ComputeMode("fp32", "channels_last")
    graphed = {mode: replace(mode, graph=True) for mode in (bf16, fp32)}
    seconds = {fp32: 4.0, bf16: 2.0, graphed[bf16]: 1.0, graphed[fp32]: 1.5}
    monkeypatch.setattr(
        "ich.training.timing.time_training_steps", lambda _: Timing(dict(seconds), {})
    )
    refused: dict[ComputeMode, str] = {}
    monkeypatch.setattr(
        "ich.training.graph_check.why_not_graphed", lambda *args: refused.get(args[-1], "")
    )
    chosen = _fastest_mode(config, GPU, "a GPU")
    assert chosen == replace(graphed[bf16], processor="a GPU")
    assert chosen.timed["fp32, channels_last"] == 0.2
    refused[graphed[bf16]] = "a captured step differs: moments 4.0%"
    assert _fastest_mode(config, GPU, "a GPU") == replace(graphed[fp32], processor="a GPU")
    refused[graphed[fp32]] = "a captured step differs: counts"
    chosen = _fastest_mode(config, GPU, "a GPU")
    assert chosen == replace(bf16, processor="a GPU")
    assert chosen.reason == "a captured step differs: moments 4.0%"
    seconds[graphed[bf16]], seconds[graphed[fp32]] = 1.99, 3.99
    chosen = _fastest_mode(config, GPU, "a GPU")
    assert (chosen.graph, chosen.reason) == (False, "one graph per step is 1.01 times as fast")
    assert ComputeMode.from_json(asdict(chosen)) == chosen
    assert ComputeMode.from_json({"precision": "fp32", "layout": "channels_last"}) == fp32


def test_where_no_mode_fits_the_job_says_so(
    composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("model=mobilenet_v2", "model.pretrained=false", "train.device=cpu")
    fits: set[str] = set()

    def in_turn(*given: Any) -> None:
        modes, timing = given[3], given[5]
        if modes[0].precision not in fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        timing.seconds.update(dict.fromkeys(modes, 1.0))

    monkeypatch.setattr("ich.training.timing._time_in_turn", in_turn)
    with pytest.raises(torch.OutOfMemoryError):
        time_training_steps(config)
    monkeypatch.setattr(devices, "pick_device", lambda _: GPU)
    fits.add("bf16")
    assert {mode.precision for mode in time_training_steps(config).seconds} == fits


@pytest.mark.parametrize("generic", ["none", "tf32", "ieee"])
@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_convolutions_compute_in_what_the_mode_says(
    generic: str, precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("torch before its switches per kind of operation")
    monkeypatch.setattr(cudnn, "benchmark", False)
    switches: list[Any] = [torch.backends, cudnn.conv, cudnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    try:
        switches[0].fp32_precision = generic
        configure_cudnn(GPU, ComputeMode(precision, "channels_last"))
        assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == expected
        assert cudnn.allow_tf32 == (precision == "tf32")
    finally:
        cudnn.allow_tf32 = True
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine with two GPUs, as far as torch and nvidia-smi tell."""
    told = SimpleNamespace(count=2, works=True, capabilities=["9.0", "9.0"], built=["sm_90"])

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: told.count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: told.works)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: told.built)
    monkeypatch.setattr(devices.provenance, "nvidia_smi", lambda _: told.capabilities)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    count_usable_gpus.cache_clear()
    yield told
    count_usable_gpus.cache_clear()


def test_gpus_are_numbered_as_nvidia_smi_does_and_told_how_many_share_them(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_gpus() == ["0", "1"]
    slots = gpu_slots(visible_gpus(), 2)
    assert [slot.name for slot in slots] == ["GPU 0", "GPU 1", "GPU 0", "GPU 1"]
    assert {slot.environment["CUDA_DEVICE_ORDER"] for slot in slots} == {"PCI_BUS_ID"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 30, 8 << 30))
    assert free_memory(GPU) == 8 << 30
    monkeypatch.setenv("ICH_JOBS_PER_GPU", slots[0].environment["ICH_JOBS_PER_GPU"])
    assert free_memory(GPU) == 4 << 30


def test_a_gpu_that_torch_cannot_use_is_no_cpu(gpu: SimpleNamespace) -> None:
    gpu.works = False
    for ask in (visible_gpus, lambda: pick_device(Device.auto)):
        with pytest.raises(UserError, match=r"torch .* cannot use it: The NVIDIA driver .* 11040"):
            ask()
    assert pick_device(Device.cpu).type == "cpu"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80", "sm_90"], "8.6", True),  # binaries run within a generation, upwards
        (["sm_86", "sm_90"], "8.0", False),
        (["sm_70", "sm_80"], "9.0", False),
        (["sm_70", "compute_80"], "9.0", True),  # the driver compiles it
        (["sm_90a"], "9.0", True),
        (["sm_100", "sm_120"], "12.0", True),
        (["sm_75"], "6.1", False),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    gpu: SimpleNamespace, built: list[str], capability: str, runs: bool
) -> None:
    gpu.built, gpu.capabilities = built, [capability]
    if runs:
        assert count_usable_gpus() == 2
        return
    with pytest.raises(UserError, match=f"compute capability {capability}, for which torch"):
        count_usable_gpus()


def test_of_parts_of_a_gpu_one_is_taken_and_several_are_refused(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.count = 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a")
    assert visible_gpus() == ["MIG-a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    with pytest.raises(UserError, match="MIG-a,MIG-b, and of a list .* Name one"):
        visible_gpus()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: out of memory"),
        CaptureError("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_whoever_runs_out_of_gpu_memory_the_reason_says_what_to_change(error: Exception) -> None:
    def training() -> Any:
        raise error

    reason = _outcome(training).reason
    assert reason.startswith(f"out of GPU memory: {error} Lower train.batch_size")

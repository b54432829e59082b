"""How many jobs share a GPU: as many as fit and pay, and it says why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import TINY

from ich.base.config import Config, Device, UserError
from ich.base.records import ComputeMode, Origin, SweepRecord
from ich.base.results import SweepPaths
from ich.launch import sharing
from ich.launch.composing import ComposedJob
from ich.launch.jobs import gpus_of
from ich.launch.launcher import LocalLauncher
from ich.launch.sharing import describe_sharing, jobs_that_fit, shared_slots
from ich.launch.side_by_side import Kind, measure, pick_number

GB = 10**9
CONTEXT = 3 << 29
UUIDS = {"0": "GPU-aaaa-1", "1": "GPU-bbbb-2"}


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 0.92, 4: 0.9}, 4),
        ({1: 1.0, 2: 0.92}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.57}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.4}, 8),
    ],
)
def test_each_doubling_must_be_worth_it(seconds: dict[int, float], number: int) -> None:
    assert pick_number(seconds) == number


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two GPUs with 20 and 40 GB free, and 64 cores."""
    mib = {"0": 20 * GB >> 20, "1": 40 * GB >> 20}
    told = {"gpus": [f"{n}, {UUIDS[n]}, {mib[n]} MiB" for n in UUIDS], "cores": 64}
    monkeypatch.setattr(sharing, "nvidia_smi", lambda _: told["gpus"])
    monkeypatch.setattr(sharing, "available_cores", lambda: told["cores"])
    monkeypatch.setattr(sharing, "_measured", {})
    return told


def jobs(composed: Callable[..., Config], number: int, gb: float = 4) -> list[Any]:
    """Jobs of which a timing found that steps take so much memory beside a context."""
    mode = ComputeMode("bf16", "channels_last", memory=int(gb * GB) - CONTEXT)
    config = composed(*TINY, "model=mobilenet_v2", "tracking=none")
    return [(replace(config, job=f"seed{n}", seed=n), mode) for n in range(number)]


@pytest.mark.parametrize(
    ("number", "gb", "gpus", "most"),
    [
        (16, 4, ["0"], 4),  # five fit
        (16, 11, ["0"], 1),
        (16, 11, ["1"], 2),
        (16, 2, ["1"], 8),
        (16, 4, ["1", "0"], 4),  # the smaller counts
        (3, 4, ["0"], 2),  # no more than there are
        (2, 4, ["0", "1"], 1),  # one each
        (16, 4, ["GPU-bbbb"], 8),
        (16, 4, ["GPU-b"], 8),  # CUDA takes the first characters
        (16, 4, ["MIG-x"], 1),  # of which nvidia-smi says nothing
    ],
)
def test_as_many_as_fit_the_memory(
    composed: Callable[..., Config],
    machine: dict[str, Any],
    number: int,
    gb: float,
    gpus: list[str],
    most: int,
) -> None:
    assert jobs_that_fit(jobs(composed, number, gb), gpus).most == most


def test_each_job_has_a_core_and_the_largest_counts(
    composed: Callable[..., Config], machine: dict[str, Any]
) -> None:
    todo = [*jobs(composed, 15, 2), *jobs(composed, 1, 9)]
    fit = jobs_that_fit(todo, ["0"])
    assert fit.most == 2
    assert fit.why == (
        "20.0 GB of its memory are free and a job needs up to 9.0, 16 are waiting, and 64 cores "
        "are for it"
    )
    machine["cores"] = 3
    assert jobs_that_fit(jobs(composed, 16, 2), ["0"]).most == 2
    assert jobs_that_fit(jobs(composed, 16, 2), ["0", "1"]).most == 1


@pytest.fixture
def sweep(tmp_path: Path) -> SweepPaths:
    return SweepPaths(tmp_path / "sweep")


def opened(sweep: SweepPaths, todo: Sequence[Any]) -> list[Config]:
    """The configs of jobs whose sweep is opened."""
    origins = {config.job: Origin(mode=mode) for config, mode in todo}
    sweep.root.mkdir(exist_ok=True)
    sweep.write_record(SweepRecord("s", tuple(origins), origins=origins))
    return [config for config, _ in todo]


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the service."""
    events: list[str] = []

    @contextlib.contextmanager
    def service(gpus: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
        events.append(f"on {','.join(gpus)}")
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/pipes"}, "with a daemon"
        events.append("off")

    monkeypatch.setattr(sharing, "multi_process_service", service)
    return events


def measures(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], died: str = "") -> list:
    asked: list[Any] = []

    def fake(kinds: Sequence[Kind], most: int, environment: Mapping[str, str], _: object) -> Any:
        asked.append(([kind.jobs for kind in kinds], most, environment))
        return seconds, died

    monkeypatch.setattr(sharing, "measure", fake)
    return asked


def test_jobs_share_gpus_by_what_was_measured_and_it_is_said(
    composed: Callable[..., Config],
    machine: dict[str, Any],
    sweep: SweepPaths,
    mps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = measures(monkeypatch, {1: 1.0, 2: 0.6, 4: 0.58})
    configs = opened(sweep, jobs(composed, 8))
    said = (
        "2 on each GPU, with a daemon: 2 take 1.67 times the images of one, 4 take 1.72 times the "
        "images of one; 20.0 GB of its memory are free and a job needs up to 4.0, 4 are waiting, "
        "and 32 cores are for it"
    )
    for _ in range(2):  # the second batch of an optimizing sweeper is not measured again
        with shared_slots(configs, sweep, ["0", "1"]) as slots:
            assert [slot.name for slot in slots] == ["GPU 0", "GPU 1", "GPU 0", "GPU 1"]
            assert gpus_of(slots) == [*UUIDS.values()]
            assert {s.environment["ICH_JOBS_PER_GPU"] for s in slots} == {"2"}
            assert {s.environment["CUDA_MPS_PIPE_DIRECTORY"] for s in slots} == {"/pipes"}
            assert mps[-1] == "on GPU-aaaa-1,GPU-bbbb-2"
        assert mps[-1] == "off"
        assert f"hydra.launcher.jobs_per_gpu=auto: {said}." in capsys.readouterr().out
    assert sweep.read_record().sharing == said
    ((counts, most, environment),) = asked
    assert (counts, most) == ([8], 4)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa-1"
    assert environment["ICH_JOBS_PER_GPU"] == "4"


@pytest.mark.parametrize(
    ("seconds", "died", "why"),
    [
        ({1: 1.0, 2: 0.95}, "", "2 take 1.05 times the images of one"),
        ({1: 1.0}, "OutOfMemoryError", "two at once could not be measured (more ended: OutOf"),
        ({}, "CUDA error", "what measures them ended (CUDA error)"),
    ],
)
def test_where_sharing_does_not_pay_there_is_one_job_and_no_mps(
    composed: Callable[..., Config],
    machine: dict[str, Any],
    sweep: SweepPaths,
    mps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[int, float],
    died: str,
    why: str,
) -> None:
    measures(monkeypatch, seconds, died)
    configs = opened(sweep, jobs(composed, 8))
    with shared_slots(configs, sweep, ["0"]) as slots:
        (slot,) = slots
        assert slot.environment["CUDA_VISIBLE_DEVICES"] == "0"
        assert "CUDA_MPS_PIPE_DIRECTORY" not in slot.environment
        assert mps == ["on GPU-aaaa-1", "off"]
    assert why in sweep.read_record().sharing


def test_what_cannot_share_is_not_measured(
    composed: Callable[..., Config], machine: dict[str, Any], sweep: SweepPaths, mps: list[str]
) -> None:
    with shared_slots(opened(sweep, jobs(composed, 1)), sweep, ["0"]) as slots:
        assert len(slots) == 1
    assert mps == []
    assert sweep.read_record().sharing == "1 job on each GPU: jobs left: 1, GPUs: 1"


def test_a_plan_says_how_many_would_share(
    composed: Callable[..., Config], machine: dict[str, Any], sweep: SweepPaths
) -> None:
    configs = [config for config, _ in jobs(composed, 8)]
    said = describe_sharing(configs, sweep, ["0"], "auto")
    assert said.startswith("Sharing: up to 8 on each GPU: 20.0 GB of its memory are free and a job")
    assert said.endswith("What pays is measured at the launch.")
    assert describe_sharing(configs, sweep, ["0"], 2) == "Sharing: 2 jobs at once on each GPU."
    assert describe_sharing(configs, sweep, ["0"], 1) == ""
    assert describe_sharing(configs, sweep, [], "auto") == ""


def test_on_a_cpu_auto_means_nothing_and_another_word_is_refused(
    composed: Callable[..., Config],
) -> None:
    job = ComposedJob([], None, composed("train.device=cpu"))  # type: ignore[arg-type]
    assert gpus_of(LocalLauncher(jobs_per_gpu="auto").slots([job])) == []
    for wrong in ("many", 1.5, 0):
        with pytest.raises(UserError, match=rf"gpu is {wrong}, but must be from 1 to 64, or auto"):
            LocalLauncher(jobs_per_gpu=wrong).slots([job])  # type: ignore[arg-type]


def test_processes_that_die_are_left_out(
    composed: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.launch.side_by_side.sys.executable", "/bin/false")
    ((config, mode),) = jobs(composed, 1)
    assert measure([Kind(config, mode, 1)], 2, {}) == ({}, "")


@pytest.mark.faults
def test_processes_take_steps_alone_and_together(composed: Callable[..., Config]) -> None:
    ((config, _),) = jobs(composed, 1)
    mode = ComputeMode("fp32", "channels_last")
    config.train.batch_size = 8
    kinds = [Kind(config, mode, 2), Kind(replace(config, seed=1), mode, 1)]
    seconds, died = measure(kinds, 2, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert died == ""
    assert set(seconds) == {1, 2}
    assert all(0 < s < 60 for s in seconds.values())
    config.train.device = Device.cuda
    died = "ich.base.config.UserError: the device is cuda, but torch finds no GPU."
    assert measure(kinds, 2, {"CUDA_VISIBLE_DEVICES": ""})[1].startswith(died)

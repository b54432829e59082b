"""The benchmark: every part gives ratios, and what is saved can be read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ich.base.records import ComputeMode
from ich.bench import main
from ich.benchmarks import trainings
from ich.benchmarks.commands import bench_tests
from ich.benchmarks.jobs import bench_slots
from ich.benchmarks.measure import (
    InTurn,
    PartResult,
    compare_rates,
    compose_job,
    geometric_mean,
)
from ich.benchmarks.parts import PartError, in_own_process, measure_parts
from ich.benchmarks.published import beside_published, projection
from ich.benchmarks.report import ReportWriter
from ich.benchmarks.settings import GPU_PARTS, MODELS, Settings
from ich.launch.side_by_side import Kind

OPTIONS = ("--models", "mobilenet_v2", "--image-size", "64", "--rounds", "1", "--seconds", "0.05")
NAMES = {
    "prepare": [
        f"prepare, {store}, {size} px: cache build / {other}"
        for store in ("folder of 207", "zip of 207")
        for size in (320, 128)
        for other in ("plain loop", "reading the bytes")
    ],
    "input": [
        "input, 64 px: ours / plain DICOM Dataset",
        "input, 64 px: ours / MONAI CacheDataset",
        "input, 64 px: ours / timm loader over PNGs",
        "input, 64 px: copying the bytes / ours",
    ],
    "step": [
        "step, mobilenet_v2, 64 px: ours",
        "step, mobilenet_v2, 64 px: ours with data / on one resident batch",
        "roofline, mobilenet_v2, 64 px, GMAC/s: a matrix product / ours",
        "modes, mobilenet_v2, 64 px: bf16, channels_last / fp32, channels_last",
        "step, 64 px, geometric mean: ours / fp32 NCHW",
        "step, 64 px, geometric mean: with data / resident",
    ],
    "sweep": ["sweep, an epoch of 1 networks, 64 px: ours / the plain way"],
    "predict": [
        "predict, mobilenet_v2, 64 px: ours / one by one",
        "predict, 64 px: geometric mean",
    ],
    "intervals": ["intervals, resamples per s: ours / scikit-learn"],
    "start": ["start, per s: a job to its first step / importing its libraries"],
    "busy": [
        "busy, 64 px: alone, ours / spinning",
        "busy, 64 px: beside a busy process, ours / spinning",
        "busy, 64 px: ours, beside a busy process / alone",
    ],
    "memory": [
        "memory of a training, MB: 80 / 40 rows",
        "memory of a prediction, MB: 80 / 40 rows",
    ],
    "tests": [],
    "demo": [],
    "slots": [
        f"slots, mobilenet_v2, 64 px: {jobs} jobs at once / one after another" for jobs in (2, 4)
    ],
    "evaluate": ["evaluate, mobilenet_v2, 64 px: ours, process and all / one by one"],
    "report": [],
}
# These start whole trainings and commands, which takes as long as a sweep among faults.
WITH_JOBS = ("start", "memory", "busy", "demo", "slots", "evaluate")
WITHOUT_NOTES = ("prepare", "input", "busy", "demo", "slots", "evaluate")
TABLES = {
    "demo": ["The demo sweep"],
    "step": ["The report's training steps at 64 px, and what others publish"],
    "report": ["The report's trainings at 64 px on a cohort of its size"],
}
SETTINGS = Settings(["mobilenet_v2", "resnet50"], [64], 8, 70, 1, 0.05)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, phantom: Path) -> None:
    monkeypatch.setattr(
        "ich.benchmarks.parts.in_own_process",
        lambda part, settings, folder: part(settings, folder),
    )
    monkeypatch.setattr(
        "ich.benchmarks.parts.write_phantom", lambda out, _: shutil.copytree(phantom, out)
    )


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("default")  # of the libraries that are compared with
@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=[pytest.mark.faults] * (p in WITH_JOBS)) for p in NAMES]
)
def test_a_part_saves_its_ratios(
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ich.benchmarks.jobs._COHORTS", (40, 80))
    if part == "busy":  # four trainings, two of them beside a process that never rests
        monkeypatch.setattr(
            "ich.benchmarks.jobs.compose_job", lambda *own: compose_job(*own, "data.subset=0.2")
        )
    monkeypatch.setattr("ich.benchmarks.predictions.RESAMPLES", 50)
    monkeypatch.setattr(trainings, "REPORT", {"train": 70, "val": 40, "epochs": 10})
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    monkeypatch.setattr("ich.benchmarks.commands._GPU_TESTS", (tmp_path / "test_one.py",))
    options = (*OPTIONS, "--images", "70", "--patients", "8")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert main(["--parts", part, *options, "--out", *map(str, folders)]) == 0
    printed = capsys.readouterr()
    (path,) = folders[0].glob("*.json")
    assert path.read_text() == (folders[1] / path.name).read_text()
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == len(NAMES[part])
    for (name, values), start in zip(saved["rows"].items(), NAMES[part], strict=True):
        assert name.startswith(start)
        assert 0 < values["lowest"] <= values["ratio"] <= values["highest"]
        assert f"{name}: " in printed.err
        assert f"| {name} |" in printed.out
    assert path.with_suffix(".md").read_text() in printed.out
    assert len(saved["notes"]) == (part not in WITHOUT_NOTES)
    assert list(saved.get("tables", {})) == TABLES.get(part, [])
    for title, (headings, *lines) in saved.get("tables", {}).items():
        assert f"## {title}" in printed.out
        assert all(len(line) == len(headings) for line in lines)
        assert lines


def test_a_row_holds_medians_and_the_ratios_of_each_round(tmp_path: Path) -> None:
    twice, thrice = compare_rates([2, 4, 9], [1, 2, 3]), compare_rates([3], [1])
    mean = geometric_mean([twice, thrice])
    rows = {"a": twice, "b": thrice, "mean": mean}
    path = ReportWriter([tmp_path], "defaults").write(PartResult(rows, ["One.", "Two."]))
    saved = json.loads(path.with_suffix(".json").read_text())
    assert list(saved["rows"]["a"].items()) == [
        *(("ours", 4), ("plain", 2)),
        *(("ratio", 2), ("lowest", 2), ("highest", 3)),
    ]
    assert saved["rows"]["mean"] == {"ratio": pytest.approx(6**0.5), "lowest": 2, "highest": 3}
    lines = path.read_text().splitlines()
    assert "| a | 4.0 | 2.0 | 2 | 2 | 3 |" in lines
    assert "| mean |  |  | 2.45 | 2 | 3 |" in lines
    assert lines[-4:] == ["", "One.", "", "Two."]


def _works(_: Settings, __: Path) -> Iterator[PartResult]:
    yield PartResult({"works: a / b": compare_rates([2], [1])})


def _fails(_: Settings, __: Path) -> Iterator[PartResult]:
    yield PartResult(notes=["Before."])
    raise ValueError("no\nGPU")


def _dies(_: Settings, __: Path) -> Iterator[PartResult]:
    yield PartResult(notes=["Before."])
    time.sleep(0.5)  # until that is sent
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(_: Settings, __: Path) -> Iterator[PartResult]:
    yield PartResult(notes=["Before."])
    time.sleep(600)


@pytest.mark.usefixtures("in_this_process")
def test_a_part_that_fails_is_noted_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "ich.benchmarks.parts._FUNCTIONS", {"step": _fails, "input": _works, "slots": _dies}
    )
    saved: list[PartResult] = []
    measured = measure_parts(["input", "step"], SETTINGS, saved.append)
    assert [len(s.notes) + len(s.failures) + len(s.rows) for s in saved] == [1, 2, 3]
    assert (measured.failures, measured.notes) == (["step: no GPU"], ["Before."])
    assert main(["--parts", "input", "step", "--minutes", "5", "--out", str(tmp_path)]) == 1
    text = next(tmp_path.glob("*.md")).read_text()
    assert text.index("| works: a / b |") < text.index("parts took: step 0 s, input 0 s.")
    assert text.endswith("## Not measured\n\nstep: no GPU\n")
    assert text in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.parametrize(
    ("part", "seconds", "reason"),
    [
        (_works, math.inf, ""),
        (_fails, math.inf, "ValueError: no GPU"),
        (_dies, math.inf, "its process ended with status -9"),
        (_hangs, 20, "it took too long, and was ended"),
    ],
)
def test_a_part_that_dies_or_hangs_costs_itself(
    part: Callable[[Settings, Path], Iterator[PartResult]],
    seconds: float,
    reason: str,
    tmp_path: Path,
) -> None:
    settings = replace(SETTINGS, limit=time.monotonic() + seconds)
    found = in_own_process(part, settings, tmp_path)
    assert next(found)
    if not reason:
        assert list(found) == []
        return
    with pytest.raises(PartError, match=f"^{reason}$"):
        next(found)


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        (math.inf, "tests: pytest ended with status 1: 1 failed"),
        (0, "tests: pytest was ended for want of time: "),
    ],
)
def test_tests_that_fail_or_find_no_time_are_named(
    seconds: float, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_one.py").write_text("def test_one():\n    assert 1 == 2\n")
    monkeypatch.setattr("ich.benchmarks.commands._GPU_TESTS", (tmp_path / "test_one.py",))
    end = time.monotonic() + seconds
    (result,) = bench_tests(replace(SETTINGS, until=end, limit=end), tmp_path)
    assert not result.notes
    assert result.failures[0].startswith(reason)
    assert ["FAILED" in failure for failure in result.failures[1:]] == [True] * (seconds > 0)


def test_jobs_share_a_gpu_without_and_with_mps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Mapping[str, str]] = []

    def measured(
        kinds: list[Kind], most: int, environment: Mapping[str, str]
    ) -> tuple[dict[int, float], str]:
        assert (kinds[0].config.model.name, most) == ("mobilenet_v2", 4)
        asked.append(environment)
        return ({1: 1.0, 2: 0.5, 4: 0.4}, "") if len(asked) == 1 else ({1: 1.0, 2: 0.4}, "no room")

    @contextlib.contextmanager
    def service(gpus: list[str]) -> Iterator[tuple[dict[str, str], str]]:
        assert gpus == ["GPU-a"]
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/pipes"}, "with a daemon"

    jobs = "ich.benchmarks.jobs"
    mode = ComputeMode("bf16", "channels_last")
    monkeypatch.setattr(f"{jobs}.chosen_mode", lambda *_: mode)
    monkeypatch.setattr(f"{jobs}.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(f"{jobs}.visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(f"{jobs}.nvidia_smi", lambda _: ["GPU-a", "GPU-b"])
    monkeypatch.setattr(f"{jobs}.measure", measured)
    monkeypatch.setattr(f"{jobs}.multi_process_service", service)
    results = [*bench_slots(SETTINGS, tmp_path)]
    ratios = {name: row.ratio for result in results for name, row in result.rows.items()}
    assert ratios == {
        "slots, mobilenet_v2, 64 px: 2 jobs at once / one after another": 2,
        "slots, mobilenet_v2, 64 px: 4 jobs at once / one after another": 2.5,
        "slots, mobilenet_v2, 64 px, with MPS: 2 jobs at once / one after another": 2.5,
    }
    assert results[1].notes == ["Trainings that share a GPU: with a daemon."]
    reason = "slots, mobilenet_v2, 64 px, with MPS: a training ended: no room"
    assert results[2].failures == [reason]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in asked] == ["0", "GPU-a"]


def test_of_networks_what_fails_costs_itself_and_none_is_begun_without_time() -> None:
    now = time.monotonic()
    took = {"a": 0.0, "b": 0.3, "c": 0.0, "d": 0.0}

    def measured(name: str) -> str:
        time.sleep(took[name])
        if name == "a":
            raise ValueError("no memory")
        return name

    in_turn = InTurn("step", [*took], replace(SETTINGS, until=now + 0.5))
    assert list(in_turn.measure(measured)) == ["b"]
    assert in_turn.remarks.failures == ["step, a: ValueError: no memory"]
    assert in_turn.remarks.notes == ["For want of time not in step: c, d."]


def test_where_an_epoch_does_not_fit_steps_stand_for_it(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "phantom").symlink_to(phantom)
    settings = replace(SETTINGS, models=["mobilenet_v2"], until=time.monotonic() + 60)
    first, *_, last = trainings.bench_report(settings, tmp_path)
    ((_, line),) = first.tables.values()
    assert line[:3] == ["mobilenet_v2", line[1], "3 steps"]
    assert re.match(r"The report's sweep \(mobilenet_v2, 10 epochs, 65,859 training", *last.notes)


def test_a_projection_stands_beside_what_is_published() -> None:
    mode = ComputeMode("bf16", "channels_last", graph=True)
    headings, *lines = beside_published([(model, mode, 4000.0, 0.05) for model in MODELS])
    assert [line[-2] for line in lines] == [
        *("546", "1,218", "782", "2,313", "498", "1,752", "979", "572")
    ]
    own = ["resnet50", "bf16, channels_last, graphed", "4,000.0", "3.0"]
    assert lines[1] == [*own, "1,218", "2,700 to 2,800"]
    assert len(headings) == 6
    assert "at 224 px would take 25 minutes at" in projection(25 / 60, MODELS, 224, "steps")
    assert "eight networks, 10 epochs" in projection(172.1, MODELS, 224, "steps")


def test_the_gpu_is_measured_in_the_order_of_importance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: None
) -> None:
    """Each with its share of the time that is left; the last one has all of it."""
    asked: list[tuple[str, Settings]] = []

    def part(name: str) -> Callable[[Settings, Path], Iterator[PartResult]]:
        def asking(settings: Settings, _: Path) -> Iterator[PartResult]:
            asked.append((name, settings))
            yield PartResult()

        return asking

    functions = {name: part(name) for name in GPU_PARTS}
    monkeypatch.setattr("ich.benchmarks.parts._FUNCTIONS", functions)
    end = time.monotonic() + 540
    assert main(["--parts", "gpu", "--minutes", "9", "--out", str(tmp_path)]) == 0
    assert [name for name, _ in asked] == list(GPU_PARTS)
    shares = {name: settings.until - (end - 540) for name, settings in asked}
    assert 20 < shares["tests"] < 80
    assert 180 < shares["step"] < 400
    assert shares["report"] == pytest.approx(540, abs=5)
    assert all(s.until <= s.limit <= end + 5 for _, s in asked)

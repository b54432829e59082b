"""The benchmark: every part gives ratios, and what is saved can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ich.bench import main
from ich.benchmarks.measure import PartResult, compare_rates, geometric_mean
from ich.benchmarks.report import write_report

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
}
# These start whole trainings, which takes as long as a sweep among faults.
WITH_JOBS = ("start", "memory", "busy")


@pytest.mark.filterwarnings("default")  # of the libraries that are compared with
@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=[pytest.mark.faults] * (p in WITH_JOBS)) for p in NAMES]
)
def test_a_part_saves_its_ratios(
    part: str,
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ich.benchmarks.jobs._COHORTS", (40, 80))
    monkeypatch.setattr("ich.benchmarks.predictions.RESAMPLES", 50)
    monkeypatch.setattr(
        "ich.benchmarks.parts.write_phantom", lambda out, _: shutil.copytree(phantom, out)
    )
    assert main(["--parts", part, *OPTIONS, "--images", "70", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == len(NAMES[part])
    for (name, values), start in zip(saved["rows"].items(), NAMES[part], strict=True):
        assert name.startswith(start)
        assert 0 < values["lowest"] <= values["ratio"] <= values["highest"]
        assert f"{name}: " in printed.err
        assert f"| {name} |" in printed.out
    assert path.with_suffix(".md").read_text() in printed.out
    assert len(saved["notes"]) == (part not in ("prepare", "input", "busy"))


def test_a_row_holds_medians_and_the_ratios_of_each_round(tmp_path: Path) -> None:
    twice, thrice = compare_rates([2, 4, 9], [1, 2, 3]), compare_rates([3], [1])
    mean = geometric_mean([twice, thrice])
    rows = {"a": twice, "b": thrice, "mean": mean}
    path = write_report(PartResult(rows, ["One.", "Two."]), tmp_path, "defaults")
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

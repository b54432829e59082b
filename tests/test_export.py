"""Exported files give our probabilities, wherever they run; and the card says what is known."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ich.base.config import EXPORTS, UserError, WindowConfig
from ich.base.metadata import Metadata
from ich.base.results import RunPaths, SweepPaths
from ich.data.decode import resize_area, square
from ich.data.dicom import read_hu
from ich.data.phantom.spec import LABELS
from ich.export import main
from ich.inference import export as exporting
from ich.inference.card import model_card
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.export import export, made_up_slices
from ich.inference.graph import NO_AUGMENT, Graph
from ich.scoring.metrics import sigmoid
from ich.training.transforms import CTWindows, Resample

CPU = torch.device("cpu")


@pytest.fixture
def run(trained: Path) -> RunPaths:
    sweep = SweepPaths(trained / "multirun_reports" / "s")
    return sweep.run(sweep.read_record().jobs[0])


@pytest.fixture
def model(run: RunPaths) -> Ensemble:
    return load_ensemble([str(run.root)], CPU)


def ours(model: Ensemble, hu: np.ndarray) -> np.ndarray:
    small = np.stack([resize_area(h, 48) for h in hu])
    return sigmoid(model.logits({48: small})[:, 0])


# The graph is what the predictor does step by step


@pytest.mark.parametrize(("cached", "size"), [(48, 32), (32, 32), (40, 64), (96, 75)])
def test_resampling_is_a_matrix(cached: int, size: int) -> None:
    resample = Resample(size, NO_AUGMENT)
    hu = torch.from_numpy(made_up_slices(cached))
    matrix = resample.matrix(cached)
    torch.testing.assert_close(
        (matrix @ hu.float() @ matrix.T).unsqueeze(1), resample(hu), rtol=1e-5, atol=1e-2
    )


def test_windows_are_in_the_graph(model: Ensemble) -> None:
    """With a network that hands its input through, the graph's output is the network's input."""

    class Through(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    windows = (WindowConfig("brain", 40, 80), WindowConfig("bone", 600, 2800))
    metadata = replace(model.members[0].metadata, windows=windows, mean=(0.5, 0.4), std=(0.2, 0.3))
    hu = made_up_slices(48)
    graph = Graph(Through(), metadata)  # type: ignore[arg-type]
    planes = Resample(32, NO_AUGMENT)(torch.from_numpy(hu))
    expected = CTWindows(windows, "cpu", (0.5, 0.4), (0.2, 0.3))(planes)
    torch.testing.assert_close(graph(torch.from_numpy(hu)), expected, rtol=1e-4, atol=1e-4)


# Each format


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run of the sweep in all three formats, for slices of 64 pixels."""
    sweep = SweepPaths(trained / "multirun_reports" / "s")
    root, out = sweep.run(sweep.read_record().jobs[0]).root, tmp_path_factory.mktemp("exports")
    for kind in EXPORTS:
        words = ["--model", root, "--format", kind, "-o", out, "--size", 64, "--resamples", 50]
        assert main([str(w) for w in words]) == 0
    return out


@pytest.fixture
def slices(phantom: Path) -> np.ndarray:
    files = sorted((phantom / "stage_2_train").glob("*.dcm"))[:5]
    return np.stack([read_hu(f.read_bytes()) for f in files])


def test_the_onnx_file_runs_in_onnxruntime(
    exported: Path, model: Ensemble, slices: np.ndarray
) -> None:
    path = exported / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (said,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("hu", "tensor(int16)", [64, 64])
    assert said.name == "probability"
    for batch in (slices, slices[:1]):
        (found,) = session.run(None, {"hu": batch})
        np.testing.assert_allclose(found, ours(model, batch), atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert Metadata.from_json(told["ich"]) == model.members[0].metadata
    assert "research and education only" in told["intended_use"]


def test_the_torch_export_runs_without_ich(
    exported: Path, model: Ensemble, slices: np.ndarray
) -> None:
    told = {"ich.json": ""}
    program = torch.export.load(exported / "model.pt2", extra_files=told)
    with torch.no_grad():
        for batch in (slices, slices[:1]):
            found = program.module()(torch.from_numpy(batch)).numpy()
            np.testing.assert_allclose(found, ours(model, batch), atol=1e-5)
    assert Metadata.from_json(json.loads(told["ich.json"])["ich"]) == model.members[0].metadata
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        for name in archive.namelist():
            assert not archive.read(name).startswith(b"PK"), name  # what torch.save pickles into


def test_the_safetensors_file_predicts_alone(
    exported: Path, model: Ensemble, slices: np.ndarray, tmp_path: Path
) -> None:
    shutil.copy(exported / "model.safetensors", tmp_path / "elsewhere.safetensors")
    alone = load_ensemble([str(tmp_path / "elsewhere.safetensors")], CPU)
    np.testing.assert_array_equal(ours(alone, slices), ours(model, slices))
    assert alone.thresholds == model.thresholds


def test_slices_of_the_caches_size_and_larger_ones_agree(
    model: Ensemble, slices: np.ndarray
) -> None:
    network, metadata = model.members[0].network, model.members[0].metadata
    small = np.stack([resize_area(square(h[:, 4:-4]), 48) for h in slices])
    with torch.no_grad():
        found = Graph(network.model, metadata)(torch.from_numpy(small)).numpy()
    np.testing.assert_allclose(found, network.logits(small), atol=1e-4)


def test_a_file_that_differs_is_not_kept(
    model: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("earlier")
    monkeypatch.setattr(
        exporting, "_reader", lambda *_: lambda hu: np.full((len(hu), 6), 0.5, np.float32)
    )
    with pytest.raises(UserError, match=r"gives probabilities that differ by .* was not kept"):
        export(model, "onnx", tmp_path, 64, 0)
    monkeypatch.setattr(
        exporting, "_reader", lambda *_: lambda hu: np.full((len(hu), 6), np.nan, np.float32)
    )
    with pytest.raises(UserError, match="differ by nan"):
        export(model, "onnx", tmp_path, 64, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "earlier"


def test_without_its_packages_onnx_is_refused(
    model: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "has_onnx", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'ich\[onnx\]'. --format torch_export"):
        export(model, "onnx", tmp_path, 64, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "16"], "--size is 16, but must be from 48, the size of the slices"),
        (["--resamples", "-1"], "--resamples is -1"),
    ],
)
def test_a_value_out_of_range_is_refused(
    run: RunPaths, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--model", str(run.root), "--format", "onnx", *words]) == 2
    assert message in capsys.readouterr().err


# The card


def test_the_card_says_what_is_known(exported: Path, run: RunPaths) -> None:
    card = (exported / "model_card.md").read_text()
    fit = run.read_result().fit
    for text in (
        "# Model card: mobilenet_v2",
        "brain (40/80), subdural (80/200), soft_tissue (40/380)",
        f"cohort {fit.cohort.cohort}",
        "There is no test set: the same rows chose the epoch and the thresholds, and scored.",
        f"{fit.cohort.leak['patient']:.1%} of the scored rows the patient",
        "Not a medical device",
        "Trained on synthetic slices: its metrics say nothing about a patient.",
        "without intervals",  # eight patients
        "Synthetic slices, made by ich.phantom",
        "The initial weights were random.",
        f"| auc | {fit.scores['auc']:.4f} |",
        f"| accuracy | {fit.scores['accuracy']:.4f} |",
    ):
        assert text in card, text
    for label, threshold in load_ensemble([str(run.root)], CPU).thresholds.items():
        assert f"| {label} | {threshold:.4f} |" in card


@pytest.mark.parametrize(
    ("source", "text"),
    [("rsna", "non-commercial research and education only"), ("folder", "terms ich does not know")],
)
def test_the_card_names_the_datas_licence(
    run: RunPaths, tmp_path: Path, source: str, text: str
) -> None:
    shutil.copytree(run.root, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("source: phantom", f"source: {source}"))
    card = model_card(load_ensemble([str(tmp_path / "run")], CPU), "It takes HU.", 0)
    assert text in card
    assert "It takes HU." in card


def test_a_model_without_its_run_has_no_card(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(run.best, tmp_path / "alone.safetensors")
    words = ["--model", str(tmp_path / "alone.safetensors"), "--format", "safetensors"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "has no finished run beside it" in capsys.readouterr().err
    shutil.copytree(run.root, tmp_path / "run")
    (tmp_path / "run" / "predictions.npz").write_bytes(b"x")
    assert main(["--model", str(tmp_path / "run"), "--format", "safetensors"]) == 2
    assert "so the model card would have no metric" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sound_run_is_carded_by_its_test_rows(run: RunPaths, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "run")
    with np.load(run.predictions) as file:
        arrays = dict(file)
    rng = np.random.default_rng(0)
    rows, patients = 400, 20
    arrays |= {
        "test_image_id": np.array([f"ID_t{n}" for n in range(rows)]),
        "test_patient": 1000 + np.arange(rows) % patients,
        "test_study": 1000 + np.arange(rows) % patients,
        "test_target": (rng.random((rows, 6)) < 0.4).astype(np.float32),
        "test_logits": rng.normal(size=(rows, 6)).astype(np.float32),
    }
    np.savez_compressed(tmp_path / "run" / "predictions.npz", **arrays)
    card = model_card(load_ensemble([str(tmp_path / "run")], CPU), "", 100)
    assert "Per slice, on the test rows, with 95 % intervals from 100 bootstrap resamples" in card
    assert "| metric | test | validation |" in card
    assert all(k in card for k in LABELS)

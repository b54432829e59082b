"""A network that sees the slices around a slice: predicted, explained, evaluated and exported."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from commands import run_module
from dicom_files import STORED, dataset, encoded
from sweeps import TINY

from ich.base.config import ModelConfig, WindowConfig
from ich.base.metadata import Metadata
from ich.base.results import SweepPaths
from ich.data.decode import resize_area, square
from ich.data.dicom import DicomError, Slice, read_slice
from ich.data.inputs import Inputs
from ich.data.phantom.spec import LABELS
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.explain import explain
from ich.inference.export import made_up_slices
from ich.inference.gradcam import grad_cams
from ich.inference.graph import Graph, write_onnx
from ich.inference.predicted_files import PredictedFiles, predict_files
from ich.inference.session import Session
from ich.predict import main as predict_main
from ich.scoring.metrics import sigmoid
from ich.serving import Server
from ich.training.model import build_model, save_weights

CPU = torch.device("cpu")
WINDOWS = (WindowConfig("brain", 40, 80), WindowConfig("wide", 80, 400), WindowConfig("b", 0, 900))


def write_weights(path: Path, context: str, windows: int) -> None:
    """Of a network that nobody trained."""
    metadata = Metadata(
        model="mobilenet_v2",
        timm="mobilenetv2_100.ra_in1k",
        labels=LABELS,
        windows=WINDOWS[:windows],
        cache_size=48,
        image_size=32,
        mean=(0.5, 0.4, 0.3),
        std=(0.1, 0.2, 0.3),
        thresholds=dict.fromkeys(LABELS, 0.5),
        context=context,
    )
    torch.manual_seed(windows)
    cfg = ModelConfig("mobilenet_v2", metadata.timm, 32, pretrained=False)
    model = build_model(cfg, metadata.channels, len(LABELS))
    torch.nn.init.normal_(model.head.weight)  # else all logits are nearly alike
    save_weights(model, path, metadata)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    kinds = {"first": ("neighbours", 1), "all": ("neighbours", 3), "slice": ("slice", 3)}
    for name, (context, windows) in kinds.items():
        write_weights(folder / f"{name}.safetensors", context, windows)
    return {name: folder / f"{name}.safetensors" for name in kinds}


@pytest.fixture(scope="module")
def files(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two studies, one in two folders; of it a slice in the middle is damaged, and one does not say
    where it lies; and a slice of nobody."""
    root = tmp_path_factory.mktemp("files")
    studies: dict[str, list[tuple[float, Path]]] = {}
    for file in sorted((phantom / "stage_2_train").glob("*.dcm")):
        found = read_slice(file.read_bytes())
        studies.setdefault(found.study, []).append((found.position, file))
    first, second, *_ = (sorted(s) for s in studies.values())
    out = []
    for n, (_, file) in enumerate([*first[:9], *second[:5]]):
        folder = root / ("a" if n % 2 else "b")
        folder.mkdir(exist_ok=True)
        out.append(folder / file.name)
        shutil.copy(file, out[-1])
    out[3].write_bytes(out[3].read_bytes()[:-500])
    data = pydicom.dcmread(out[6])
    del data.ImagePositionPatient
    data.save_as(out[6])
    out.append(root / "nobody.dcm")
    out[-1].write_bytes(encoded(dataset(STORED)))
    return sorted(out)


def by_a_loop(model: Ensemble, files: Sequence[Path]) -> np.ndarray:
    """float32 [N, M, L], NaN for what cannot be read."""
    slices: dict[int, Slice] = {}
    for n, file in enumerate(files):
        with suppress(DicomError):
            slices[n] = read_slice(file.read_bytes())
    hu = {n: resize_area(square(s.hu), 48) for n, s in slices.items()}
    logits = np.full((len(files), len(model.members), len(LABELS)), np.nan, np.float32)
    for n, own in slices.items():
        around = [n] * 3
        if own.series and np.isfinite(own.position):
            placed = sorted((s.position, m) for m, s in slices.items() if s.series == own.series)
            order = [m for p, m in placed if np.isfinite(p)]
            at = order.index(n)
            around = [order[max(at - 1, 0)], n, order[min(at + 1, len(order) - 1)]]
        seen = np.stack([hu[m] for m in around])[None]
        for k, member in enumerate(model.members):
            own_hu = seen if member.metadata.slices == 3 else seen[:, 1]
            logits[n, k] = member.network.logits(own_hu)[0]
    return logits


def predicted(model: Ensemble, files: Sequence[Path], **options: object) -> PredictedFiles:
    inputs = Inputs.find([str(f) for f in files])
    return predict_files(model, inputs, lambda _, uid: uid, lambda *_: None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("first",), ("all",), ("slice", "first")])
def test_predictions_are_those_of_a_plain_loop(
    weights: dict[str, Path], files: list[Path], names: tuple[str, ...]
) -> None:
    model = load_ensemble([str(weights[n]) for n in names], CPU)
    expected = by_a_loop(model, files)
    for options in ({}, {"batch_size": 3}, {"batch_size": 4, "workers": 2}):
        found = predicted(model, files, **options)
        assert list(found.reasons) == np.flatnonzero(np.isnan(expected[:, 0, 0])).tolist()
        np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)
        assert len(found.reasons) == 1
        assert found.lone == 2  # one that does not say where it lies, and nobody's


def test_a_converted_network_gives_the_same(
    weights: dict[str, Path], files: list[Path], tmp_path: Path
) -> None:
    names = [str(weights["all"]), str(weights["slice"])]
    converted = predicted(load_ensemble(names, CPU, None, tmp_path), files, tta="flips")
    plain = predicted(load_ensemble(names, CPU), files, tta="flips")
    np.testing.assert_allclose(converted.logits, plain.logits, atol=1e-3)


@pytest.mark.parametrize("name", ["first", "all"])
def test_an_exported_graph_takes_three_slices(
    weights: dict[str, Path], tmp_path: Path, name: str
) -> None:
    network = load_ensemble([str(weights[name])], CPU).members[0].network
    hu = made_up_slices(96)
    hu = np.stack([np.roll(hu, 1, 0), hu, np.roll(hu, -1, 0)], 1)
    small = np.stack([resize_area(h, 48) for h in hu.reshape(-1, 96, 96)]).reshape(-1, 3, 48, 48)
    expected = sigmoid(network.logits(small))
    graph = Graph(network.model, network.metadata, 96, probabilities=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(graph(torch.from_numpy(hu)).numpy(), expected, atol=1e-3)
    write_onnx(graph, tmp_path / "m.onnx")
    np.testing.assert_allclose(Session(tmp_path / "m.onnx", 1)(hu), expected, atol=1e-3)


def test_the_map_is_that_of_the_three_slices(
    weights: dict[str, Path], files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_ensemble([str(weights["first"])], CPU).with_thresholds("0")
    inputs = Inputs.find([str(f) for f in files])
    found = predict_files(model, inputs, lambda _, uid: uid[-4:], lambda *_: None)
    maps = []

    def noted(network: object, hu: np.ndarray, *rest: object) -> np.ndarray:
        maps.append(hu)
        return grad_cams(network, hu, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("ich.inference.gradcam.grad_cams", noted)
    names = [inputs.name(n) for n in range(len(inputs))]
    pages = explain(model, inputs, found, names, tmp_path / "out", lambda *_: None)
    assert len(pages) == 3  # two studies, and nobody
    assert {hu.shape[1:] for hu in maps} == {(3, 48, 48)}
    assert sum(len(hu) for hu in maps) == len(found.numbers)


def test_the_output_says_which_slices_stood_for_their_neighbours(
    weights: dict[str, Path],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(f) for f in files]
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert predict_main([*given, "--model", str(weights["first"]), "-o", "out.csv"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "Each slice was seen with the one before and the one after it in its series." in said
    assert "2 slices are alone in their series, or do not say where they lie" in said
    assert predict_main([given[0], "--model", str(weights["first"]), "-o", "one.csv"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 slices are alone in their series" in said


def test_a_request_s_rows_are_seen_with_their_series(
    weights: dict[str, Path], files: list[Path]
) -> None:
    """As predicted; a row of `hu` without a series is by itself, and one that is no slice nobody's
    neighbour."""
    model, server = load_ensemble([str(weights["first"])], CPU), Server(weights["first"])
    expected = sigmoid(by_a_loop(model, files)[:, 0])
    rows = [{"dicom": base64.b64encode(f.read_bytes()).decode()} for f in files]
    found = server.predict(pd.DataFrame(rows))
    values = found[list(LABELS)].to_numpy(float)
    np.testing.assert_allclose(values, expected, atol=1e-4)
    read = found["reason"] == ""
    assert found.loc[read, "alone"].sum() == 2
    assert (~read).sum() == 1
    hu = np.random.default_rng(0).integers(-100, 150, (4, 48, 48), np.int16)
    given = [{"hu": h.tolist(), "series": "s"} for h in hu[:3]] + [{"hu": hu[3].tolist()}]
    found = server.predict(pd.DataFrame(given))
    around = np.stack([hu[[0, 0, 1]], hu[[0, 1, 2]], hu[[1, 2, 2]], hu[[3, 3, 3]]])
    expected = sigmoid(model.members[0].network.logits(around))
    np.testing.assert_allclose(found[list(LABELS)].to_numpy(float), expected, atol=1e-4)
    assert found["alone"].tolist() == [False, False, False, True]
    assert server.predict(None)["reason"].str.startswith("neither dicom").all()
    assert len(server.predict(pd.DataFrame({"hu": []}))) == 0


@pytest.mark.faults
def test_a_sweep_and_all_that_follows(phantom: Path, tmp_path: Path) -> None:
    """Trained, predicted, evaluated on its own rows, exported and repeated."""
    swept = ("-m", "name=s", "model=mobilenet_v2", "context=slice,neighbours", "protocol=sound")
    few = ("protocol.negatives_per_positive=2", "protocol.oversample=null", "train.epochs=1")
    own = (f'data.root="{phantom}"', *TINY, *few, "train.precision=fp32", "tracking=none")
    done = run_module("sweep", *swept, *own, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = SweepPaths(tmp_path / "multirun_reports" / "s")
    run = sweep.run("mobilenet_v2,context=neighbours")
    table = pd.read_csv(sweep.csv)
    assert {"mobilenet_v2,context=neighbours", "mobilenet_v2,context=slice"} <= set(table["job"])
    again = run_module("sweep", *swept, *own, cwd=tmp_path)
    assert "2 finished before" in again.stdout
    with np.load(run.predictions) as saved:
        ids, logits = saved["test_image_id"].tolist(), saved["test_logits"]
    files = [phantom / "stage_2_train" / f"{i}.dcm" for i in ids]
    done = run_module("predict", "--model", run.root, *files, "-o", "o.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = pd.read_csv(tmp_path / "o.csv").set_index("file").loc[[str(f) for f in files]]
    np.testing.assert_allclose(found[list(LABELS)].to_numpy(), sigmoid(logits), atol=1e-4)
    evaluated = (f"models='{run.root}'", "rows=test", "resamples=0", "name=e")
    done = run_module("evaluate", *evaluated, *own[:1], "protocol=sound", *few[:2], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = pd.read_csv(tmp_path / "multirun_reports" / "evaluations" / "e" / "evaluation.csv")
    auc = metrics[(metrics["metric"] == "auc") & (metrics["level"] == "slice")]["here"].item()
    fit = run.read_result().fit
    assert fit is not None
    assert auc == pytest.approx(fit.scores["auc"], abs=1e-4)
    for kind in ("torch_export", "safetensors"):
        options = ("--model", run.root, "--format", kind, "-o", kind, "--resamples", 0)
        done = run_module("export", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    card = (tmp_path / "torch_export" / "model_card.md").read_text()
    assert "batch, 3, 512, 512" in card
    assert "It sees the slices before, at and after one" in card
    done = run_module("rerun", run.root, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical" in done.stdout

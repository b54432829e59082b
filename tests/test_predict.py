"""From a finished run to probabilities of new scans: as in training, whatever the input."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from canaries import Canaries
from commands import run_module, start_module
from dicom_files import STORED, dataset, encoded
from made_up import Bomb
from sweeps import alive, wait_for

from ich.base.config import UserError
from ich.base.entry import Status
from ich.base.results import RunPaths, SweepPaths
from ich.data.dicom import read_hu, read_slice
from ich.data.inputs import Inputs
from ich.data.phantom.spec import LABELS
from ich.data.store import SliceStore
from ich.inference import ensemble as ensembles
from ich.inference import predicted_files
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.export import ExportOptions
from ich.inference.export import run as run_export
from ich.inference.outputs import RSNA_LABELS, image_id_of
from ich.inference.predict import conversion_folder
from ich.inference.predicted_files import predict_files
from ich.predict import main, parse
from ich.scoring.metrics import best_thresholds, sigmoid
from ich.tracking.store import MlflowStore, TrackingConfig

CPU = torch.device("cpu")
Predict = Callable[..., int]
Capture = pytest.CaptureFixture


@pytest.fixture
def runs(trained: Path) -> list[Path]:
    sweep = SweepPaths(trained / "multirun_reports" / "s")
    return [sweep.run(job).root for job in sweep.read_record().jobs]


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Runs the command in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*words: object) -> int:
        return main([str(w) for w in words])

    return call


def slices_of(phantom: Path) -> list[Path]:
    return sorted((phantom / "stage_2_train").glob("*.dcm"))


def probabilities(table: pd.DataFrame) -> np.ndarray:
    return table[list(LABELS)].to_numpy()


# The same numbers as in training


def test_probabilities_are_those_of_the_runs_own_validation(
    runs: list[Path], phantom: Path, predict: Predict
) -> None:
    with np.load(runs[0] / "predictions.npz") as file:
        ids, logits = file["val_image_id"], file["val_logits"]
    files = [phantom / "stage_2_train" / f"{i}.dcm" for i in dict.fromkeys(ids.tolist())]
    assert predict("--model", runs[0], *files, "-o", "out.csv") == 0
    table = pd.read_csv("out.csv").set_index("file")
    found = table.loc[[str(phantom / "stage_2_train" / f"{i}.dcm") for i in ids]]
    np.testing.assert_allclose(probabilities(found), sigmoid(logits), atol=1e-5)


def test_the_callers_folder_and_workers_change_nothing(
    runs: list[Path], phantom: Path, predict: Predict
) -> None:
    for n, options in enumerate(([], ["--workers", 3], ["--batch-size", 7])):
        assert predict("--model", runs[0], phantom, "-o", f"{n}.csv", *options) == Status.LEFT_OUT
    first, second, third = (pd.read_csv(f"{n}.csv") for n in range(3))
    pd.testing.assert_frame_equal(first, second)
    np.testing.assert_allclose(probabilities(third), probabilities(first), atol=1e-5)
    assert len(first) == len(slices_of(phantom))


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_study_has_its_highest_slice_and_the_mean_of_three(
    runs: list[Path], phantom: Path, predict: Predict, capsys: Capture
) -> None:
    files = slices_of(phantom)
    predict("--model", runs[0], *files, "-o", "out.parquet", "--threshold", "any=0.3")
    slices, studies = pd.read_parquet("out.parquet"), pd.read_parquet("out.studies.parquet")
    assert slices["file"].tolist() == [str(f) for f in files]
    headers = [pydicom.dcmread(f, stop_before_pixels=True).StudyInstanceUID for f in files]
    together = pd.crosstab(slices["study"], pd.Series([str(h) for h in headers]))
    one_to_one = [(together.to_numpy() > 0).sum(axis).tolist() for axis in (0, 1)]
    assert one_to_one == [[1] * len(studies)] * 2
    for _, row in studies.iterrows():
        mine = slices[slices["study"] == row["study"]]
        assert row["slices"] == len(mine)
        for k in LABELS:
            ranked = mine.sort_values(k, ascending=False)
            assert row[k] == pytest.approx(ranked[k].iloc[0])
            assert row[f"{k}_top3"] == pytest.approx(ranked[k].iloc[:3].mean())
            assert row[f"{k}_slice"] == ranked["file"].iloc[0]
        assert ("any" in row["positive"].split(";")) == (row["any"] >= 0.3)
    said = capsys.readouterr().out
    assert "any 0.300: as given; else the best F1 on the run's validation rows" in said
    assert studies["study"][0] in said


def test_thresholds_are_those_of_the_best_epochs_validation(runs: list[Path]) -> None:
    with np.load(runs[0] / "predictions.npz") as file:
        expected = best_thresholds(file["val_logits"], file["val_target"], LABELS)
    model = load_ensemble([str(runs[0])], CPU)
    assert model.thresholds == {k: 0.5 if t is None else t for k, t in expected.items()}


@pytest.mark.parametrize(
    "given",
    [
        "x",
        "1.5",
        "any=0.5,any2=0.5",
        "nan",
        "any=",
        "=0.5,any=0.1",
        "0,1",
        "0.3,0.5",
        "any=0.3,any=0.9",
        "=0.5",
        "",
    ],
)
def test_a_threshold_that_is_none_is_refused(runs: list[Path], given: str) -> None:
    model = load_ensemble([str(runs[0])], CPU)
    with pytest.raises(UserError, match=r"--threshold is .* from 0 to 1, .* The labels are"):
        model.with_thresholds(given)
    assert set(model.with_thresholds("0.25").thresholds.values()) == {0.25}


def test_onnxruntime_gives_the_same_and_converts_once(
    runs: list[Path], phantom: Path, predict: Predict
) -> None:
    files = slices_of(phantom)[:40]
    for engine in ("torch", "onnx", "onnx"):
        assert predict("--model", runs[0], *files, "-o", f"{engine}.csv", "--engine", engine) == 0
        made = [(p.name, p.stat().st_mtime_ns) for p in Path(".ich-cache").glob("onnx/*")]
        assert len(made) == (engine == "onnx")
    by_torch, by_onnx = (probabilities(pd.read_csv(f"{e}.csv")) for e in ("torch", "onnx"))
    np.testing.assert_allclose(by_onnx, by_torch, atol=1e-5)


@pytest.mark.parametrize("memory", [2**40, 0])
def test_processes_that_predict_give_what_one_does(
    runs: list[Path], phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(ensembles, "available_memory", lambda: memory)
    model = load_ensemble([str(r) for r in runs[:2]], CPU, None, tmp_path)
    assert len(model.converted_for(2)) == (2 if memory else 0)
    inputs = Inputs.find([*map(str, slices_of(phantom)[:30]), __file__])
    one, two = (
        predict_files(model, inputs, lambda _, key: key, lambda *_: None, "flips", 8, workers)
        for workers in (1, 2)
    )
    np.testing.assert_allclose(two.logits, one.logits, atol=1e-5)
    assert two.reasons == one.reasons == {30: "not a DICOM file (no DICM prefix)"}
    assert (two.study, two.series) == (one.study, one.series)
    np.testing.assert_array_equal(two.position, one.position)


def test_many_files_on_a_cpu_are_worth_converting(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse(["a", "--model", "b", "-o", "c.csv"])
    folder = Path(".ich-cache/onnx")
    assert [conversion_folder(options, CPU, n) for n in (2999, 3000)] == [None, folder]
    assert conversion_folder(options, torch.device("cuda"), 3000) is None
    options = replace(options, engine="onnx")
    assert conversion_folder(options, CPU, 1) == folder
    monkeypatch.setattr("ich.inference.predict.has_onnx", lambda: False)
    with pytest.raises(UserError, match=r"--engine is onnx, .* pip install 'ich\[onnx\]'"):
        conversion_folder(options, CPU, 1)


# Ensembles and flips


def test_an_ensemble_averages_logits_and_shows_each(
    runs: list[Path], phantom: Path, predict: Predict, capsys: Capture
) -> None:
    files = slices_of(phantom)[:20]
    for n, run in enumerate(runs):
        predict("--model", run, *files, "-o", f"{n}.csv")
    predict("--model", runs[0], "--model", runs[1], *files, "-o", "both.csv")
    each = [probabilities(pd.read_csv(f"{n}.csv")) for n in (0, 1)]
    both = pd.read_csv("both.csv")
    logits = np.mean([np.log(p / (1 - p)) for p in each], axis=0)
    np.testing.assert_allclose(probabilities(both), sigmoid(logits), atol=1e-6)
    for run, p in zip(runs, each, strict=True):
        np.testing.assert_allclose(both[[f"{k}@{run.name}" for k in LABELS]], p, atol=1e-6)
    assert "the best F1 of the average on the members' common validation" in capsys.readouterr().out


def test_an_ensembles_threshold_comes_from_its_average(runs: list[Path]) -> None:
    files = [np.load(r / "predictions.npz") for r in runs]
    logits = np.mean([f["val_logits"] for f in files], axis=0)
    expected = best_thresholds(logits, files[0]["val_target"], LABELS)
    model = load_ensemble([str(r) for r in runs], CPU)
    assert model.thresholds["any"] == pytest.approx(expected["any"])
    lone = [str(r / "best.safetensors") for r in runs]
    assert model.validation is not None
    again = load_ensemble(lone, CPU)
    assert again.thresholds == model.thresholds  # the run lies beside its weights


def test_members_without_common_rows_have_the_mean_of_their_thresholds(
    runs: list[Path], tmp_path: Path
) -> None:
    shutil.copy(runs[0] / "best.safetensors", tmp_path / "a.safetensors")
    model = load_ensemble([str(tmp_path / "a.safetensors"), str(runs[1])], CPU)
    each = [load_ensemble([str(r)], CPU).thresholds["any"] for r in runs]
    assert model.thresholds["any"] == pytest.approx(np.mean(each))
    assert "for their validation rows differ or are gone" in model.chosen_by
    assert model.name.startswith("a + ")


def test_flips_are_the_mean_over_flipped_slices(runs: list[Path], phantom: Path) -> None:
    network = load_ensemble([str(runs[0])], CPU).members[0].network
    hu = np.stack([read_hu(f.read_bytes()) for f in slices_of(phantom)[:3]])[:, 8:56, 8:56]
    flipped = [hu, hu[:, :, ::-1], hu[:, ::-1], hu[:, ::-1, ::-1]]
    one_by_one = [network.logits(f.copy()) for f in flipped]
    found = network.logits(hu.copy(), "flips")
    np.testing.assert_allclose(found, np.mean(one_by_one, axis=0), atol=1e-5)
    assert not np.allclose(found, one_by_one[0], atol=1e-4)


def test_networks_of_other_labels_are_not_averaged(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ensembles.Network

    def other(weights: Path, *args: object) -> ensembles.Network:
        network = real(weights, *args)
        if "seed=1" in str(weights):
            network.metadata = replace(network.metadata, labels=("a", *LABELS[1:]))
        return network

    monkeypatch.setattr(ensembles, "Network", other)
    with pytest.raises(UserError, match=r"different labels: .*seed=0 has epidural, .* a, "):
        load_ensemble([str(r) for r in runs], CPU)


# Where a model comes from


def test_mlflow_names_lead_to_the_same_weights(
    trained: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    of_run = {RunPaths(r).read_tracking().mlflow_run: r for r in runs}
    store = MlflowStore(TrackingConfig(mlflow=True))
    best = of_run[store.client.get_model_version_by_alias("ich", "best").run_id]
    names = {**of_run, f"runs:/{next(iter(of_run))}": runs[0]}
    names |= {"models:/ich@best": best, "models:/ich/1": best}
    for name, run in names.items():
        model = load_ensemble([name], CPU)
        for mine, theirs in zip(
            model.members[0].network.model.parameters(),
            load_ensemble([str(run)], CPU).members[0].network.model.parameters(),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        assert model.name == run.name
        assert model.validation is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multirun_reports", r"nothing to predict with. Give the folder of a finished run"),
        ("nothing", r"nothing to predict with. Give the folder of a finished run"),
        ("mlflow.db", r"nothing to predict with"),
        ("models:/ich@nobody", r"cannot be had from MLflow at mlflow.db \(.*`make ui` shows"),
        ("0" * 32, r"cannot be had from MLflow"),
    ],
)
def test_what_is_no_model_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match=message):
        load_ensemble([name], CPU)


def test_a_sweep_stands_for_its_ensemble(trained: Path, tmp_path: Path) -> None:
    sweep = SweepPaths(shutil.copytree(trained / "multirun_reports" / "s", tmp_path / "s"))
    jobs = [r.job for r in sweep.read_results()]
    assert [m.name for m in load_ensemble([str(sweep.root)], CPU).members] == jobs
    sweep.write_ensemble(jobs[1:])  # as a report with a test set chooses
    assert [m.name for m in load_ensemble([str(sweep.root)], CPU).members] == jobs[1:]
    for damaged in ('{"jobs": ["../other"]}', '{"jobs": []}', "{"):
        sweep.ensemble.write_text(damaged)
        assert len(sweep.ensemble_runs()) == 2
    options = ExportOptions(str(sweep.root), "safetensors", tmp_path / "o", 512, 0, None)
    with pytest.raises(UserError, match=r"stands for 2 networks, and an exported file holds one"):
        run_export(options)


def test_without_a_database_an_mlflow_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, name in ((None, "mlflow.db"), ("sqlite:///typo/no.db", "no.db")):
        store = TrackingConfig(mlflow=True, uri=uri)
        with pytest.raises(UserError, match=f"there is no MLflow database .*{name}"):
            load_ensemble(["models:/ich@best"], CPU, store)
    assert not list(tmp_path.iterdir())


def test_a_runs_folder_with_code_or_other_weights_is_refused(
    runs: list[Path], tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("name: mobilenet_v2", "name: vgg16"))
    assert predict("--model", tmp_path / "run", tmp_path, "-o", "out.csv") == 2
    assert "holds weights of mobilenet_v2, but the run beside it" in capsys.readouterr().err
    best.write_bytes(pickle.dumps(Bomb()))
    assert predict("--model", tmp_path / "run", tmp_path, "-o", "out.csv") == 2
    assert "can carry code and are not read" in capsys.readouterr().err
    assert [p.name for p in Path().iterdir()] == [".ich-cache"]  # nor "executed"


# What is given


def test_files_folders_and_archives_mixed(phantom: Path, tmp_path: Path) -> None:
    files = slices_of(phantom)[:9]
    folder = tmp_path / "scans" / "deep"
    folder.mkdir(parents=True)
    for file in files[:3]:
        shutil.copy(file, folder)
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for n, file in enumerate(files[3:7]):
            z.write(file, f"{'ab'[n % 2]}/{file.name}")
    given = [*map(str, files[7:]), f"{tmp_path}/scans", f"{archive}/b", str(archive), str(files[8])]
    inputs = Inputs.find(given)
    names = [inputs.name(n) for n in range(len(inputs))]
    assert len(names) == len(set(names)) == len(inputs) == 9
    assert names[:2] == [str(f) for f in files[7:]]
    assert names[2:5] == [str(folder / f.name) for f in files[:3]]
    assert [n.split("scans.zip/")[1][0] for n in names[5:]] == ["b", "b", "a", "a"]
    again = Inputs.find(names)
    assert [again.name(n) for n in range(9)] == names
    one_folder = Inputs.find([str(f) for f in files]).batches(4, (32,))
    assert [request.numbers for request in one_folder] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    requests = list(inputs.requests([8, 0, 3], (32,)))
    assert sorted(n for request in requests for n in request.numbers) == [0, 3, 8]


def test_what_is_given_twice_is_there_once(phantom: Path, tmp_path: Path) -> None:
    deep = tmp_path / "scans" / "deep"
    deep.mkdir(parents=True)
    for file in slices_of(phantom)[:3]:
        shutil.copy(file, deep)
    inputs = Inputs.find([f"{tmp_path}/scans", str(deep), str(next(deep.iterdir()))])
    assert len(inputs) == 3


def test_nothing_vanishes(
    runs: list[Path], phantom: Path, tmp_path: Path, predict: Predict
) -> None:
    scans, files = tmp_path / "scans", slices_of(phantom)
    scans.mkdir()
    shutil.copy(files[0], scans / "a.dcm")
    (scans / "linked").symlink_to(phantom / "stage_2_train")
    (tmp_path / "tail.dcm").write_bytes(files[1].read_bytes() + b"PK\5\6" + bytes(18))
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4")
    given = [scans, tmp_path / "cut.zip", tmp_path / "tail.dcm"]
    assert predict("--model", runs[0], *given, "-o", "out.csv") == Status.LEFT_OUT
    read = [str(scans / "a.dcm"), str(tmp_path / "tail.dcm")]
    assert pd.read_csv("out.csv")["file"].tolist() == read
    listed = pd.read_csv("out.left_out.csv").set_index("file")["reason"]
    assert listed[str(scans / "linked")] == "a symbolic link, which is not followed"
    assert "cannot be read" in listed[str(tmp_path / "cut.zip")]


def test_a_folder_that_cannot_be_opened_stands_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.dcm").touch()
    (tmp_path / "b.dcm").touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert SliceStore(tmp_path).paths == ["b.dcm", "closed"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none", "the input is 'none', which does not exist"),
        ("a.dcm/x", "the input is 'a.dcm/x', which does not exist"),
        ("broken.zip", "broken.zip: the directory of the zip archive cannot be read"),
        ("z.zip/x", "the archive z.zip holds no 'x'"),
        ("empty", "there is no file in empty"),
    ],
)
def test_an_input_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.dcm").write_bytes(b"x")
    Path("broken.zip").write_bytes(b"PK\3\4 and no more")
    Path("empty").mkdir()
    with zipfile.ZipFile("z.zip", "w") as z:
        z.writestr("a.dcm", b"x")
    with pytest.raises(UserError, match=message):
        Inputs.find([given])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.dcm": (lambda: b"", "the file is empty"),
    "page.dcm": (lambda: b"<html>" * 99, "not a DICOM file"),
    "image.dcm": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(300), "not a DICOM file"),
    "cut.dcm": (lambda: encoded(dataset(STORED))[:-20], "pixel data cannot be decoded: 220 bytes"),
    "slope.dcm": (lambda: encoded(dataset(STORED), RescaleSlope=None), "RescaleSlope is None"),
    "zero.dcm": (lambda: encoded(dataset(STORED), RescaleSlope="0"), "RescaleSlope is 0"),
    "mono.dcm": (
        lambda: encoded(dataset(STORED), PhotometricInterpretation="MONOCHROME1"),
        "is 'MONOCHROME1'",
    ),
    "frames.dcm": (lambda: encoded(dataset(STORED), NumberOfFrames="2"), "multi-frame file"),
    "mr.dcm": (lambda: encoded(dataset(STORED), Modality="MR"), "Modality is 'MR'"),
    "scout.dcm": (
        lambda: encoded(dataset(STORED), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "ImageType says LOCALIZER",
    ),
    "coronal.dcm": (
        lambda: encoded(dataset(STORED), ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]),
        "more than 45 degrees from axial",
    ),
    "rgb.dcm": (lambda: encoded(dataset(STORED), SamplesPerPixel=3), "SamplesPerPixel is 3"),
    "bomb.dcm": (lambda: encoded(dataset(STORED), Rows=60000), "Rows is 60000"),
}


def test_what_is_no_slice_is_listed_and_stops_nothing(
    runs: list[Path], tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, (data, _) in REFUSED.items():
        (scans / name).write_bytes(data())
    stored = np.random.default_rng(1).integers(-100, 4000, (638, 490)).astype(np.int16)
    (scans / "tall.dcm").write_bytes(encoded(dataset(stored)))  # FAULTS 20: read, not refused
    os.mkfifo(scans / "pipe.dcm")
    (scans / "link.dcm").symlink_to(scans / "tall.dcm")
    (scans / "\x1b[31mred.dcm").write_bytes(b"")
    assert predict("--model", runs[0], scans, "-o", "out.csv") == Status.LEFT_OUT
    assert pd.read_csv("out.csv")["file"].tolist() == [str(scans / "tall.dcm")]
    listed = pd.read_csv("out.left_out.csv").set_index("file")["reason"]
    expected = {k: message for k, (_, message) in REFUSED.items()}
    expected |= {"pipe.dcm": "not a regular file", "link.dcm": "a symbolic link"}
    expected["\x1b[31mred.dcm"] = "the file is empty"
    assert len(listed) == len(expected)
    for name, message in expected.items():
        assert message in listed[str(scans / name)], name
    said = capsys.readouterr().out
    assert f"left out: {scans / 'mr.dcm'}: Modality is 'MR', not 'CT'" in said
    assert r"\x1b[31mred.dcm: the file is empty" in said
    assert "16 files left out, listed in out.left_out.csv" in said
    # Given themselves, the same; and with nothing else there is nothing to write.
    assert predict("--model", runs[0], scans / "pipe.dcm", scans / "link.dcm", "-o", "x.csv") == 2
    assert "none of the 2 files is a CT slice" in capsys.readouterr().err
    assert not Path("x.csv").exists()
    assert predict("--model", runs[0], scans / "tall.dcm", "-o", "out.csv") == 0
    assert not Path("out.left_out.csv").exists()


def test_a_slice_that_names_no_study_is_in_none(
    runs: list[Path], tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    (tmp_path / "a.dcm").write_bytes(encoded(dataset(STORED), StudyInstanceUID=None))
    assert predict("--model", runs[0], tmp_path / "a.dcm", "-o", "out.csv") == 0
    assert len(pd.read_csv("out.studies.csv")) == 0
    assert "1 slices name no study" in capsys.readouterr().out


def test_weights_with_a_nan_predict_nothing(
    runs: list[Path], phantom: Path, tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    model, metadata = ensembles.load_trained(runs[0] / "best.safetensors")
    with torch.no_grad():
        model.head.bias[2] = torch.nan
    from ich.training.model import save_weights

    save_weights(model, tmp_path / "nan.safetensors", metadata)
    files = slices_of(phantom)[:3]
    assert predict("--model", tmp_path / "nan.safetensors", *files, "-o", "out.csv") == 2
    assert "its logits are not finite" in capsys.readouterr().err


# What is written


def test_a_submission_is_the_competitions(
    runs: list[Path], phantom: Path, predict: Predict
) -> None:
    files = slices_of(phantom)[:4]
    words = ["--model", runs[0], *files, "-o", "out.csv", "--submission", "sub.csv"]
    assert predict(*words) == 0
    found, slices = pd.read_csv("sub.csv"), pd.read_csv("out.csv")
    assert found.columns.tolist() == ["ID", "Label"]
    assert found["ID"].tolist() == [f"{f.stem}_{k}" for f in files for k in RSNA_LABELS]
    assert found["Label"].tolist() == slices[list(RSNA_LABELS)].to_numpy().ravel().tolist()


def test_a_pseudonym_is_the_files_wherever_it_is_named_from(
    runs: list[Path], phantom: Path, predict: Predict
) -> None:
    first = slices_of(phantom)[0]
    for n, name in enumerate((first, os.path.relpath(first))):
        assert predict("--model", runs[0], name, "-o", f"{n}.csv", "--names", "pseudonym") == 0
    (one,), (other,) = (pd.read_csv(f"{n}.csv")["file"] for n in (0, 1))
    assert one == other
    assert re.fullmatch("[0-9a-f]{16}", one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--submission", "sub.parquet"], "--submission is 'sub.parquet', but must end with .csv"),
        (["--submission", "./out.csv"], "which is also where -o out.csv writes"),
        (["--submission", "out.studies.csv"], "which is also where -o out.csv writes"),
        (["--submission", "s.csv", "--names", "pseudonym"], "does not go with --names pseudonym"),
        (["--explain", "full"], "--explain is 'full', which holds something else than explan"),
        (["--explain", "full/file/x"], "--explain is 'full/file/x', which cannot be made a folder"),
        (["--explain", "."], "--explain is '.', where out.csv would go too"),
        (["--submission", "e/s.csv", "--explain", "e"], "--explain is 'e', where s.csv would go"),
    ],
)
def test_outputs_in_each_others_way_are_refused(
    predict: Predict, capsys: Capture, words: list[str], message: str
) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    assert predict("--model", "none", "nothing", "-o", "out.csv", *words) == 2
    assert message in capsys.readouterr().err


def test_files_of_odd_names_are_a_row_each(
    runs: list[Path], phantom: Path, predict: Predict, capsys: Capture
) -> None:
    """A carriage return split a row of out.csv."""
    Path("in").mkdir()
    names = ["a\rb.dcm", "caf\udce9.dcm", "\x1b[2J.dcm"]
    for name, file in zip(names, slices_of(phantom), strict=False):
        shutil.copy(file, Path("in", name))
    Path("in", "empty\r.dcm").touch()
    pages = ("--explain", "pages", "--threshold", "0")
    assert predict("--model", runs[0], "in", "-o", "out.csv", *pages) == Status.LEFT_OUT
    shown = ["in/\x1b[2J.dcm", "in/a\rb.dcm", r"in/caf\udce9.dcm"]
    assert sorted(pd.read_csv("out.csv")["file"]) == shown
    assert pd.read_csv("out.left_out.csv")["file"].tolist() == ["in/empty\r.dcm"]
    assert len(pd.read_csv("out.studies.csv")) >= 1
    assert not set(capsys.readouterr().out) & {"\r", "\x1b"}


def test_an_input_is_not_written_over_nor_half_the_outputs(
    runs: list[Path], phantom: Path, predict: Predict, capsys: Capture
) -> None:
    shutil.copy(slices_of(phantom)[0], "in.csv")
    before = Path("in.csv").read_bytes()
    assert predict("--model", runs[0], "in.csv", "-o", "./in.csv") == 2
    assert "-o in.csv would write over the input in.csv" in capsys.readouterr().err
    assert Path("in.csv").read_bytes() == before
    Path("out.studies.csv").mkdir()
    assert predict("--model", runs[0], "in.csv", "-o", "out.csv") == 2
    assert "-o is 'out.studies.csv', which cannot be written" in capsys.readouterr().err
    assert not Path("out.csv").exists()


def test_an_image_with_two_files_makes_no_submission(
    runs: list[Path], phantom: Path, tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    for folder, file in zip("ab", slices_of(phantom), strict=False):
        (tmp_path / folder).mkdir()
        shutil.copy(file, tmp_path / folder / "ID_1.dcm")
    given = [tmp_path / "a", tmp_path / "b"]
    assert predict("--model", runs[0], *given, "-o", "out.csv", "--submission", "s.csv") == 2
    assert "1 images have several files (the first: ID_1), so s.csv" in capsys.readouterr().err
    assert len(pd.read_csv("out.csv")) == 2
    assert not Path("s.csv").exists()


def test_names_that_differ_little_have_their_own_pseudonyms(
    runs: list[Path], phantom: Path, tmp_path: Path, predict: Predict, capsys: Capture
) -> None:
    names = [b"a.dcm", b"a.dcm ", b"a\xff.dcm", b"a\xfe.dcm"]
    (tmp_path / "scans").mkdir()
    for name in names:
        shutil.copy(slices_of(phantom)[0], os.fsencode(tmp_path / "scans") + b"/" + name)
    (tmp_path / "CANARY.zip").write_bytes(b"PK\3\4")
    words = [tmp_path / "scans", tmp_path / "CANARY.zip", "-o", "out.csv"]
    assert predict("--model", runs[0], *words, "--names", "pseudonym") == Status.LEFT_OUT
    assert pd.read_csv("out.csv")["file"].nunique() == 4
    assert "CANARY" not in Path("out.left_out.csv").read_text() + capsys.readouterr().out
    assert predict("--model", runs[0], *words) == Status.LEFT_OUT
    assert pd.read_csv("out.csv")["file"].nunique() == 4


def test_a_damaged_npz_is_none(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    with np.load(runs[0] / "predictions.npz") as file:
        arrays = dict(file)
    np.savez(
        tmp_path / "run" / "predictions.npz", **arrays | {"val_logits": arrays["val_logits"][:5]}
    )
    model = load_ensemble([str(tmp_path / "run"), str(runs[1])], CPU)
    assert model.validation is None


def test_only_a_dicom_ending_is_cut_from_animage_id_of() -> None:
    names = ("a/ID_1.dcm", "ID_2.DCM", "1.2.840.113", "x.ima")
    assert [image_id_of(n) for n in names] == ["ID_1", "ID_2", "1.2.840.113", "x"]


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_a_count_that_is_none_is_refused(count: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        parse(["a", "--model", "b", "-o", "c.csv", f"--batch-size={count}"])
    assert f"'{count}' is not a whole number from 1 on" in capsys.readouterr().err


def test_a_killed_decoding_process_costs_what_it_had(
    runs: list[Path], phantom: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predicted_files.run_parallel

    def broken(*args: object) -> object:
        for n, read in enumerate(real(*args)):
            if n == 3:
                raise BrokenProcessPool
            yield read

    monkeypatch.setattr(predicted_files, "run_parallel", broken)
    files = slices_of(phantom)[:40]
    words = ["--model", runs[0], *files, "-o", "out.csv", "--batch-size", 8, "--workers", 1]
    assert predict(*words) == Status.LEFT_OUT
    assert len(pd.read_csv("out.csv")) == 24
    listed = pd.read_csv("out.left_out.csv")
    assert len(listed) == 16
    assert listed["reason"].str.contains("a decoding process was killed").all()


def test_out_of_gpu_memory_says_what_to_change(
    runs: list[Path],
    phantom: Path,
    predict: Predict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(ensembles.Network, "outputs", full)
    assert predict("--model", runs[0], slices_of(phantom)[0], "-o", "out.csv") == 2
    said = capsys.readouterr().err
    assert "out of GPU memory at 32 slices at a time: CUDA out of memory. Tried to" in said
    assert "Lower the batch size" in said


def test_a_network_that_cannot_be_converted_is_computed_by_torch(
    runs: list[Path],
    phantom: Path,
    predict: Predict,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    words = ["--model", runs[0], slices_of(phantom)[0], "-o", "out.csv", "--engine", "onnx"]
    assert predict(*words) == 0
    assert "cannot be converted to ONNX (no such operator)" in caplog.text
    assert "torch computes instead of onnxruntime" in caplog.text


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "", "- x"])
def test_a_damaged_config_beside_the_weights_does_not_matter(
    runs: list[Path], tmp_path: Path, text: str
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert load_ensemble([str(tmp_path / "run")], CPU).name == "best"


def test_the_submission_has_the_samples_order(shared: Path) -> None:
    with zipfile.ZipFile(shared / "rsna_mini.zip") as z:
        name = next(n for n in z.namelist() if n.endswith("sample_submission.csv"))
        sample = pd.read_csv(io.BytesIO(z.read(name)))
    assert tuple(i.rsplit("_", 1)[1] for i in sample["ID"][:6]) == RSNA_LABELS
    assert sample.columns.tolist() == ["ID", "Label"]


def test_a_submission_needs_the_labels(runs: list[Path]) -> None:
    from ich.inference.outputs import check_submission

    model = load_ensemble([str(runs[0])], CPU)
    with pytest.raises(UserError, match="needs the competition's labels .* the model has a, b"):
        check_submission(Ensemble(model.members, ("a", "b"), {}, "", None))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.txt", r"must end with .csv or .parquet"),
        ("file/out.csv", r"-o is 'file/out.csv', which cannot be written"),
        ("folder.csv", r"folder.csv is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything(
    runs: list[Path], predict: Predict, capsys: Capture, out: str, message: str
) -> None:
    Path("file").touch()
    Path("folder.csv").mkdir()
    assert predict("--model", runs[0], "nothing", "-o", out) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_leaves_what_was_there(
    runs: list[Path],
    phantom: Path,
    predict: Predict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    Path("out.csv").write_text("earlier")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ich.base.files.os.fsync", full)
    assert predict("--model", runs[0], slices_of(phantom)[0], "-o", "out.csv") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "earlier"


@pytest.mark.faults
def test_sigterm_ends_it_and_its_workers(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    for n in range(40):
        shutil.copytree(phantom / "stage_2_train", tmp_path / "scans" / str(n))
    words = ("--model", runs[0], "scans", "-o", "out.csv", "--workers", 3, "--batch-size", 4)
    process = start_module("predict", *words, cwd=tmp_path, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    wait_for(lambda: not alive(process.pid))
    assert not (tmp_path / "out.csv").exists()


# Identifiers (FAULTS 36)


def test_no_identifier_is_in_any_output(
    canaries: Canaries, runs: list[Path], tmp_path: Path
) -> None:
    words = ("--model", runs[0], canaries.root, "-o", "out.csv", "--names", "pseudonym")
    pages = ("--explain", "explained", "--threshold", "any=0.01")
    done = run_module("predict", *words, *pages, cwd=tmp_path)
    assert done.returncode == Status.LEFT_OUT, done.stderr
    assert canaries.seen_in(tmp_path, done.stdout, done.stderr) == []
    assert "left out" in done.stdout
    assert len(pd.read_csv(tmp_path / "out.studies.csv")) > 1


# The place of a slice


def test_slices_are_ordered_along_their_normal() -> None:
    tilt = np.deg2rad(18.5)
    normal = np.array([0, -np.sin(tilt), np.cos(tilt)])
    orientation = [1, 0, 0, 0, np.cos(tilt), np.sin(tilt)]
    for step in (-3.0, 0.0, 4.5):
        place = [str(round(v, 6)) for v in 10 * np.array([1, 0, 0]) + step * normal]
        found = read_slice(
            encoded(
                dataset(STORED),
                ImagePositionPatient=place,
                ImageOrientationPatient=[str(round(v, 8)) for v in orientation],
                SeriesInstanceUID="2.25.3",
            )
        )
        assert found.position == pytest.approx(step, abs=1e-4)
        assert (found.study, found.series) == ("2.25.2", "2.25.3")
    assert np.isnan(read_slice(encoded(dataset(STORED))).position)
    bent = {"ImagePositionPatient": ["1", "2", "3"], "ImageOrientationPatient": ["1", "2"]}
    assert np.isnan(read_slice(encoded(dataset(STORED), **bent)).position)


def test_the_real_study_of_another_vendor(shared: Path, runs: list[Path], predict: Predict) -> None:
    archive = shared / "ge_head.zip"
    assert predict("--model", runs[0], archive, "-o", "out.csv") == 0
    studies = pd.read_csv("out.studies.csv")
    assert studies["slices"].tolist() == [28]
    with zipfile.ZipFile(archive) as z:
        places = [read_slice(z.read(n)).position for n in sorted(z.namelist())]
    steps = np.diff(places)
    assert (np.sign(steps) == np.sign(steps[0])).all()  # by file name, and by position

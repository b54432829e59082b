"""A run's MLflow model: its signature, its answers, and that nothing in it is executed."""

from __future__ import annotations

import base64
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dicom_files import STORED, dataset, encoded

from ich.base.results import RunPaths, SweepPaths
from ich.data.dicom import read_hu
from ich.data.phantom.spec import LABELS
from ich.inference.ensemble import load_ensemble
from ich.scoring.metrics import sigmoid
from ich.serving import Server
from ich.tracking.store import MlflowStore, TrackingConfig


@pytest.fixture
def run(trained: Path) -> RunPaths:
    sweep = SweepPaths(trained / "multirun_reports" / "s")
    return sweep.run(sweep.read_record().jobs[0])


@pytest.fixture
def model_folder(trained: Path, run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return MlflowStore(TrackingConfig(mlflow=True)).fetch(run.read_tracking().mlflow_run) / (
        "model"
    )


@pytest.fixture
def files(phantom: Path) -> list[bytes]:
    return [f.read_bytes() for f in sorted((phantom / "stage_2_train").glob("*.dcm"))[:3]]


def expected(run: RunPaths, files: list[bytes]) -> np.ndarray:
    from ich.data.decode import resize_area

    model = load_ensemble([str(run.root)], torch.device("cpu"))
    hu = np.stack([resize_area(read_hu(f), 48) for f in files])
    return sigmoid(model.logits({48: hu})[:, 0])


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_the_folder_holds_weights_and_text_alone(model_folder: Path) -> None:
    files = {p.relative_to(model_folder).as_posix() for p in model_folder.rglob("*") if p.is_file()}
    texts = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    assert files == texts | {"data/best.safetensors"}
    said = yaml.safe_load((model_folder / "MLmodel").read_text())
    assert said["flavors"]["python_function"]["loader_module"] == "ich.serving"
    assert said["flavors"]["python_function"]["code"] is None
    assert json.loads(said["metadata"]["ich"])["labels"] == list(LABELS)
    inputs = json.loads(said["signature"]["inputs"])
    assert [(i["name"], i["required"]) for i in inputs] == [("dicom", False), ("hu", False)]
    outputs = json.loads(said["signature"]["outputs"])
    assert [o["name"] for o in outputs] == [*LABELS, "positive", "reason"]
    assert "ich" not in (model_folder / "requirements.txt").read_text()


def test_loading_executes_no_pickle(
    model_folder: Path, run: RunPaths, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"))
    for module, name in readers:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was read"))
    model = mlflow.pyfunc.load_model(str(model_folder))
    found = model.predict(pd.DataFrame({"dicom": [text_of(f) for f in files]}))
    np.testing.assert_allclose(found[list(LABELS)].to_numpy(float), expected(run, files), atol=1e-5)
    again = model.predict(pd.DataFrame({"hu": [read_hu(f).tolist() for f in files]}))
    np.testing.assert_allclose(again[list(LABELS)].to_numpy(float), expected(run, files), atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dicom": "%%%"}, "dicom is not base64"),
        ({"dicom": text_of(b"")}, "neither dicom nor hu"),
        ({"dicom": text_of(b"x" * 300)}, "not a DICOM file"),
        ({"dicom": text_of(encoded(dataset(STORED), Rows=60000))}, "Rows is 60000"),
        ({"dicom": "A" * (90 << 20)}, "the file has more than 67,108,864 bytes"),
        ({"hu": [[1, 2], [3]]}, "hu is not rows of as many numbers each"),
        ({"hu": [[1, "x"]]}, "hu is not rows of as many numbers each"),
        ({"hu": []}, r"hu is of shape \(0,\)"),
        ({"hu": [[]]}, r"hu is of shape \(1, 0\)"),
        ({"hu": [[float("nan")]]}, "not finite"),
        ({"hu": None}, "neither dicom nor hu"),
    ],
)
def test_a_row_that_is_no_slice_has_a_reason_and_no_number(
    run: RunPaths, files: list[bytes], row: dict[str, Any], message: str
) -> None:
    good = {"dicom": text_of(files[0])}
    found = Server(run.best).predict(pd.DataFrame([good, row, good]))
    assert found["reason"].str.match(".*" + message).tolist() == [False, True, False]
    assert all(v is None for v in found.loc[1, list(LABELS)])
    kept = found.loc[[0, 2], list(LABELS)].to_numpy(float)
    np.testing.assert_allclose(kept, expected(run, files[:1]).repeat(2, 0), atol=1e-5)
    assert json.loads(json.dumps(found.to_dict("records"), allow_nan=False))


def test_columns_of_another_name_are_refused(run: RunPaths) -> None:
    with pytest.raises(ValueError, match="a row needs `dicom`, a DICOM file in base64, or `hu`"):
        Server(run.best).predict(pd.DataFrame({"image": ["x"]}))


@pytest.fixture
def served(trained: Path) -> Iterator[str]:
    """`mlflow models serve`, as docs/use-the-winner.md has it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    serve = [str(programs / "mlflow"), "models", "serve", "-m", "models:/ich@best"]
    process = subprocess.Popen(
        [*serve, "--env-manager", "local", "--host", "127.0.0.1", "-p", str(port)],
        cwd=trained,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
            "PATH": f"{programs}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0].decode()
                assert time.monotonic() < end
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


def post(url: str, rows: list[dict[str, Any]]) -> tuple[int, Any]:
    data = json.dumps({"dataframe_records": rows}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read(), parse_constant=pytest.fail)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_mlflow_serves_it(served: str, trained: Path, files: list[bytes]) -> None:
    store = MlflowStore(TrackingConfig(mlflow=True, uri=f"sqlite:///{trained / 'mlflow.db'}"))
    best = store.client.get_model_version_by_alias("ich", "best").tags["ich.job"]
    run = SweepPaths(trained / "multirun_reports" / "s").run(best)
    status, said = post(served, [{"dicom": text_of(f)} for f in [*files, b"no DICOM" * 50]])
    assert status == 200
    rows = said["predictions"]
    found = [[row[k] for k in LABELS] for row in rows[:-1]]
    np.testing.assert_allclose(found, expected(run, files), atol=1e-5)
    assert rows[-1]["any"] is None
    assert "not a DICOM file" in rows[-1]["reason"]
    status, said = post(served, [{"hu": read_hu(files[0]).tolist()}])
    assert said["predictions"][0]["any"] == pytest.approx(found[0][-1], abs=1e-5)
    status, said = post(served, [{"image": 1}])
    assert (status, "a row needs `dicom`" in said["stack_trace"]) == (400, True)

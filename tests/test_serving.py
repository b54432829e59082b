"""A run's MLflow model: its signature, its answers, and that nothing in it is executed."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
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
        ({"dicom": text_of(b"")}, r"neither dicom \(a file in base64\) nor hu"),
        ({"dicom": text_of(b"x" * 300)}, "not a DICOM file"),
        ({"dicom": text_of(encoded(dataset(STORED), Rows=60000))}, "Rows is 60000"),
        ({"dicom": "A" * (90 << 20)}, "the file has more than 67,108,864 bytes"),
        ({"hu": [[1, 2], [3]]}, "hu is not rows of as many numbers each"),
        ({"hu": [[1, "x"]]}, "hu is not rows of as many numbers each"),
        ({"hu": []}, r"hu is of shape \(0,\)"),
        ({"hu": [[]]}, r"hu is of shape \(1, 0\)"),
        ({"hu": [[float("nan")]]}, "not finite"),
        ({"hu": [[10**400]]}, "hu is not rows of as many numbers each"),
        ({"hu": {"a": 1}}, "hu is not rows of as many numbers each"),
        ({"dicom": 5}, "dicom is not base64"),
        ({"dicom": ["x"]}, "dicom is not base64"),
        ({"hu": None}, r"neither dicom \(a file in base64\) nor hu"),
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


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (pd.DataFrame({"image": ["x", "y"]}), 2),
        (pd.DataFrame(index=range(3)), 3),
        (pd.DataFrame([["a", "b"]], columns=["image", "image"]), 1),
        (np.zeros((2, 2)), 1),
        ({"dicom": "x"}, 1),
        (None, 1),
    ],
)
def test_a_request_of_another_form_has_reasons_too(run: RunPaths, given: Any, rows: int) -> None:
    """What was raised here, MLflow answered with a traceback and its paths."""
    reasons = Server(run.best).predict(given)["reason"].tolist()
    assert len(reasons) == rows
    assert all(r.startswith("neither dicom") for r in reasons)


def test_a_fault_of_ours_is_a_reason_without_its_text(
    run: RunPaths, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/home/me/secret")

    rows = pd.DataFrame([{"dicom": text_of(f)} for f in files])
    server = Server(run.best)
    monkeypatch.setattr("ich.serving.read_slice", broken)
    assert set(server.predict(rows)["reason"]) == {"it cannot be read (RuntimeError)"}
    monkeypatch.undo()
    monkeypatch.setattr(type(server._model), "outputs", broken)
    found = server.predict(rows)
    assert set(found["reason"]) == {"it could not be predicted (RuntimeError)"}
    assert found["any"].tolist() == [None] * len(files)


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


JSON = "application/json"
ODD = [
    (JSON, b'{"dataframe_records": [{"dicom": 5}, {"hu": 7}]}'),
    (JSON, b'{"dataframe_records": [{"hu": [[1' + b"0" * 400 + b"]]}]}"),
    (JSON, b'{"dataframe_records": [{"image": 1}]}'),
    (JSON, b'{"dataframe_records": []}'),
    (JSON, b'{"dataframe_records": [1]}'),
    (JSON, b'{"dataframe_split": {"columns": ["dicom", "dicom"], "data": [["a", "b"]]}}'),
    (JSON, b'{"inputs": [1, 2]}'),
    (JSON, b'{"instances": [{"dicom": "x"}]}'),
    (JSON, b"no JSON"),
    (JSON, b"\xff\xfe"),
    (JSON, b"[" * 100_000),
    ("text/csv", b'a,b\n"'),
    ("text/csv", b""),
    ("application/vnd.apache.parquet", b"no parquet"),
    ("text/plain", b"hello"),
]


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
    mixed = [{"hu": read_hu(files[0]).tolist()}, {"dicom": text_of(files[0])}, {"image": 1}]
    status, said = post(served, mixed)
    assert status == 200
    assert [row["any"] for row in said["predictions"]] == [pytest.approx(found[0][-1])] * 2 + [None]
    for kind, body in ODD:
        request = urllib.request.Request(served, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode()
        assert "Traceback" not in text, body
        assert "stack_trace" not in text, body
        assert not re.search(r"/[a-z]+/|\.py", text.replace("https://mlflow.org/docs/", "")), text

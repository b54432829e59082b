"""Grad-CAM against its formula, and the pages of studies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ich.base.config import UserError
from ich.base.results import SweepPaths
from ich.data.dicom import read_hu, read_slice
from ich.data.inputs import Inputs
from ich.data.phantom.spec import LABELS
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.explain import check_folder, explain
from ich.inference.gradcam import ensemble_cams, grad_cams
from ich.inference.outputs import slice_table
from ich.inference.predicted_files import PredictedFiles, predict_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(trained: Path) -> Ensemble:
    sweep = SweepPaths(trained / "multirun_reports" / "s")
    return load_ensemble([str(sweep.run(j).root) for j in sweep.read_record().jobs], CPU)


@pytest.fixture
def one_study(phantom: Path) -> list[Path]:
    """The files of a study that is not in the order of their names."""
    files = sorted((phantom / "stage_2_train").glob("*.dcm"))
    slices = [read_slice(f.read_bytes()) for f in files]
    study = slices[0].study
    return [f for f, s in zip(files, slices, strict=True) if s.study == study]


def predicted(model: Ensemble, files: list[Path]) -> tuple[Inputs, PredictedFiles]:
    inputs = Inputs.find([str(f) for f in files])
    key = {"study": "aaaa", "series": "bbbb"}
    return inputs, predict_files(model, inputs, lambda kind, _: key[kind], lambda *_: None)


def test_the_map_is_the_weighted_sum_of_the_last_features(
    model: Ensemble, one_study: list[Path]
) -> None:
    network = model.members[0].network
    hu = np.stack([read_hu(f.read_bytes())[8:56, 8:56] for f in one_study[:4]])
    with torch.no_grad():
        x = network.windows(network.planes(torch.from_numpy(hu)))
        maps = network.model.base.forward_features(x).numpy()
    weights = network.model.head.weight.detach().numpy()
    for label in (0, 5):
        expected = np.maximum(np.einsum("bchw,c->bhw", maps, weights[label]), 0)
        found = grad_cams(network, hu, [5, label], maps.shape[-1])[1]
        highest = expected.max((1, 2), keepdims=True)
        scaled = np.divide(expected, highest, out=np.zeros_like(expected), where=highest > 0)
        np.testing.assert_allclose(found, scaled, atol=1e-4)
    (larger,) = grad_cams(network, hu, [5], 64)
    assert larger.shape == (4, 64, 64)
    assert larger.min() >= 0
    assert larger.max() <= 1 + 1e-6


def test_an_ensembles_map_is_the_mean(model: Ensemble, one_study: list[Path]) -> None:
    hu = read_hu(one_study[5].read_bytes())[None, 8:56, 8:56]
    each = [grad_cams(m.network, hu, [1], 32) for m in model.members]
    np.testing.assert_allclose(ensemble_cams(model, {48: hu}, [1], 32), np.mean(each, axis=0))


def test_a_study_gets_a_page_and_every_finding_a_picture(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    inputs, found = predicted(model, one_study)
    names = [f.name for f in one_study]
    table = slice_table(model, found, names)
    limit = table["any"].quantile(0.7)
    deciding = model.with_thresholds(f"{limit}").with_thresholds(f"any={limit},epidural=1")
    table = slice_table(deciding, found, names)
    steps: list[tuple[int, int]] = []
    pages = explain(deciding, inputs, found, names, tmp_path, lambda *s: steps.append(s))
    assert [p.name for p in pages] == ["aaaa.html"]
    assert steps[-1] == (len(names), len(names))
    page = pages[0].read_text()
    shown = re.findall(r"<h3>\d+ of \d+: ([^<]+)</h3>", page)
    by_place = np.argsort(found.position)
    assert shown == [names[n] for n in by_place]
    assert shown != names
    positive = table.set_index("file")["positive"].fillna("").to_dict()
    pictures = sorted(p.name for p in (tmp_path / "aaaa").iterdir())
    assert pictures == sorted(
        f"{n:03d}-{label}.png"
        for n, name in enumerate(shown, start=1)
        for label in positive[name].split(";")
        if label
    )
    assert page.count("Grad-CAM of any</figcaption>") == sum("any" in p for p in positive.values())
    with Image.open(tmp_path / "aaaa" / pictures[0]) as image:
        assert image.size == (4 * 384, 384)  # three windows and the overlay
    index = (tmp_path / "index.html").read_text()
    assert 'href="aaaa.html"' in index
    assert "no diagnosis" in index


def test_another_time_leaves_nothing_of_the_one_before(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    inputs, found = predicted(model, one_study[:3])
    explain(model.with_thresholds("0"), inputs, found, list("abc"), tmp_path, lambda *_: None)
    assert len(list((tmp_path / "aaaa").iterdir())) == 3 * len(LABELS)
    (tmp_path / "aaaa.html.part").touch()  # of a call that was killed
    check_folder(tmp_path)
    few = model.with_thresholds(",".join(f"{k}={int(k != 'any')}" for k in LABELS))
    explain(few, inputs, found, ["x"] * 3, tmp_path, lambda *_: None)
    assert len(list((tmp_path / "aaaa").iterdir())) == 3
    explain(model.with_thresholds("1"), inputs, found, ["x"] * 3, tmp_path, lambda *_: None)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["explained.json", "index.html"]


@pytest.mark.parametrize(
    "foreign", ["notes.html", "aaaa/me.png", "aaaa/001-any.png.txt", ".part", "sub", "link.html"]
)
def test_what_is_not_listed_is_kept_and_refused(
    model: Ensemble, one_study: list[Path], tmp_path: Path, foreign: str
) -> None:
    """A folder with an index.html was taken for ours, and each *.html in it was deleted."""
    inputs, found = predicted(model, one_study[:1])
    explain(model.with_thresholds("0"), inputs, found, ["a"], tmp_path, lambda *_: None)
    path = tmp_path / foreign
    if foreign == "sub":
        path.mkdir()
    elif foreign == "link.html":
        path.symlink_to(tmp_path / "index.html")
    else:
        path.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"something else than explanations: '{foreign}'"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match="something else than explanations"):
        explain(model.with_thresholds("1"), inputs, found, ["a"], tmp_path, lambda *_: None)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_alone_makes_no_folder_ours(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my home page")
    with pytest.raises(UserError, match="something else than explanations: 'index.html'"):
        check_folder(tmp_path)


@pytest.mark.parametrize("listed", ["../notes.html", "/etc/hosts", "notes.txt", "a/b/c.html", 3])
def test_a_manifest_of_somebody_else_deletes_nothing(tmp_path: Path, listed: object) -> None:
    (tmp_path / "notes.html").touch()
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "explained.json").write_text(json.dumps({"files": [listed]}))
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="something else than explanations: 'notes.txt'"):
        check_folder(folder)
    assert (tmp_path / "notes.html").exists()


def test_many_slices_without_a_study_are_split(
    model: Ensemble, one_study: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ich.inference.explain._MOST_WITHOUT", 2)
    inputs, found = predicted(model, one_study[:3])
    found.study[:] = [""] * 3
    pages = explain(
        model.with_thresholds("0"), inputs, found, list("abc"), tmp_path, lambda *_: None
    )
    assert [p.name for p in pages] == ["no-study-1.html", "no-study-2.html"]


def test_a_slice_of_unknown_place_comes_last(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    inputs, found = predicted(model, one_study[:3])
    found.position[:] = [np.nan, 30, -20]
    (page,) = explain(
        model.with_thresholds("0"), inputs, found, list("abc"), tmp_path, lambda *_: None
    )
    shown = re.findall(r"<h3>\d+ of \d+: ([^<]+)</h3>", page.read_text())
    assert shown == ["c", "b", "a"]


def test_without_a_finding_the_index_says_so(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    inputs, found = predicted(model, one_study[:2])
    none = model.with_thresholds("1")
    assert explain(none, inputs, found, ["a", "b"], tmp_path, lambda *_: None) == []
    assert "No slice reaches the threshold" in (tmp_path / "index.html").read_text()


def test_a_file_that_is_gone_since_is_said(
    model: Ensemble, phantom: Path, one_study: list[Path], tmp_path: Path
) -> None:
    copies = [tmp_path / f.name for f in one_study[:3]]
    for copy, file in zip(copies, one_study, strict=False):
        copy.write_bytes(file.read_bytes())
    inputs, found = predicted(model, copies)
    copies[1].unlink()
    check_folder(tmp_path / "pages")
    (page,) = explain(
        model.with_thresholds("0"), inputs, found, list("abc"), tmp_path / "pages", lambda *_: None
    )
    assert "the file is missing" in page.read_text()
    assert page.read_text().count("<figure>") == 2 * (3 + len(LABELS))


def test_slices_without_a_study_share_a_page(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    inputs, found = predicted(model, one_study[:2])
    found.study[:] = ["", ""]
    (page,) = explain(
        model.with_thresholds("0"), inputs, found, ["a", "b"], tmp_path, lambda *_: None
    )
    assert page.name == "no-study.html"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--explain is .*file/x', which cannot be made a folder"):
        check_folder(tmp_path / "file" / "x")


def test_labels_of_any_text_become_file_names(
    model: Ensemble, one_study: list[Path], tmp_path: Path
) -> None:
    labels = ("a/b", "c <d>", "a_b", "A b", "x" * 300, *LABELS[5:])
    other = replace(model, labels=labels, thresholds=dict.fromkeys(labels, 0.0))
    inputs, found = predicted(other, one_study[:1])
    (page,) = explain(other, inputs, found, ["<img>"], tmp_path, lambda *_: None)
    names = {p.name for p in (tmp_path / "aaaa").iterdir()}
    own = {"001-a_b.png", "001-c__d_.png", "001-a_b-2.png", "001-A_b-3.png", "001-any.png"}
    assert names == own | {f"001-{'x' * 100}.png"}
    check_folder(tmp_path)
    assert "<img>" not in page.read_text()
    assert "c &lt;d&gt;" in page.read_text()

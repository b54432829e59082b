"""A head over studies, trained after the slice network."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from sweeps import SMALL

from ich.base.config import Config, UserError
from ich.base.records import FitResult, Origin, RunResult
from ich.base.results import RunPaths
from ich.data.cohorts import cohort_keys
from ich.data.dataset import Split, load_dataset
from ich.data.order import Sequences
from ich.evaluate import main as evaluate_main
from ich.export import main as export_main
from ich.inference.ensemble import load_ensemble
from ich.inference.export import predict
from ich.predict import main as predict_main
from ich.scoring.metrics import sigmoid
from ich.serving import Server
from ich.tracking.journal import Journal
from ich.training.fit import Terminated, fit
from ich.training.model import load_trained
from ich.training.study.fit import Studies
from ich.training.study.head import StudyHead

Compose = Callable[..., Config]
OWN = ("tracking=none", "optimizer.lr=3e-3", "train.threads=1", "protocol=sound", "data.subset=1.0")
STUDY = ("context=study", "context.epochs=3", "context.batch_size=3")


@pytest.fixture
def compose_small(composed: Compose, phantom: Path) -> Callable[..., Config]:
    def compose(*overrides: str) -> Config:
        of = ("model=mobilenet_v2", f'data.root="{phantom}"')
        return composed(*of, *SMALL, "train.epochs=2", *OWN, *overrides)

    return compose


class Killed(BaseException):
    """Like SIGKILL: nothing in the training knows it."""


def train(config: Config, run: RunPaths, stop: Callable[[str], None] = lambda _: None) -> FitResult:
    run.root.mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    load_dataset(config)
    if not run.origin.exists():  # else with the mode it began in
        run.write_origin(Origin(cohort_keys({"": config})[""], "random", "code"))
    return fit(config, run, Journal(run.metrics), lambda phase, *_: stop(phase))


def test_slices_head_and_smoothing_are_scored_on_the_same_rows(
    compose_small: Compose, tmp_path: Path
) -> None:
    alone, study = RunPaths(tmp_path / "alone/x"), RunPaths(tmp_path / "b/y")
    before = train(compose_small(), alone)
    slices = load_trained(alone.best)[0].state_dict()
    result = train(compose_small(*STUDY), study)
    a, b = (np.load(r.predictions) for r in (alone, study))
    # The slice network is the one that context=slice trains, bit for bit.
    for split in ("val", "test"):
        assert (a[f"{split}_logits"] == b[f"{split}_slice_logits"]).all()
        assert (a[f"{split}_image_id"] == b[f"{split}_image_id"]).all()
    assert result.head is not None
    np.testing.assert_equal(result.head.slice_scores, before.scores)
    model, metadata = load_trained(study.best)
    assert metadata.context == "study"
    both = model.state_dict()
    assert all(torch.equal(both[name], value) for name, value in slices.items())
    assert {n.split(".")[0] for n in both.keys() - slices.keys()} == {"study"}
    dataset = load_dataset(compose_small(*STUDY))
    assert dataset.test is not None
    assert dataset.sequences is not None
    at = {row: n for n, row in enumerate(dataset.test.row.tolist())}
    around = dataset.sequences.neighbours(dataset.test.row)
    for n in (0, 7, len(at) - 1):
        mean = np.mean([b["test_slice_logits"][at[row]] for row in around[n].tolist()], axis=0)
        np.testing.assert_allclose(b["test_smoothed_logits"][n], mean, rtol=1e-5)
    steps = [line.step for line in study.read_metrics()]
    assert steps == [1, 2, 3, 4, 5]
    assert "head/features/val/auc" in study.read_metrics()[-1].metrics
    study.write_result(RunResult("finished", fit=result))
    read = study.read_result().fit
    assert read is not None
    np.testing.assert_equal(read.to_json()["head"], json.loads(study.result.read_text())["head"])


@pytest.mark.faults
@pytest.mark.parametrize("taken", [False, True])
def test_killed_anywhere_it_ends_as_an_undisturbed_one(
    compose_small: Compose, tmp_path: Path, taken: bool
) -> None:
    """FAULTS 32, in all of its stages; and where it took its slice network from another job."""
    whole, broken = RunPaths(tmp_path / "whole/x"), RunPaths(tmp_path / "broken/x")
    config = compose_small(*STUDY)
    straight = train(config, whole)
    config.train.checkpoint_minutes = 1e-9
    if taken:
        finished(compose_small("job=slices"), RunPaths(tmp_path / "broken/slices"))
    draw, kills, phases, result = random.Random(0), 0, set(), None
    while result is None:
        left = draw.randint(2, 14) if kills < 25 else 10**9
        kind = draw.choice([Terminated, Killed])

        def stop(phase: str, kind: type[BaseException] = kind) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                phases.add(phase)
                raise kind

        torch.manual_seed(kills)  # whatever this process did before must not matter
        try:
            result = train(config, broken, stop)
        except (Terminated, Killed):
            kills += 1
    assert {"features", "head"} <= phases
    assert ("training" in phases) is not taken
    assert_same(whole, broken)
    assert result.head is not None
    assert straight.head is not None
    assert result.head.epoch == straight.head.epoch
    np.testing.assert_equal(result.scores, straight.scores)


def finished(config: Config, run: RunPaths) -> FitResult:
    """A training with all that its process leaves."""
    fit_result = train(config, run)
    run.write_result(RunResult("finished", "", config.job, config.model.name, fit_result))
    return fit_result


def assert_same(run: RunPaths, other: RunPaths) -> None:
    assert run.best.read_bytes() == other.best.read_bytes()
    with np.load(run.predictions) as x, np.load(other.predictions) as y:
        assert x.files == y.files
        for name in x.files:
            assert (x[name] == y[name]).all(), name
    rows = [
        [(line.step, {k: v for k, v in line.metrics.items() if "per_s" not in k}) for line in lines]
        for lines in (run.read_metrics(), other.read_metrics())
    ]
    np.testing.assert_equal(*rows)


def test_an_equal_slice_jobs_network_is_taken_and_no_other(
    compose_small: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    phases: set[str] = set()
    finished(compose_small("job=slices", "train.epochs=1"), RunPaths(tmp_path / "s/slices"))
    other = compose_small(*STUDY, "job=other", "train.epochs=1", "seed=1")
    train(other, RunPaths(tmp_path / "s/other"), phases.add)
    assert "training" in phases
    phases.clear()
    equal = compose_small(*STUDY, "job=equal", "train.epochs=1")
    train(equal, RunPaths(tmp_path / "s/equal"), phases.add)
    assert "training" not in phases
    assert "the slice network is that of slices, which was trained alike" in caplog.text
    train(equal, RunPaths(tmp_path / "alone/equal"))
    assert_same(RunPaths(tmp_path / "s/equal"), RunPaths(tmp_path / "alone/equal"))


# At work


def test_files_in_any_order_are_predicted_as_their_studies(
    compose_small: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunPaths(tmp_path / "s/x")
    config = compose_small(*STUDY, "train.epochs=1", "train.monitor=log_loss")
    result = finished(config, run)
    assert result.head is not None
    assert result.head.epoch > 0
    saved = np.load(run.predictions)
    logits = dict(zip(saved["test_image_id"].tolist(), saved["test_logits"], strict=True))
    slices = dict(zip(saved["test_image_id"].tolist(), saved["test_slice_logits"], strict=True))
    dataset = load_dataset(config)
    files = sorted(Path(str(config.data.root)).rglob("*.dcm"))
    paths = {path.stem: str(path) for path in files if path.stem in logits}
    random.Random(0).shuffle(files := list(paths.values()))
    common = ("--model", str(run.root), "--workers", "1", "--cache-dir", str(tmp_path))
    shown = ("--explain", str(tmp_path / "pages"), "--threshold", "any=0")
    assert predict_main([*files, *common, "-o", str(tmp_path / "all.csv"), *shown]) == 0
    pages = [p.read_text() for p in (tmp_path / "pages").glob("*.html") if p.stem != "index"]
    assert pages
    assert all("<span>moved any</span>" in page for page in pages)
    together = pd.read_csv(tmp_path / "all.csv")
    one = next(iter(paths))
    assert predict_main([paths[one], *common, "-o", str(tmp_path / "one.csv")]) == 0
    assert "1 of 1 slices are by themselves" in " ".join(capsys.readouterr().out.split())
    alone = pd.read_csv(tmp_path / "one.csv")
    for table, expected in ((together, logits), (alone, slices)):
        found = sigmoid(np.array([expected[Path(f).stem] for f in table["file"]]))
        np.testing.assert_allclose(table[list(dataset.labels)], found, atol=2e-3)
    encoded = [base64.b64encode(Path(f).read_bytes()).decode() for f in together["file"]]
    served = Server(run.best).predict(pd.DataFrame({"dicom": encoded}))
    names = list(dataset.labels)
    np.testing.assert_allclose(served[names].to_numpy(float), together[names], atol=1e-4)
    assert not served["alone"].any()
    rows = ("rows=test", "protocol=sound", "data.subset=1.0", "resamples=0", "name=e")
    data = (f'data.root="{config.data.root}"', f"data.cache_dir='{config.data.cache_dir}'")
    places = (f"models='{run.root}'", f"output='{tmp_path}'", "data.max_quarantine=0.01")
    assert evaluate_main([*rows, *data, *places]) == 0
    assert evaluate_main([*rows, *data, *places, "recalibrate=true"]) == 2
    assert "the model has a head over whole studies" in " ".join(capsys.readouterr().err.split())
    table = pd.read_csv(tmp_path / "e" / "evaluation.csv")
    log_loss = table.query("metric == 'log_loss' and level == 'slice'")["here"]
    assert log_loss.iloc[0] == pytest.approx(result.scores["log_loss"], abs=1e-3)
    for kind in ("onnx", "torch_export"):
        out = ("-o", str(tmp_path / kind), "--size", "64", "--resamples", "0", "--format", kind)
        assert export_main(["--model", str(run.root), *out]) == 0
    assert "of one series, at least 2, in their order" in " ".join(capsys.readouterr().out.split())
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    module = torch.export.load(tmp_path / "torch_export" / "model.pt2").module()
    network = load_ensemble([str(run.root)], torch.device("cpu")).members[0].network
    for length in (2, 5, 40):
        hu = np.random.default_rng(length).integers(-100, 150, (length, 64, 64), np.int16)
        ours = predict(network, hu)
        np.testing.assert_allclose(session.run(None, {"hu": hu})[0], ours, atol=1e-3)
        with torch.no_grad():
            np.testing.assert_allclose(module(torch.from_numpy(hu)), ours, atol=1e-3)
    ids = saved["test_image_id"].tolist()
    assert max(np.abs(sigmoid(logits[i]) - sigmoid(slices[i])).max() for i in ids) > 5e-3


# Sequences of every length


@pytest.mark.parametrize("features", [0, 8])
def test_a_head_begins_as_smoothing_and_padding_moves_nothing(features: int) -> None:
    torch.manual_seed(0)
    head = StudyHead(features, 3).eval()
    given, logits = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    place = torch.arange(5).expand(2, 5)
    is_slice = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    untrained = head(given, logits, place, is_slice)
    for study, length in ((0, 5), (1, 3)):
        for n in range(length):
            around = [max(n - 1, 0), n, min(n + 1, length - 1)]
            torch.testing.assert_close(untrained[study, n], logits[study, around].mean(0))
    torch.nn.init.normal_(head.out.weight)
    alone = head(given[1:, :3], logits[1:, :3], place[1:, :3])
    padded = head(given, logits, place, is_slice)
    torch.testing.assert_close(padded[1:, :3], alone)
    assert not torch.allclose(alone, untrained[1:, :3])


def test_splits_are_studies_whose_copies_are_repeated_whole() -> None:
    # Three sequences, of one slice, of two, and of 600.
    rows = np.random.default_rng(0).permutation(603)
    sequences = Sequences(rows, np.array([0, 1, 3, 603]), np.arange(603))
    split = split_of(np.concatenate([rows[1:3], rows[2:3], rows[2:3], rows[:1]]))
    studies = Studies.of(split, sequences)
    assert studies.numbers.tolist() == [0, 1]
    assert studies.copies.tolist() == [1, 3]
    assert (rows[studies.at] == split.row).all()
    assert Studies.of(split_of(rows[3:]), sequences).numbers.tolist() == [2]
    for torn in (rows[1:2], rows[4:], np.array([700])):
        with pytest.raises(UserError, match="context=study needs whole studies, but one of this"):
            Studies.of(split_of(torn), sequences)


def test_a_study_of_two_series_is_repeated_with_both() -> None:
    # Of two slices each; the first two are of one study, nobody knows whose the last two are.
    sequences = Sequences(np.arange(10), np.arange(0, 11, 2), np.arange(10))
    study = np.array([5, 5, 5, 5, 3, 3, -1, -1, -1, -1])
    split = split_of(np.array([*range(10), 2, 2, 8]))
    split = replace(split, study=study[split.row])
    studies = Studies.of(split, sequences)
    assert studies.numbers.tolist() == [0, 1, 2, 3, 4]
    assert studies.copies.tolist() == [3, 3, 1, 1, 2]


def split_of(row: np.ndarray) -> Split:
    return Split(row.astype(str), row, np.zeros((len(row), 2), np.float32), row, row)

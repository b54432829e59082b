"""A model on other labelled rows, beside its validation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import run_module
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from sklearn.metrics import confusion_matrix, roc_auc_score

from ich.base.config import CONF_DIR, EvaluateConfig, UserError, register_schemas, to_dataclass
from ich.base.results import SweepPaths
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import LABELS, PhantomSpec
from ich.inference.card import model_card
from ich.inference.ensemble import load_ensemble
from ich.inference.export import made_up_slices
from ich.inference.recalibrate import check_model, recalibrate
from ich.inference.scores import evaluate, validate
from ich.pages.evaluation_page import recalibration_blocks, write_evaluation
from ich.scoring.evaluation import Evaluation, metrics_table
from ich.scoring.metrics import sigmoid
from ich.scoring.predictions import Predictions, read_predictions
from ich.scoring.uncertainty import ScoredRows

THRESHOLDS = dict.fromkeys(LABELS, 0.4)


def predictions(patients: int, seed: int, signal: float = 1.5) -> Predictions:
    rng = np.random.default_rng(seed)
    rows = patients * 8
    target = (rng.random((rows, 6)) < 0.3).astype(np.float32)
    logits = (rng.normal(size=(rows, 6)) + signal * target - 1).astype(np.float32)
    group = np.repeat(np.arange(patients), 8)
    ids = np.array([f"ID_{seed}_{n}" for n in range(rows)])
    scored = ScoredRows(LABELS, target, logits, group)
    return Predictions(scored, "patients", ids, group, (logits, target))


def evaluation(here: Predictions, validation: Predictions | None) -> Evaluation:
    none = pd.DataFrame(columns=["image_id", "reason"])
    return Evaluation("a model", here, validation, THRESHOLDS, ["a note"], none)


def test_decisions_are_scikit_learns_at_the_models_thresholds() -> None:
    here = predictions(20, 0)
    table = metrics_table(evaluation(here, None), 50).set_index(["level", "metric"])["here"]
    for i, k in enumerate(LABELS):
        target, logits = here.scored.target[:, i], here.scored.logits[:, i]
        tn, fp, fn, tp = confusion_matrix(target, sigmoid(logits) >= 0.4).ravel()
        assert table["slice", f"sensitivity_{k}"] == pytest.approx(tp / (tp + fn))
        assert table["slice", f"specificity_{k}"] == pytest.approx(tn / (tn + fp))
        assert table["slice", f"precision_{k}"] == pytest.approx(tp / (tp + fp))
        assert table["slice", f"npv_{k}"] == pytest.approx(tn / (tn + fn))
        assert table["slice", f"auc_{k}"] == pytest.approx(roc_auc_score(target, logits))
    studies = here.study_metrics
    assert table["study", "brier"] == pytest.approx(studies["brier"])


def test_a_decisions_interval_is_that_of_rows_really_repeated() -> None:
    here = predictions(12, 1)
    table = metrics_table(evaluation(here, None), 400)
    found = table[table["level"] == "slice"].set_index("metric")
    rng = np.random.default_rng(0)
    said, truth = sigmoid(here.scored.logits[:, 5]) >= 0.4, here.scored.target[:, 5] > 0.5
    values = []
    for _ in range(400):
        drawn = rng.integers(0, 12, 12)
        rows = np.concatenate([np.flatnonzero(here.scored.group == g) for g in drawn])
        values.append((said & truth)[rows].sum() / truth[rows].sum())
    low, high = np.quantile(values, [0.025, 0.975])
    assert found.loc["sensitivity_any", "here_low"] == pytest.approx(low, abs=1e-9)
    assert found.loc["sensitivity_any", "here_high"] == pytest.approx(high, abs=1e-9)


def test_a_difference_is_unpaired_and_told_from_chance_only_where_it_is() -> None:
    worse = evaluation(predictions(60, 2, signal=0.3), predictions(60, 3))
    row = metrics_table(worse, 300).set_index(["level", "metric"]).loc[("slice", "auc")]
    assert row["difference"] == pytest.approx(row["here"] - row["validation"])
    assert row["difference_high"] < 0
    same = evaluation(predictions(60, 4), predictions(60, 5))
    row = metrics_table(same, 300).set_index(["level", "metric"]).loc[("slice", "auc")]
    assert row["difference_low"] < 0 < row["difference_high"]
    width = row["here_high"] - row["here_low"]
    assert row["difference_high"] - row["difference_low"] > 1.2 * width


def test_the_same_rows_are_paired() -> None:
    one = predictions(30, 4)
    other = replace(one, scored=replace(one.scored, group=one.scored.group[::-1].copy()))
    found = evaluation(one, other)
    table = metrics_table(found, 100).set_index(["level", "metric"])
    for name in ("auc", "auc_any", "accuracy", "sensitivity_any"):
        row = table.loc[("slice", name)]
        assert (row["difference_low"], row["difference_high"]) == (0, 0)
        assert row["here_low"] == row["validation_low"]


def test_a_study_is_positive_where_any_of_its_slices_is() -> None:
    here = predictions(40, 0, signal=4.0)
    table = metrics_table(evaluation(here, None), 0).set_index(["level", "metric"])["here"]
    i = LABELS.index("subdural")
    said = (sigmoid(here.scored.logits[:, i]) >= 0.4).reshape(40, 8).any(1)
    truth = (here.scored.target[:, i] > 0.5).reshape(40, 8).any(1)
    assert table["study", "sensitivity_subdural"] == pytest.approx(said[truth].mean())
    specificity = table["study", "specificity_subdural"]
    assert specificity == pytest.approx((~said[~truth]).mean())


def test_few_patients_have_no_interval() -> None:
    table = metrics_table(evaluation(predictions(9, 0), predictions(30, 1)), 100)
    assert table["here_low"].isna().all()
    assert table["difference_low"].isna().all()
    assert table["validation_low"].notna().any()


def test_the_page_holds_both_sides(tmp_path: Path) -> None:
    found = evaluation(predictions(20, 0), predictions(20, 1))
    page = write_evaluation(found, metrics_table(found, 50), tmp_path).read_text()
    for text in ("a note", "any, per slice, decided at 0.400", "sensitivity_any", 'class="chart"'):
        assert text in page
    assert "sensitivity_any" in (tmp_path / "evaluation.md").read_text()
    rows = pd.read_csv(tmp_path / "predictions.csv")
    assert len(rows) == 160
    np.testing.assert_allclose(rows["any"], sigmoid(found.here.scored.logits[:, 5]))


# From a config


@pytest.fixture
def config(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.chdir(trained)  # its cohort's file is under .ich-cache there
    register_schemas()
    job = SweepPaths(trained / "multirun_reports" / "s").read_record().jobs[0]

    def make(*overrides: str) -> EvaluateConfig:
        own = [f"models='multirun_reports/s/{job}'", f"output={tmp_path / 'out'}", "resamples=20"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("evaluate", overrides=[*own, *overrides])
        return to_dataclass(OmegaConf.create(OmegaConf.to_container(cfg)), EvaluateConfig)  # type: ignore[arg-type]

    return make


def metric(page: Path, name: str, column: str = "here") -> float:
    table = pd.read_csv(page.with_suffix(".csv")).query("level == 'slice'").set_index("metric")
    return float(table.loc[name, column])


def test_the_runs_own_validation_rows_score_as_in_training(
    config: Callable, phantom: Path, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    page = evaluate(config(f'data.root="{phantom}"', "rows=val"))
    run = SweepPaths(trained / "multirun_reports" / "s").run(
        SweepPaths(trained / "multirun_reports" / "s").read_record().jobs[0]
    )
    own = read_predictions(run)
    assert own is not None
    for name in ("auc", "accuracy", "log_loss", "auc_any", "brier"):
        assert metric(page, name) == pytest.approx(own.metrics[name], abs=1e-5)
        assert metric(page, name, "difference") == pytest.approx(0, abs=1e-5)
    leak = run.read_result().fit.cohort.leak
    said = capsys.readouterr().out
    assert f"{leak['image']:.1%} the image, {leak['study']:.1%} the study" in said


def test_the_runs_own_rows_are_known_where_their_files_lie_now(
    config: Callable, phantom: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(phantom, tmp_path / "moved", copy_function=shutil.copyfile)
    before = evaluate(config(f'data.root="{phantom}"', "rows=val"))
    after = evaluate(config(f'data.root="{moved}"', "rows=val", "name=moved"))
    assert metric(after, "auc") == metric(before, "auc")


def test_rows_of_another_split_than_the_runs_are_refused(config: Callable, phantom: Path) -> None:
    with pytest.raises(UserError, match=r"make another cohort \(\w+\) than .*seed=0 was trained"):
        evaluate(config(f'data.root="{phantom}"', "rows=val", "data.subset=0.5"))
    with pytest.raises(UserError, match="make another cohort"):
        evaluate(config(f'data.root="{phantom}"', "rows=val", "protocol.seed=1"))


def test_patients_under_another_key_are_unknown_not_none(
    config: Callable, phantom: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    run = next((trained / "multirun_reports" / "s").glob("*seed=0"))
    shutil.copytree(run, tmp_path / "run")
    saved = tmp_path / "run" / "config.yaml"
    own = f"cache_dir: {trained / '.ich-cache'}"
    saved.write_text(saved.read_text().replace("cache_dir: .ich-cache", own))
    given = [f'data.root="{phantom}"', f"models='{tmp_path / 'run'}'"]
    evaluate(config(*given, f"data.cache_dir={tmp_path / 'elsewhere'}"))
    said = capsys.readouterr().out
    assert "unknown how many the study, unknown how many the patient" in said
    evaluate(config(*given))
    assert "unknown how many" not in capsys.readouterr().out
    saved.write_text("a_key_of_another_version: 1\n" + saved.read_text())
    evaluate(config(*given))


def test_another_phantom_shares_nobody(
    config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write_phantom(tmp_path / "other", PhantomSpec(patients=10, seed=5, size=64), workers=1)
    (tmp_path / "other" / "stage_2_train" / "broken.dcm").write_bytes(b"x")
    first = sorted((other / "stage_2_train").glob("ID_*.dcm"))[0]
    first.write_bytes(b"no DICOM")
    page = evaluate(config(f'data.root="{other}"', "name=x", "data.max_quarantine=0.1"))
    said = capsys.readouterr().out
    assert "0.0% the image, 0.0% the study, 0.0% the patient" in said
    assert "of 10 patients; 1 files left out" in said
    assert page == tmp_path / "out" / "x" / "evaluation.html"
    assert pd.read_csv(page.parent / "left_out.csv")["image_id"].tolist() == [first.stem]
    assert metric(page, "auc") != metric(page, "auc", "validation")
    with pytest.raises(UserError, match="slices cannot be used, more than data.max_quarantine=0"):
        evaluate(config(f'data.root="{other}"', "data.max_quarantine=0"))


def test_labels_that_are_missing_are_left_out_on_both_sides(
    config: Callable, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels = pd.read_csv(phantom / "stage_2_train.csv")
    labels[["image_id", "kind"]] = labels["ID"].str.rsplit("_", n=1, expand=True)
    wide = labels.pivot_table(index="image_id", columns="kind", values="Label").astype(int)
    wide[["any", "subdural"]].reset_index().to_csv(tmp_path / "labels.csv", index=False)
    given = ["data=folder", f'data.root="{phantom}"', f"data.labels={tmp_path / 'labels.csv'}"]
    page = evaluate(config(*given))
    assert "Not evaluated, since the data do not have it: epidural," in capsys.readouterr().out
    names = pd.read_csv(page.with_suffix(".csv"))["metric"]
    assert {n for n in names if n.startswith("auc_")} == {"auc_macro", "auc_subdural", "auc_any"}
    wide[["any"]].rename(columns={"any": "ICH"}).reset_index().to_csv(
        tmp_path / "labels.csv", index=False
    )
    with pytest.raises(UserError, match="the model's labels are .* and the data's ICH: none is"):
        evaluate(config(*given))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tta=twice"], "tta is 'twice', but must be one of none, flips"),
        (["resamples=-1"], "resamples is -1, but must be 0"),
        (["batch_size=0"], "batch_size is 0, but must be at least 1"),
        (["name='a/b'"], "name is 'a/b', but must be letters"),
        (["data.subset=0"], "data.subset is 0"),
    ],
)
def test_a_value_out_of_range_is_refused(
    config: Callable, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(config(*overrides))


def test_rows_that_the_protocol_lacks_are_refused(config: Callable, phantom: Path) -> None:
    with pytest.raises(UserError, match=r"rows is test, but protocol=report has no such rows"):
        evaluate(config(f'data.root="{phantom}"', "rows=test"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["models=nothing"], "ich: the model is 'nothing', which is nothing to predict with"),
        ([], "ich: models is missing. Give the folder of a run with models=PATH"),
        (["models=[]"], "ich: models is empty"),
    ],
)
def test_a_mistake_is_one_paragraph(trained: Path, given: list[str], message: str) -> None:
    done = run_module("evaluate", *given, cwd=trained)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# For a site


def test_a_recalibrated_network_is_a_run_that_says_on_whom(trained: Path, tmp_path: Path) -> None:
    """Twice as sure as it should be on these rows, by construction."""
    cpu = torch.device("cpu")
    run = next((trained / "multirun_reports" / "s").glob("*seed=0"))
    model = load_ensemble([str(run)], cpu)
    rng, here = np.random.default_rng(0), predictions(60, 7)
    right = rng.normal(-1, 1.5, here.scored.logits.shape)
    target = (rng.random(right.shape) < sigmoid(right)).astype(np.float32)
    here = replace(here, scored=replace(here.scored, logits=2 * right, target=target))
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        own = ["models=x", "recalibrate=true", "resamples=100"]
        config = to_dataclass(compose("evaluate", overrides=own), EvaluateConfig)
    found = recalibrate(config, model, evaluation(here, None), tmp_path)
    table = found.table.set_index(["level", "metric"])
    assert table.loc[("slice", "ece"), "difference_high"] < 0
    assert table.loc[("slice", "brier"), "difference_high"] < 0
    auc = table.loc[("slice", "auc_any")]
    assert (auc["difference_low"], auc["difference_high"]) == (0, 0)
    assert "Recalibrated on 30 patients (240 rows) of data=phantom: " in found.notes[0]
    assert str(tmp_path) not in " ".join(found.notes)
    after = load_ensemble([str(tmp_path / "recalibrated")], cpu)
    assert after.chosen_by == "the best F1 on the rows it was recalibrated on"
    assert after.thresholds != model.thresholds
    side = model.sizes[0]
    hu = {side: made_up_slices(side)}
    before, now = model.logits(hu)[:, 0], after.logits(hu)[:, 0]
    slope = (now - now[0])[1:] / (before - before[0])[1:]
    assert slope == pytest.approx(np.full(slope.shape, 0.5), rel=0.25)
    stored = read_predictions(after.members[0].run)
    assert stored is not None
    assert model.validation is not None
    assert stored.metrics["auc_any"] == pytest.approx(model.validation.metrics["auc_any"])
    assert "Recalibrated on 30 patients (240 rows)" in model_card(after, "A file.", 0)
    blocks = recalibration_blocks(found.table, found.notes, LABELS)
    page = write_evaluation(evaluation(here, None), found.table, tmp_path / "page", blocks)
    assert "sensitivity and specificity each at its own thresholds" in page.read_text()


def test_what_cannot_be_recalibrated_is_refused(trained: Path, tmp_path: Path) -> None:
    runs = sorted((trained / "multirun_reports" / "s").glob("*seed=*"))
    both = load_ensemble([str(run) for run in runs], torch.device("cpu"))
    with pytest.raises(UserError, match=r"recalibrate is true, and the model is 2 networks"):
        check_model(both)
    config = EvaluateConfig(models="x", resamples=0)
    with pytest.raises(UserError, match=r"the scored rows are of 19 patients. At least 20"):
        recalibrate(config, both, evaluation(predictions(19, 0), None), tmp_path)
    none = predictions(30, 0)
    none.scored.target[:] = 0
    with pytest.raises(UserError, match="no label has both classes among the patients to fit on"):
        recalibrate(config, both, evaluation(none, None), tmp_path)
    assert not list(tmp_path.iterdir())

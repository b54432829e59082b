"""The comparison: what its tables say about runs whose truth is known."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_up import cohort, write_sweep
from mlflow import MlflowClient

from ich.base.config import Config, UserError
from ich.base.entry import public_command, without_paths
from ich.base.results import SweepPaths
from ich.data.cohorts import CohortFiles
from ich.data.subgroups.facts import Facts
from ich.launch import steps
from ich.pages.columns import best_cells
from ich.pages.figures import pareto_front
from ich.pages.hardest_cases import hardest
from ich.pages.page import Cell, Ranking, Row, to_html, to_markdown
from ich.pages.tables import compare
from ich.report import main
from ich.scoring.comparison import RANKING_METRIC, load_comparison
from ich.scoring.effects import compute_effects
from ich.scoring.findings import REPORT_TABLE_2
from ich.scoring.predictions import read_predictions
from ich.sweep import close
from ich.tracking.registry import promote
from ich.tracking.sweep_run import close_in_this_process

Compose = Callable[..., Config]
EIGHT = dict.fromkeys(REPORT_TABLE_2, 2.0)


@pytest.fixture
def three(tmp_path: Path, composed: Compose) -> SweepPaths:
    """Two networks that are equally good, and one that is much worse."""
    jobs = {"xception": 2.0, "resnet50": 2.0, "vgg16": 0.8}
    return write_sweep(tmp_path / "three", jobs, composed)


def test_what_can_be_told_apart_is_and_what_cannot_is_marked(three: SweepPaths) -> None:
    table = compare(three, page=False)
    told = dict(zip(table["job"], table["told_from_best"], strict=True))
    best, same = (
        ("xception", "resnet50") if told["xception"] == "best" else ("resnet50", "xception")
    )
    assert told[best] == "best"
    assert told[same] == "no"
    assert told["vgg16"] == "yes"
    worse = table[table["job"] == "vgg16"].iloc[0]
    assert worse["auc_minus_best_low"] < worse["auc_minus_best_high"] < 0
    row = table[table["job"] == best].iloc[0]
    assert row["auc_low"] < row["auc"] < row["auc_high"]
    text = three.markdown.read_text()
    assert f"to {table[table['job'] == same].iloc[0]['auc_high']:.3f} ≈" in text
    assert "2,000 bootstrap resamples of 60 patients (720 scored rows of 720 images)" in text
    assert "One seed per setting" in text


def test_what_is_equal_is_by_the_margin_of_the_launch_or_of_the_command(
    three: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    table = compare(three, page=False).set_index("job")
    assert set(table["margin"].dropna()) == {0.005}
    assert sorted(table["against_best"].dropna()) == ["best", "different", "not known"]
    assert table.loc["vgg16", "p_from_best"] < table.loc["vgg16", "p_from_best_holm"] < 0.05
    assert table["chance_best"].sum() == pytest.approx(1)
    assert table.loc["vgg16", "patients_to_tell"] < 60  # it is told from 60
    (mean,) = table.loc[table["model"] == "mean of all"].to_dict("records")
    assert mean["reason"] == "3 of 3 networks: xception; resnet50; vgg16"
    assert mean["auc_low"] < mean["auc"] < mean["auc_high"]
    assert mean["auc_minus_best_low"] < mean["auc_minus_best_high"]
    assert pd.isna(mean["told_from_best"])
    assert not three.ensemble.exists()  # there is no test set to keep a choice honest
    assert table["smallest_told"].dropna().between(0.001, 0.1).all()
    record = three.read_record()
    for config in record.configs.values():
        config["report"]["margin"] = 0.02
    three.write_record(record)
    assert main([str(three.root), "--resamples", "200"]) == 0
    assert "lies within ±0.02." in three.markdown.read_text()
    page = three.page.read_text()
    assert "Not known: " in page or "Equal to it within 0.02 AUC: " in page
    assert "Different from it, and lower: vgg16." in page
    assert (three.figures / "ranks.png").stat().st_size > 2_000
    assert main([str(three.root), "--resamples", "200", "--margin", "0.4"]) == 0
    assert sorted(pd.read_csv(three.csv)["against_best"].dropna()) == ["best", "equal", "equal"]
    assert main([str(three.root), "--margin", "2"]) == 2
    assert "--margin is 2.0; it must be above 0 and below 0.5" in capsys.readouterr().err


def test_subgroups_have_metrics_intervals_and_differences(
    tmp_path: Path, composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three sites of known patients, one of them too small to be shown; and one site's labels are
    turned round, so that it does worse by construction."""
    rows = cohort()
    site = np.select([rows["patient"] < 25, rows["patient"] < 55], ["north", "south"], "few")
    wrong = site == "south"
    rows["target"][wrong] = 1 - rows["target"][wrong]
    jobs = {"xception": 2.0, "vgg16": 0.8}
    sweep = write_sweep(tmp_path / "s", jobs, composed, dict.fromkeys(jobs, rows))
    metadata = tmp_path / "m.csv"
    pd.DataFrame({"image_id": rows["image_id"], "site": site}).to_csv(metadata, index=False)
    for job in jobs:
        path = sweep.run(job).config
        path.write_text(path.read_text().replace("metadata: null", f"metadata: {metadata}"))
    record = sweep.read_record()
    for config in record.configs.values():
        config["report"]["subgroups"] = ["site"]
    sweep.write_record(record)
    compare(sweep, resamples=200)
    table = pd.read_csv(sweep.subgroups)
    auc = table[(table["metric"] == "auc") & (table["level"] == "slice")].set_index("group")
    assert auc["patients"].to_dict() == {"north": 25, "south": 30}
    assert (auc["low"] < auc["value"]).all()
    assert (auc["value"] < auc["high"]).all()
    lines = {"auc_any", "ap_macro", "brier", "ece", "threshold_any"}
    assert lines <= set(table["metric"])
    assert "In subgroups" in sweep.page.read_text()
    assert "<td>25 (" in sweep.page.read_text()
    assert str(tmp_path) not in sweep.page.read_text()
    assert main([str(sweep.root), "--resamples", "0", "--subgroup", "scanner"]) == 0
    assert "Not told: report.subgroups names &#39;scanner&#39;" in sweep.page.read_text()
    assert not sweep.subgroups.exists()


def test_what_headers_tell_makes_subgroups(three: SweepPaths, tmp_path: Path) -> None:
    """Kept beside the cohort that the runs were made from; the page says that it is of headers."""
    jobs = list(three.read_record().configs)
    image_ids = cohort()["image_id"]
    kept = pd.DataFrame({"image_id": image_ids}).drop_duplicates()
    kept = kept.assign(**Facts()._asdict())
    kept["manufacturer"] = np.where(np.arange(len(kept)) % 2, "GE", "Siemens")
    for job in jobs:
        run = three.run(job)
        run.write_origin(replace(run.read_origin(), cohort="c"))
        config = yaml.safe_load(run.config.read_text())
        config["data"]["cache_dir"] = str(tmp_path / "kept")
        run.config.write_text(yaml.safe_dump(config))
    command = [str(three.root), "--resamples", "200", "--subgroup", "manufacturer"]
    assert main(command) == 0
    assert "which headers tell, but they were not read for" in three.page.read_text()
    assert not three.subgroups.exists()
    (tmp_path / "kept").mkdir()
    kept.to_csv(CohortFiles(tmp_path / "kept", "c").header_facts, index=False)
    assert main(command) == 0
    table = pd.read_csv(three.subgroups)
    assert set(table["group"]) == {"GE", "Siemens"}
    assert "By manufacturer (from the files&#39; headers), the best setting" in (
        three.page.read_text()
    )


def test_without_resamples_nothing_is_called_distinguishable(
    three: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    table = compare(three, resamples=0, page=False)
    # As after Ctrl-C: what is not there is not offered.
    assert not three.page.exists()
    assert "report.html" in capsys.readouterr().out.split("Next: ")[1].split("makes ")[1]
    assert table["auc_low"].isna().all()
    assert set(table["told_from_best"].dropna()) == {"best"}
    assert "small differences mean nothing" in three.markdown.read_text()


def test_seeds_of_a_setting_are_one_group_with_mean_and_spread(
    tmp_path: Path, composed: Compose
) -> None:
    jobs = {f"{m},seed={s}": 1.5 for m in ("xception", "vgg16") for s in (0, 1, 2)}
    sweep = write_sweep(tmp_path / "seeds", jobs, composed)
    table = compare(sweep, page=False)
    runs = table[table["job"].str.startswith("xception", na=False)]
    assert runs["seed"].tolist() == [0, 1, 2]
    assert runs["seeds"].tolist() == [3] * 3
    means = table[table["reason"] == "mean of 3 seeds"]
    assert means["setting"].tolist() == ["xception", "vgg16"]
    mean = means.iloc[0]
    assert pd.isna(mean["job"])
    assert mean["auc"] == pytest.approx(runs["auc"].mean())
    assert mean["auc_sd"] == pytest.approx(runs["auc"].std())
    assert mean["model"] == "xception"
    every = pd.read_csv(sweep.metrics).set_index(["setting", "level", "metric"])
    assert every.loc[("xception", "slice", "auc"), "value"] == pytest.approx(mean["auc"])
    study = every.loc[("vgg16", "study", "auc_any")]
    assert study["low"] < study["value"] < study["high"]
    text = sweep.markdown.read_text()
    assert "intervals cover patients and seeds" in text
    assert "| xception (3 seeds) |" in text
    assert "xception,seed=0" not in text


def test_runs_on_other_rows_are_not_paired(tmp_path: Path, composed: Compose) -> None:
    jobs = {"xception": 2.0, "vgg16": 0.5}
    sweep = write_sweep(tmp_path / "two", jobs, composed, rows={"vgg16": cohort(seed=1)})
    comparison = load_comparison([sweep], 50)
    assert len(comparison.evaluation_sets) == 2
    assert all(not g.difference_from_best and g.is_best for g in comparison.settings)
    compare(sweep)
    text = sweep.markdown.read_text()
    assert "2 different sets of rows" in text
    assert "unpaired" in text


def test_unknown_patients_are_said(tmp_path: Path, composed: Compose) -> None:
    unknown = cohort() | {"patient": np.full(720, -1), "study": np.full(720, -1)}
    sweep = write_sweep(tmp_path / "x", {"xception": 2.0}, composed, rows={"xception": unknown})
    compare(sweep, page=False, resamples=50)
    assert "720 images: patients are unknown" in sweep.markdown.read_text()


def test_damaged_predictions_cost_their_interval_and_nothing_else(three: SweepPaths) -> None:
    three.run("vgg16").predictions.write_bytes(b"PK\3\4 cut off")
    table = compare(three, page=False, resamples=50).set_index("job")
    assert table.loc["vgg16", "auc"] > 0.5
    assert pd.isna(table.loc["vgg16", "auc_low"])
    assert table.loc["xception", "auc_low"] > 0.5


def test_arrays_of_another_shape_or_type_are_no_predictions(three: SweepPaths) -> None:
    run = three.run("vgg16")
    with np.load(run.predictions) as file:
        whole = dict(file)
    for name, array in whole.items():
        others = [array[:-1], array[..., None], np.array(3), np.array(["x"]), array.astype("S9")]
        for other in others:
            if other.dtype.kind != "S" or array.dtype.kind != "U":  # texts may be bytes
                np.savez(run.predictions, **whole | {name: other})
                assert read_predictions(run) is None, (name, other.dtype, other.shape)
    np.savez(run.predictions, **whole | {"val_image_id": whole["val_image_id"].astype(object)})
    assert read_predictions(run) is None


def test_a_sweep_over_settings_says_what_each_is_worth(tmp_path: Path, composed: Compose) -> None:
    worth = {"bce": 1.6, "focal": 1.6, "weighted_bce": 0.9}
    jobs = {f"{m},loss={k}": v for m in ("xception", "vgg16") for k, v in worth.items()}
    comparison = load_comparison([write_sweep(tmp_path / "loss", jobs, composed)], 500)
    assert set(comparison.factors()) == {"model", "loss"}
    found = {(e.factor, e.level): e for e in compute_effects(comparison)}
    assert found[("loss", "focal")].interval.contains_zero
    worse = found[("loss", "weighted_bce")]
    assert worse.against == "bce"
    assert worse.pairs == 2
    assert worse.interval.high < 0
    assert found[("model", "vgg16")].pairs == 3


def test_a_reason_with_brackets_is_shown_whole(
    tmp_path: Path, composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(
        tmp_path / "[red]s", {"vgg16": 1.0, "xception": 1.0}, composed, None, ["vgg16"]
    )
    run = sweep.run("vgg16")
    run.write_result(replace(run.read_result(), reason="no [/b]\n\x1b[2J[batch]"))
    compare(sweep, resamples=0, page=False)
    printed = capsys.readouterr().out
    shown = r"failed: no [/b] \x1b[2J[batch]"  # in one line, and nothing of it acts
    assert shown in printed
    assert shown in sweep.markdown.read_text()
    assert printed.count("[red]s") >= 3  # its name, and its folder


def test_several_sweeps_make_one_report_and_need_a_folder(
    three: SweepPaths, tmp_path: Path, composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_sweep(tmp_path / "other", {"mobilenet_v2": 2.0}, composed)
    with pytest.raises(UserError, match=r"2 sweeps are compared, and -o DIR is not given"):
        compare(three, other)
    out = tmp_path / "both"
    arguments = [str(three.root), str(other.root), "-o", str(out), "--resamples", "200"]
    assert main(arguments) == 0
    table = pd.read_csv(out / "comparison.csv")
    jobs = [f"three/{model}" for model in ("xception", "resnet50", "vgg16")]
    assert table["job"].tolist()[:4] == [*jobs, "other/mobilenet_v2"]
    assert table["told_from_best"].notna().sum() == 4  # the same rows: paired
    assert "Comparison: three + other" in (out / "report.html").read_text()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert main([str(three.root), "--resamples", "-1"]) == 2


def test_the_page_holds_every_section_and_fetches_nothing(
    tmp_path: Path, composed: Compose
) -> None:
    jobs = EIGHT | {"vgg16": 0.8, "resnet50": 1.0}
    sweep = write_sweep(tmp_path / "a & <b>", jobs, composed, failed=["mobilenet_v2"])
    compare(sweep, resamples=200)
    text = sweep.page.read_text()
    assert re.findall("<h[23].*?>(.*?)</h", text) == [
        *("Compare", "Not finished", "What can be told apart", "How many patients it would take"),
        *("Every metric", "Against the report"),
        *("Why", "Learning curves", "Cost", "Label by label", "Sensitivity and specificity"),
        *("Precision and recall", "Calibration", "Confusion", "Hardest cases"),
        *("How", "What was compared", "Configuration", "Provenance"),
    ]
    assert "http" not in text.split("</style>")[1].replace("http-equiv", "")
    assert str(tmp_path) not in text
    assert "a &amp; &lt;b&gt;" in text
    constant = text.split('<tbody class="last">')[-1].split("</tbody>")[0]
    assert constant.count(">0.500<") == 4  # AUC: micro, any, macro, per study
    assert "needs mobilenet_v2" in text  # a finding about a job that failed
    assert "ended by SIGKILL" in text
    curves = ("forest", "learning_curves", "roc", "precision_recall", "calibration", "confusion")
    for stem in (*curves, "cost", "labels"):
        assert (sweep.figures / f"{stem}.png").stat().st_size > 5_000, stem
        assert (sweep.figures / f"{stem}.svg").read_text().count("<path") > 3, stem
    latex = sweep.latex.read_text()
    assert latex.count("\\\\") >= 9
    assert "\\toprule" in latex
    assert "efficientnet\\_b3" in latex


def test_a_page_that_cannot_be_made_costs_no_table(
    three: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no figure today")

    monkeypatch.setattr("ich.pages.comparison_page.figures.draw_all", broken)
    with pytest.raises(ValueError, match="no figure today"):
        compare(three, resamples=0)
    assert three.csv.exists()


def test_a_finished_sweep_is_rebuilt_alike(three: SweepPaths) -> None:
    compare(three)
    files = [three.csv, three.markdown, three.latex, three.metrics, three.page]
    files += sorted(three.figures.iterdir())
    before = [f.read_bytes() for f in files]
    time.sleep(1.1)
    compare(three)
    assert [f.name for f, b in zip(files, before, strict=True) if f.read_bytes() != b] == []


def test_the_hardest_cases_are_the_most_confident_mistakes(three: SweepPaths) -> None:
    (rows,) = load_comparison([three], 0).evaluation_sets
    run = rows.settings[0].runs[0]
    label, missed, alarms = hardest(run)
    assert label == "any"
    assert run.predictions is not None
    scored = run.predictions.scored
    i = scored.labels.index("any")
    positive = scored.target[:, i] > 0.5
    lowest = run.predictions.image_id[positive][scored.logits[positive, i].argmin()]
    assert missed[0].image_id == lowest
    assert alarms[0].truth == "none"
    assert len({c.image_id for c in (*missed, *alarms)}) == 8


def test_the_pareto_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9)]
    assert pareto_front(points) == [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]


def test_no_interval_leaves_what_a_metric_can_be(tmp_path: Path, composed: Compose) -> None:
    """Over seeds means are stretched: an AUC of nearly 1 had an upper end of 1.014."""
    jobs = {f"xception,seed={seed}": signal for seed, signal in enumerate((3.0, 9.0))}
    sweep = write_sweep(tmp_path / "s", jobs, composed)
    (rows,) = load_comparison([sweep], 200).evaluation_sets
    (setting,) = rows.settings
    ends = {m: setting.interval(m) for m in setting.replicates}
    assert max(i.high for m, i in ends.items() if "log_loss" not in m) == 1
    assert min(i.low for i in ends.values()) >= 0


def test_a_ranking_shows_seeds_in_html_and_markdown() -> None:
    part = Row("seed 0", [Cell("0.9", 0.9)])
    ranking = Ranking("r", ["setting", "AUC"], [Row("x|y", [Cell("0.9", 0.9)], "", [part], "1")])
    page = to_html("t", {}, [("s", [ranking])])
    assert 'class="part"' in page
    assert "script-src 'sha256-" in page
    assert "| - seed 0 | 0.9 |" in to_markdown("t", {}, [("s", [ranking])])


def test_the_best_is_by_auc(three: SweepPaths) -> None:
    (rows,) = load_comparison([three], 0).evaluation_sets
    assert rows.best is not None
    assert rows.best.mean(RANKING_METRIC) == max(g.mean(RANKING_METRIC) for g in rows.settings)


# MLflow


def test_the_best_run_is_registered_and_the_alias_moves_only_where_it_may(
    tmp_path: Path,
    composed: Compose,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{shutil.copy(database, tmp_path)}")

    def close(name: str, signal: float, **rows: dict[str, np.ndarray]) -> SweepPaths:
        sweep = write_sweep(tmp_path / name, {"xception": signal, "vgg16": 0.5}, composed, rows)
        compare(sweep, resamples=0)
        close_in_this_process(sweep, "FINISHED")
        return sweep

    def alias(name: str) -> str:
        return str(client.get_model_version_by_alias("ich", name).tags["ich.sweep"])

    first = close("first", 1.5)
    assert alias("best") == alias("first") == "first"
    close("worse", 1.0)
    assert alias("best") == "first"
    assert alias("worse") == "worse"
    close("better.one", 2.0)
    assert alias("best") == alias("better-one") == "better.one"
    elsewhere = {k: cohort(seed=3) for k in ("xception", "vgg16")}
    other = close("other", 3.0, **elsewhere)
    assert alias("best") == "better.one"  # higher, but on other rows
    assert main([str(other.root), "--resamples", "0", "--promote"]) == 0
    assert "is version 4 of the model ich, and its alias best" in capsys.readouterr().out
    assert alias("best") == "other"
    close_in_this_process(first, "FINISHED")  # again, as after the same command
    assert len(client.search_model_versions("name = 'ich'")) == 4
    version = client.get_model_version_by_alias("ich", "other")
    assert version.tags["ich.job"] == "xception"
    parent = client.get_run(str(other.read_record().mlflow_run))
    assert parent.data.tags["ich.best_job"] == "xception"
    assert parent.data.metrics["best/auc"] > 0.9
    kept = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "comparison.tex", "metrics.csv", "figures"} <= kept


def test_a_sweep_is_promoted_in_the_store_of_its_own_project(
    tmp_path: Path, composed: Compose, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder an empty database was made, and nothing found in it."""
    project, elsewhere = tmp_path / "a", tmp_path / "b"
    for folder in (project, elsewhere):
        folder.mkdir()
    shutil.copy(database, project)
    root = project / "multirun_reports" / "s"
    sweep = write_sweep(root, {"xception": 1.5, "vgg16": 0.5}, composed)
    record = sweep.read_record()
    for config in record.configs.values():
        config["sweep"]["output"] = "multirun_reports"
    sweep.write_record(record)
    monkeypatch.chdir(project)
    close_in_this_process(sweep, "FINISHED")
    monkeypatch.chdir(elsewhere)
    relative = SweepPaths(Path("../a/multirun_reports/s"))
    assert "xception is version 1 of the model ich" in promote(relative)
    copy = shutil.copytree(root, elsewhere / "s")  # the sweep's folder alone: where was it?
    with pytest.raises(UserError, match=r"s cannot be promoted: there is no MLflow database mlfl"):
        promote(SweepPaths(copy))
    assert [p.name for p in elsewhere.iterdir()] == ["s"]
    shutil.copy(database, elsewhere)
    with pytest.raises(UserError, match=r"no run of .*a copy in MLflow at mlflow.db, experiment i"):
        promote(SweepPaths(copy))


def test_nothing_is_promoted_that_mlflow_does_not_have(
    three: SweepPaths, tmp_path: Path, composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    record = three.read_record()
    for config in record.configs.values():
        config["tracking"]["mlflow"] = False
    three.write_record(record)
    with pytest.raises(UserError, match=r"was trained with tracking=none"):
        promote(three)
    assert main([str(three.root), str(three.root), "-o", str(tmp_path / "o"), "--promote"]) == 2
    assert "--promote takes one sweep, and 2 are given" in capsys.readouterr().err


# What the reviewer found


def test_runs_without_predictions_still_have_their_table(three: SweepPaths) -> None:
    """As in the committed examples of earlier versions."""
    for job in ("xception", "resnet50", "vgg16"):
        three.run(job).predictions.unlink()
    table = compare(three)
    assert table["auc"].notna().sum() == 4
    assert "no run has predictions that can be read" in three.markdown.read_text()


def nul(data: bytes) -> bytes:
    return b"\0" * len(data)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage(data: bytes) -> bytes:
    return bytes(b ^ 0xA5 for b in data)


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "metrics.jsonl", "predictions.npz"])
def test_a_damaged_file_costs_its_own_run_alone_and_is_named(
    three: SweepPaths, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_comparison([three], 0).runs
    paths = [three.run(job).root / name for job in ("resnet50", "vgg16")]
    for path, damage in zip(paths, (nul, cut), strict=True):
        path.write_bytes(damage(path.read_bytes()))
    table = compare(three, resamples=0, page=name == "metrics.jsonl").set_index("job")
    for run in expected:
        row = table.loc[run.name]
        if name == "result.json" and run.name != "xception":
            assert (row["status"], row["reason"]) == ("failed", "result.json is damaged")
        else:
            assert row["auc"] == run.fit.scores["auc"]
    if name not in ("result.json", "metrics.jsonl"):
        assert all(str(path) in caplog.text for path in paths[:1])


@pytest.mark.parametrize("damage", [nul, cut, garbage])
def test_a_damaged_record_has_a_row_for_each_folder(
    three: SweepPaths, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    three.record.write_bytes(damage(three.record.read_bytes()))
    table = compare(three, resamples=0, page=False)
    assert {"resnet50", "vgg16", "xception"} <= {*table["job"]}
    assert f"{three.record} is damaged" in caplog.text


def test_a_secret_of_this_machine_gets_into_no_page(
    tmp_path: Path, composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `${oc.env:...}` in the folder of somebody else."""
    monkeypatch.setenv("ICH_SECRET", "a-secret-of-this-machine")
    sweep = write_sweep(tmp_path / "s", {"vgg16": 1.0}, composed)
    for path in (sweep.run("vgg16").config, sweep.record):
        text = path.read_text()
        assert "phantom" in text
        path.write_text(text.replace("phantom", "${oc.env:ICH_SECRET}"))
    compare(sweep, resamples=0)
    pages = [p for p in sweep.root.rglob("*") if p.suffix in (".html", ".md", ".csv", ".tex")]
    assert len(pages) == 7
    for path in pages:
        assert "a-secret" not in path.read_text()


def test_a_damaged_record_without_any_run_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="holds no sweep"):
        compare(SweepPaths(tmp_path))


def test_intervals_that_cannot_be_computed_again_are_kept(
    three: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    before = compare(three, resamples=10, page=False).set_index("job")
    three.page.write_text("a page")
    three.run("vgg16").predictions.unlink()
    table = compare(three, resamples=10, page=False).set_index("job")
    assert pd.isna(table.loc["vgg16", "auc_low"])
    kept = SweepPaths(three.root / "superseded" / "report.1")
    earlier = pd.read_csv(kept.csv).set_index("job")
    assert earlier.loc["vgg16", "auc_low"] == pytest.approx(before.loc["vgg16", "auc_low"])
    assert kept.page.read_text() == "a page"
    out = " ".join(capsys.readouterr().out.split())
    assert "The predictions of vgg16 are gone or damaged, so there are no intervals" in out
    assert f"which has them, is kept in {kept.root}." in out
    compare(three, resamples=0, page=False)  # nothing more is lost, so nothing more is kept
    assert [p.name for p in kept.root.parent.iterdir()] == ["report.1"]


def test_a_page_that_cannot_be_written_is_named_and_not_offered(
    three: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    three.page.mkdir(parents=True)
    assert main([str(three.root), "--resamples", "0"]) == 2
    out, err = capsys.readouterr()
    assert str(three.page) in err
    assert err.count("\n") == 1
    assert "open report.html" not in out
    assert three.csv.exists()


def test_a_sweep_whose_tables_cannot_be_written_says_so_in_a_paragraph(
    three: SweepPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr("ich.tracking.sweep_run.close_sweep_run", lambda *a: closed.append(a[1]))
    monkeypatch.setattr(steps, "launched", [three])
    three.csv.mkdir()
    assert close(interrupted=False) is False
    err = capsys.readouterr().err
    assert f"the comparison of {three.root} could not be written (" in err
    assert str(three.csv) in err
    assert f"ich report {three.root} makes it again" in err
    assert err.count("\n") == 1
    assert closed == ["FINISHED"]


def test_a_finished_run_without_its_config_costs_nothing_else(three: SweepPaths) -> None:
    three.run("xception").config.unlink()
    compare(three, resamples=50)
    assert three.page.exists()


def test_patients_without_a_study_are_left_out_of_studies_alone(
    tmp_path: Path, composed: Compose
) -> None:
    rows = cohort()
    rows["study"] = np.where(rows["patient"] == rows["patient"].max(), -1, rows["study"])
    sweep = write_sweep(tmp_path / "s", {"xception": 2.0}, composed, rows={"xception": rows})
    (group,) = load_comparison([sweep], 50).settings
    assert group.interval("study_auc").low < group.mean("auc", study=True)


def test_few_patients_have_no_interval(tmp_path: Path, composed: Compose) -> None:
    rows = cohort(patients=4, slices=60)
    jobs = {"xception": 2.0, "vgg16": 0.5}
    sweep = write_sweep(tmp_path / "few", jobs, composed, rows=dict.fromkeys(jobs, rows))
    table = compare(sweep, page=False)
    assert table["auc_low"].isna().all()
    assert "no" not in set(table["told_from_best"].dropna())
    assert "4 patients, too few for any (at least 10)" in sweep.markdown.read_text()


def test_the_page_names_no_path_of_the_machine(three: SweepPaths) -> None:
    command = "ich sweep data.root=/home/alice/rsna.zip data.labels='/srv/a b/l.csv'"
    three.write_record(replace(three.read_record(), command=command))
    compare(three, resamples=0)
    for file in (three.page, three.markdown):
        assert "data.root=rsna.zip" in file.read_text()
        assert "alice" not in file.read_text()
        assert "/srv" not in file.read_text()
    assert without_paths("see https://example.org/a/b.html, or a/b") == (
        "see https://example.org/a/b.html, or a/b"
    )


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("data.root=/scans", "data.root=scans"),
        ("data.root=[/home/a/b,/c]", "data.root=[b,c]"),
        ("tracking.uri=sqlite:////home/a/ml.db", "tracking.uri=sqlite:///ml.db"),
        ("tracking.uri=http://ann:pw@host:5000", "tracking.uri=http://***@host:5000"),
        (f"data.root='{Path.cwd()}/a b/c'", "data.root='a b/c'"),
        ("hydra/launcher=ich_ray data.root=a/b", "hydra/launcher=ich_ray data.root=a/b"),
    ],
)
def test_a_command_is_shown_without_paths_and_passwords(typed: str, shown: str) -> None:
    assert public_command(f"ich sweep -m {typed}") == f"ich sweep -m {shown}"


def test_sweeps_of_one_name_are_refused(three: SweepPaths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have folders of one name, 'three'"):
        compare(three, SweepPaths(three.root), out=tmp_path / "o")


def test_a_run_with_a_nan_logit_costs_its_own_scores_alone(three: SweepPaths) -> None:
    path = three.run("vgg16").predictions
    with np.load(path) as file:
        arrays = dict(file)
    arrays["val_logits"][5, 2] = np.nan
    np.savez(path, **arrays)
    table = compare(three, resamples=50).set_index("job")
    assert pd.isna(table.loc["vgg16", "accuracy_low"])
    assert table.loc["xception", "auc_low"] > 0.5
    assert three.page.exists()


def test_two_ablations_together_keep_each_its_effects(tmp_path: Path, composed: Compose) -> None:
    a = write_sweep(
        tmp_path / "a", {"xception,augment=none": 1.5, "xception,augment=report": 1.6}, composed
    )
    b = write_sweep(
        tmp_path / "b", {"xception,loss=bce": 1.6, "xception,loss=focal": 1.0}, composed
    )
    for pair in ((a, b), (b, a)):
        found = {e.factor for e in compute_effects(load_comparison(pair, 50))}
        assert {"augment", "loss"} <= found


def test_the_best_is_marked_among_runs_on_the_same_rows(tmp_path: Path, composed: Compose) -> None:
    jobs = {"xception": 2.0, "resnet50": 1.0, "vgg16": 0.5, "mobilenet_v2": 0.6}
    other = dict.fromkeys(("vgg16", "mobilenet_v2"), cohort(seed=1))
    sweep = write_sweep(tmp_path / "s", jobs, composed, rows=other)
    table = compare(sweep, resamples=0, page=False)
    assert {(0, "auc"), (3, "auc")} <= best_cells(table)


def test_seeds_are_one_setting_where_names_had_to_be_cut(tmp_path: Path, composed: Compose) -> None:
    sweep = write_sweep(tmp_path / "s", {"xception,seed=0": 1.5, "xception,seed=1": 1.5}, composed)
    for seed, digest in ((0, "f0afa1"), (1, "5e04ae")):
        name = f"xception,augment.hflip=x_y,seed={seed}-{digest}"
        sweep.run(f"xception,seed={seed}").root.rename(sweep.run(name).root)
    jobs = tuple(p.name for p in sorted(sweep.root.glob("xception*")))
    sweep.write_record(replace(sweep.read_record(), jobs=jobs))
    (group,) = load_comparison([sweep], 0).settings
    assert group.name == "xception,augment.hflip=x_y"
    assert len(group.runs) == 2

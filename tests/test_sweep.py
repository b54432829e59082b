"""The sweep as its user runs it: a subprocess, synthetic DICOM, one job that fails."""

from __future__ import annotations

import fcntl
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pandas as pd
import pytest
from commands import run_module
from mlflow import MlflowClient
from sweeps import SMALL

from ich.base.config import UserError
from ich.base.entry import Status
from ich.base.records import FAILED, RunResult
from ich.base.results import SweepPaths
from ich.data.phantom.spec import LABELS
from ich.pages.tables import compare

# What other people's scripts rely on, in this order.
COLUMNS = [
    *("job", "model", "status", "reason", "accuracy", "auc"),
    *(f"auc_{k}" for k in LABELS),
    *("auc_macro", "auc_top", "params", "params_imagenet", "best_epoch", "minutes"),
    *("images_per_s", "report_accuracy", "report_auc", "scored_on", "val_accuracy", "val_auc"),
    *("leak_image", "leak_study", "leak_patient", "precision"),
    *("seed", "exact_match", "ap_macro", "log_loss", "log_loss_weighted", "brier", "ece"),
    *("study_auc", "setting", "rows", "seeds", "auc_sd", "accuracy_sd"),
    *("auc_low", "auc_high", "auc_minus_best_low", "auc_minus_best_high"),
    *("accuracy_low", "accuracy_high", "accuracy_minus_best_low", "accuracy_minus_best_high"),
    "told_from_best",
    *("margin", "against_best", "p_from_best", "p_from_best_holm", "chance_best"),
    *("patients_to_tell", "positives_to_tell", "smallest_told"),
]

# It composes and passes every check, and diverges in training.
BROKEN = """# @package _global_
model:
  name: broken
  timm: mobilenetv2_100.ra_in1k
  image_size: 40
optimizer:
  weight_decay: 1e39
"""


def run(folder: Path, phantom: Path, *words: str) -> CompletedProcess[str]:
    """A small sweep of the phantom."""
    small = (f'data.root="{phantom}"', *SMALL, "train.epochs=1", "train.threads=1")
    return run_module("sweep", *words, *small, cwd=folder, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def sweep(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Two models and a third that fails, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("a project")
    (folder / "extra" / "model").mkdir(parents=True)
    (folder / "extra" / "model" / "broken.yaml").write_text(BROKEN)
    extra = f"hydra.searchpath=[file://{folder / 'extra'}]"
    jobs = "model=mobilenet_v2,broken,efficientnet_b0"
    done = run(folder, phantom, "-m", jobs, "name=three", extra)
    return folder, done.stdout + done.stderr, done.returncode


def test_one_failing_job_ends_neither_the_sweep_nor_the_table(sweep: tuple[Path, str, int]) -> None:
    folder, output, status = sweep
    assert status == 1, output
    table = pd.read_csv(folder / "multirun_reports" / "three" / "comparison.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["job"].dropna()) == ["mobilenet_v2", "broken", "efficientnet_b0"]
    assert list(table["status"].dropna()) == ["finished", "failed", "finished"]
    assert "not finite" in table["reason"][1]
    assert list(table["model"])[3:] == ["mean of all", "always negative"]
    assert table["accuracy"].notna().tolist() == [True, False, True, True, True]
    assert table["scored_on"][0] == "val"
    assert 0 < table["leak_image"][0] < table["leak_patient"][0] <= 1
    assert "Traceback" in (folder / "multirun_reports/three/broken/job.log").read_text()
    assert "Traceback" not in output


def test_the_terminal_shows_epochs_the_table_and_what_next(sweep: tuple[Path, str, int]) -> None:
    _, output, _ = sweep
    assert "decoding slices" in output
    assert "[1/3] mobilenet_v2" in output
    assert "mobilenet_v2 epoch 1/1: loss" in output
    assert "broken failed" in output
    assert "always negative" in output
    assert "Next: open report.html; make ui" in output


def test_mlflow_has_the_sweep_and_its_jobs(sweep: tuple[Path, str, int]) -> None:
    folder, _, _ = sweep
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ich")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert {n: r.info.status for n, r in runs.items()} == {
        "three": "FAILED",
        "mobilenet_v2": "FINISHED",
        "broken": "FAILED",
        "efficientnet_b0": "FINISHED",
    }
    job = runs["mobilenet_v2"]
    assert job.data.tags["mlflow.parentRunId"] == runs["three"].info.run_id
    assert job.data.params["optimizer.lr"] == "0.0001"
    assert {
        "train/loss",
        "train/lr",
        "train/images_per_s",
        "val/accuracy",
        "val/auc",
        "val/auc_macro",
        "val/auc_any",
        "best/accuracy",
        "best/val_accuracy",
        "data/leak_image",
        "data/leak_study",
        "data/leak_patient",
    } <= set(job.data.metrics)
    files = {f.path for f in client.list_artifacts(job.info.run_id)}
    assert {"config.yaml", "model", "predictions.npz"} <= files
    kept = {f.path for f in client.list_artifacts(runs["three"].info.run_id)}
    assert {"0-verdict", "comparison.csv", "report.md", "figures"} <= kept
    for run in (runs["three"], job):
        assert run.data.tags["mlflow.source.name"].startswith("ich sweep ")
        assert str(folder) not in run.data.tags["mlflow.source.name"]
        assert len(client.get_run(run.info.run_id).inputs.dataset_inputs) == 1
    (data,) = [path for path in kept if path.startswith("data-")]
    reports = {f.path for f in client.list_artifacts(runs["three"].info.run_id, data)}
    assert {f"{data}/data_report.html", f"{data}/data_report.md"} <= reports


def test_the_table_is_rebuilt_from_the_files_alone(sweep: tuple[Path, str, int]) -> None:
    folder, _, _ = sweep
    place = SweepPaths(folder / "multirun_reports" / "three")
    before = place.csv.read_text(), place.markdown.read_text()
    place.csv.unlink()
    place.markdown.unlink()
    done = run_module("report", "multirun_reports/three", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (place.csv.read_text(), place.markdown.read_text()) == before
    assert (place.figures / "learning_curves.png").stat().st_size > 10_000
    nothing = run_module("report", "multirun_reports/none", cwd=folder)
    assert nothing.returncode == 2
    assert "holds no sweep (no sweep.json)" in nothing.stderr
    assert "Traceback" not in nothing.stderr


def test_the_same_command_again_runs_only_what_is_missing(
    sweep: tuple[Path, str, int], phantom: Path
) -> None:
    folder, _, _ = sweep
    weights = folder / "multirun_reports/three/mobilenet_v2/best.safetensors"
    before = weights.stat().st_mtime_ns
    done = run(folder, phantom, "-m", "model=mobilenet_v2", "name=three")
    assert done.returncode == 0, done.stderr
    assert "mobilenet_v2 was finished before" in done.stdout
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=vgg16,vgg17"], "there is no model=vgg17. Did you mean model=vgg16?"),
        (["model=vgg16", "data.imagesize=3"], "Did you mean data.image_size?"),
        (["model=vgg16,vgg16"], "the job 'vgg16' stands 2 times"),
        (["model=resnet50,vgg16", "optimizer.lr=1e-3,nan"], "optimizer.lr is nan"),
        (["model=vgg16", "model.weights=no.safetensors"], "model.weights is 'no.safetensors'"),
        (["model=vgg16,resnet50", "model.pretrained=true"], "Three ways out"),
        (["model=vgg16", "data=rsna", "data.root=nowhere"], "data.root is 'nowhere'"),
        (["experiment=report", "model.pretrained=true"], "data.root is not set"),
        (["model=vgg16", "name=../up"], "name is '../up', but must be letters"),
        (["model=vgg16", "tracking.uri=http://127.0.0.1:9"], "cannot be used"),
    ],
)
def test_mistakes_are_said_before_any_job_starts(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    env_free = [] if "model.pretrained=true" in overrides else ["model.pretrained=false"]
    cache = {"HF_HUB_CACHE": str(tmp_path / "empty"), "TORCH_HOME": str(tmp_path / "empty")}
    done = run_module("sweep", "-m", *overrides, *env_free, cwd=tmp_path, env=cache)
    assert done.returncode == Status.MISTAKE
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "multirun_reports").exists()
    assert not (tmp_path / "up").exists()


# The table itself


def test_two_sweeps_in_one_folder_are_refused(phantom: Path, tmp_path: Path) -> None:
    place = tmp_path / "multirun_reports" / "busy"
    place.mkdir(parents=True)
    with (place / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = run(tmp_path, phantom, "model=mobilenet_v2", "name=busy", "tracking=none")
    assert done.returncode == Status.MISTAKE
    assert "another sweep is running in multirun_reports/busy" in done.stderr
    assert not (place / "sweep.json").exists()


@pytest.mark.faults  # a whole sweep
def test_any_launcher_of_hydra_works_because_all_jobs_are_checked_first(
    phantom: Path, tmp_path: Path
) -> None:
    common = ("-m", "hydra/launcher=basic", "name=basic", "model=mobilenet_v2", "tracking=none")
    wrong = run(tmp_path, phantom, *common, "optimizer.lr=1e-3,nan")
    assert wrong.returncode == Status.MISTAKE
    assert "optimizer.lr is nan" in wrong.stderr
    assert not (tmp_path / "multirun_reports").exists()
    done = run(tmp_path, phantom, *common, "seed=0,1", "protocol.seed=${seed}")
    assert done.returncode == 0, done.stderr
    sweep = SweepPaths(tmp_path / "multirun_reports" / "basic")
    table = pd.read_csv(sweep.csv)
    assert table["job"].tolist()[:2] == ["mobilenet_v2,seed=0", "mobilenet_v2,seed=1"]
    assert table["status"].tolist()[:2] == ["finished"] * 2
    # Each job has its own cohort, hence its own baseline, and the heading speaks for both.
    assert (table["model"] == "always negative").sum() == 2
    assert "seed 0 or 1." in sweep.markdown.read_text()


def test_a_sweep_without_a_finished_job_still_has_its_table(tmp_path: Path) -> None:
    place = SweepPaths(tmp_path)
    place.record.write_text('{"name": "x", "jobs": ["a"], "started": "", "command": ""}')
    place.run("a").root.mkdir()
    place.run("a").write_result(RunResult(FAILED, "ended by SIGKILL", "a"))
    table = compare(place)
    assert table["reason"].tolist() == ["ended by SIGKILL"]
    assert "failed: ended by SIGKILL" in place.markdown.read_text()


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep \(no sweep.json\)"):
        compare(SweepPaths(tmp_path))


def test_a_single_sound_training_selects_on_validation_and_scores_on_test(
    phantom: Path, tmp_path: Path
) -> None:
    own = ("name=sound", "protocol=sound", "tracking=none")
    done = run(tmp_path, phantom, "model=mobilenet_v2", *own)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mlflow.db").exists()
    place = SweepPaths(tmp_path / "multirun_reports" / "sound")
    table = pd.read_csv(place.csv)
    assert table["status"][0] == "finished"
    assert table["scored_on"][0] == "test"
    assert table["leak_patient"][0] == 0
    saved = np.load(place.run("mobilenet_v2").predictions)
    for split, prefix in (("test", ""), ("val", "val_")):
        accuracy = ((saved[f"{split}_logits"] > 0) == (saved[f"{split}_target"] > 0.5)).mean()
        assert table[f"{prefix}accuracy"][0] == pytest.approx(accuracy, abs=1e-6)
    assert not set(saved["test_patient"]) & set(saved["val_patient"])
    text = place.markdown.read_text()
    assert "Epochs were chosen on the validation rows, and scored on the test rows" in text
    assert "No image and no study and no patient of the scored rows stands in another set" in text
    (report,) = place.root.glob("data-*/data_report.html")
    assert f"{report.parent.name}/data_report.html" in text

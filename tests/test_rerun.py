"""A finished run again: identical, within tolerance, or different and where; what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_module, start_module
from made_up import FIT
from safetensors.numpy import load_file, save_file
from sweeps import SMALL, saboteur, wait_for

from ich.base import provenance
from ich.base.config import Config, UserError, load_config, to_yaml
from ich.base.files import write_json
from ich.base.processes import lock_run
from ich.base.records import (
    FAILED,
    FINISHED,
    KILLED,
    GitState,
    Hardware,
    Origin,
    Provenance,
    RunResult,
)
from ich.base.results import RunPaths, SweepPaths
from ich.launch.rerun import Original, list_changes, rerun_config, restore_commands
from ich.rerun import main
from ich.scoring.verdict import Outcome, compare_runs, describe

JOB = "mobilenet_v2"


# Two folders made by hand


def make(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> RunPaths:
    """A finished run of two epochs, four validation images, two labels; `change` edits it."""
    scores = {"auc": 0.9, "accuracy": 0.8}
    fit = replace(FIT, scores=scores, val_scores=scores, always_negative={"accuracy": 0.7})
    what: dict[str, Any] = {
        "epochs": [
            {"step": n, "time": float(n), "train/images_per_s": 10.0 * n}
            | {"train/loss": 0.5 / n, "train/lr": 1e-4, "val/auc": 0.9, "val/auc_any": None}
            for n in (1, 2)
        ],
        "result": {"status": FINISHED, "reason": "", **fit.to_json()},
        "predictions": {
            "labels": np.array(["epidural", "any"]),
            "val_image_id": np.array(["ID_a", "ID_b", "ID_c", "ID_d"]),
            "val_patient": np.arange(4),
            "val_target": np.eye(4, 2, dtype=np.float32),
            "val_logits": np.array([[-2, 0], [0, 2], [1, 1], [-1, 3]], np.float32),
        },
        "weights": {
            "base.conv": np.arange(6, dtype=np.float32).reshape(2, 3),
            "head.weight": np.ones((2, 2), np.float32),
        },
        "header": {"ich": "{}"},
    }
    change(what)
    run = RunPaths(folder)
    folder.mkdir()
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in what["epochs"]))
    write_json(run.result, what["result"])
    np.savez_compressed(run.predictions, **what["predictions"])
    save_file(what["weights"], run.best, what["header"])
    return run


def set_to(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of a run, by the keys that lead to it."""

    def change(what: dict[str, Any]) -> None:
        place: Any = what
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


IDS, TARGET, LOGITS = (("predictions", f"val_{k}") for k in ("image_id", "target", "logits"))


def full(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def test_equal_runs_are_identical_however_long_they_took(tmp_path: Path) -> None:
    def slower(what: dict[str, Any]) -> None:
        what["epochs"][0] |= {"time": 99.0, "train/images_per_s": 1.0}
        what["result"] |= {"minutes": 60.0, "resumed": 3, "device": "another", "threads": 8}
        what["predictions"]["val_patient"] = np.arange(4)[::-1]

    verdict = compare_runs(make(tmp_path / "a"), make(tmp_path / "b", slower), 0.0)
    assert verdict.outcome is Outcome.identical
    assert [p.compared for p in verdict.parts] == [8, 11, 22, 2]
    assert describe(verdict)[-1] == "best.safetensors: 2 tensors, all equal, byte for byte"


@pytest.mark.parametrize(
    ("keys", "value", "part", "where"),
    [
        (("epochs", 1, "val/auc"), 0.9009, "journal", "epoch 2, val/auc"),
        (("result", "val_accuracy"), 0.8009, "result", "val_accuracy"),
        (("weights", "head.weight"), full(5, 2, 2), "weights", "tensor head.weight"),
        (("header", "ich"), "other", "weights", "the header"),
        ((*LOGITS, (2, 0)), 1 + 1e-5, "predictions", "val, image ID_c, probability of epidural"),
    ],
)
def test_a_small_difference_is_within_tolerance_and_named(
    tmp_path: Path, keys: tuple[Any, ...], value: object, part: str, where: str
) -> None:
    other = make(tmp_path / "b", set_to(*keys, value=value))
    verdict = compare_runs(make(tmp_path / "a"), other, 1e-3)
    assert verdict.outcome is Outcome.within
    found = getattr(verdict, part)
    assert (found.differing, found.first.where) == (1, where)
    assert found.first.size < 10
    assert sum(p.differing for p in verdict.parts) == 1


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        (
            ("epochs", 0, "train/loss"),
            0.502,
            "metrics.jsonl: 1 of 8 values differ. First: epoch 1, train/loss, 0.5 before and 0.502 "
            "now (by 0.002)",
        ),
        (("epochs", 0, "train/lr"), 1.0001e-4, "epoch 1, train/lr, 0.0001 before and 0.00010001"),
        (("epochs", 1, "val/auc_any"), 0.5, "epoch 2, val/auc_any, nothing before and 0.5 now"),
        (
            ("epochs", slice(1, None)),
            [],
            "3 of 8 values differ. First: epoch 2, train/loss, 0.25 before and nothing now",
        ),
        (("result", "best_epoch"), 1, "First: best_epoch, 2 before and 1 now"),
        ((*IDS, 1), "ID_x", "First: val_image_id, row 1, ID_b before and ID_x now"),
        ((*TARGET, (3, 1)), 1, "First: val_target, row 3, label 1, 0 before and 1 now"),
        (LOGITS, full(0, 3, 2), "val_logits, float32 (4, 2) before and float32 (3, 2) now"),
        (
            ("predictions", "test_logits"),
            full(0, 4, 2),
            "First: shape of test_logits, nothing before and float32 (4, 2) now",
        ),
        (
            (*LOGITS, (3, 0)),
            1,
            "First: val, image ID_d, probability of epidural, 0.268941421 before and 0.731058579 "
            "now (by 0.46)",
        ),
        (
            ("weights", "head.bias"),
            full(0, 2),
            "First: tensor head.bias, nothing before and float32 (2,) now",
        ),
        (
            ("weights", "base.conv"),
            full(0, 3, 2),
            "First: tensor base.conv, float32 (2, 3) before and float32 (3, 2) now",
        ),
    ],
)
def test_runs_that_differ_by_more_are_different_and_it_says_where(
    tmp_path: Path, keys: tuple[Any, ...], value: object, line: str
) -> None:
    other = make(tmp_path / "b", set_to(*keys, value=value))
    verdict = compare_runs(make(tmp_path / "a"), other, 1e-3)
    assert verdict.outcome is Outcome.different
    assert line in "\n".join(describe(verdict))


def test_the_first_and_the_largest_difference_are_both_told(tmp_path: Path) -> None:
    logits = np.array([[-2, 0], [0, 2.0001], [1, 1], [-1, 0]], np.float32)
    change = set_to("predictions", "val_logits", value=logits)
    verdict = compare_runs(make(tmp_path / "a"), make(tmp_path / "b", change), 1e-3)
    assert verdict.predictions.differing == 2
    first, largest = verdict.predictions.first, verdict.predictions.largest
    assert first is not None
    assert largest is not None
    assert first.where == "val, image ID_b, probability of any"
    assert largest.where == "val, image ID_d, probability of any"
    assert largest.after == 0.5
    assert largest.size == pytest.approx(1 / (1 + np.exp(-3)) - 0.5)


def test_the_tolerance_is_the_callers(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", set_to("result", "auc", value=0.95))
    assert compare_runs(a, b, 0.04).outcome is Outcome.different
    assert compare_runs(a, b, 0.06).outcome is Outcome.within


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.npz", "best.safetensors"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path, name: str, cut: bool) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    path = b.root / name
    if cut:
        path.write_bytes(path.read_bytes()[:-9] + b"\n{}\n")
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"b/{name} is {'damaged' if cut else 'missing'}"):
        compare_runs(a, b, 0.0)


# A real run


@pytest.fixture(scope="module")
def project(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a sweep of one small network has run, on one thread of the machine's."""
    folder = tmp_path_factory.mktemp("project")
    own = ("train.epochs=2", "tracking=none", "hydra.launcher.cpu_jobs=64")
    swept = ("-m", f"model={JOB}", "name=s", f'data.root="{phantom}"', *SMALL, *own)
    command(folder, "sweep", *swept)
    return folder


def command(folder: Path, *words: str) -> str:
    done = run_module(*words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture
def run(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """The run in a copy of the project, which is the working folder."""
    folder = tmp_path / "copy"
    shutil.copytree(project, folder)
    shutil.rmtree(folder / "multirun_reports" / "s" / "reruns", ignore_errors=True)
    monkeypatch.chdir(folder)
    return RunPaths(Path("multirun_reports") / "s" / JOB)


Train = Callable[[Callable[[RunPaths], None]], None]


@pytest.fixture
def trains(run: RunPaths, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Puts in place of a training: the original's files, changed as given."""

    def install(change: Callable[[RunPaths], None]) -> None:
        def run_job(config: Config, again: RunPaths, origin: Origin, *_: object) -> object:
            assert not again.best.exists()
            shutil.copytree(run.root, again.root, dirs_exist_ok=True)
            again.config.write_text(to_yaml(config))
            again.write_origin(origin)
            again.write_provenance(provenance.record())
            change(again)
            return again.read_result()

        monkeypatch.setattr("ich.launch.rerun.run_job", run_job)

    return install


def nothing(_: RunPaths) -> None:
    pass


def edit(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def rerun_of(run: RunPaths) -> RunPaths:
    return SweepPaths(run.root.parent).rerun(run.root.name)


def test_a_repeated_run_is_identical(project: Path) -> None:
    """The training itself, as a user starts it; the original had one thread, by its slot."""
    folder = f"multirun_reports/s/{JOB}"
    before = {p: p.stat().st_mtime_ns for p in (project / folder).iterdir()}
    out = command(project, "rerun", folder)
    assert "\nidentical\n" in out
    assert f"{JOB} epoch 2/2: loss" in out
    original, again = RunPaths(project / folder), rerun_of(RunPaths(project / folder))
    assert again.root == project / "multirun_reports" / "s" / "reruns" / JOB
    first, second = original.read_result().fit, again.read_result().fit
    assert first is not None
    assert second is not None
    assert first.threads == second.threads == 1
    assert again.best.read_bytes() == original.best.read_bytes()
    record = json.loads(again.comparison.read_text())
    assert (record["verdict"], record["tolerance"]) == ("identical", 1e-3)
    assert [part["differing"] for part in record["parts"]] == [0, 0, 0, 0]
    assert {p: p.stat().st_mtime_ns for p in (project / folder).iterdir()} == before


def test_another_seed_in_the_record_is_another_training(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_text(to_yaml(replace(load_config(run.config), seed=1)))
    assert main([str(run.root)]) == 1
    out = capsys.readouterr().out
    assert "seed: 0 in the sweep's record, 1 in config.yaml, which counts." in out
    assert "\ndifferent (tolerance 0.001)\n" in out
    assert "First: epoch 1, train/loss, " in out
    record = json.loads(rerun_of(run).comparison.read_text())
    assert record["verdict"] == "different"
    assert record["parts"][0]["first"]["where"] == "epoch 1, train/loss"
    assert "image ID_" in record["parts"][2]["largest"]["where"]
    assert record["parts"][3]["first"]["where"].startswith("tensor ")


def shift(again: RunPaths) -> None:
    """Logits as another machine's rounding would leave them."""
    with np.load(again.predictions) as file:
        arrays = dict(file)
    arrays["val_logits"] = arrays["val_logits"] + np.float32(1e-5)
    np.savez_compressed(again.predictions, **arrays)
    weights = load_file(again.best)
    weights["head.bias"] = weights["head.bias"] + np.float32(1e-5)
    save_file(weights, again.best)


def test_logits_that_differ_in_their_last_digits_are_within_tolerance(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(shift)
    for path in (run.origin, run.provenance):  # whoever works on ich while this runs
        edit(path, code=provenance.code_version())
    assert main([str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "Code, packages, hardware and threads are those of its record." in out
    assert "\nwithin tolerance (tolerance 0.001)\n" in out
    assert "best.safetensors: 1 of 314 tensors differ. First: tensor head.bias" in out
    assert main([str(run.root), "--tolerance", "1e-9"]) == 1


def test_a_finished_rerun_is_kept_and_the_run_repeated_again(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(nothing)
    for _ in range(3):
        assert main([str(run.root)]) == 0
    shelf = rerun_of(run).root.parent / "superseded"
    assert sorted(p.name for p in shelf.iterdir()) == [f"{JOB}.1", f"{JOB}.2"]
    assert RunPaths(shelf / f"{JOB}.1").comparison.exists()
    with pytest.raises(SystemExit):
        main([str(run.root), "--tolerance", "-1"])
    assert "'-1' is not a finite number, 0 or more" in capsys.readouterr().err


def test_a_rerun_that_fails_says_why_and_compares_nothing(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(again: RunPaths) -> None:
        again.write_result(RunResult(FAILED, "ended by SIGKILL (out of memory?)"))

    trains(die)
    assert main([str(run.root)]) == 1
    out = capsys.readouterr().out
    assert f"{JOB} failed: ended by SIGKILL (out of memory?)" in out
    assert f"The rerun is failed; its log is {rerun_of(run).log}." in out
    assert not rerun_of(run).comparison.exists()


def test_a_run_replaced_in_the_meantime_is_not_compared_with(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(lambda _: edit(run.result, auc=0.123))
    assert main([str(run.root)]) == 2
    assert "was replaced by another run meanwhile" in capsys.readouterr().err


def test_a_superseded_run_can_be_repeated_too(run: RunPaths, trains: Train) -> None:
    trains(nothing)
    run.supersede()
    shutil.copytree(run.root.parent / "superseded" / f"{JOB}.1", run.root, dirs_exist_ok=True)
    assert main([str(run.root.parent / "superseded" / f"{JOB}.1")]) == 0
    assert SweepPaths(run.root.parent).rerun(f"{JOB}.1").comparison.exists()


# What has changed since


def test_other_code_is_reported_with_the_commands_that_restore_it(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    trains(nothing)
    edit(run.origin, code="0ther")
    edit(run.provenance, code="0ther", git={"commit": commit, "changed": True})
    run.diff.write_text("a diff")
    assert main([str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "code of ich: 0ther then, " in out
    assert f"it was commit {commit}, with the changes in launch.diff." in out
    assert f"git checkout {commit} && git apply {run.diff.absolute()}" in out
    assert "\nidentical\n" in out


@pytest.fixture
def original(composed: Callable[..., Config], tmp_path: Path) -> Original:
    config = composed("model=mobilenet_v2", "tracking=mlflow")
    versions, hardware = {"torch": "2.6", "timm": "1.0"}, Hardware("a chip", cores=2)
    made_with = Provenance("x", versions=versions, hardware=hardware)
    sweep = SweepPaths(tmp_path / "s")
    origin = Origin(cohort="c", weights="w", code="x")
    fit = replace(FIT, threads=2)
    return Original(sweep.run(JOB), sweep, config, origin, fit, made_with, None)


def test_each_change_of_packages_hardware_and_threads_is_a_sentence(original: Original) -> None:
    now = original.provenance
    assert list_changes(original, now, "CPU, 4 threads") == []
    hardware = Hardware("a chip", cores=1, gpus=("a GPU, 8 GB",))
    now = Provenance("x", versions={"torch": "2.7", "scipy": "1.11"}, hardware=hardware)
    assert list_changes(original, now, "a GPU") == [
        "torch: 2.6 then, 2.7 now.",
        "timm: 1.0 then, none now.",
        "scipy: none then, 1.11 now.",
        "device: CPU then, a GPU now.",
        "cores: 2 then, 1 now.",
        "gpus: none then, a GPU, 8 GB now.",
        "threads: 2 as then, on 1 cores: slower, but the same sums.",
    ]
    older = replace(original, fit=FIT, provenance=Provenance())
    code, packages, threads = list_changes(older, replace(now, code="y"), "CPU, 2 threads")
    assert code == "code of ich: x then, y now; it was version unknown, of no recorded commit."
    assert "not recorded" in packages
    assert "threads: not recorded as a number (CPU, 2 threads)" in threads
    assert restore_commands(older) is None


@pytest.mark.parametrize("commit", ["0123abc; rm -rf ~", "--orphan", "$(id)", "main"])
def test_what_is_no_commit_is_in_no_command_to_paste(original: Original, commit: str) -> None:
    """A run's record may be somebody else's."""
    strange = replace(original.provenance, git=GitState(commit))
    assert restore_commands(replace(original, provenance=strange)) is None
    real = replace(original.provenance, git=GitState("0123abc"))
    diff = Path("/data/it's mine/launch.diff")
    told = restore_commands(replace(original, provenance=real, diff=diff))
    assert told is not None
    assert shlex.split(told) == ["git", "checkout", "0123abc", "&&", "git", "apply", str(diff)]


def test_the_rerun_has_the_runs_threads_and_no_mlflow(original: Original) -> None:
    config = rerun_config(original)
    assert (config.train.threads, config.tracking.mlflow) == (2, False)
    assert (original.config.train.threads, original.config.tracking.mlflow) == (None, True)
    assert replace(config, train=original.config.train, tracking=original.config.tracking) == (
        original.config
    )


def test_what_a_later_launch_was_made_with_is_not_taken_for_the_runs(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of before `provenance.json`: its sweep's record counts while it has the same code."""
    trains(nothing)
    run.provenance.unlink()
    record = SweepPaths(run.root.parent).record
    launch = json.loads(record.read_text())["provenance"]
    edit(record, provenance=launch | {"versions": launch["versions"] | {"torch": "0.1"}})
    assert main([str(run.root)]) == 0
    assert "torch: 0.1 then, " in capsys.readouterr().out
    edit(record, provenance=launch | {"code": "later"})
    assert main([str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "packages and hardware: not recorded, or replaced by a later launch" in out
    assert "torch" not in out


# Refusals


def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one paragraph of a refusal."""
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ich: ")
    assert error.count("\n") == 1
    assert not list(folder.parent.glob("reruns/*/best.safetensors"))
    return error


def test_a_folder_without_a_run_is_refused(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run (no config.yaml)" in refused(capsys, Path("no/such/run"))
    error = refused(capsys, run.root.parent)
    assert f"is a sweep. Give one of its runs, as in ich rerun {run.root};" in error
    again = rerun_of(run)
    shutil.copytree(run.root, again.root)
    again.best.unlink()
    assert "is a rerun itself" in refused(capsys, again.root)


def test_a_run_that_did_not_finish_is_refused(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run.result, status="failed", reason="the loss is not finite")
    error = refused(capsys, run.root)
    assert "did not finish" in error
    assert "It is failed: the loss is not finite." in error
    assert "goes on with it: ich sweep -m model=mobilenet_v2" in error
    run.result.unlink()
    assert "It is not started: it has no result." in refused(capsys, run.root)


def test_other_data_are_refused_with_both_fingerprints(
    run: RunPaths, capsys: pytest.CaptureFixture[str], phantom: Path, tmp_path: Path
) -> None:
    was = run.read_origin().cohort
    other = tmp_path / "elsewhere"
    shutil.copytree(phantom, other)
    next(other.glob("*/*.dcm")).unlink()
    config = load_config(run.config)
    run.config.write_text(to_yaml(replace(config, data=replace(config.data, root=str(other)))))
    error = refused(capsys, run.root)
    assert f"their fingerprint was {was} and is " in error
    assert f"looked up in this folder, {Path.cwd()}." in error
    run.config.write_text(to_yaml(replace(config, data=replace(config.data, root="gone"))))
    assert "data.root is 'gone', which does not exist" in refused(capsys, run.root)


def test_data_that_have_moved_are_accepted(
    run: RunPaths,
    trains: Train,
    capsys: pytest.CaptureFixture[str],
    phantom: Path,
    tmp_path: Path,
) -> None:
    trains(nothing)
    moved = shutil.copytree(phantom, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    config = load_config(run.config)
    run.config.write_text(to_yaml(replace(config, data=replace(config.data, root="gone"))))
    assert "data.root is 'gone', which does not exist" in refused(capsys, run.root)
    assert main([str(run.root), f"data.root={moved}"]) == 0
    assert load_config(rerun_of(run).config).data.root == str(moved)
    for word in ("data.rot=x", "seed=1", "elsewhere"):
        assert main([str(run.root), word]) == 2
        error = capsys.readouterr().err
        assert f"{word} is no place that a rerun takes." in error
        assert ("Did you mean data.root?" in error) == (word == "data.rot=x")


def test_other_initial_weights_are_refused_with_both_digests(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(run.config)
    path = run.root / "initial.safetensors"
    path.write_bytes(b"x")
    model = replace(config.model, weights=str(path))
    run.config.write_text(to_yaml(replace(config, model=model)))
    error = refused(capsys, run.root)
    assert "they were random and are 2d711642b726b044" in error
    edit(run.origin, weights="2d711642b726b044")
    path.unlink()
    assert "they were 2d711642b726b044 and are no file" in refused(capsys, run.root)


def test_nothing_is_written_where_a_record_says(
    run: RunPaths, trains: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder may be somebody else's: its cache_dir was made, and slices were written."""
    trains(nothing)
    config = load_config(run.config)
    elsewhere = tmp_path / "elsewhere"
    data = replace(config.data, cache_dir=str(elsewhere))
    run.config.write_text(to_yaml(replace(config, data=data)))
    assert main([str(run.root)]) == 0
    assert not elsewhere.exists()
    told = f"Slices are kept in .ich-cache; those of the run were in {elsewhere}."
    assert told in " ".join(capsys.readouterr().out.split())
    assert load_config(rerun_of(run).config).data.cache_dir == ".ich-cache"
    assert main([str(run.root), f"data.cache_dir={elsewhere}"]) == 0
    assert list(elsewhere.glob("cohort-*.json"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.yaml", "config.yaml is damaged .*so the run cannot be repeated"),
        ("result.json", "It is failed: result.json is damaged"),
        ("metrics.jsonl", "metrics.jsonl is damaged .*cannot be compared"),
        ("predictions.npz", "predictions.npz is damaged"),
        ("best.safetensors", "best.safetensors is damaged"),
        ("origin.json", "has no origin.json that tells which data"),
    ],
)
def test_a_damaged_run_is_refused_by_name(
    run: RunPaths, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    path = run.root / name
    whole = path.read_bytes()
    for damaged in (b"\0" * len(whole), b"[]\n", whole[: len(whole) // 2] + b"\n", b""):
        path.write_bytes(damaged)
        assert re.search(says, refused(capsys, run.root)), damaged[:20]


def test_a_record_with_holes_is_refused(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    config, origin = run.config.read_text(), run.origin.read_text()
    run.config.write_text(config + "learning: fast\n")
    assert "is damaged or of another version of ich (Key 'learning'" in refused(capsys, run.root)
    run.config.write_text(config)
    run.origin.unlink()
    assert "has no origin.json that tells which data" in refused(capsys, run.root)
    run.origin.write_text(origin)
    run.predictions.unlink()
    assert "predictions.npz is missing" in refused(capsys, run.root)


def test_a_second_rerun_at_once_is_refused(
    run: RunPaths, trains: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(nothing)
    reruns = SweepPaths(run.root.parent).reruns
    reruns.mkdir()
    with lock_run(RunPaths(reruns), 0):
        assert "another rerun is under way in multirun_reports/s/reruns" in refused(
            capsys, run.root
        )
    assert main([str(run.root)]) == 0


# Killed


def test_a_rerun_goes_on_unless_it_began_with_other_code(
    run: RunPaths,
    trains: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trains(nothing)
    assert main([str(run.root)]) == 0
    again = rerun_of(run)
    seen = []

    def run_job(_: Config, run: RunPaths, *__: object) -> RunResult:
        seen.append(run.has_checkpoint())
        return RunResult(KILLED, "a test")

    monkeypatch.setattr("ich.launch.rerun.run_job", run_job)
    again.result.unlink()
    (again.root / "checkpoint-a.ich").write_bytes(b"a checkpoint")
    assert main([str(run.root)]) == 1
    assert "is kept in" not in capsys.readouterr().out.split("\nidentical\n")[1]
    edit(again.provenance, code="0ther")
    assert main([str(run.root)]) == 1
    kept = f"The rerun that began with other code or packages is kept in {again.root.parent}"
    assert kept in capsys.readouterr().out
    assert seen == [True, False]


@pytest.mark.faults
def test_a_rerun_that_is_ended_goes_on_when_the_command_is_given_again(run: RunPaths) -> None:
    for how, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert end_by(how, run) == status
    out = command(Path.cwd(), "rerun", str(run.root))
    assert "\nidentical\n" in out
    fit = rerun_of(run).read_result().fit
    assert fit is not None, out
    assert fit.resumed == 3


def end_by(how: signal.Signals, run: RunPaths) -> int:
    """Reruns a run until its training is under way, sends a signal, and returns the exit status."""
    again, slow = rerun_of(run), saboteur({JOB: ("slow", 0.3)})
    process = start_module("rerun", run.root, cwd=Path.cwd(), env=slow)
    wait_for(lambda: again.progress.exists() or process.poll() is not None)
    process.send_signal(how)
    process.communicate(timeout=120)
    wait_for(lambda: not again.progress.exists())  # of a killed rerun, the training saves and ends
    return process.returncode

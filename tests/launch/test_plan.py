"""The plan: what it says is what happens, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from commands import run_module
from sweeps import SMALL

from ich.base.config import Config, ModelConfig, to_yaml
from ich.base.results import State, SweepPaths
from ich.data.cohorts import cohort_sizes
from ich.data.dataset import load_dataset
from ich.launch.jobs import run_job
from ich.launch.plan import Plan, describe_plan, make_plan, total_seconds
from ich.launch.preflight import inspect_jobs
from ich.training.model import count_parameters, initial_weights_source, model_cost


def quiet(*_: object) -> None:
    """Takes progress and tells nobody."""


@pytest.fixture
def small(composed: Callable[..., Config], phantom: Path) -> Callable[..., Config]:
    own = ("model=mobilenet_v2", *SMALL, "train.threads=1", "tracking=none")
    return partial(composed, *own, f'data.root="{phantom}"')


@pytest.fixture
def config(small: Callable[..., Config]) -> Config:
    return small()


def plan_of(config: Config) -> Plan:
    return make_plan([config], quiet)


@pytest.mark.parametrize("mode", [["-m", "model=mobilenet_v2,vgg16"], ["model=mobilenet_v2"]])
def test_a_plan_says_what_would_run_and_writes_nothing(
    tmp_path: Path, phantom: Path, mode: list[str]
) -> None:
    before = sorted(phantom.rglob("*"))
    own = (f'data.root="{phantom}"', "data.image_size=32", "sweep.plan=true")
    folders = {"TMPDIR": str(tmp_path / "scratch"), "HF_HUB_CACHE": str(tmp_path / "none")}
    done = run_module(
        *("sweep", *mode, *own, "sweep.plan_timing=false"),
        cwd=tmp_path,
        env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1", **folders},
    )
    assert done.returncode == 0, done.stderr
    assert "Plan of multirun_reports/phantom-" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if " new " in line]
    assert [row[:4] for row in rows] == [
        [job, "new", "to", "download"] for job in ("mobilenet_v2", "vgg16")[: len(rows)]
    ]
    assert len(rows) == len(mode)
    assert "no earlier run" in done.stdout
    assert "sweep.plan_timing=true times a few steps" in done.stdout
    assert list(tmp_path.rglob("*")) == []
    assert sorted(phantom.rglob("*")) == before


def test_a_plan_refuses_what_a_sweep_would_refuse(tmp_path: Path) -> None:
    swept = ("-m", "model=vgg16", "optimizer.lr=1e-3,nan", "sweep.plan=true")
    done = run_module("sweep", *swept, cwd=tmp_path)
    assert done.returncode == 2
    assert "optimizer.lr is nan" in done.stderr
    assert "Traceback" not in done.stderr


def test_states_and_times_follow_a_job_from_new_to_done(config: Config) -> None:
    run = SweepPaths(Path(config.sweep.output) / config.name).run(config.job)
    (planned,) = plan_of(config).jobs
    assert planned.job.state is State.new
    assert planned.basis == "timed now"
    assert planned.seconds is not None
    assert planned.seconds > 10

    load_dataset(config)
    (job,) = inspect_jobs([config], SweepPaths(run.root.parent))
    # Its first epoch is done, and its process was killed.
    run.root.mkdir(parents=True)
    run.config.write_text(to_yaml(config))
    run.write_origin(job.origin)
    run.metrics.write_text('{"step": 1, "time": 0.0}\n')
    (run.root / "checkpoint-a.ich").write_bytes(b"")
    (planned,) = make_plan([config], quiet).jobs
    assert planned.job.state is State.resume
    (run.root / "checkpoint-a.ich").unlink()

    assert run_job(config, run, job.origin, None, quiet).is_finished
    made = plan_of(config)
    assert made.jobs[0].job.state is State.done
    assert made.jobs[0].seconds == 0
    assert "nothing is left to do" in describe_plan(made)[2][-1]
    other = replace(config, job="other", seed=1)
    (planned,) = plan_of(other).jobs
    assert planned.basis == "run test/job"
    minutes = run.read_result().fit.minutes
    # The same work again, and the start of a process.
    assert planned.seconds == pytest.approx(10 + 60 * minutes, rel=1e-6)


@pytest.mark.parametrize("protocol", ["report", "sound"])
def test_sizes_are_those_of_the_cohort_that_is_made(
    small: Callable[..., Config], protocol: str
) -> None:
    config = small(f"protocol={protocol}")
    before = cohort_sizes(config)
    assert before.is_exact == (protocol == "report")  # headers were not read: patients unknown
    dataset = load_dataset(config)
    after = cohort_sizes(config)
    counts = {"train": len(dataset.train.row), "val": len(dataset.val.row)}
    counts["test"] = len(dataset.test.row) if dataset.test else 0
    assert after.rows == counts
    splits = [s for s in (dataset.train, dataset.val, dataset.test) if s]
    assert after.images == len({i for s in splits for i in s.image_id})
    assert after.new_bytes == 0
    assert after.is_exact
    if before.is_exact:
        assert before.rows == after.rows
        assert before.new_bytes == before.images * 32 * 32 * 2
    else:
        assert before.images == pytest.approx(after.images, rel=0.25)


def test_a_phantom_that_is_not_there_is_not_made(composed: Callable[..., Config]) -> None:
    own = ("data.phantom.patients=4", "data.phantom.size=64")
    config = composed("model=mobilenet_v2", *SMALL, *own)
    sizes = cohort_sizes(config)
    assert not sizes.is_exact
    assert not Path(config.data.cache_dir).exists()
    assert sizes.new_bytes > 64 * 64 * 2 * 20
    dataset = load_dataset(config)
    assert sum(sizes.rows.values()) == pytest.approx(sizes.images, abs=1)
    assert sizes.images == pytest.approx(dataset.summary.steps["images"] / 2, abs=1)  # data.subset
    assert cohort_sizes(config).is_exact


# GMACs at 224 x 224 as published: He 2015, Simonyan 2014 (convolutions), Sandler 2018, Tan 2019.
@pytest.mark.parametrize(
    ("timm", "gmacs"),
    [
        ("resnet50.tv_in1k", 4.1),
        ("vgg16.tv_in1k", 15.3),
        ("mobilenetv2_100.ra_in1k", 0.30),
        ("efficientnet_b0.ra_in1k", 0.39),
    ],
)
def test_multiply_adds_are_the_published_ones(timm: str, gmacs: float) -> None:
    model = ModelConfig(name="x", timm=timm, image_size=224)
    cost = model_cost(model, 3, 224, 2)
    assert cost.macs / 1e9 == pytest.approx(gmacs, rel=0.05)
    assert cost.params == count_parameters(model)[0]


def test_kept_activations_grow_with_the_batch_and_not_with_the_weights() -> None:
    model = ModelConfig(name="x", timm="resnet50.tv_in1k", image_size=64)
    two, eight = (model_cost(model, 3, 64, n).activations for n in (2, 8))
    assert eight == pytest.approx(4 * two, rel=0.02)  # statistics of normalizations stay
    # The first convolution keeps its input, and the normalization after it keeps its: the least.
    assert two > 2 * 4 * (3 * 64 * 64 + 64 * 32 * 32)


def test_where_weights_would_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(name="x", timm="resnet50.tv_in1k", image_size=224)
    monkeypatch.setattr("ich.training.model._is_cached", lambda _: True)
    assert initial_weights_source(model) == "at hand"
    monkeypatch.setattr("ich.training.model._is_cached", lambda _: False)
    assert initial_weights_source(model) == "to download"
    assert initial_weights_source(replace(model, pretrained=False)) == "random"
    assert initial_weights_source(replace(model, weights=str(tmp_path / "w"))) == "no such file"
    (tmp_path / "w").touch()
    assert initial_weights_source(replace(model, weights=str(tmp_path / "w"))) == "local file"


def test_jobs_are_added_up_over_the_processors_they_have(config: Config) -> None:
    (one,) = plan_of(config).jobs
    three = [replace(one, seconds=s) for s in (30.0, 20.0, 15.0)]
    plan = Plan(three, [], "a GPU")
    assert total_seconds(plan) == 65
    assert total_seconds(plan, 2) == 35  # 30 beside 20 + 15
    assert total_seconds(Plan([*three, replace(one, seconds=None)], [], "")) is None

"""conf/: every YAML composes and builds, and every wrong value is refused before a job starts."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from ich.base.config import (
    CONF_DIR,
    Config,
    Monitor,
    ProtocolName,
    UserError,
    load_config,
    register_schemas,
    to_dataclass,
    to_yaml,
)
from ich.base.naming import identity, job_name, sweep_name
from ich.base.validation import validate
from ich.benchmarks.settings import MODELS as REPORT_MODELS
from ich.data.phantom.spec import LABELS
from ich.launch.composing import register_resolvers
from ich.training.losses import build_loss
from ich.training.model import build_model
from ich.training.optimizer import build_optimizer, build_scheduler
from ich.training.transforms import CTWindows, Resample

Compose = Callable[..., Config]
GROUPS = [
    "data",
    "protocol",
    "windows",
    "augment",
    "context",
    "loss",
    "optimizer",
    "scheduler",
    "train",
    "tracking",
    "sweep",
]
OPTIONS = [(g, f.stem) for g in GROUPS for f in sorted((CONF_DIR / g).glob("*.yaml"))]
MODELS = sorted(f.stem for f in (CONF_DIR / "model").glob("*.yaml"))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(composed: Compose, group: str, option: str) -> None:
    # What needs whole studies goes with the protocol that keeps them.
    sound = ["protocol=sound"] if group == "context" else []
    config = composed(f"{group}={option}", *sound)
    validate(config)
    model = torch.nn.Linear(2, len(LABELS))
    optimizer = build_optimizer(config.optimizer, model)
    scheduler = build_scheduler(config.scheduler, optimizer, steps=10)
    loss = build_loss(config.loss, torch.full((len(LABELS),), 0.2))
    logits = model(torch.ones(4, 2))
    loss(logits, torch.ones(4, len(LABELS))).backward()
    before = model.weight.detach().clone()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(before, model.weight)
    hu = Resample(8, config.augment)(torch.zeros(2, 8, 8, dtype=torch.int16), torch.rand(2, 6))
    assert CTWindows(config.windows.channels)(hu).shape[1] == len(config.windows.channels)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_config_builds_and_runs(composed: Compose, model: str) -> None:
    config = composed(f"model={model}", "model.pretrained=false")
    validate(config)
    size = config.model.min_size
    network = build_model(config.model).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, size, size)).shape == (1, len(LABELS))


EXPERIMENTS = sorted(f.stem for f in (CONF_DIR / "experiment").glob("*.yaml"))
ABLATIONS = [e for e in EXPERIMENTS if e.startswith("ablation_")]


@pytest.mark.parametrize("experiment", ABLATIONS)
def test_every_job_of_an_ablation_composes(experiment: str, composed: Compose) -> None:
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    params = {k: str(v).split(",") for k, v in cfg.hydra.sweeper.params.items()}
    assert params["seed"] == ["0", "1", "2"]
    assert len([v for k, v in params.items() if k != "seed" and len(v) > 1]) >= 1
    jobs = set()
    for values in itertools.product(*params.values()):
        overrides = [f"{k}={v}" for k, v in zip(params, values, strict=True)]
        config = composed(f"experiment={experiment}", *overrides)
        validate(config)
        jobs.add(str(identity(config)))
    assert len(jobs) == math.prod(len(v) for v in params.values())
    if experiment != "ablation_protocol":  # its point is that the scored rows differ
        assert config.protocol.name is ProtocolName.sound


@pytest.mark.parametrize("experiment", sorted(set(EXPERIMENTS) - set(ABLATIONS)))
def test_every_other_experiment_is_a_sweep_over_the_reports_eight_models(experiment: str) -> None:
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params.model.split(",") == list(REPORT_MODELS)


def test_every_yaml_opens_with_the_command_that_runs_it() -> None:
    for path in CONF_DIR.rglob("*.yaml"):
        if path.parts[-2] in ("job_logging", "hydra_logging"):
            continue
        first = next(line for line in path.read_text().splitlines() if "@package" not in line)
        assert re.match(r"# (make sweep|ich )", first), path


def test_defaults_are_the_reports(composed: Compose) -> None:
    config = composed()
    assert config.optimizer._target_ == "torch.optim.Adam"
    assert (config.optimizer.lr, config.train.batch_size, config.train.epochs) == (1e-4, 32, 10)
    assert config.train.monitor is Monitor.accuracy
    assert config.loss.name.value == "bce"
    assert config.scheduler.name.value == "none"
    assert config.model.pretrained
    windows = [(w.center, w.width) for w in config.windows.channels]
    assert windows == [(40, 80), (80, 200), (40, 380)]
    assert (config.augment.hflip, config.augment.vflip, config.augment.crop) == (0.25, 0.10, 0.25)
    assert composed("data=rsna").data.subset == 0.1
    assert composed("data=phantom").data.subset == 1.0


def test_a_saved_config_reads_back_equal(composed: Compose, tmp_path: Path) -> None:
    config = composed("model=vgg16", "data=rsna", "optimizer=sgd")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "protocol.test_fraction=0.9",
            "protocol.test_fraction is 0.9, but must be 0 or more, with",
        ),
        ("protocol.folds=2", "protocol.folds is 2"),
        ("protocol.folds=5", "protocol.fold is None, but must be from 0 to 4"),
    ],
)
def test_a_sound_protocol_is_checked_too(composed: Compose, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(composed("protocol=sound", override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=nan", "optimizer.lr is nan, but must be a finite number above 0"),
        ("optimizer.lr=inf", "optimizer.lr is inf"),
        ("optimizer.lr=0", "optimizer.lr is 0.0"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0"),
        ("train.batch_size=0", "train.batch_size is 0, but must be at least 1"),
        ("train.compile=maybe", "train.compile is 'maybe', but must be true, false or auto"),
        ("train.epochs=0", "train.epochs is 0"),
        ("data.subset=0", "data.subset is 0.0"),
        ("data.subset=1.5", "data.subset is 1.5"),
        ("protocol.val_fraction=1", "protocol.val_fraction is 1.0"),
        (
            "protocol.test_fraction=0.1",
            "protocol.test_fraction is 0.1, but must be 0: the report's",
        ),
        ("protocol.folds=5", "protocol.folds is 5, but must be null, or at least 3 with protocol="),
        ("protocol.fold=1", "protocol.fold is 1, but must be null without protocol.folds"),
        ("protocol.negatives_per_positive=0", "protocol.negatives_per_positive is 0.0"),
        ("protocol.oversample_times=0", "protocol.oversample_times is 0"),
        ("data.label_columns=[a,a]", "data.label_columns is ['a', 'a']"),
        ("data.any_label=some", "data.any_label is 'some', but must be null or one of"),
        ("augment.hflip=1.2", "augment.hflip is 1.2"),
        ("sweep.time_limit=0", "sweep.time_limit is 0.0"),
        ("data.image_size=8", "image size is 8 pixels, but resnet50 needs at least 32"),
        ("optimizer.momentum=0.9", "optimizer.momentum is set, but torch.optim.Adam has no such"),
        ("optimizer._target_=os.system", "optimizer._target_ is 'os.system', but must be one of"),
        ("windows.channels=[]", "windows.channels"),
        ("windows.channels=[{name:b,center:40,width:0}]", "window 'b' has center 40.0 and width 0"),
        ("name=../up", "name is '../up', but must be letters"),
        ("job=../up", "job is '../up', but must be letters"),
        ("job=superseded", "job is 'superseded'"),
        ("seed=-1", "seed is -1"),
        ("protocol.seed=-1", "protocol.seed is -1"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas is [0.9, 1.5]"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0"),
        ("data.image_size=0", "the image size is 0 pixels"),
    ],
)
def test_values_out_of_range_are_refused(composed: Compose, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(composed(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=vgg17", "Could not find 'model/vgg17'"),
        ("data.imagesize=64", "Key 'imagesize' not in 'DataConfig'"),
        ("train.epochs=ten", "could not be converted to Integer"),
        ("train.monitor=f1", r"expected one of \[accuracy, auc, log_loss\]"),
    ],
)
def test_unknown_names_and_types_are_refused(override: str, message: str) -> None:
    register_schemas()
    register_resolvers()
    with (
        initialize_config_dir(str(CONF_DIR), version_base="1.3"),
        pytest.raises(ConfigCompositionException) as error,
    ):
        compose("config", overrides=[override])
    assert re.search(message, f"{error.value} {error.value.__cause__}")


def test_names_keep_sweeps_and_jobs_apart() -> None:
    few = sweep_name(["model=a", "optimizer.lr=1"], ["model"], "demo")
    more = sweep_name(["optimizer.lr=1", "model=a,b"], ["model"], "demo")
    assert few == more != sweep_name(["model=a"], ["model"], "demo") == "demo"
    assert job_name(["model=a", "seed=1"], ["model", "seed"], "a") == "a,seed=1"
    assert job_name(["model=a", "seed=1"], ["model"], "a") == "a"
    assert "/" not in job_name(["data.root=../x y"], ["data.root"], "a")
    paths = [
        job_name([f"model.weights={d}/w.st", "seed=1"], ["model.weights", "seed"], "a")
        for d in ("one", "two")
    ]
    assert all(p.startswith("a,model.weights=w.st,seed=1-") for p in paths)
    assert len(set(paths)) == 2
    quoted = [job_name([f"data.root={v}"], ["data.root"], "a") for v in ("'a b'", "'a_b'")]
    assert len(set(quoted)) == 2


def test_unknown_keys_in_a_saved_config_are_refused() -> None:
    with pytest.raises(Exception, match="Key 'epoch' not in 'TrainConfig'"):
        to_dataclass(OmegaConf.create({"train": {"epoch": 1}}))

"""The typed schema of `conf/`: what a run may be told, and which values are in range.

`conf/` holds every value; these dataclasses hold the types, so that a misspelt key or a wrong
type in the last job of a sweep is refused while the first one is still waiting. Ranges are checked
by `validate`, in this one place. Nothing heavy is imported here: composing a config takes no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import ich

_PACKAGE = Path(ich.__file__).resolve().parent
# The wheel carries conf/ as ich/conf; a checkout or an editable install has it beside the package.
CONF_DIR = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())


class UserError(ValueError):
    """A mistake the user can mend. Its text is one paragraph: what, value, allowed, how to mend."""


class Source(Enum):
    """Where slices come from: `phantom` and `rsna` in the RSNA layout, `folder` in any."""

    phantom = "phantom"
    rsna = "rsna"
    folder = "folder"


class ProtocolName(Enum):
    """How images become training, validation and test rows, see `ich.data.protocol`."""

    report = "report"
    sound = "sound"


class Monitor(Enum):
    """The validation metric that picks the epoch whose weights are kept."""

    accuracy = "accuracy"
    auc = "auc"
    log_loss = "log_loss"


class LossName(Enum):
    """Losses of logits and targets, see `ich.training.losses`."""

    bce = "bce"
    weighted_bce = "weighted_bce"
    focal = "focal"


class SchedulerName(Enum):
    """Learning-rate schedules, stepped once per optimizer step."""

    none = "none"
    cosine = "cosine"


class Device(Enum):
    """Where a training runs; `auto` takes the first GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """What convolutions compute in; `auto` takes what a short timing finds faster."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    tf32 = "tf32"


class CudaGraph(Enum):
    """Whether a training step is one CUDA graph; `auto` is `off` until it has run on a GPU."""

    auto = "auto"
    on = "on"
    off = "off"


class Feed(Enum):
    """Where a training's slices are kept (`ich.training.loader`)."""

    auto = "auto"
    resident = "resident"
    pinned = "pinned"
    mapped = "mapped"


# Not as a class, for `continue` is no name in Python.
OnFailure = Enum("OnFailure", {"continue": "continue", "stop": "stop"})


@dataclass
class PhantomConfig:
    """Settings of the synthetic set made on first use by `data=phantom` (`ich.phantom`)."""

    patients: int = MISSING
    seed: int = MISSING
    size: int = MISSING
    prevalence: float = MISSING


@dataclass
class DataConfig:
    """Where slices and labels lie, how many are used, and how they are decoded and cached."""

    source: Source = MISSING
    root: str | None = None
    labels: str | None = None
    label_columns: list[str] | None = None
    any_label: str | None = None
    metadata: str | None = None
    subset: float = MISSING
    cache_size: int = MISSING
    cache_dir: str = MISSING
    image_size: int | None = None
    max_quarantine: float = MISSING
    workers: int | None = None
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


@dataclass
class ProtocolConfig:
    """How the manifest becomes training, validation and test rows (`ich.data.protocol`)."""

    name: ProtocolName = MISSING
    seed: int = MISSING
    oversample: str | None = None
    oversample_times: int = MISSING
    negatives_per_positive: float | None = None
    val_fraction: float = MISSING
    test_fraction: float = MISSING
    folds: int | None = None
    fold: int | None = None


@dataclass
class WindowConfig:
    """One CT window: `center` and `width` in HU (DICOM PS3.3 C.11.2.1.2)."""

    name: str = MISSING
    center: float = MISSING
    width: float = MISSING


@dataclass
class WindowsConfig:
    """The windows that become the channels of the network's input, in order."""

    channels: list[WindowConfig] = MISSING


@dataclass
class AugmentConfig:
    """Probabilities of each augmentation; `crop_min` is the shortest side of a crop, as a share."""

    hflip: float = MISSING
    vflip: float = MISSING
    crop: float = MISSING
    crop_min: float = MISSING


@dataclass
class ModelConfig:
    """One network: its name in the tables, its timm tag, its input, and where weights come from."""

    name: str = MISSING
    timm: str = MISSING
    image_size: int = MISSING
    min_size: int = 32
    pretrained: bool = True
    weights: str | None = None


@dataclass
class LossConfig:
    """A loss by name; `gamma` and `alpha` belong to `focal`."""

    name: LossName = MISSING
    gamma: float | None = None
    alpha: float | None = None


@dataclass
class OptimizerConfig:
    """A torch optimizer from a closed list; a setting left at null is torch's own default."""

    _target_: str = MISSING
    lr: float = MISSING
    weight_decay: float | None = None
    betas: list[float] | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None


@dataclass
class SchedulerConfig:
    """A schedule by name; `warmup` is the share of all steps with a linear start (cosine)."""

    name: SchedulerName = MISSING
    warmup: float = 0.0


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = MISSING
    batch_size: int = MISSING
    monitor: Monitor = MISSING
    device: Device = MISSING
    precision: Precision = Precision.auto
    graph: CudaGraph = CudaGraph.auto
    compile: bool = False
    feed: Feed = Feed.auto
    checkpoint_minutes: float = 10.0
    threads: int | None = None


@dataclass
class TrackingConfig:
    """MLflow, or nothing. `uri: null` is an SQLite database in the project folder."""

    mlflow: bool = MISSING
    uri: str | None = None
    artifacts: str | None = None
    experiment: str = "ich"


@dataclass
class SweepConfig:
    """How jobs are supervised; `time_limit` is in minutes per job and attempt.

    plan: say what would be done, and do nothing; `plan_timing`: with a few timed steps.
    """

    plan: bool = False
    plan_timing: bool = True
    retry: int = 0
    on_failure: OnFailure = OnFailure["continue"]
    time_limit: float | None = None
    output: str = MISSING


@dataclass
class Config:
    """A whole job, as `conf/config.yaml` composes it."""

    name: str = MISSING
    job: str = MISSING
    seed: int = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


@dataclass
class PrepareConfig:
    """What `python -m ich.prepare` composes: data, protocol, and the windows of its pictures."""

    dry_run: bool = MISSING
    verify: bool = MISSING
    output: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)


class Rows(Enum):
    """What `ich.evaluate` scores: every labelled image once, or a split of the protocol."""

    all = "all"
    train = "train"
    val = "val"
    test = "test"


@dataclass
class EvaluateConfig:
    """What `python -m ich.evaluate` composes. `models` is one model or a list, whose logits are
    averaged. Of `data`, sizes are not used: those of the model are."""

    models: Any = MISSING
    rows: Rows = MISSING
    tta: str = MISSING
    threshold: str | None = None
    name: str | None = None
    output: str = MISSING
    resamples: int = MISSING
    batch_size: int = MISSING
    device: Device = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


# `_target_` is executable configuration: only these names are ever looked up.
OPTIMIZER_SETTINGS: dict[str, frozenset[str]] = {
    "torch.optim.Adam": frozenset({"lr", "betas", "eps", "weight_decay"}),
    "torch.optim.AdamW": frozenset({"lr", "betas", "eps", "weight_decay"}),
    "torch.optim.SGD": frozenset({"lr", "momentum", "nesterov", "weight_decay"}),
}


def register() -> None:
    """Makes the schemas known to Hydra: the bases of `conf/config.yaml` and of the two others."""
    ConfigStore.instance().store(name="ich_schema", node=Config)
    ConfigStore.instance().store(name="ich_prepare_schema", node=PrepareConfig)
    ConfigStore.instance().store(name="ich_evaluate_schema", node=EvaluateConfig)


AnyConfig = TypeVar("AnyConfig", Config, PrepareConfig, EvaluateConfig)


def typed(cfg: DictConfig | dict[str, Any], schema: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    """A composed or saved config as typed dataclasses, every interpolation resolved."""
    node = OmegaConf.merge(OmegaConf.structured(schema), cfg)
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema)
    return config


def load(path: Path) -> Config:
    """The typed config that `save` wrote."""
    return typed(OmegaConf.load(path))  # type: ignore[arg-type]


def to_yaml(config: Config) -> str:
    """The whole job as YAML, readable by `load`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def plain(config: Config) -> dict[str, Any]:
    """The whole job as what JSON can hold."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def flatten(config: Config) -> dict[str, str]:
    """Dotted keys and printable values, for a tracker's parameter table."""
    return flatten_values(plain(config))


def flatten_values(values: Any) -> dict[str, str]:
    """The same of settings as nested dicts, as they stand in a run's config.yaml."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), child)
        else:
            flat[prefix] = str(value)

    walk("", values)
    return flat


# What a training's outcome does not depend on: changing these repeats nothing.
_INCIDENTAL = (
    "sweep",
    "tracking",
    "data.workers",
    "data.cache_dir",
    "data.max_quarantine",
    "train.threads",
    "train.feed",
    "train.checkpoint_minutes",
)


def _is_incidental(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _INCIDENTAL)


def identity(config: Config) -> dict[str, str]:
    """What makes this training this one: its flat settings without the incidental ones."""
    return {k: v for k, v in flatten(config).items() if not _is_incidental(k)}


def job_name(task_overrides: Iterable[str], swept: Iterable[str], model: str) -> str:
    """A job's folder: its model, then the other swept overrides; only characters safe in a path.

    Of a path only its last part is shown, and other characters are replaced; then a hash of the
    exact text keeps two jobs apart.
    """
    keys = set(swept) - {"model"}
    rest = [o.lstrip("+~") for o in task_overrides if o.split("=", 1)[0].lstrip("+~") in keys]
    text = ",".join([model, *rest])
    short = re.sub(r"=[^,]*/", "=", text)
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", short).strip(".")
    if safe != text or len(safe) > 120:
        safe = f"{safe[:120]}-{_short_hash([text])}"
    return safe


def sweep_name(task_overrides: Iterable[str], swept: Iterable[str], base: str) -> str:
    """A sweep's folder: `base`, and a hash of the overrides that all its jobs share, if any.

    Adding a model, or another value to what is swept over, therefore stays in the same folder.
    `base` is the experiment, or the data where there is no experiment.
    """
    ignored = {"model", "experiment", "name", f"data={base}", *swept}
    shared = []
    for override in task_overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if not ignored & {key, override} and not _is_incidental(key):
            shared.append(override)
    return f"{base}-{_short_hash(sorted(shared))}" if shared else base


def _short_hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]


def validate(config: Config) -> None:
    """Checks every range of one job's config.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, ok, allowed in _ranges(config):
        if not ok:
            _refuse(config, key, allowed)
    validate_data(config)
    _check_optimizer(config.optimizer)
    _check_image_size(config)


def _refuse(config: Config | PrepareConfig | EvaluateConfig, key: str, allowed: str) -> None:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    shown = value.value if isinstance(value, Enum) else value
    raise UserError(
        f"{key} is {shown!r}, but must be {allowed}. Set it with {key}=VALUE on the "
        f"command line, or in the YAML under conf/ that gave it."
    )


def validate_data(config: Config | PrepareConfig | EvaluateConfig) -> None:
    """Checks the ranges of `data`, `protocol` and, where there are any, `windows`.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, ok, allowed in _data_ranges(config.data, config.protocol):
        if not ok:
            _refuse(config, key, allowed)
    if isinstance(config, EvaluateConfig):
        return
    if not config.windows.channels:
        _refuse(config, "windows.channels", "a list of at least one window")
    for window in config.windows.channels:
        if not (math.isfinite(window.center) and 0 < window.width < math.inf):
            raise UserError(
                f"window {window.name!r} has center {window.center} and width {window.width}, but "
                f"the center must be finite and the width above 0 HU. Mend windows.channels."
            )


def _data_ranges(data: DataConfig, protocol: ProtocolConfig) -> list[tuple[str, bool, str]]:
    p, ratio = protocol, protocol.negatives_per_positive
    sound = p.name is ProtocolName.sound
    labels = data.label_columns
    return [
        (
            "data.label_columns",
            labels is None or (len(labels) >= 1 and len(set(labels)) == len(labels)),
            "null, or distinct column names",
        ),
        (
            "data.any_label",
            data.any_label is None or labels is None or data.any_label in labels,
            f"null or one of data.label_columns, {', '.join(labels or [])}",
        ),
        ("data.subset", 0 < data.subset <= 1, "above 0 and at most 1"),
        ("data.cache_size", 16 <= data.cache_size <= 1024, "from 16 to 1024 pixels"),
        ("data.max_quarantine", 0 <= data.max_quarantine <= 1, "a number from 0 to 1"),
        ("data.workers", data.workers is None or data.workers >= 1, "at least 1, or null"),
        ("protocol.seed", 0 <= p.seed < 2**32, "from 0 to 4294967295"),
        ("protocol.oversample_times", p.oversample_times >= 1, "at least 1 (1 adds no copy)"),
        (
            "protocol.negatives_per_positive",
            ratio is None or 0 < ratio < math.inf,
            "a finite number above 0, or null to keep all negatives",
        ),
        ("protocol.val_fraction", 0 < p.val_fraction < 1, "above 0 and below 1"),
        (
            "protocol.test_fraction",
            0 <= p.test_fraction < 1 - p.val_fraction if sound else p.test_fraction == 0,
            "0 or more, with val_fraction below 1 in all"
            if sound
            else "0: the report's protocol has no test set; use protocol=sound",
        ),
        (
            "protocol.folds",
            p.folds is None or (sound and p.folds >= 3),
            "null, or at least 3 with protocol=sound (one fold tests, one validates)",
        ),
        (
            "protocol.fold",
            (p.fold is None) if p.folds is None else p.fold is not None and 0 <= p.fold < p.folds,
            "null without protocol.folds" if p.folds is None else f"from 0 to {p.folds - 1}",
        ),
    ]


# Folders of a sweep that are no job's.
RESERVED = ("superseded", "figures", "reruns")


def _ranges(c: Config) -> list[tuple[str, bool, str]]:
    share = "a number from 0 to 1"
    return [
        (
            "name",
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", c.name)),
            "letters, digits and _.+- (it becomes a folder)",
        ),
        (
            "job",
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", c.job)) and c.job not in RESERVED,
            f"letters, digits and _.,=+- (it becomes a folder), and not {', '.join(RESERVED)}",
        ),
        ("seed", 0 <= c.seed < 2**63, "0 or more"),
        *(
            (f"augment.{k}", 0 <= getattr(c.augment, k) <= 1, share)
            for k in ("hflip", "vflip", "crop")
        ),
        ("augment.crop_min", 0 < c.augment.crop_min <= 1, "above 0 and at most 1"),
        ("loss.gamma", c.loss.gamma is None or 0 <= c.loss.gamma < math.inf, "0 or more"),
        ("loss.alpha", c.loss.alpha is None or 0 < c.loss.alpha < 1, "above 0 and below 1"),
        ("optimizer.lr", 0 < c.optimizer.lr < math.inf, "a finite number above 0"),
        *(
            (f"optimizer.{k}", v is None or 0 <= v < math.inf, "a finite number, 0 or more")
            for k, v in (
                ("weight_decay", c.optimizer.weight_decay),
                ("eps", c.optimizer.eps),
                ("momentum", c.optimizer.momentum),
            )
        ),
        (
            "optimizer.betas",
            c.optimizer.betas is None
            or (len(c.optimizer.betas) == 2 and all(0 <= b < 1 for b in c.optimizer.betas)),
            "two numbers from 0 to below 1",
        ),
        ("scheduler.warmup", 0 <= c.scheduler.warmup < 1, "from 0 to below 1"),
        ("train.epochs", c.train.epochs >= 1, "at least 1"),
        ("train.batch_size", c.train.batch_size >= 1, "at least 1"),
        ("train.checkpoint_minutes", c.train.checkpoint_minutes > 0, "above 0"),
        ("train.threads", c.train.threads is None or c.train.threads >= 1, "at least 1, or null"),
        ("sweep.retry", 0 <= c.sweep.retry <= 100, "from 0 to 100"),
        (
            "sweep.time_limit",
            c.sweep.time_limit is None or c.sweep.time_limit > 0,
            "minutes above 0, or null for no limit",
        ),
    ]


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    allowed = OPTIMIZER_SETTINGS.get(optimizer._target_)
    if allowed is None:
        raise UserError(
            f"optimizer._target_ is {optimizer._target_!r}, but must be one of "
            f"{', '.join(OPTIMIZER_SETTINGS)}. Choose with optimizer=adam, adamw or sgd."
        )
    given = {k for k, v in vars(optimizer).items() if k != "_target_" and v is not None}
    if extra := sorted(given - allowed):
        raise UserError(
            f"optimizer.{extra[0]} is set, but {optimizer._target_} has no such setting; it takes "
            f"{', '.join(sorted(allowed))}. Leave it out, or choose another optimizer."
        )


def image_size(config: Config) -> int:
    """Side of the network's input, pixels: `data.image_size`, or the model's own."""
    own = config.model.image_size
    return own if config.data.image_size is None else config.data.image_size


def _check_image_size(config: Config) -> None:
    size = image_size(config)
    if not config.model.min_size <= size <= 2048:
        raise UserError(
            f"the image size is {size} pixels, but {config.model.name} needs at least "
            f"{config.model.min_size} and at most 2048. Set data.image_size, or leave it null for "
            f"the model's own {config.model.image_size}."
        )

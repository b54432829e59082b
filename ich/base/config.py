"""The typed schema of `conf/`: the settings of a job, and which values each may have.

`conf/` holds every value; these dataclasses hold the types, so that a misspelt key or a wrong
type in the last job of a sweep is refused while the first one is still waiting. Which values a
setting may have stands beside it and is checked by `ich.base.validation`. Nothing heavy is imported
here: composing a config takes no torch.

Enumerations come first, then a dataclass per group of `conf/`, then the three that commands compose
(`Config`, `PrepareConfig`, `EvaluateConfig`), and last how a config is read, written and flattened.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ich
from ich.base.files import DamagedError, read_yaml, require_plain
from ich.base.ranges import (
    AT_LEAST_1,
    AT_LEAST_1_OR_NULL,
    FINITE_NOT_NEGATIVE,
    POSITIVE_SHARE,
    PROPER_SHARE,
    SHARE,
    allowed,
    number,
)

_PACKAGE = Path(ich.__file__).resolve().parent
# The wheel carries conf/ as ich/conf; a checkout or an editable install has it beside the package.
# Absolute: one relative to the entry point, as in Hydra's examples, is lost once ich is installed.
CONF_DIR = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())


class UserError(ValueError):
    """A mistake the user can mend. Its text is one paragraph: what, value, allowed, how to mend."""


# What options of commands offer: here, so that a command's help and completion need no torch.
ENGINES = ("auto", "torch", "onnx")  # of `ich predict`
NAMES = ("file", "pseudonym")  # by which it calls slices
EXPORTS = {"onnx": "model.onnx", "torch_export": "model.pt2", "safetensors": "model.safetensors"}
RESAMPLES = 2000  # of a bootstrap over patients
MARGIN = 0.005  # AUC: settings that differ by less are equal (`report.margin`)


# Enumerations, for OmegaConf knows no `Literal`; YAML has the names of their members.
class Source(Enum):
    """Where slices come from: `phantom` and `rsna` in the RSNA layout, `folder` in any."""

    phantom = "phantom"
    rsna = "rsna"
    folder = "folder"


class ProtocolName(Enum):
    """How images become training, validation and test rows, see `ich.data.protocol`."""

    report = "report"
    sound = "sound"


class ContextName(Enum):
    """What a network sees beside a slice: nothing, its neighbours, or its whole study."""

    slice = "slice"
    neighbours = "neighbours"
    study = "study"


class ContextWindows(Enum):
    """Which of `windows` each of the slices of `context=neighbours` is shown in."""

    first = "first"
    all = "all"


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
    """Whether a training step is one CUDA graph; `auto`: on a GPU, if that is faster and right."""

    auto = "auto"
    on = "on"
    off = "off"


class Feed(Enum):
    """Where a training's slices are kept (`ich.training.loader`)."""

    auto = "auto"
    resident = "resident"
    mapped = "mapped"


# Not as a class, for `continue` is no name in Python.
OnFailure = Enum("OnFailure", {"continue": "continue", "stop": "stop"})


# Dataclasses, and not frozen: OmegaConf makes a frozen one read-only, and every override of it
# fails. MISSING is a value that conf/ must give.
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
    label_columns: list[str] | None = field(
        default=None,
        metadata=allowed(
            "null, or distinct column names", lambda names: 0 < len(names) == len(set(names))
        ),
    )
    any_label: str | None = None
    metadata: str | None = None
    subset: float = field(default=MISSING, metadata=POSITIVE_SHARE)
    cache_size: int = field(
        default=MISSING, metadata=number("from 16 to 1024 pixels", at_least=16, at_most=1024)
    )
    cache_dir: str = MISSING
    image_size: int | None = None
    max_quarantine: float = field(default=MISSING, metadata=SHARE)
    workers: int | None = field(default=None, metadata=AT_LEAST_1_OR_NULL)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


@dataclass
class ProtocolConfig:
    """How the manifest becomes training, validation and test rows (`ich.data.protocol`)."""

    name: ProtocolName = MISSING
    seed: int = field(
        # numpy's RandomState, by which iterative-stratification and pandas draw, takes 32 bits.
        default=MISSING,
        metadata=number("from 0 to 4294967295", at_least=0, below=2**32),
    )
    oversample: str | None = None
    oversample_times: int = field(
        default=MISSING, metadata=number("at least 1 (1 adds no copy)", at_least=1)
    )
    negatives_per_positive: float | None = field(
        default=None,
        metadata=number(
            "a finite number above 0, or null to keep all negatives", above=0, below=math.inf
        ),
    )
    val_fraction: float = field(default=MISSING, metadata=PROPER_SHARE)
    test_fraction: float = MISSING
    folds: int | None = None
    fold: int | None = None


@dataclass
class WindowConfig:
    """One CT window: `center` and `width` in HU (DICOM PS3.3 C.11.2.1.2)."""

    name: str = MISSING
    center: float = MISSING
    width: float = MISSING

    @property
    def is_in_range(self) -> bool:
        """A width below 1 is none (C.11.2.1.2.1), and no value of a slice has more than 16 bits."""
        # All comparisons with NaN fail, and so refuse it.
        return abs(self.center) <= 2**15 and 1 <= self.width <= 2**16


@dataclass
class WindowsConfig:
    """The windows that become the channels of the network's input, in order."""

    channels: list[WindowConfig] = field(
        # Of the list alone; `ich.base.validation` looks at each window.
        default=MISSING,
        metadata=allowed("a list of at least one window", bool),
    )


@dataclass
class ContextConfig:
    """What a network sees beside a slice (docs/context.md); `windows` belongs to `neighbours`, and
    `epochs`, `lr` and `batch_size`, in studies, to the head of `study`."""

    # With defaults, which runs that were made before there was a context have had.
    name: ContextName = ContextName.slice
    windows: ContextWindows | None = None
    epochs: int | None = field(default=None, metadata=AT_LEAST_1_OR_NULL)
    lr: float | None = field(
        default=None, metadata=number("a finite number above 0", above=0, below=math.inf)
    )
    batch_size: int | None = field(default=None, metadata=AT_LEAST_1_OR_NULL)

    @property
    def is_slice(self) -> bool:
        """Whether each slice stands for itself, and no order of slices is needed."""
        return self.name is ContextName.slice


@dataclass
class AugmentConfig:
    """Probabilities of each augmentation; `crop_min` is the shortest side of a crop, as a share."""

    hflip: float = field(default=MISSING, metadata=SHARE)
    vflip: float = field(default=MISSING, metadata=SHARE)
    crop: float = field(default=MISSING, metadata=SHARE)
    crop_min: float = field(default=MISSING, metadata=POSITIVE_SHARE)


@dataclass
class ModelConfig:
    """One network: its name in the tables, its timm tag, its input, and where weights come from."""

    name: str = MISSING
    timm: str = MISSING
    image_size: int = MISSING
    # Five halvings leave one pixel of 32; a network that needs more says so in its YAML.
    min_size: int = 32
    pretrained: bool = True
    weights: str | None = None


@dataclass
class LossConfig:
    """A loss by name; `gamma` and `alpha` belong to `focal`."""

    name: LossName = MISSING
    gamma: float | None = field(
        default=None, metadata=number("0 or more", at_least=0, below=math.inf)
    )
    alpha: float | None = field(default=None, metadata=PROPER_SHARE)


# `_target_` is executable configuration: only these names are ever looked up.
OPTIMIZER_SETTINGS: dict[str, frozenset[str]] = {
    "torch.optim.Adam": frozenset({"lr", "betas", "eps", "weight_decay"}),
    "torch.optim.AdamW": frozenset({"lr", "betas", "eps", "weight_decay"}),
    "torch.optim.SGD": frozenset({"lr", "momentum", "nesterov", "weight_decay"}),
}


@dataclass
class OptimizerConfig:
    """A torch optimizer from a closed list; a setting left at null is torch's own default."""

    _target_: str = MISSING
    lr: float = field(
        default=MISSING, metadata=number("a finite number above 0", above=0, below=math.inf)
    )
    weight_decay: float | None = field(default=None, metadata=FINITE_NOT_NEGATIVE)
    betas: list[float] | None = field(
        default=None,
        metadata=allowed(
            "two numbers from 0 to below 1",
            lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas),
        ),
    )
    eps: float | None = field(default=None, metadata=FINITE_NOT_NEGATIVE)
    momentum: float | None = field(default=None, metadata=FINITE_NOT_NEGATIVE)
    nesterov: bool | None = None


@dataclass
class SchedulerConfig:
    """A schedule by name; `warmup` is the share of all steps with a linear start (cosine)."""

    name: SchedulerName = MISSING
    warmup: float = field(default=0.0, metadata=number("from 0 to below 1", at_least=0, below=1))


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = field(default=MISSING, metadata=AT_LEAST_1)
    batch_size: int = field(default=MISSING, metadata=AT_LEAST_1)
    monitor: Monitor = MISSING
    device: Device = MISSING
    precision: Precision = Precision.auto
    graph: CudaGraph = CudaGraph.auto
    # A union, so that what earlier configs have stays what it was.
    compile: bool | str = field(
        default=False,
        metadata=allowed("true, false or auto", lambda value: value in (True, False, "auto")),
    )
    feed: Feed = Feed.auto
    checkpoint_minutes: float = field(default=10.0, metadata=number("above 0", above=0))
    threads: int | None = field(default=None, metadata=AT_LEAST_1_OR_NULL)


@dataclass
class TrackingConfig:
    """MLflow, or nothing. What is null, `ich.tracking.places` finds out."""

    mlflow: bool = MISSING
    uri: str | None = None
    artifacts: str | None = None
    experiment: str | None = None


@dataclass
class AssumedConfig:
    """What a plan assumes of two networks where no runs tell how many patients it takes to tell
    them apart. correlation: of their scores, among positives and among negatives."""

    aucs: list[float] = field(
        default_factory=lambda: [0.97, 0.96],
        metadata=allowed(
            "two different numbers from 0.5 to below 1",
            lambda aucs: len(set(aucs)) == len(aucs) == 2 and all(0.5 <= a < 1 for a in aucs),
        ),
    )
    prevalence: float = field(default=0.4, metadata=PROPER_SHARE)
    correlation: float = field(
        default=0.7, metadata=number("from 0 to below 1", at_least=0, below=1)
    )


@dataclass
class ReportConfig:
    """What the comparison calls equal: a difference in AUC below `margin`. subgroups: columns of
    `data.labels` or `data.metadata`, or what headers tell (`ich.data.subgroups`), by which the best
    setting is scored in parts."""

    margin: float = field(
        default=MARGIN, metadata=number("above 0 and below 0.5", above=0, below=0.5)
    )
    subgroups: list[str] | None = field(
        default=None,
        metadata=allowed(
            "null, or distinct column names", lambda names: 0 < len(names) == len(set(names))
        ),
    )
    assumed: AssumedConfig = field(default_factory=AssumedConfig)


@dataclass
class SweepConfig:
    """How jobs are supervised; `time_limit` is in minutes per job and attempt.

    plan: say what would be done, and do nothing; `plan_timing`: with a few timed steps.
    """

    plan: bool = False
    plan_timing: bool = True
    retry: int = field(default=0, metadata=number("from 0 to 100", at_least=0, at_most=100))
    on_failure: OnFailure = OnFailure["continue"]
    time_limit: float | None = field(
        default=None, metadata=number("minutes above 0, or null for no limit", above=0)
    )
    output: str = MISSING


# Folders of a sweep that are no job's.
RESERVED_JOB_NAMES = ("superseded", "figures", "reruns")
_RESERVED = ", ".join(RESERVED_JOB_NAMES)
# No separator, and no dot or dash at the start: such a name leads out of no folder, is not hidden,
# and is taken for no option. A job also has the `,` and `=` of its overrides.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")


@dataclass
class Config:
    """A whole job, as `conf/config.yaml` composes it."""

    name: str = field(
        default=MISSING,
        metadata=allowed("letters, digits and _.+- (it becomes a folder)", _NAME.fullmatch),
    )
    job: str = field(
        default=MISSING,
        metadata=allowed(
            f"letters, digits and _.,=+- (it becomes a folder), and not {_RESERVED}",
            lambda job: _JOB.fullmatch(job) and job not in RESERVED_JOB_NAMES,
        ),
    )
    seed: int = field(default=MISSING, metadata=number("0 or more", at_least=0, below=2**63))
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass
class PrepareConfig:
    """What `ich prepare` composes: data, protocol, the windows of its pictures, and whether slices
    are put in order."""

    dry_run: bool = MISSING
    verify: bool = MISSING
    output: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    context: ContextConfig = field(default_factory=ContextConfig)


class Rows(Enum):
    """What `ich.evaluate` scores: every labelled image once, or a split of the protocol."""

    all = "all"
    train = "train"
    val = "val"
    test = "test"


@dataclass
class EvaluateConfig:
    """What `ich evaluate` composes. `models` is one model or a list, whose logits are
    averaged. Of `data`, sizes are not used: those of the model are."""

    # A text or a list of texts: OmegaConf's unions are of primitive types alone.
    models: Any = MISSING
    rows: Rows = MISSING
    tta: str = MISSING
    threshold: str | None = None
    name: str | None = None
    output: str = MISSING
    recalibrate: bool = False
    resamples: int = field(default=MISSING, metadata=number("0 (no intervals) or more", at_least=0))
    batch_size: int = field(default=MISSING, metadata=AT_LEAST_1)
    device: Device = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def register_schemas() -> None:
    """Makes the schemas known to Hydra: the bases of `conf/config.yaml` and of the two others."""
    ConfigStore.instance().store(name="ich_schema", node=Config)
    ConfigStore.instance().store(name="ich_prepare_schema", node=PrepareConfig)
    ConfigStore.instance().store(name="ich_evaluate_schema", node=EvaluateConfig)


# Settings that are a path.
PATHS = (
    *("data.root", "data.labels", "data.metadata", "data.cache_dir", "model.weights", "models"),
    *("tracking.artifacts", "sweep.output", "output"),
)
AnyConfig = Config | PrepareConfig | EvaluateConfig
Schema = TypeVar("Schema", Config, PrepareConfig, EvaluateConfig)


def to_dataclass(cfg: DictConfig | dict[str, Any], schema: type[Schema] = Config) -> Schema:  # type: ignore[assignment]
    """A composed or saved config as typed dataclasses, every interpolation resolved."""
    # Into the schema: an unknown key or a wrong type then raises.
    node = OmegaConf.merge(OmegaConf.structured(schema), cfg)
    for key in PATHS:
        path = OmegaConf.select(node, key)
        if isinstance(path, str) and path.startswith("~"):
            OmegaConf.update(node, key, os.path.expanduser(path))  # noqa: PTH111
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema)
    return config


def load_config(path: Path) -> Config:
    """The config of a job that was saved as `to_yaml` has it.

    Raises:
        FileNotFoundError: the file is not there.
        DamagedError: see `saved_config` and `ich.base.files.read_yaml`.
    """
    return saved_config(read_yaml(path), str(path))


def saved_config(values: dict[str, Any], where: str) -> Config:
    """A config as a record holds it: data, in which nothing is looked up.

    Args:
        values: plain values.
        where: they stand, for a message.

    Raises:
        DamagedError: they are no config of this version of ich.
    """
    try:
        require_plain(values)
        return to_dataclass(values)
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(
            f"{where} is damaged or of another version of ich ({reason[:200]})"
        ) from None


def select_value(values: object, key: str) -> Any:
    """A value of nested dicts by its dotted key, None if it is not there."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def to_yaml(config: Config) -> str:
    """The whole job as YAML, readable by `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The whole job as what JSON can hold."""
    # Enumerations by their names: JSON has none, and a name is what tables of settings show.
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def flatten(config: Config) -> dict[str, str]:
    """Dotted keys and printable values, for a tracker's parameter table."""
    return flatten_values(to_dict(config))


def flatten_values(values: Any) -> dict[str, str]:
    """Dotted keys and printable values of nested dicts, as they stand in a run's config.yaml."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), child)
        else:
            # A list too, as one value: windows that differ in one number are other windows.
            flat[prefix] = str(value)

    walk("", values)
    return flat


def image_size(config: Config) -> int:
    """Side of the network's input, pixels: `data.image_size`, or the model's own."""
    own = config.model.image_size
    return own if config.data.image_size is None else config.data.image_size


SLICES_SHOWN = {ContextName.neighbours.value: 3}  # to the network at once; else one


def slices_shown(config: Config) -> int:
    """How many slices the network sees at once."""
    return SLICES_SHOWN.get(config.context.name.value, 1)


def windows_shown(config: Config) -> list[WindowConfig]:
    """The windows in which it sees each of them."""
    windows = config.windows.channels
    return windows[:1] if config.context.windows is ContextWindows.first else windows


def input_channels(config: Config) -> int:
    """Channels of the network's input: one for each window of each slice."""
    return slices_shown(config) * len(windows_shown(config))

"""Whether a config can be used: every value in its range, and settings that fit each other.

A range of one setting stands beside its field in `ich.base.config`; here are the rules that involve
several.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from ich.base.config import (
    OPTIMIZER_SETTINGS,
    AnyConfig,
    Config,
    ContextConfig,
    ContextName,
    DataConfig,
    EvaluateConfig,
    OptimizerConfig,
    ProtocolConfig,
    ProtocolName,
    UserError,
    WindowsConfig,
    image_size,
)
from ich.base.naming import clean_name, why_unusable


def validate(config: AnyConfig) -> None:
    """Checks every range of a config, and what depends on several settings.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    # First, for the rules below compare values that are in range. Of several mistakes the first in
    # the config's order is named.
    _check_ranges(config)
    _check_labels(config.data)
    _check_protocol(config.protocol)
    if not isinstance(config, EvaluateConfig):  # which has the windows of the model's weights
        _check_windows(config.windows)
        _check_context(config.context, config.protocol)
    if isinstance(config, Config):
        _check_optimizer(config.optimizer)
        _check_image_size(config)


def _check_ranges(node: Any, prefix: str = "") -> None:
    """Walks nested dataclasses, and refuses the first value that its field does not allow."""
    for field in fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        # A list is one value here: windows are looked at by `_check_windows`.
        if is_dataclass(value):
            _check_ranges(value, f"{key}.")
        elif value is not None and (allowed := field.metadata.get("allowed")):
            _require(allowed.holds(value), key, value, allowed.text)


def _require(holds: object, key: str, value: Any, allowed: str) -> None:
    if not holds:
        # As it would be written on the command line.
        shown = value.value if isinstance(value, Enum) else value
        raise UserError(
            f"{key} is {shown!r}, but must be {allowed}. Set it with {key}=VALUE on the "
            f"command line, or in the YAML under conf/ that gave it."
        )


def _check_labels(data: DataConfig) -> None:
    labels, any_label = data.label_columns, data.any_label
    _require(
        any_label is None or labels is None or any_label in labels,
        "data.any_label",
        any_label,
        f"null or one of data.label_columns, {', '.join(labels or [])}",
    )
    if reason := why_unusable([clean_name(name) for name in labels or []]):
        raise UserError(
            f"data.label_columns has {reason}. Rename the column in the label file, and here."
        )


def _check_protocol(p: ProtocolConfig) -> None:
    if p.name is ProtocolName.sound:
        _require(
            0 <= p.test_fraction < 1 - p.val_fraction,
            "protocol.test_fraction",
            p.test_fraction,
            "0 or more, with val_fraction below 1 in all",
        )
    else:
        _require(
            p.test_fraction == 0,
            "protocol.test_fraction",
            p.test_fraction,
            "0: the report's protocol has no test set; use protocol=sound",
        )
    _require(
        p.folds is None or (p.name is ProtocolName.sound and p.folds >= 3),
        "protocol.folds",
        p.folds,
        "null, or at least 3 with protocol=sound (one fold tests, one validates)",
    )
    if p.folds is None:
        _require(p.fold is None, "protocol.fold", p.fold, "null without protocol.folds")
    else:
        # Cross-validation is a sweep over `fold`, so each job must name its own.
        within = p.fold is not None and 0 <= p.fold < p.folds
        _require(within, "protocol.fold", p.fold, f"from 0 to {p.folds - 1}")


def _check_windows(windows: WindowsConfig) -> None:
    for window in windows.channels:
        if not window.is_in_range:
            raise UserError(
                f"window {window.name!r} has center {window.center} and width {window.width}, but "
                f"the center must be from -32768 to 32768 HU and the width from 1 to 65536. Mend "
                f"windows.channels."
            )


def _check_context(context: ContextConfig, protocol: ProtocolConfig) -> None:
    name = context.name.value
    if not context.is_slice and protocol.name is not ProtocolName.sound:
        raise UserError(
            f"context={name} needs whole studies, but protocol={protocol.name.value} tears them "
            f"apart: of one study some slices are trained on, some scored, and the rest left out. "
            f"Add protocol=sound, which splits by patient."
        )
    is_neighbours = context.name is ContextName.neighbours
    _require(
        (context.windows is not None) == is_neighbours,
        "context.windows",
        context.windows,
        "first or all with context=neighbours" if is_neighbours else f"null with context={name}",
    )
    is_study = context.name is ContextName.study
    for key in ("epochs", "lr", "batch_size"):
        value = getattr(context, key)
        allowed = "a number with context=study" if is_study else f"null with context={name}"
        _require((value is not None) == is_study, f"context.{key}", value, allowed)


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    allowed = OPTIMIZER_SETTINGS.get(optimizer._target_)
    if allowed is None:
        raise UserError(
            f"optimizer._target_ is {optimizer._target_!r}, but must be one of "
            f"{', '.join(OPTIMIZER_SETTINGS)}. Choose with optimizer=adam, adamw or sgd."
        )
    # Null is torch's own default; what is set must be a setting of this very optimizer, or it would
    # be dropped in silence.
    given = {k for k, v in vars(optimizer).items() if k != "_target_" and v is not None}
    if extra := sorted(given - allowed):
        raise UserError(
            f"optimizer.{extra[0]} is set, but {optimizer._target_} has no such setting; it takes "
            f"{', '.join(sorted(allowed))}. Leave it out, or choose another optimizer."
        )


def _check_image_size(config: Config) -> None:
    size = image_size(config)
    if not config.model.min_size <= size <= 2048:
        raise UserError(
            f"the image size is {size} pixels, but {config.model.name} needs at least "
            f"{config.model.min_size} and at most 2048. Set data.image_size, or leave it null for "
            f"the model's own {config.model.image_size}."
        )

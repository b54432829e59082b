"""What tells trainings apart: the settings their outcome depends on, and the names of folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from ich.base.config import Config, flatten

# What a training's outcome does not depend on: changing these repeats nothing.
# (When it was decided by the whole config, a new time limit trained finished jobs again.)
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
# Paths: what lies there counts, by its content, which a run's `Origin` tells; a data set may move.
BY_CONTENT = ("data.root", "data.labels", "data.metadata", "model.weights")


def _is_incidental(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _INCIDENTAL)


def identity(config: Config) -> dict[str, str]:
    """What, beside its `Origin`, makes this training this one: its flat settings without incidental
    ones and without paths."""
    values = flatten(config).items()
    return {k: v for k, v in values if not (_is_incidental(k) or k in BY_CONTENT)}


def job_name(task_overrides: Iterable[str], swept: Iterable[str], model: str) -> str:
    """A job's folder: its model, then the other swept overrides; only characters safe in a path.

    Of a path only its last part is shown, and other characters are replaced; then a hash of the
    exact text keeps two jobs apart.
    """
    keys = set(swept) - {"model"}
    # Hydra's prefixes of overrides: + adds a key, ~ takes one away.
    rest = [o.lstrip("+~") for o in task_overrides if o.split("=", 1)[0].lstrip("+~") in keys]
    text = ",".join([model, *rest])
    short = re.sub(r"=[^,]*/", "=", text)
    # Without dots at the ends: no hidden folder, and no `..`.
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", short).strip(".")
    # A file's name has at most 255 bytes, and superseded runs add a number.
    if safe != text or len(safe) > 120:
        safe = f"{safe[:120]}-{_short_hash([text])}"
    return safe


def sweep_name(task_overrides: Iterable[str], swept: Iterable[str], base: str) -> str:
    """A sweep's folder: `base`, and a hash of the overrides that all its jobs share, if any.

    Adding a model, or another value to what is swept over, therefore stays in the same folder.
    `base` is the experiment, or the data where there is no experiment.
    """
    # What stands in the name already, or tells jobs of one sweep apart.
    ignored = {"model", "experiment", "name", f"data={base}", *swept}
    shared = []
    for override in task_overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if not ignored & {key, override} and not _is_incidental(key):
            shared.append(override)
    # Sorted: the order of overrides on the command line makes no other sweep.
    return f"{base}-{_short_hash(sorted(shared))}" if shared else base


def _short_hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]

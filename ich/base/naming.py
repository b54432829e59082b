"""What tells trainings apart: the settings their outcome depends on, and the names of folders; and
what a label may be called.

A label's name is a column of tables, the end of a metric's name in MLflow, a word of commands and
pages, a part of a picture's file name, and stands in the weights. It is checked once, for all of
these, before anything is made of it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from ich.base.config import Config, flatten

# What a training's outcome does not depend on: changing these repeats nothing.
# (When it was decided by the whole config, a new time limit trained finished jobs again.)
_INCIDENTAL = (
    "sweep",
    "report",
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


# Labels

# Of any script. MLflow takes no others in a metric's name, but for `/` and `:`, which file systems
# and Hydra have another use for.
_NAME = re.compile(r"[^\W_]([\w .-]*[\w.-])?")
_MAX_BYTES = 200  # in UTF-8: a file's name may have 255, and MLflow's names 250
# Columns of tables that have one per label: of the cohort, of predictions and of evaluations.
_COLUMNS = (
    *("image_id", "path", "patient_id", "study_id", "patient", "study", "repeat", "split"),
    *("file", "slices", "positive", "reason", "label", "id"),
)
# Behind `auc_`, `ap_` or `accuracy_` they make the name of another number than a label's.
_METRICS = ("macro", "top", "sd", "low", "high", "minus_best_low", "minus_best_high")
_NO_LABEL = ("negative",)  # the row of the data report that shows a slice without any
_WORDS = ("null", "none", "true", "false", "yes", "no", "on", "off")  # of Hydra and YAML
_RESERVED = frozenset((*_COLUMNS, *_METRICS, *_NO_LABEL, *_WORDS))
_METRIC_PARTS = ("at_90_", "at_95_")  # sensitivity_at_90_<label> is no sensitivity_<label>
_SUFFIXES = ("_top3", "_slice", "_target")  # of a label's further columns


def clean_name(text: str) -> str:
    """A heading without blanks around it, in Unicode's composed form (macOS decomposes umlauts)."""
    return unicodedata.normalize("NFC", text.strip())


def why_unusable(names: Sequence[str]) -> str:
    """Why labels cannot have these names, after "has"; empty if they can."""
    for name in names:
        if reason := _why_not(name):
            return f"a label {name[:80]!r}, {reason}"
    seen: dict[str, str] = {}
    for name in names:
        # Pictures are called by it, on file systems that may not tell cases apart.
        form = re.sub(r"[ _.-]", "_", unicodedata.normalize("NFKC", name).casefold())
        if form in seen:
            return (
                f"the labels {seen[form]!r} and {name!r}, which differ in case, blanks, dots or "
                f"dashes only"
            )
        seen[form] = name
    for form, name in seen.items():
        for suffix in _SUFFIXES:
            if form.endswith(suffix) and (stem := form.removesuffix(suffix)) in seen:
                return f"a label {name!r}, but so a further column of {seen[stem]!r} is called"
    return ""


def _why_not(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name.encode()) > _MAX_BYTES:
        return (
            f"but a label's name is made of letters and digits, with blanks, dots, `_` and `-` "
            f"behind the first, and has at most {_MAX_BYTES} bytes"
        )
    if name.casefold() in _RESERVED or name.casefold().startswith(_METRIC_PARTS):
        return "but where predictions are written, compared or asked for, that is something else"
    try:
        float(name)
    except ValueError:
        return ""
    return "but that is a number, and would be read as one"

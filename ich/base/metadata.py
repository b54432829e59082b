"""What a weights file says of itself: everything between a slice in HU and its probabilities."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ich.base.config import SLICES_SHOWN, UserError, WindowConfig
from ich.base.naming import why_unusable

METADATA_KEY = "ich"  # of the entry in a weights file
_FORMAT = 1
_LARGEST_SIDE = 4096  # pixels
_MOST_WINDOWS = 64
_LEAST_STD = 1e-3


@dataclass(frozen=True)
class Metadata:
    """Everything between a slice in HU and its probabilities, as the weights file itself says it.

    model, timm: the network's name in tables, and its timm tag. labels: of the outputs, in order.
    windows: of the input's channels, in order. cache_size, image_size: a slice is averaged to the
    first, pixels, and resampled to the second. mean, std: subtracted from and divided out of
    channels of 0..1. thresholds: per label the probability with the best F1 on validation, None
    where validation had one class only. context: `slice`; `neighbours`: the slices before, at and
    after are the input's channels, one after the other, each in all windows; or `study`: the file
    holds a head over the slices of a study, too, which takes, as head says, their `logits`, or
    `features` too. recalibration: on whom and how it was recalibrated, a sentence; empty if it was
    not.
    """

    model: str
    timm: str
    labels: tuple[str, ...]
    windows: tuple[WindowConfig, ...]
    cache_size: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    thresholds: dict[str, float | None]
    context: str = "slice"
    recalibration: str = ""
    head: str = ""

    @property
    def slices(self) -> int:
        """How many slices the network sees at once."""
        return SLICES_SHOWN.get(self.context, 1)

    @property
    def channels(self) -> int:
        """Of the network's input."""
        return self.slices * len(self.windows)

    @property
    def is_of_studies(self) -> bool:
        """Whether there is a head over studies."""
        return self.context == "study"

    def to_json(self) -> str:
        values = {"format": _FORMAT, **asdict(self)}
        # Left out as before there was any: the same weights are the same file.
        if self.context == "slice":
            del values["context"]
        for name in ("recalibration", "head"):
            if not values[name]:
                del values[name]
        return json.dumps(values)

    @staticmethod
    def from_json(text: str) -> Metadata:
        """Raises ValueError, KeyError or TypeError if it is not what `to_json` returned."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format") != _FORMAT:
            raise ValueError("another format")
        # JSON has no tuples, and a list would not equal what was written.
        values |= {k: tuple(values[k]) for k in ("labels", "mean", "std")}
        windows = tuple(WindowConfig(**w) for w in values.pop("windows"))
        metadata = Metadata(**values, windows=windows)
        metadata.check()
        return metadata

    def check(self) -> None:
        """Raises ValueError or TypeError if a network could not be used by it."""
        # A file from elsewhere is read by it: no size may fill the memory, no value divide by 0.
        sizes, labels = (self.cache_size, self.image_size), self.labels
        texts = (self.model, self.timm, self.recalibration, *labels)
        texts += tuple(w.name for w in self.windows)
        if not all(isinstance(t, str) for t in texts) or not isinstance(self.thresholds, dict):
            raise TypeError("a value is of another type")
        limits = [t for t in self.thresholds.values() if t is not None]
        numbers = [n for w in self.windows for n in (w.center, w.width)]
        # True is a number to Python.
        if any(isinstance(n, bool) for n in (*sizes, *numbers, *self.mean, *self.std, *limits)):
            raise TypeError("a value is of another type")
        if not (
            all(isinstance(s, int) and 1 <= s <= _LARGEST_SIDE for s in sizes)
            and self.head in (("logits", "features") if self.is_of_studies else ("",))
            and labels
            and not why_unusable(labels)
            and set(self.thresholds) == set(labels)
            and all(0 <= t <= 1 for t in limits)
            and 1 <= len(self.windows) <= _MOST_WINDOWS
            and all(w.is_in_range for w in self.windows)
            and len(self.mean) == len(self.std)
            # One per window, or ImageNet's three, whose average another number of windows gets.
            and len(self.mean) in (3, len(self.windows))
            and self.context in ("slice", "study", *SLICES_SHOWN)
            # Of images of 0..1; by more, channels would be the same number or none.
            and all(abs(m) <= 1 / _LEAST_STD for m in self.mean)
            and all(_LEAST_STD <= s <= 1 / _LEAST_STD for s in self.std)
        ):
            raise ValueError("a value is out of range")


def read_metadata(path: Path) -> Metadata:
    """What a weights file says of itself; nothing in it is executed.

    Raises:
        UserError: it is no safetensors file, or not one that `ich` can use alone.
    """
    try:
        with safe_open(path, "pt") as file:
            entries = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights {path} are no safetensors file ({error}). Other formats can carry code "
            f"and are not read."
        ) from None
    try:
        return Metadata.from_json(entries[METADATA_KEY])
    # RecursionError: JSON may be nested deeper than Python's parser goes.
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"the weights {path} do not say how their input is made (windows, sizes, labels), or "
            f"say it wrongly: they are of another tool or an earlier version of ich. Train again, "
            f"for example with ich rerun on the folder of a run, and use what that makes."
        ) from None

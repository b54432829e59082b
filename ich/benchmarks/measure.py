"""Rates of two sides timed alternately, their ratios, and the jobs they are timed on.

A part of the benchmark is a function of the settings and a folder, in which a phantom is, that
yields its results as it has them: see `ich.benchmarks.parts`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from hydra import compose, initialize_config_dir

from ich.base.config import CONF_DIR, Config, image_size, register_schemas, to_dataclass
from ich.base.entry import one_line
from ich.base.records import ComputeMode
from ich.base.results import RunPaths
from ich.benchmarks.peers import Rate
from ich.benchmarks.settings import Settings
from ich.launch.composing import register_resolvers
from ich.training.fit import select_and_record_mode

_CACHED = {96: 128, 224: 320}  # side of the network's input -> of the decoded slices it comes from
# Trained rows, epochs and networks of the report's sweep, and the rows it validates on.
REPORT = {"train": 65_859, "val": 11_623, "epochs": 10}
Table = Sequence[Sequence[str]]  # the first line has the headings
T = TypeVar("T")


@dataclass(frozen=True)
class RatioRow:
    """A line of the table: both sides in items per second, and ours / plain over the rounds."""

    ours: float | None  # medians; None where the row is a mean of other rows' ratios
    plain: float | None
    ratio: float  # median
    lowest: float
    highest: float

    def to_json(self) -> dict[str, float]:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class PartResult:
    """Rows by what they compare, sentences that stand below the table, further tables by their
    titles, and what could not be measured, with the reason."""

    rows: Mapping[str, RatioRow] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    failures: Sequence[str] = ()

    def joined(self, other: PartResult) -> PartResult:
        """Both."""
        return PartResult(
            {**self.rows, **other.rows},
            [*self.notes, *other.notes],
            {**self.tables, **other.tables},
            [*self.failures, *other.failures],
        )


# It yields what it has, size by size, since with all networks it runs for long, and is watched.
Part = Callable[[Settings, Path], Iterator[PartResult]]


def alternate(sides: dict[str, Rate], rounds: int) -> dict[str, list[float]]:
    """Times some functions in turn, several times: all get the quiet and the busy minutes of a
    machine. Items per second by side and round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side())
    return rates


def compare_rates(ours: Sequence[float], plain: Sequence[float]) -> RatioRow:
    """The row of two sides' rates, round by round."""
    # The ratio of two rates of one round, and not of two medians: a machine that slows down for a
    # round slows both.
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    middle = statistics.median
    return RatioRow(middle(ours), middle(plain), middle(ratios), min(ratios), max(ratios))


def compare(ours: Rate, plain: Rate, rounds: int) -> RatioRow:
    """Times two functions alternately; see `compare_rates`."""
    rates = alternate({"ours": ours, "plain": plain}, rounds)
    return compare_rates(rates["ours"], rates["plain"])


def geometric_mean(rows: Sequence[RatioRow]) -> RatioRow:
    """The mean of ratios, and the smallest and largest of their medians; no rates of its own."""
    ratios = [row.ratio for row in rows]
    lowest, highest = min(ratios), max(ratios)
    # Through the logarithm the mean of one ratio may end a digit beside it, outside its own range.
    mean = min(max(statistics.geometric_mean(ratios), lowest), highest)
    return RatioRow(None, None, mean, lowest, highest)


class InTurn:
    """What is measured of some names, one after another: what fails costs itself, and none is begun
    for which no time is left. `remarks`: what was not measured, and why.

    Args:
        part: what they are measured for.
        names: networks, or whatever is measured.
        settings: with the time by which all should have ended.
    """

    def __init__(self, part: str, names: Sequence[str], settings: Settings) -> None:
        self._part, self._names, self._settings = part, names, settings
        self.remarks = PartResult()

    def measure(self, measured: Callable[[str], T]) -> Iterator[T]:
        """What a function says of each name."""
        longest = 0.0
        for number, name in enumerate(self._names):
            # The next may take as long as the longest before it.
            if self._settings.seconds_left < longest:
                note = f"For want of time not in {self._part}: {', '.join(self._names[number:])}."
                self.remarks = self.remarks.joined(PartResult(notes=[note]))
                return
            begin = time.monotonic()
            try:
                result = measured(name)
            except Exception as error:
                failure = f"{self._part}, {name}: {type(error).__name__}: {one_line(error)}"
                self.remarks = self.remarks.joined(PartResult(failures=[failure]))
            else:
                yield result
            longest = max(longest, time.monotonic() - begin)


def chosen_mode(config: Config, folder: Path) -> ComputeMode:
    """The mode that `auto` takes for a job, timed once for all parts: it takes long on a GPU."""
    run = RunPaths(folder / "modes" / f"{config.model.name}-{image_size(config)}")
    run.root.mkdir(parents=True, exist_ok=True)
    return select_and_record_mode(config, run)


def compose_job(model: str, size: int, folder: Path, *overrides: str) -> Config:
    """The config of a job as a sweep composes it, from scratch, on slices under `folder`."""
    register_schemas()
    register_resolvers()
    own = [
        f"model={model}",
        "model.pretrained=false",
        f"data.image_size={size}",
        f"data.cache_size={_CACHED.get(size, size)}",
        f'data.cache_dir="{folder / "cache"}"',
        f'data.root="{folder / "phantom"}"',
        "name=bench",
        "job=bench",
        *overrides,
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_dataclass(compose("config", overrides=own))


def wait_for_device(device: torch.device) -> None:
    """A GPU runs behind Python: the clock is looked at only when it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: torch.device, item: int) -> Rate:
    """Items of so many bytes copied per second."""
    # 256 MB: beyond most caches.
    source = torch.ones(64 * 2**20, device=device)
    target = torch.zeros_like(source)

    def rate() -> float:
        target.copy_(source)
        wait_for_device(device)
        start = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        wait_for_device(device)
        return 10 * source.nbytes / item / (time.perf_counter() - start)

    return rate

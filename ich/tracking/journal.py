"""Metrics on disk first: one line per epoch, before anything else hears of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ich.base.files import append_line, write_text
from ich.base.records import EpochMetrics
from ich.base.results import RunPaths


class Journal:
    """`metrics.jsonl`: one line per epoch, safe on disk before anything else hears of it."""

    def __init__(self, path: Path, on_write: Callable[[], None] = lambda: None):
        self._path, self._on_write = path, on_write

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends one line, `{"step": ..., "time": ..., <metric>: <value or null>}`."""
        # JSON has no NaN and no infinity: null, which the mirror tells MLflow as undefined.
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = EpochMetrics(step, time.time(), values)
        # Synced: MLflow must not know of an epoch that a power cut took out of the journal.
        append_line(self._path, json.dumps(line.to_json()))
        self._on_write()

    def rewind(self, step: int) -> None:
        """Drops the lines after a step: a resumed training writes them again."""
        # Without what cannot be read, such as a last line that was cut off, to which the next one
        # would be appended.
        kept = [line for line in RunPaths(self._path.parent).read_metrics() if line.step <= step]
        if self._path.exists():
            self.replace(kept)

    def replace(self, lines: Sequence[EpochMetrics]) -> None:
        """Writes these lines in place of what is there."""
        # Whole or not at all: a process that is killed here must not cost the epochs before.
        write_text(self._path, "".join(json.dumps(line.to_json()) + "\n" for line in lines))

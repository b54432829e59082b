"""The parts of the benchmark, and how they are measured together."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from ich.base.memory import keep_memory
from ich.benchmarks.inputs import bench_input, bench_prepare
from ich.benchmarks.jobs import bench_busy, bench_memory, bench_start
from ich.benchmarks.measure import Part, PartResult, RatioRow
from ich.benchmarks.predictions import bench_intervals, bench_predict
from ich.benchmarks.settings import PARTS, Settings
from ich.benchmarks.steps import bench_step, bench_sweep
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import PhantomSpec

_FUNCTIONS: dict[str, Part] = {
    "prepare": bench_prepare,
    "input": bench_input,
    "step": bench_step,
    "sweep": bench_sweep,
    "predict": bench_predict,
    "start": bench_start,
    "memory": bench_memory,
    "busy": bench_busy,
    "intervals": bench_intervals,
}


def measure_parts(names: Collection[str], settings: Settings) -> PartResult:
    """Measures them on a phantom made for it; each ratio is on stderr as soon as it is known."""
    rows: dict[str, RatioRow] = {}
    notes: list[str] = []
    keep_memory()  # as every training does
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = PhantomSpec(patients=settings.patients, seed=0, size=512)
        write_phantom(folder / "phantom", spec)
        # In this order, whatever the order of the names: tables of two runs are compared by eye.
        for part in (_FUNCTIONS[name] for name in PARTS if name in names):
            for result in part(settings, folder):
                rows.update(result.rows)
                notes.extend(result.notes)
                for name, row in result.rows.items():  # a long run is watched
                    print(f"{name}: {row.ratio:.3g}", file=sys.stderr, flush=True)
    return PartResult(rows, notes)

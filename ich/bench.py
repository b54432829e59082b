"""Speed as ratios measured side by side in one run: `python -m ich.bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Eight parts: `prepare` (decoding), `input` (batches for the
network), `step` (one training step), `sweep` (an epoch of all eight networks), `predict` (from
files to probabilities), `start` (of a job), `memory` (of a training, by the size of its cohort) and
`intervals` (of a comparison). Prints a table and saves it, with versions and hardware, under
multirun_reports/benchmarks/. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ich.base.workers import keep_memory
from ich.benchmarks.inputs import bench_input, bench_prepare
from ich.benchmarks.jobs import bench_memory, bench_start
from ich.benchmarks.measure import MODELS, Row
from ich.benchmarks.predictions import bench_intervals, bench_predict
from ich.benchmarks.report import projection, write_report
from ich.benchmarks.steps import bench_step, bench_sweep
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import PhantomSpec

PARTS = ("prepare", "input", "step", "sweep", "predict", "start", "memory", "intervals")


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(prog="python -m ich.bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--image-size", type=int, nargs="+", default=[96, 224], help="pixels")
    parser.add_argument("--patients", type=int, default=120, help="phantom patients to decode")
    parser.add_argument("--images", type=int, default=1000, help="files that other loaders read")
    parser.add_argument("--rounds", type=int, default=3, help="alternations per pair")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one timing of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("multirun_reports/benchmarks"))
    args = parser.parse_args(argv)
    rows: dict[str, Row] = {}
    notes: list[str] = []

    def add(found: dict[str, Row]) -> None:
        rows.update(found)
        for name, row in found.items():  # a long run is watched
            print(f"{name}: {row['ratio']:.3g}", file=sys.stderr, flush=True)

    keep_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_phantom(folder / "phantom", PhantomSpec(patients=args.patients, seed=0, size=512))
        if "prepare" in args.parts:
            add(bench_prepare(folder, args.rounds))
        if "input" in args.parts:
            add(bench_input(folder, args.image_size, args.rounds, args.images))
        for size in args.image_size if "step" in args.parts else ():
            found, hours = bench_step(args.models, size, folder, args.seconds, args.rounds)
            add(found)
            notes.append(projection(hours, args.models, size, "its training steps alone"))
        if "sweep" in args.parts:
            size = args.image_size[0]
            found, hours = bench_sweep(args.models, size, folder, args.images, args.rounds)
            add(found)
            notes.append(projection(hours, args.models, size, "validation included"))
        for size in args.image_size if "predict" in args.parts else ():
            found, note = bench_predict(args.models, size, folder, args.images, args.rounds)
            add(found)
            notes.append(note)
        for part, measure in (
            ("start", lambda: bench_start(folder, args.rounds)),
            ("memory", lambda: bench_memory(folder)),
            ("intervals", lambda: bench_intervals(args.rounds)),
        ):
            if part in args.parts:
                found, note = measure()
                add(found)
                notes.append(note)
    settings = " ".join(sys.argv[1:] if argv is None else argv) or "defaults"
    path = write_report(rows, args.out, settings, notes)
    print(path.read_text())
    print(f"saved as {path} and {path.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed as ratios measured side by side in one run: `ich bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Parts: `prepare` (decoding), `step` (one training step), `input`
(batches for the network), `sweep` (an epoch of all eight networks), `predict` (from files to
probabilities), `start` (of a job), `memory` (of a training, by the size of its cohort), `busy` (a
training beside another process) and `intervals` (of a comparison). Where they are asked for:
`tests` (of the GPU path), `demo` (the demo sweep), `slots` (jobs that share a device), `evaluate`,
and `report` (trainings on a cohort of the report's size). `gpu` is all that there is to know of a
machine with a GPU, see `make check-gpu`.

Prints a table and saves it, with versions and hardware, under multirun_reports/benchmarks/, anew
after each result. A part that fails is noted there with its reason, and the next one goes on. Keep
the machine otherwise idle.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ich.base.entry import Parser, Status, end_on_signals, exit_status
from ich.base.memory import importing, leave
from ich.benchmarks.settings import DEFAULT_PARTS, GPU_PARTS, MODELS, PARTS, Settings


def parser() -> Parser:
    """The command's options."""
    parser = Parser("bench", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=[*PARTS, "gpu"], default=list(DEFAULT_PARTS))
    add("--image-size", type=int, nargs="+", default=[96, 224], help="pixels")
    add("--patients", type=int, default=120, help="phantom patients to decode")
    add("--images", type=int, default=1000, help="files that other loaders read")
    add("--rounds", type=int, default=3, help="alternations per pair")
    add("--seconds", type=float, default=3.0, help="length of one timing of a step")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    budget = "for all of it: parts then measure fewer networks and steps, the last ones first"
    add("--minutes", type=float, default=math.inf, help=budget)
    folder = Path("multirun_reports/benchmarks")
    add("--out", type=Path, nargs="+", default=[folder], help="folders that the report goes to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves the table; status 1 if a part failed."""
    end_on_signals()
    given = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(given))
    until = time.monotonic() + 60 * args.pop("minutes")
    named, out = args.pop("parts"), args.pop("out")
    parts = {*named} - {"gpu"} | ({*GPU_PARTS} if "gpu" in named else set())
    settings = Settings(**args, until=until, limit=until)
    return exit_status(lambda: _measure(parts, settings, out, " ".join(given)))


def _measure(parts: set[str], settings: Settings, out: Sequence[Path], given: str) -> int:
    with importing():  # torch: help and a mistake do not wait for it
        from ich.base.terminal import print_line
        from ich.benchmarks.parts import measure_parts
        from ich.benchmarks.report import ReportWriter

    writer = ReportWriter(out, given or "defaults")
    result = measure_parts(parts, settings, writer.write)
    path = writer.write(result)
    print(path.read_text())
    print_line(f"saved as {path} and {path.with_suffix('.json').name}")
    return Status.FAILED if result.failures else Status.DONE


if __name__ == "__main__":
    leave(main())

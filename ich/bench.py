"""Speed as ratios measured side by side in one run: `ich bench`, or `make bench`.

Absolute times change with the machine; a ratio whose two sides were timed alternately, in the same
minutes, is worth writing down. Nine parts: `prepare` (decoding), `input` (batches for the
network), `step` (one training step), `sweep` (an epoch of all eight networks), `predict` (from
files to probabilities), `start` (of a job), `memory` (of a training, by the size of its cohort),
`busy` (a training beside another process) and `intervals` (of a comparison). Prints a table and
saves it, with versions and hardware, under multirun_reports/benchmarks/. Keep the machine otherwise
idle.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ich.base.entry import Parser, Status, end_on_signals, exit_status
from ich.base.memory import importing, leave
from ich.benchmarks.settings import MODELS, PARTS, Settings


def parser() -> Parser:
    """The command's options."""
    parser = Parser("bench", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--image-size", type=int, nargs="+", default=[96, 224], help="pixels")
    parser.add_argument("--patients", type=int, default=120, help="phantom patients to decode")
    parser.add_argument("--images", type=int, default=1000, help="files that other loaders read")
    parser.add_argument("--rounds", type=int, default=3, help="alternations per pair")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one timing of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("multirun_reports/benchmarks"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and saves the table."""
    end_on_signals()
    given = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(given))
    parts, out = args.pop("parts"), args.pop("out")
    return exit_status(lambda: _measure(parts, Settings(**args), out, " ".join(given)))


def _measure(parts: Sequence[str], settings: Settings, out: Path, given: str) -> int:
    with importing():  # torch: help and a mistake do not wait for it
        from ich.base.terminal import print_line
        from ich.benchmarks.parts import measure_parts
        from ich.benchmarks.report import write_report

    path = write_report(measure_parts(parts, settings), out, given or "defaults")
    print(path.read_text())
    print_line(f"saved as {path} and {path.with_suffix('.json').name}")
    return Status.DONE


if __name__ == "__main__":
    leave(main())

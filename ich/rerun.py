"""Repeats a finished run from its record: `ich rerun multirun_reports/<name>/<job>`.

The method, the verdicts and the tolerance stand in `ich.launch.rerun`.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from ich.base.entry import Parser, Status, end_on_signals, exit_status
from ich.base.memory import importing, leave

TOLERANCE = 1e-3


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a finite number, 0 or more")
    return value


def parser() -> Parser:
    """The command's options."""
    parser = Parser("rerun", (__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, multirun_reports/<name>/<job>")
    parser.add_argument(
        "places",
        nargs="*",
        metavar="KEY=PATH",
        help="where its data or weights lie now: data.root, data.labels, data.metadata or "
        "model.weights; or where slices are, or are made: data.cache_dir (default: .ich-cache)",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=TOLERANCE,
        help="largest difference of a metric or a probability (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 for identical and within tolerance, 1 for different or a rerun that failed; the
    others, see `ich.base.entry.Status`."""
    end_on_signals()  # so that the training is ended
    args = parser().parse_args(argv)
    return exit_status(lambda: _rerun(args))


def _rerun(args: Namespace) -> int:
    with importing():  # it takes seconds, which help and a mistake need not wait for
        from ich.launch.rerun import rerun

    is_same = rerun(args.run, args.tolerance, args.places)
    return Status.DONE if is_same else Status.FAILED


if __name__ == "__main__":
    leave(main())

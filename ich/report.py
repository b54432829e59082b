"""Finished runs -> the comparison: table (CSV, Markdown, LaTeX, terminal), figures and report.html.

`ich report multirun_reports/<name>` makes it again, from the files alone; several folders and
`-o DIR` compare several sweeps.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ich.base.config import RESAMPLES, UserError
from ich.base.entry import Parser, Status, end_on_signals, exit_status
from ich.base.memory import importing, leave
from ich.base.results import SweepPaths


def parser() -> Parser:
    """The command's options."""
    parser = Parser("report", __doc__)
    add = parser.add_argument
    add("sweeps", type=Path, nargs="+", help="folders of sweeps, multirun_reports/<name>")
    add("-o", "--out", type=Path, help="folder of the report; of several needed")
    add("--resamples", type=int, default=RESAMPLES, help="of the bootstrap; 0: no intervals")
    equal = "AUC within which settings are equal; else report.margin of the sweep's launch"
    add("--margin", type=float, help=equal)
    parts = "column of a CSV, or what headers tell (may stand several times); else report.subgroups"
    add("--subgroup", dest="subgroups", metavar="COLUMN", action="append", help=parts)
    move = "make the best run of this sweep the registered model's alias `best`"
    add("--promote", action="store_true", help=move)
    alone = (
        "draw figures/forest.png and .svg alone, from comparison.csv as it stands: for a folder "
        "whose predictions are gone"
    )
    add("--forest", action="store_true", help=alone)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuilds the report of one sweep, or makes one of several; the exit status."""
    end_on_signals()
    args = parser().parse_args(argv)
    return exit_status(lambda: _report(args))


def _report(args: Namespace) -> int:
    if args.promote and len(args.sweeps) > 1:
        raise UserError(f"--promote takes one sweep, and {len(args.sweeps)} are given.")
    if args.resamples < 0:
        raise UserError(f"--resamples is {args.resamples}; it must be 0 or more.")
    if args.margin is not None and not 0 < args.margin < 0.5:
        raise UserError(f"--margin is {args.margin}; it must be above 0 and below 0.5 (AUC).")
    if args.forest and (args.out or args.promote):
        raise UserError("--forest draws into the sweep's own folder, and takes no -o or --promote.")
    with importing():  # they take seconds, which help and a mistake need not wait for
        from ich.base.terminal import print_line
        from ich.pages.forest import redraw_forest
        from ich.pages.tables import compare
        from ich.tracking.registry import promote

    if args.forest:
        for sweep in args.sweeps:
            print_line(str(redraw_forest(SweepPaths(sweep))))
        return Status.DONE
    sweeps = map(SweepPaths, args.sweeps)
    options = {"resamples": args.resamples, "margin": args.margin, "subgroups": args.subgroups}
    compare(*sweeps, out=args.out, **options)
    if args.promote:
        print_line(promote(SweepPaths(args.sweeps[0])))
    return Status.DONE


if __name__ == "__main__":
    leave(main())

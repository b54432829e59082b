"""Finished runs -> the comparison: table (CSV, Markdown, LaTeX, terminal), figures and report.html.

`python -m ich.report multirun_reports/<name>` makes it again, from the files alone; several folders
and `-o DIR` compare several sweeps.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ich.base.config import UserError
from ich.base.results import SweepPaths
from ich.pages.forest import redraw_forest
from ich.pages.tables import compare
from ich.scoring.uncertainty import RESAMPLES
from ich.tracking.registry import promote

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Rebuilds the report of one sweep, or makes one of several."""
    parser = argparse.ArgumentParser(prog="python -m ich.report", description=__doc__)
    parser.add_argument(
        "sweeps", type=Path, nargs="+", help="folders of sweeps, multirun_reports/<name>"
    )
    parser.add_argument("-o", "--out", type=Path, help="folder of the report; of several needed")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="of the bootstrap; 0: no intervals"
    )
    parser.add_argument(
        "--promote",
        action="store_true",
        help="make the best run of this sweep the registered model's alias `best`",
    )
    parser.add_argument(
        "--forest",
        action="store_true",
        help="draw figures/forest.png and .svg alone, from comparison.csv as it stands: for a "
        "folder whose predictions are gone",
    )
    args = parser.parse_args(argv)
    try:
        if args.forest:
            for sweep in args.sweeps:
                print(redraw_forest(SweepPaths(sweep)))
            return 0
        if args.promote and len(args.sweeps) > 1:
            raise UserError(f"--promote takes one sweep, and {len(args.sweeps)} are given.")
        if args.resamples < 0:
            raise UserError(f"--resamples is {args.resamples}; it must be 0 or more.")
        compare(*map(SweepPaths, args.sweeps), out=args.out, resamples=args.resamples)
        if args.promote:
            print(promote(SweepPaths(args.sweeps[0])))
    except UserError as error:
        print(f"ich: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

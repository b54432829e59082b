"""Repeats a finished run from its record: `python -m ich.rerun multirun_reports/<name>/<job>`.

The method, the verdicts and the tolerance stand in `ich.launch.rerun`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ich.base.config import UserError
from ich.base.entry import end_on_signals
from ich.launch.rerun import TOLERANCE, rerun


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 for identical and within tolerance, 1 for different or a rerun that failed, 2
    for a mistake, 130 or 143 after Ctrl-C or SIGTERM."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m ich.rerun", description=about)
    parser.add_argument("run", type=Path, help="a run's folder, multirun_reports/<name>/<job>")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=TOLERANCE,
        help="largest difference of a metric or a probability (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        return 0 if rerun(args.run, args.tolerance) else 1
    except UserError as error:
        print(f"ich: {error}", file=sys.stderr)
    except OSError as error:
        print(f"ich: a folder or file cannot be used: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("ich: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    end_on_signals()  # so that the training is ended
    sys.exit(main())

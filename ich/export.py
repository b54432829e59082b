"""A trained model as one file for other programs: `python -m ich.export --model RUN --format onnx`.

HU in, probabilities out: averaging, windows and normalization are inside the graph. The file is
compared with our own prediction before anything says it is there, and a model card lies beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ich.base import entry
from ich.inference.export import FORMATS, ExportOptions, run
from ich.scoring.uncertainty import RESAMPLES


def parse(argv: Sequence[str] | None = None) -> ExportOptions:
    """The command line as options; exits as argparse does after a mistake."""
    parser = argparse.ArgumentParser("python -m ich.export", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, an MLflow run id, or models:/ich@ALIAS")
    add("--format", choices=tuple(FORMATS), required=True)
    add("-o", "--out", type=Path, help="a folder; else exports/<run>")
    add("--size", type=int, default=512, help="side of the slices it takes, pixels (512)")
    add("--resamples", type=int, default=RESAMPLES, help="of the card's intervals; 0 for none")
    add("--tracking-uri", help="MLflow's; else the database in this folder")
    return ExportOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after a mistake, 130 or 143 after Ctrl-C or SIGTERM."""
    options = parse(argv)
    return entry.exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

"""A trained model as one file for other programs: `python -m ich.export --model RUN --format onnx`.

HU in, probabilities out: averaging, windows and normalization are inside the graph. The file is
compared with our own prediction before anything says it is there, and a model card lies beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ich.base import entry
from ich.base.config import TrackingConfig, UserError
from ich.base.terminal import Terminal
from ich.inference.ensemble import load_ensemble
from ich.inference.export import CARD, FORMATS, check_size, export, input_text
from ich.scoring.uncertainty import RESAMPLES


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m ich.export", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, an MLflow run id, or models:/ich@ALIAS")
    add("--format", choices=tuple(FORMATS), required=True)
    add("-o", "--out", type=Path, help="a folder; else exports/<run>")
    add("--size", type=int, default=512, help="side of the slices it takes, pixels (512)")
    add("--resamples", type=int, default=RESAMPLES, help="of the card's intervals; 0 for none")
    add("--tracking-uri", help="MLflow's; else the database in this folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Exports and says so."""
    if args.resamples < 0:
        raise UserError(f"--resamples is {args.resamples}; it must be 0 or more.")
    tracking = TrackingConfig(mlflow=True, uri=args.tracking_uri)
    model = load_ensemble([args.model], torch.device("cpu"), tracking)
    check_size(args.size, model.members[0].metadata)
    folder = args.out or Path("exports") / re.sub(r"[^A-Za-z0-9_.,=+-]", "-", model.name)
    difference = export(model, args.format, folder, args.size, args.resamples)
    say = Terminal().say
    say(f"{folder / FORMATS[args.format]}: {input_text(args.format, args.size)}")
    say(f"Largest difference from ich's own probabilities: {difference:.2g}")
    say(f"Model card: {folder / CARD}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after a mistake, 130 or 143 after Ctrl-C or SIGTERM."""
    args = parse(argv)
    return entry.exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

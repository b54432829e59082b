"""A trained model as one file for other programs: `ich export --model RUN --format onnx`.

HU in, probabilities out: averaging, windows and normalization are inside the graph. The file is
compared with our own prediction before anything says it is there, and a model card lies beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ich.base.config import EXPORTS, RESAMPLES
from ich.base.entry import Parser, end_on_signals, exit_status
from ich.base.memory import importing, leave

if TYPE_CHECKING:
    from ich.inference.export import ExportOptions


def parser() -> Parser:
    """The command's options."""
    parser = Parser("export", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, an MLflow run id, or models:/ich@ALIAS")
    add("--format", choices=tuple(EXPORTS), required=True)
    add("-o", "--out", type=Path, help="a folder; else exports/<run>")
    add("--size", type=int, default=512, help="side of the slices it takes, pixels (512)")
    add("--resamples", type=int, default=RESAMPLES, help="of the card's intervals; 0 for none")
    add("--tracking-uri", help="MLflow's; else MLFLOW_TRACKING_URI, or mlflow.db here")
    return parser


def parse(argv: Sequence[str] | None = None) -> ExportOptions:
    """The command line as options; exits as argparse does after a mistake."""
    given = vars(parser().parse_args(argv))
    with importing():  # torch: help and a mistake do not wait for it
        from ich.inference.export import ExportOptions

    return ExportOptions(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, checks and says so; the exit status, see `ich.base.entry.Status`."""
    end_on_signals()
    return exit_status(lambda: _export(parse(argv)))


def _export(options: ExportOptions) -> int:
    from ich.inference.export import run

    return run(options)


if __name__ == "__main__":
    leave(main())

"""One training, in a process of its own: `ich train RUN_DIR`.

`ich sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.base.results`), whatever becomes of the process.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ich.base.config import UserError
from ich.base.entry import Parser, PrintableFormatter, exit_status
from ich.base.memory import importing, leave
from ich.base.results import RunPaths


def parser() -> Parser:
    """The command's options."""
    parser = Parser("train", __doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", help="MLflow run of the sweep")
    parser.add_argument("--watched-by", type=int, help="process without which this one ends")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the run in RUN_DIR; the exit status, see `ich.base.entry.Status`."""
    # Not end_on_signals: until the training handles SIGTERM, that is to end the process as such,
    # by which its sweep knows that it was told to end.
    args = parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return exit_status(lambda: _train(args))


def _train(args: Namespace) -> int:
    run = RunPaths(args.run_dir)
    if not run.config.exists():
        raise UserError(
            f"{run.root} holds no run (no {run.config.name}). `ich sweep` makes the folders of its "
            f"jobs, and trains them."
        )
    with importing():  # torch: help and a mistake do not wait for it
        from ich.training.run import train_run

    return train_run(run, args.parent, args.watched_by)


if __name__ == "__main__":
    leave(main())

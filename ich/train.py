"""One training, in a process of its own: `python -m ich.train RUN_DIR`.

`ich.sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.base.results`), whatever becomes of the process.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ich.base.memory import importing, leave


def main(argv: list[str] | None = None) -> int:
    """Trains the run in RUN_DIR; exit status 0 if it finished, 1 if it did not."""
    parser = argparse.ArgumentParser(prog="python -m ich.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", help="MLflow run of the sweep")
    parser.add_argument("--watched-by", type=int, help="process without which this one ends")
    args = parser.parse_args(argv)
    with importing():  # torch: help and a mistake do not wait for it
        from ich.base.results import RunPaths
        from ich.training.run import train_run
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return train_run(RunPaths(args.run_dir), args.parent, args.watched_by)


if __name__ == "__main__":
    leave(main())

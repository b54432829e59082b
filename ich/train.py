"""One training, in a process of its own: `python -m ich.train RUN_DIR`.

`ich.sweep` writes RUN_DIR/config.yaml and starts this; everything a run leaves behind lies in
RUN_DIR (see `ich.base.results`), whatever becomes of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from pathlib import Path

from ich.base.config import load
from ich.base.processes import hold, watch_supervisor
from ich.base.results import RunPaths
from ich.base.workers import keep_memory
from ich.tracking.mirror import Mirror
from ich.training.fit import ProgressFile, Stop, train_and_close

log = logging.getLogger("ich.train")
_EARLIER_PROCESS_SECONDS = 30  # what the last process of a killed sweep may need to end


def main(argv: list[str] | None = None) -> int:
    """Trains the run in RUN_DIR and writes its result, whatever happens."""
    parser = argparse.ArgumentParser(prog="python -m ich.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", help="MLflow run of the sweep")
    parser.add_argument("--watched-by", type=int, help="process without which this one ends")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keep_memory()
    run = RunPaths(args.run_dir)
    cfg = load(run.config)
    stop = Stop(ProgressFile(run.progress, cfg.train.epochs))
    for asks_to_end in (signal.SIGTERM, signal.SIGUSR2):  # the second comes from Slurm
        signal.signal(asks_to_end, stop)
    if args.watched_by:
        watch_supervisor(args.watched_by)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(run, _EARLIER_PROCESS_SECONDS))
        except BlockingIOError:
            log.error("another process trains in this folder, and did not end")
            return 1
        return train_and_close(cfg, run, Mirror(cfg, run, args.parent), stop)


if __name__ == "__main__":
    sys.exit(main())

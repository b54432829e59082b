"""The sweep: `python -m ich.sweep -m model=vgg16,resnet50,...`, or `experiment=report`.

Method. Hydra composes one config per job from `conf/`. Before the first job starts, all of them
are checked and their data prepared once (`ich.launch.preflight`): labels become a manifest, the
protocol turns it into training, validation and, if it is sound, test rows, which are audited for
leaks; their slices are decoded to int16 HU. Each job then trains in a process of its own
(`ich.train`): CT windows as channels, flips and crops, an ImageNet network with one linear layer of
an output per label, binary cross-entropy, Adam; the weights of the epoch with the best validation
accuracy are kept, and scored. Every run is logged to MLflow under its sweep. In the end, whatever
became of single jobs, there is a comparison with intervals (`ich.report`).
"""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ich.base.config import CONF_DIR, register_schemas, to_dataclass
from ich.base.entry import end_on_signals
from ich.launch import steps
from ich.launch.composing import register_resolvers
from ich.pages.tables import compare
from ich.scoring.uncertainty import RESAMPLES
from ich.tracking.sweep_run import close_sweep_run

_PATIENCE_INTERRUPTED = 10  # seconds for MLflow after Ctrl-C or SIGTERM


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def train_one(cfg: DictConfig) -> float | None:
    """One job of the sweep; returns the monitored metric, for sweepers that optimize it."""
    steps.enter()
    config = to_dataclass(cfg)
    if config.sweep.plan:
        steps.plan([config])
        return None
    if HydraConfig.get().mode == RunMode.RUN:
        steps.prepare([config])
    with steps.board_for(config) as board:
        return steps.train(config, board)


def close(interrupted: bool) -> bool:
    """Writes the tables of what this process launched; True if every job finished."""
    all_ok = True
    for sweep in steps.launched:
        ok = all(r.is_finished for r in sweep.read_results())
        compare(sweep, resamples=0 if interrupted else RESAMPLES, page=not interrupted)
        status = "FINISHED" if ok else "KILLED" if interrupted else "FAILED"
        close_sweep_run(sweep, status, _PATIENCE_INTERRUPTED if interrupted else None)
        all_ok &= ok
    return all_ok


def main() -> None:
    """Exit status 0 if every job finished, 1 if one failed, 130 or 143 after Ctrl-C or SIGTERM."""
    register_schemas()
    register_resolvers()
    end_on_signals()  # so that `except` is reached
    try:
        train_one()
    except (KeyboardInterrupt, SystemExit) as end:
        status = 130 if isinstance(end, KeyboardInterrupt) else end.code
        close(interrupted=status in (130, 143))
        sys.exit(status)
    sys.exit(0 if close(interrupted=False) else 1)


if __name__ == "__main__":
    main()

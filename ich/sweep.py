"""The sweep: `ich sweep -m model=vgg16,resnet50,...`, or `experiment=report`.

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

from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ich.base.config import CONF_DIR, RESAMPLES, Config
from ich.base.entry import (
    Status,
    end_on_signals,
    exit_status,
    is_interrupt,
    keep_traceback,
    shell_command,
    tell,
)
from ich.base.memory import importing, leave
from ich.base.results import SweepPaths
from ich.launch import steps
from ich.launch.command import carrying, run_hydra, typed
from ich.launch.composing import register_resolvers

_PATIENCE_INTERRUPTED = 10  # seconds for MLflow after Ctrl-C or SIGTERM


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
@carrying
def train_one(cfg: DictConfig) -> float | None:
    """One job of the sweep; returns the monitored metric, for sweepers that optimize it."""
    steps.enter()
    config = typed(cfg, Config)
    if config.sweep.plan:
        steps.plan([config])
        return None
    if HydraConfig.get().mode == RunMode.RUN:
        steps.prepare([config])
    with steps.board_for(config) as board:
        return steps.train(config, board)


def close(interrupted: bool) -> bool:
    """Writes the tables of what this process launched; True if every job finished, and they are
    written."""
    all_ok = True
    while steps.launched:
        with importing():  # they take seconds, which a mistake in an override need not wait for
            from ich.pages.tables import compare
            from ich.tracking.sweep_run import close_sweep_run

        sweep = steps.launched.pop(0)
        ok = all(r.is_finished for r in sweep.read_results())
        try:
            compare(sweep, resamples=0 if interrupted else RESAMPLES, page=not interrupted)
        except Exception as error:  # MLflow shall have the jobs all the same
            all_ok = False
            tell(_not_written(sweep, error))
        status = "FINISHED" if ok else "KILLED" if interrupted else "FAILED"
        close_sweep_run(sweep, status, _PATIENCE_INTERRUPTED if interrupted else None)
        all_ok &= ok
    return all_ok


def _not_written(sweep: SweepPaths, error: Exception) -> str:
    why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        f"the comparison of {sweep.root} could not be written ({why}). Its jobs are whole: "
        f"{shell_command('ich', 'report', sweep.root)} makes it again. {keep_traceback()}"
    )


def sweep(argv: Sequence[str] | None) -> int:
    """Launches what the command asks for, and closes it, whatever became of it."""
    try:
        run_hydra(train_one, "sweep", argv)
    except BaseException as end:
        close(interrupted=is_interrupt(end))
        raise
    return Status.DONE if close(interrupted=False) else Status.FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every job finished, 1 if one failed; the others, see
    `ich.base.entry.Status`."""
    register_resolvers()
    end_on_signals()  # so that `except` is reached
    return exit_status(lambda: sweep(argv))


if __name__ == "__main__":
    leave(main())

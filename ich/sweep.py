"""The sweep: `python -m ich.sweep -m model=vgg16,resnet50,...`, or `experiment=report`.

Method. Hydra composes one config per job from `conf/`. Before the first job starts, all of them
are checked and their data prepared once (`ich.preflight`): labels become a manifest, the protocol
turns it into training, validation and, if it is sound, test rows, which are audited for leaks;
their slices are decoded to int16 HU. Each job then trains in a process of its own (`ich.train`): CT
windows as channels, flips and crops, an ImageNet network with one linear layer of an output per
label, binary cross-entropy, Adam; the weights of the epoch with the best validation accuracy are
kept, and scored. Every run is logged to MLflow under its sweep. In the end, whatever became of
single jobs, there is a comparison table (`ich.report`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from ich import launcher
from ich.config import CONF_DIR, register, typed
from ich.jobs import run_job
from ich.preflight import close_sweep
from ich.report import compare
from ich.results import FINISHED, SweepPaths
from ich.terminal import Terminal


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def train_one(cfg: DictConfig) -> float | None:
    """One job of the sweep; returns the monitored metric, for sweepers that optimize it."""
    config = typed(cfg)
    if HydraConfig.get().mode == RunMode.RUN:
        launcher.prepare([config])
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    record, run, terminal = sweep.read_record(), sweep.run(config.job), Terminal()
    if config.job not in record.get("jobs", []):
        raise CompactHydraException(
            "ich: this launcher does not prepare a sweep's data and record "
            "its jobs. Leave hydra/launcher at local."
        )
    terminal.started(record["jobs"].index(config.job) + 1, len(record["jobs"]), config, run)
    before = run.read_result()
    with terminal.watching(config, run) as watch:
        result = run_job(config, run, record["mlflow_run"], watch)
    terminal.ended(config, result, skipped=result == before)
    score = result.get(f"val_{config.train.monitor.value}")
    return float(score) if isinstance(score, int | float) else None


def close() -> bool:
    """Writes the tables of what this process launched; True if every job finished."""
    all_ok = True
    for sweep, config in launcher.launched:
        results = [sweep.run(job).read_result() for job in sweep.read_record()["jobs"]]
        ok = all(r["status"] == FINISHED for r in results)
        compare(sweep)
        close_sweep(sweep, config, ok)
        all_ok &= ok
    return all_ok


def main() -> None:
    """Exit status 0 if every job finished, 1 if one failed, 130 or 143 after Ctrl-C or SIGTERM."""
    register()
    launcher.register_resolvers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is reached
    ok = False
    try:
        train_one()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        ok = close()
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()

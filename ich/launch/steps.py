"""The steps of a launch, whichever launcher places its jobs: plan, or prepare once and train each.

A job is supervised as a child process (`ich.launch.jobs`), so that none can end the sweep.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from ich.base.config import Config, UserError
from ich.base.entry import keep_traceback
from ich.base.memory import importing
from ich.base.records import FAILED, NOT_STARTED, RunResult
from ich.base.results import State, SweepPaths
from ich.base.terminal import Board, Terminal
from ich.launch.composing import register_resolvers
from ich.launch.jobs import Slot, run_job, slurm_thread_limit
from ich.launch.remote import Interruption
from ich.launch.sharing import describe_sharing

# The sweeps this process launched. `ich.sweep.main` closes them, whatever became of the jobs.
launched: list[SweepPaths] = []


def prepare(configs: Sequence[Config]) -> SweepPaths:
    """Opens the sweep of these jobs with a progress display."""
    with importing():  # it takes a second or two, which a mistake in an override need not wait for
        from ich.launch.preflight import describe_superseded, open_sweep

        # With what closes the sweep hours later: whatever is edited meanwhile, it ends with the
        # code that it began with.
        import_module("ich.pages.tables")
    with Terminal().preparing() as report:
        sweep, jobs = open_sweep(configs, report)
    if sweep not in launched:
        launched.append(sweep)
    other = [job.config.job for job in jobs if job.is_of_other_code]
    Terminal().opened(sweep, [job.state for job in jobs], other, describe_superseded(jobs))
    return sweep


def plan(configs: Sequence[Config], gpus: Sequence[str] = (), jobs_per_gpu: int | str = 1) -> None:
    """Prints what a launch of these jobs would do, on these GPUs if any; starts nothing."""
    # Imported here: it counts operations with torch, which takes seconds to import.
    from ich.launch.plan import describe_plan, make_plan

    with Terminal().preparing() as report:
        made = make_plan(configs, report)
    # Jobs that share a GPU count once, for they share its speed.
    headings, rows, sentences = describe_plan(made, max(1, len(gpus)))
    sweep = SweepPaths(Path(configs[0].sweep.output) / configs[0].name)
    todo = [p.job.config for p in made.jobs if p.job.state is not State.done]
    if shared := describe_sharing(todo, sweep, gpus, jobs_per_gpu):
        sentences.append(shared)
    title = f"Plan of {sweep.root} (nothing is started)"
    Terminal().tables(title, [(headings, rows)], sentences)


def train(
    config: Config, board: Board, slot: Slot | None = None, stop: threading.Event | None = None
) -> float | None:
    """Runs one job of an opened sweep, in this process's own child.

    Args:
        config: the job.
        board: shows what it does.
        slot: where it runs; by default on what Slurm gave to this process, if it did.
        stop: ends it when set; by default when the launch was interrupted, wherever that runs.

    Returns:
        The monitored metric, None if the job did not finish.

    Raises:
        UserError: the sweep's folder is not to be seen from here.
    """
    sweep = SweepPaths(Path(config.sweep.output) / config.name)
    record, run = sweep.read_record(), sweep.run(config.job)
    if config.job not in record.origins:
        raise UserError(
            f"{sweep.root} does not know the job {config.job!r}. A job on another machine "
            f"needs the launching folder at the same place, on a file system that both share."
        )
    # Jobs that waited while another failed or Ctrl-C was pressed return at once.
    if sweep.stopped.exists():
        return None
    slot = slot or Slot(environment=slurm_thread_limit())
    stop = stop or Interruption(sweep)
    origin = record.origins[config.job]
    # Asked now, since afterwards every job that finished is done.
    before = run.state(config, origin) is State.done
    watch = board.started(config, run, slot.name) if not before else lambda: None
    try:
        result = run_job(config, run, origin, record.mlflow_run, watch, slot, stop)
    except OSError as error:  # a full disk, mostly; the other jobs may have better luck
        result = RunResult(FAILED, f"its folder cannot be used: {error}. {keep_traceback()}")
    board.ended(config, result, before)
    if result.status == FAILED and config.sweep.on_failure.value == "stop":
        sweep.stop_after(config.job)
    # Validation's, also where there is a test set: an optimizing sweeper chooses by it.
    return result.fit.val_scores.get(config.train.monitor.value) if result.fit else None


def board_for(*configs: Config) -> Board:
    """What shows the jobs that are run from this process, among all of their sweep: the others are
    of an earlier batch, or another process runs them."""
    results = SweepPaths(Path(configs[0].sweep.output) / configs[0].name).read_results()
    others = {r.job: r.status for r in results if r.job not in {c.job for c in configs}}
    # Whether another process has begun with it is not known here.
    others |= {job: "waiting or elsewhere" for job, s in others.items() if s == NOT_STARTED}
    return Board([r.job for r in results], others=others)


def enter() -> None:
    """Called by a job that a launcher has started, maybe in another process on another machine:
    goes to the folder where the sweep was launched, so that relative paths mean the same."""
    register_resolvers()
    launched_in = HydraConfig.get().runtime.cwd
    if Path(launched_in) != Path.cwd():
        os.chdir(launched_in)

"""Everything that happens before the first job of a sweep starts.

All jobs are checked together: ranges, names, weights. Then the data are prepared once, for all of
them. What is wrong in the eighth job is said here, and not after seven trainings.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO

from ich.base import provenance
from ich.base.config import (
    Config,
    ModelConfig,
    UserError,
    image_size,
    input_channels,
    load_config,
    to_dict,
)
from ich.base.files import DamagedError, write_text
from ich.base.memory import importing
from ich.base.naming import identity
from ich.base.progress import StageCallback
from ich.base.records import Origin, SweepRecord
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.validation import validate
from ich.data import dataset
from ich.data.cohorts import cohort_keys, describe_data_changes
from ich.data.protocol import TRAIN
from ich.data.subgroups.reading import keep_header_facts, read_subgroups
from ich.pages.data.report import write_data_report
from ich.tracking.sweep_run import check_tracking, open_sweep_run
from ich.training import timing
from ich.training.mode import is_timed, workload_key


@dataclass(frozen=True)
class Job:
    """One job of a sweep, its folder, what it is made from, and what starting it would do."""

    config: Config
    run: RunPaths
    origin: Origin
    state: State

    @property
    def is_of_other_code(self) -> bool:
        """Whether the folder's run was made by another version of this package's code."""
        before = self.run.read_origin().code
        return self.state is not State.new and before != self.origin.code

    def superseded_because(self) -> list[str]:
        """What has changed since the finished run in the folder, which starting this job moves
        aside; empty where there is none."""
        if self.state is not State.new or not self.run.read_result().is_finished:
            return []
        before, found = self.run.read_origin(), []
        try:
            was, now = identity(load_config(self.run.config)), identity(self.config)
            keys = [k for k in was | now if was.get(k) != now.get(k)]
            found += [f"{k} was {was.get(k)} and is {now.get(k)}" for k in keys]
        except (FileNotFoundError, DamagedError):
            found.append("its config.yaml cannot be read by this version of ich")
        if before.cohort != self.origin.cohort:
            found += describe_data_changes(self.config, before.cohort, self.origin.cohort)
        if before.weights != self.origin.weights:
            found.append(f"initial weights were {before.weights} and are {self.origin.weights}")
        return found or [f"its {self.run.best.name} is gone"]


def describe_superseded(jobs: Sequence[Job]) -> list[str]:
    """Which finished runs these jobs move aside, and what has changed since: a sentence for all of
    the same reasons, mostly the data."""
    moved = {job.config.job: why for job in jobs if (why := tuple(job.superseded_because()))}
    sentences = []
    for why in dict.fromkeys(moved.values()):
        names = [job for job, reasons in moved.items() if reasons == why]
        shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        several = "finished runs move" if len(names) > 1 else "finished run moves"
        sentences.append(
            f"{len(names)} {several} to superseded/ ({shown}; name=NEW leaves all in place), since "
            f"this has changed: {'; '.join(why)}."
        )
    return sentences


def check_jobs(configs: Sequence[Config]) -> SweepPaths:
    """Checks what can be checked of all jobs without a look at their data; returns their folder.

    Raises:
        UserError: a value out of range, two jobs with one folder, or a subgroup that no table or
            header tells.
    """
    for config in configs:
        validate(config)
    ((job, times),) = Counter(config.job for config in configs).most_common(1)
    if times > 1:  # they would train in one folder
        raise UserError(
            f"the job {job!r} stands {times} times in this command. Name each value once."
        )
    # Of each data set once: a name that no column has would else be known after all trainings.
    for config in {data_key(c): c for c in configs}.values():
        if config.report.subgroups:
            read_subgroups(config.data, config.report.subgroups, [])
    return SweepPaths(Path(configs[0].sweep.output) / configs[0].name)


def data_key(config: Config) -> str:
    """Equal for jobs whose configs ask for the same cohort, which is looked at and made once."""
    # Without context nobody asks for the order of slices, which is looked up with the cohort.
    return repr((config.data, config.protocol, config.context.is_slice))


def cohort_keys_of(configs: Sequence[Config]) -> dict[str, str]:
    """The fingerprint of the jobs' cohorts, by `data_key`: a sweep over networks has one."""
    return cohort_keys({data_key(c): c for c in configs})


def inspect_jobs(
    configs: Sequence[Config], sweep: SweepPaths, keys: Mapping[str, str] | None = None
) -> list[Job]:
    """What each job is made from and what its folder holds. Decodes no slice, and writes nothing: a
    phantom that is not there yet is of no cohort that a run could be made from.

    Args:
        configs: the jobs.
        sweep: their folder.
        keys: what `cohort_keys_of` returned, which looks at labels and files, if it was asked.

    Raises:
        UserError: the data set is not there, or its labels are wrong.
    """
    keys = cohort_keys_of(configs) if keys is None else keys
    code, jobs = provenance.code_version(), []
    for config in configs:
        origin = Origin(keys[data_key(config)], weights_digest(config.model), code)
        run = sweep.run(config.job)
        jobs.append(Job(config, run, origin, run.state(config, origin)))
    return jobs


def weights_digest(cfg: ModelConfig) -> str:
    """Tells initial weights apart: a file by its content, published ones by their timm tag."""
    if cfg.weights is None:
        return cfg.timm if cfg.pretrained else "random"
    path = Path(cfg.weights)
    return _digest(path, path.stat().st_mtime_ns) if path.is_file() else "no file"


@lru_cache  # of a file as it is: all jobs of a sweep may begin with one of half a gigabyte
def _digest(path: Path, _modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_weights(configs: Sequence[Config]) -> None:
    """Makes sure that the networks of jobs take their input, and that their weights are at hand.

    Raises:
        UserError: an architecture that does not fit, or weights that cannot be had.
    """
    if not configs:
        return
    with importing():  # torch takes seconds, which a typo need not wait for
        from ich.training.model import check_architecture, ensure_weights

    # One job for each network and its input: a sweep over seeds would build it for each seed.
    for c in {repr((c.model, c.data.image_size, input_channels(c))): c for c in configs}.values():
        check_architecture(c.model, input_channels(c), image_size(c))
        ensure_weights(c.model)


def open_sweep(
    configs: Sequence[Config], report: StageCallback | None = None
) -> tuple[SweepPaths, list[Job]]:
    """Checks the jobs, prepares their data, and records the launch.

    Args:
        configs: the jobs, in the order of the table.
        report: progress of the preparation.

    Returns:
        The sweep's folder, whose record names the jobs and the MLflow parent run; and the jobs.

    Raises:
        UserError: see `check_jobs`, `check_weights`, `check_tracking` and
            `ich.data.dataset.load_dataset`.
    """
    sweep = check_jobs(configs)
    keys = cohort_keys_of(configs)
    jobs = inspect_jobs(configs, sweep, keys)
    todo = [job.config for job in jobs if job.state is not State.done]
    # Of what is to train alone: a finished job needs no weights, and no network to fetch them.
    check_weights(todo)
    check_tracking(configs[0])  # before hours are spent on data
    prepared = []
    for key, config in {data_key(config): config for config in todo}.items():
        cohort = dataset.prepare(config, report, key=keys[key])
        cohort.require_rows()
        prepared.append((config, cohort))
        keys[key] = cohort.key  # a phantom made just now has a fingerprint only now
    # Of finished jobs too, whose report may ask for more than it did.
    for key, config in {data_key(config): config for config in configs}.items():
        keep_header_facts(config, keys[key], report)
    jobs = inspect_jobs(configs, sweep, keys)
    # Locked only here: whatever is refused before leaves no folder behind.
    is_first_batch = _lock_sweep(sweep)
    for config, cohort in prepared:
        write_data_report(config, cohort, sweep.data(cohort.key))
    rows = {data_key(c): int((p.cohort.rows["split"] == TRAIN).sum()) for c, p in prepared}
    jobs = assign_modes(jobs, sweep, rows, report)
    # Last: what has a record can be trained.
    _record_launch(sweep, jobs, is_first_batch, open_sweep_run(configs[0], sweep))
    return sweep, jobs


def assign_modes(
    jobs: Sequence[Job],
    sweep: SweepPaths,
    rows: Mapping[str, int],
    report: StageCallback | None = None,
) -> list[Job]:
    """Chooses what each kind of network computes in, and notes it with its jobs.

    Jobs of one kind, also of earlier launches in this folder, compute alike: the seeds of a network
    could not be compared otherwise.

    Args:
        jobs: of the launch.
        sweep: their folder.
        rows: for training, by `data_key`, of the jobs that are not done.
        report: progress.
    """
    modes = dict(sweep.read_record().modes)
    # What is finished needs no mode, and what asks for one has it.
    unknown = {
        workload_key(j.config): (j.config, j.config.train.epochs * rows.get(data_key(j.config), 0))
        for j in jobs
        if j.state is not State.done and is_timed(j.config) and workload_key(j.config) not in modes
    }
    chosen = timing.select_modes(list(unknown.values())) if unknown else ()
    if unknown and report:
        report("timing precision", 0, len(unknown))
    for number, (of_kind, mode) in enumerate(chosen, start=1):
        modes[of_kind] = mode
        if report:
            report("timing precision", number, len(unknown))
    return [
        replace(job, origin=replace(job.origin, mode=modes.get(workload_key(job.config))))
        for job in jobs
    ]


def _record_launch(
    sweep: SweepPaths, jobs: Sequence[Job], is_first_batch: bool, parent: str | None
) -> None:
    """Writes down what was launched, from what and where: enough to do it again.

    An optimizing sweeper launches in batches, which are one launch; another launch in the folder
    replaces the record, but for the modes, in which jobs of all launches are to compute.
    """
    record = sweep.read_record()
    before = SweepRecord() if is_first_batch else record
    if is_first_batch:
        # Of an earlier launch, it would keep the jobs of this one from starting.
        sweep.stopped.unlink(missing_ok=True)
        write_text(sweep.diff, provenance.git_diff())
    names = [*before.jobs, *(j.config.job for j in jobs)]
    cohorts = [*before.cohorts, *(j.origin.cohort for j in jobs)]
    modes = {workload_key(j.config): j.origin.mode for j in jobs if j.origin.mode}
    sweep.write_record(
        SweepRecord(
            name=jobs[0].config.name,
            jobs=tuple(dict.fromkeys(names)),
            cohorts=tuple(dict.fromkeys(cohorts)),
            mlflow_run=parent,
            started=before.started or time.strftime("%Y-%m-%d %H:%M"),
            command=_command(),
            modes=record.modes | modes,
            origins=before.origins | {j.config.job: j.origin for j in jobs},
            configs=before.configs | {j.config.job: to_dict(j.config) for j in jobs},
            provenance=provenance.record() if is_first_batch else before.provenance,
        )
    )


# Open for as long as this process lives: a lock of `flock` ends with its file.
_locks: dict[Path, IO[str]] = {}


def _lock_sweep(sweep: SweepPaths) -> bool:
    """Makes the sweep's folder and keeps it for this process; False if it has it already.

    Raises:
        UserError: another process runs a sweep in it.
    """
    root = sweep.root.absolute()
    if root in _locks:
        return False
    root.mkdir(parents=True, exist_ok=True)
    # The file is never removed: two processes could then hold locks on two files of one name.
    handle = (root / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(
            f"another sweep is running in {sweep.root}. Wait for it, or give this one a folder of "
            f"its own with name=NAME."
        ) from None
    _locks[root] = handle
    return True


def _command() -> str:
    # `ich sweep`, as `ich.launch.command.run_hydra` has it.
    return shlex.join([*Path(sys.argv[0]).name.split(), *sys.argv[1:]])

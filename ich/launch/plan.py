"""What a launch would do, how long it would take and what it would need: `sweep.plan=true`.

Nothing is written and no job starts. What cannot be known before it is done is estimated, and every
estimate says what it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ich.base.config import Config, ContextName, image_size, input_channels, load_config
from ich.base.progress import StageCallback
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.terminal import format_duration
from ich.data.cohorts import Sizes, cohort_sizes
from ich.data.protocol import SPLITS, TEST, TRAIN, VAL
from ich.launch.preflight import Job, check_jobs, data_key, describe_superseded, inspect_jobs
from ich.pages.answers.patients import describe_patients
from ich.training.devices import device_name, pick_device
from ich.training.model import Cost, check_architecture, initial_weights_source, model_cost
from ich.training.timing import time_training_steps

# A row that is only evaluated costs about a third of one that is trained on: the forward pass
# without the backward pass, which takes twice as long.
_EVALUATED_ROW = 1 / 3
# Seconds of the head of context=study for a slice in an epoch, on two cores (docs/context.md).
_HEAD_SLICE = 1.1e-4
_START_SECONDS = 10.0  # of a job before its first step: imports, weights, opening the cache
# Peak resident memory of a training on the CPU at 96 px, batch 32, was 0.8 GB of Python and torch,
# and 1.17 to 1.29 times its weights, gradients, moments and kept activations (six networks).
_PROCESS_BYTES = 0.8e9
_MEMORY_FACTOR = 1.25
_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class JobPlan:
    """One job of a plan.

    cost: of its network at its size. memory: bytes of its process at its peak. disk: bytes it
    leaves, in its folder and in MLflow. checkpoints: bytes more while it runs. seconds: of what is
    left to do, alone on the machine, None if nothing tells. basis: what the time rests on.
    """

    job: Job
    weights: str
    cost: Cost
    memory: float
    disk: int
    checkpoints: int
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Plan:
    """jobs: in the table's order. cohorts: the sizes of each, once. device: that all run on."""

    jobs: list[JobPlan]
    cohorts: list[Sizes]
    device: str


def make_plan(configs: Sequence[Config], report: StageCallback) -> Plan:
    """Looks at everything that a launch of these jobs would need.

    Args:
        configs: the jobs, in the order of the table.
        report: progress of timing, which takes seconds for each network.

    Raises:
        UserError: what a launch would refuse too, but for weights that are not at hand.
    """
    # What a launch does before it writes, but for `check_weights`, which would download them.
    sweep = check_jobs(configs)
    jobs = inspect_jobs(configs, sweep)
    for config in configs:
        check_architecture(config.model, input_channels(config), image_size(config))
    configs_of_data = {data_key(config): config for config in configs}
    sizes = {key: cohort_sizes(config) for key, config in configs_of_data.items()}
    speeds = SpeedEstimates(jobs, report)
    plans = [_plan_job(job, sizes[data_key(job.config)], speeds) for job in jobs]
    return Plan(plans, list(sizes.values()), speeds.device)


def _plan_job(job: Job, sizes: Sizes, speeds: SpeedEstimates) -> JobPlan:
    config = job.config
    batch = config.train.batch_size
    # Without named columns the labels are known only once they are read: RSNA 2019 has six.
    outputs = len(config.data.label_columns or range(6))
    cost = model_cost(config.model, input_channels(config), image_size(config), batch, outputs)
    moments = _moments(config)
    weights = 4 * cost.params  # bytes, float32, as gradients and moments are
    state = weights * (2 + moments)
    seconds, basis = _seconds_left(job, sizes, speeds)
    return JobPlan(
        job=job,
        weights=initial_weights_source(config.model),
        cost=cost,
        memory=_PROCESS_BYTES + _MEMORY_FACTOR * (state + cost.activations),
        # MLflow keeps a copy of its own.
        disk=weights * (2 if config.tracking.mlflow else 1),
        # Two generations, each with the best weights so far.
        checkpoints=2 * (weights * (1 + moments) + weights) + _feature_bytes(config, cost, sizes),
        seconds=seconds,
        basis=basis,
    )


def _seconds_left(job: Job, sizes: Sizes, speeds: SpeedEstimates) -> tuple[float | None, str]:
    """Seconds of what is left to do of a job, and what they rest on."""
    if job.state is State.done:
        return 0.0, ""
    seconds, basis = speeds.seconds_per_row(job.config)
    if seconds is None:
        return None, basis
    resumes = job.state is not State.new and job.run.has_checkpoint()
    # The journal has a line for each epoch that is complete; steps of the next do not count.
    done = len(job.run.read_metrics()) if resumes else 0
    epochs = job.config.train.epochs - min(done, job.config.train.epochs)
    rows = _equivalent_rows(job.config, sizes.rows, epochs)
    study = 0.0
    if heads := job.config.context.epochs:  # of context=study alone
        left = heads - max(0, done - job.config.train.epochs)
        study = seconds * _EVALUATED_ROW * sizes.images + _HEAD_SLICE * left * sizes.images
    return _START_SECONDS + seconds * rows + study, basis


def _feature_bytes(config: Config, cost: Cost, sizes: Sizes) -> int:
    """Of the file from which the head of context=study is trained; memory holds a batch of it."""
    if config.context.name is not ContextName.study:
        return 0
    return 2 * cost.features * sizes.images


def _moments(config: Config) -> int:
    """How many numbers the optimizer keeps for each parameter: Adam two, SGD its momentum."""
    if "SGD" in config.optimizer._target_:
        return 1 if config.optimizer.momentum else 0
    return 2


def _equivalent_rows(config: Config, rows: dict[str, int], epochs: int) -> float:
    """Training rows, and others by what they cost of one, in so many epochs and a last test."""
    per_epoch = rows[TRAIN] + _EVALUATED_ROW * rows[VAL]
    return epochs * per_epoch + _EVALUATED_ROW * rows.get(TEST, 0)


class SpeedEstimates:
    """Seconds per training row, from earlier runs under the same output folder or timed now."""

    def __init__(self, jobs: Sequence[Job], report: StageCallback) -> None:
        self.device = _device(jobs[0].config)
        self._earlier = dict(_earlier_runs(Path(jobs[0].config.sweep.output)))
        self._report = report
        self._timed: dict[str, float] = {}
        todo = {_speed_key(job.config) for job in jobs if job.state is not State.done}
        self._total = len(todo - self._earlier.keys())

    def seconds_per_row(self, config: Config) -> tuple[float | None, str]:
        """Seconds per training row of a job, None if nothing tells; and what they rest on."""
        key = _speed_key(config)
        if key in self._earlier:
            seconds, run = self._earlier[key]
            return seconds, f"run {run}"
        if not config.sweep.plan_timing:
            return None, "no earlier run"
        if key not in self._timed:
            self._report("timing networks", len(self._timed), self._total)
            # Of the fastest mode, which is about what `auto` takes.
            self._timed[key] = min(time_training_steps(config).seconds.values())
            self._report("timing networks", len(self._timed), self._total)
        return self._timed[key], "timed now"


def _device(config: Config) -> str:
    """What the config would run on here, alone; sets this process's threads to what it asks for."""
    torch.set_num_threads(config.train.threads or _THREADS)
    return device_name(pick_device(config.train.device))


def _speed_key(config: Config, device: str | None = None) -> str:
    """What the speed of a training depends on."""
    channels, device = input_channels(config), device or _device(config)
    size, batch = image_size(config), config.train.batch_size
    return repr((config.model.timm, channels, size, batch, config.data.cache_size, device))


def _earlier_runs(output: Path) -> Iterator[tuple[str, tuple[float, str]]]:
    """Speed key, and seconds per training row with the run's name, later ones last."""
    # By date, since `dict` keeps the last of several runs of one kind.
    paths = [*output.glob("*/*/result.json"), *output.glob("*/superseded/*/result.json")]
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns):
        run = RunPaths(path.parent)
        fit = run.read_result().fit
        if fit is None or fit.resumed:
            continue  # a resumed run's minutes include what was done twice
        try:
            config = load_config(run.config)
            rows = _equivalent_rows(config, fit.cohort.steps, fit.epochs)
            name = run.root.relative_to(output).as_posix()
            minutes = fit.head.slice_minutes if fit.head else fit.minutes
            yield _speed_key(config, fit.device), (minutes * 60 / rows, name)
        except (KeyError, ArithmeticError, OSError):
            continue  # of another version of ich, or damaged


def total_seconds(plan: Plan, at_once: int = 1) -> float | None:
    """Wall-clock seconds of all that is left, jobs in order over so many processors."""
    if any(p.seconds is None for p in plan.jobs):
        return None
    # As slots do it: the next job goes where one is free first.
    busy_until = [0.0] * max(1, at_once)
    for job in plan.jobs:
        busy_until[int(np.argmin(busy_until))] += job.seconds or 0.0
    return max(busy_until)


def describe_plan(plan: Plan, at_once: int = 1) -> tuple[list[str], list[list[str]], list[str]]:
    """The plan as headings, rows and sentences.

    Args:
        plan: what to say.
        at_once: trainings that do not share a processor: one on a CPU, one for each GPU used.
    """
    headings = ["job", "state", "weights", "trained M", "GMACs", "memory GB", "disk MB", "time"]
    rows = [_table_row(p) for p in plan.jobs]
    todo = [p for p in plan.jobs if p.job.state is not State.done]
    # Once, where jobs differ in no more than whether they ask for the order of slices.
    sentences = list(dict.fromkeys(_describe_cohort(sizes) for sizes in plan.cohorts))
    sentences += describe_superseded([p.job for p in plan.jobs])
    if todo:
        most = max(p.checkpoints for p in todo) / 1e6
        kept = sum(p.disk for p in todo) / 1e6
        has_head = any(p.job.config.context.name is ContextName.study for p in todo)
        features = ", and with context=study for features of all slices" if has_head else ""
        sentences.append(
            f"Disk: {kept:,.0f} MB stay of the jobs to do, and each needs up to {most:,.0f} MB "
            f"more for checkpoints while it runs{features}."
        )
    sentences.append(_describe_time(plan, todo, at_once))
    if [p for p in todo if p.weights == "to download"]:
        sentences.append("Weights are downloaded before the first job starts.")
    if len(plan.jobs) > 1:  # one alone is compared with nothing
        config = plan.jobs[0].job.config
        sweep = SweepPaths(Path(config.sweep.output) / config.name)
        sentences += describe_patients(sweep, config.report)
    return [*headings, "time from"], rows, sentences


def _table_row(p: JobPlan) -> list[str]:
    time_left = "" if p.seconds is None else format_duration(p.seconds)
    return [
        p.job.config.job,
        p.job.state.value,
        p.weights,
        f"{p.cost.params / 1e6:.2f}",
        f"{p.cost.macs / 1e9:.2f}",
        f"{p.memory / 1e9:.1f}",
        f"{p.disk / 1e6:.0f}",
        time_left,
        p.basis,
    ]


def _describe_cohort(sizes: Sizes) -> str:
    rows = ", ".join(f"{sizes.rows[n]:,} {n}" for n in SPLITS if sizes.rows.get(n))
    how = "" if sizes.is_exact else "about "
    new = f"{sizes.new_bytes / 1e6:,.0f} MB of slices are still to be made."
    if not sizes.new_bytes:
        new = "Their slices are decoded."
    why = "" if sizes.is_exact else " (before oversampling: its files have not been looked at yet)"
    return f"Data: {how}{rows} rows of {sizes.images:,} images{why}. {new}"


def _describe_time(plan: Plan, todo: list[JobPlan], at_once: int) -> str:
    total = total_seconds(plan, at_once)
    if not todo:
        return "Time: nothing is left to do; the table would be written again."
    if total is None:
        return "Time: not known without an earlier run. sweep.plan_timing=true times a few steps."
    how = f"over {at_once} GPUs" if at_once > 1 else "one after another"
    return (
        f"Time: {format_duration(total)} for {len(todo)} jobs {how} on {plan.device}, making "
        f"slices not included. Jobs that share a processor take longer each."
    )

"""Trainings as child processes, placed on GPUs or CPU cores: no crash ends a sweep or its table.

A child writes to its own log. Whatever becomes of it (an exception, `sys.exit`, a signal, the time
limit) turns into a result file with a reason, and the caller goes on to the next job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ich.base import provenance
from ich.base.config import Config, UserError
from ich.base.files import write_text
from ich.base.memory import importing
from ich.base.processes import GRACE_SECONDS, lock_run, signals_ignored
from ich.base.records import FAILED, KILLED, NOT_STARTED, Origin, RunResult
from ich.base.results import RunPaths, State
from ich.base.workers import available_cores
from ich.tracking.mirror import Mirror
from ich.training.mode import JOBS_PER_GPU

log = logging.getLogger(__name__)
VISIBLE, _ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_POLL_SECONDS = 0.2
_MIRROR_SECONDS = 5  # what a slot waits for MLflow to hear of a dead child

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time.

    environment: what its child is given beside this process's own environment.
    command: what starts a training there. It is given the run's folder, `--watched-by` with the
        process without which it ends, and `--parent` with the MLflow run of its sweep.
    """

    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, "-m", "ich.train")


def gpu_slots(gpus: Sequence[str], jobs_per_gpu: int) -> list[Slot]:
    """Slots on GPUs; each job sees one of them. The first jobs go to different ones.

    Args:
        gpus: their names for CUDA_VISIBLE_DEVICES: numbers or UUIDs.
        jobs_per_gpu: how many jobs share one.
    """
    # By the bus, as nvidia-smi numbers them; CUDA puts the fastest first.
    common = {JOBS_PER_GPU: str(jobs_per_gpu), _ORDER: os.environ.get(_ORDER, "PCI_BUS_ID")}
    return [
        Slot(f"GPU {gpu}", {VISIBLE: gpu} | common) for _ in range(jobs_per_gpu) for gpu in gpus
    ]


def gpus_of(slots: Sequence[Slot]) -> list[str]:
    """The GPUs that slots are on, each once, by their names for CUDA_VISIBLE_DEVICES."""
    return [*dict.fromkeys(s.environment[VISIBLE] for s in slots if VISIBLE in s.environment)]


def cpu_slots(jobs: int) -> list[Slot]:
    """Slots on this machine's CPU; several share its cores evenly."""
    if jobs == 1:
        return [Slot()]
    # Each training would take all cores: with more threads than cores both are slower than alone.
    share = thread_limit(max(1, available_cores() // jobs))
    return [Slot(f"CPU {n}", share) for n in range(1, jobs + 1)]


def thread_limit(threads: int | str | None) -> dict[str, str]:
    """The environment of a child that computes in so many threads; empty for no limit."""
    # Under both names, since MKL reads its own before OpenMP's.
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}


def slurm_thread_limit() -> dict[str, str]:
    """The same, for the cores that Slurm gave to this process; empty where there is no Slurm."""
    return thread_limit(os.environ.get("SLURM_CPUS_PER_TASK"))


def visible_gpus() -> list[str]:
    """The GPUs this process may use, by their names for CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: there are some that torch cannot use, or several parts of one (MIG).
    """
    with importing():  # takes seconds: only where a job may run on a GPU
        from ich.training.devices import count_usable_gpus

    named = os.environ.get(VISIBLE)
    count = count_usable_gpus()
    names = [g.strip() for g in named.split(",")] if named else [str(n) for n in range(count)]
    if len(names) > 1 and any(name.startswith("MIG-") for name in names):
        raise UserError(
            f"{VISIBLE} is {named}, and of a list with parts of a GPU (MIG) CUDA uses the first "
            f"alone. Name one, and start a sweep with another name=NAME for each of the others."
        )
    return names[:count]  # CUDA leaves out whatever follows a name that it does not know


def run_in_slots(
    work: Callable[[T, Slot], R], items: Sequence[T], slots: Sequence[Slot], stop: threading.Event
) -> list[R]:
    """Does a piece of work for every item, as many at once as there are slots.

    A signal that raises in the main thread sets `stop`, and is raised again when the work under
    way has ended; work is expected to end soon once `stop` is set.

    Returns:
        The results, in the order of the items.
    """
    # A queue, and no share for each: a slot that is done early takes what is left.
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        waiting.put(number)
    results: dict[int, R] = {}
    errors: list[BaseException] = []
    ended = [threading.Event() for _ in slots]

    def serve(slot: Slot, end: threading.Event) -> None:
        try:
            while not (errors or stop.is_set()):
                number = waiting.get_nowait()
                results[number] = work(items[number], slot)
        except queue.Empty:
            pass
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)
        finally:
            end.set()

    # Daemons, so that a thread whose child does not end cannot keep an interrupted sweep alive.
    for slot, end in zip(slots, ended, strict=True):
        threading.Thread(target=serve, args=(slot, end), daemon=True).start()
    try:
        # Not Thread.join: a signal that raises there makes Python take the thread for ended.
        while not all(end.wait(_POLL_SECONDS) for end in ended):
            pass
    except BaseException:
        stop.set()
        with signals_ignored():
            for end in ended:
                # A child has GRACE_SECONDS to end by itself, and is killed then.
                end.wait(2 * GRACE_SECONDS)
        raise
    if errors:
        raise errors[0]
    return [results[n] for n in range(len(items))]


def run_job(
    config: Config,
    run: RunPaths,
    origin: Origin,
    parent: str | None,
    watch: Callable[[], None],
    slot: Slot | None = None,
    stop: threading.Event | None = None,
) -> RunResult:
    """Trains one job in a child process and returns its result, which is always written.

    A folder that already holds this very job, finished, is left as it is; one that holds a
    checkpoint of it goes on from there, whatever ended it; any other earlier run of the job is
    moved to `superseded/`. A job that fails is tried again, `sweep.retry` times.

    Args:
        config: the job.
        run: its folder.
        origin: what it is made from.
        parent: the sweep's MLflow run.
        watch: called several times a second while the child runs.
        slot: where it runs.
        stop: ends it when set.
    """
    slot, stop = slot or Slot(), stop or threading.Event()
    result = RunResult(NOT_STARTED)
    for _ in range(1 + config.sweep.retry):
        # Looked at each time: the attempt that failed may have left a checkpoint to go on from.
        state = run.state(config, origin)
        if state is State.done:
            return run.read_result()
        _prepare_folder(config, run, origin, state)
        result = _run_child(config, run, parent, watch, slot, stop)
        if result.status != FAILED or stop.is_set():
            break  # what the user or a time slot ended is not tried again
    return result


def _prepare_folder(config: Config, run: RunPaths, origin: Origin, state: State) -> None:
    """Makes the folder ready: an earlier run goes on there, or is moved out of the way."""
    goes_on = state is not State.new and run.has_checkpoint()
    # One that was ended before its first checkpoint begins again in its place: there is nothing to
    # keep, and MLflow would have one more run that was killed.
    if goes_on or run.is_empty(config, origin):
        run.result.unlink(missing_ok=True)  # else a child that dies would seem to have left it
        run.write_tracking(replace(run.read_tracking(), complete=False))
    else:
        run.supersede()
    if goes_on:
        return
    run.root.mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    run.write_origin(origin)
    # Of each run its own, for the sweep's record is replaced at every launch.
    run.write_provenance(provenance.record())
    if diff := provenance.git_diff():
        write_text(run.diff, diff)


def _run_child(
    config: Config,
    run: RunPaths,
    parent: str | None,
    watch: Callable[[], None],
    slot: Slot,
    stop: threading.Event,
) -> RunResult:
    # Watched by this process: killed, it could end no child, and a training would live on unseen.
    command = [*slot.command, str(run.root), "--watched-by", str(os.getpid())]
    if parent:
        command += ["--parent", parent]
    try:
        reason = supervise(command, run, config.sweep.time_limit, watch, slot, stop)
        died = not run.result.exists()
    except JobTimeoutError as error:
        # Told to end, it has written that it was killed: the reason is the limit.
        reason, died = str(error), not run.read_result().is_finished
    # Whatever its exit status says: it was told to end.
    if died and stop.is_set():
        reason = "ended by SIGTERM, with its sweep"
    if died:
        _write_failure(config, run, parent, reason)
    return run.read_result()


class JobTimeoutError(Exception):
    """A job exceeded its time limit and has been ended."""


def supervise(
    command: list[str],
    run: RunPaths,
    time_limit: float | None,
    watch: Callable[[], None],
    slot: Slot,
    stop: threading.Event,
) -> str:
    """Runs a command with its output in the run's log; returns how it ended, in words.

    A time limit (minutes), `stop` or an interrupt of this process ends the child, first with
    SIGTERM.

    Raises:
        JobTimeoutError: the time limit was exceeded.
    """
    deadline = time.monotonic() + time_limit * 60 if time_limit else float("inf")
    with run.log.open("ab") as log_file:  # a resumed training goes on in the same log
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            # Ctrl-C reaches this process alone, which then ends the child in order; and what the
            # child has started can be ended with it, as one group.
            start_new_session=True,
        )
        try:
            while child.poll() is None and not stop.is_set():
                if time.monotonic() > deadline:
                    _stop(child)
                    raise JobTimeoutError(f"exceeded its time limit of {time_limit:g} minutes")
                watch()
                time.sleep(_POLL_SECONDS)
        finally:
            # After a regular end too: processes that the child left behind end with it.
            _stop(child)
        watch()
    return describe_exit(child.returncode)


def describe_exit(code: int) -> str:
    """An exit code or signal in words."""
    if code >= 0:
        return f"exited with code {code} without a result"
    # Of the real-time signals only the first and the last have names.
    known = -code in {int(s) for s in signal.Signals}
    name = signal.Signals(-code).name if known else f"signal {-code}"
    # The kernel's out-of-memory killer sends it, and says so in the system's log alone.
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and everything it started."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    # What it started would outlive it where it was killed. It leads a session of its own.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _write_failure(config: Config, run: RunPaths, parent: str | None, reason: str) -> None:
    """The result of a child that could not write its own, and the end of its MLflow run."""
    # SIGTERM comes from people and batch systems; any other end is taken for the job's own fault.
    status = KILLED if reason.startswith("ended by SIGTERM") else FAILED
    run.progress.unlink(missing_ok=True)
    run.write_result(RunResult(status, reason, config.job, config.model.name))
    Mirror(config, run, parent).finish(_MIRROR_SECONDS)


def write_lost(
    config: Config,
    run: RunPaths,
    origin: Origin,
    parent: str | None,
    reason: str,
    has_result: Callable[[], bool],
) -> None:
    """The result of a job whose supervisor was lost, once its training has ended.

    Args:
        config: the job.
        run: its folder.
        origin: what it is made from.
        parent: the sweep's MLflow run.
        reason: what became of the supervisor.
        has_result: whether the training wrote a result in this launch, which then counts.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    # A training ends soon after its supervisor, for it watches that process. One that goes on for
    # all that still holds the folder, and will write a result of its own.
    with contextlib.suppress(BlockingIOError), lock_run(run, 2 * GRACE_SECONDS):
        state = run.state(config, origin)
        # Asked once the folder is ours: an orphaned training writes its result as it ends.
        if state is State.done or has_result():
            return
        if state is State.new and run.result.exists():  # of another run: the job never began
            _prepare_folder(config, run, origin, state)
        _write_failure(config, run, parent, reason)

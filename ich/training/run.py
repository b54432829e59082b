"""A training as the process that a sweep started: told to stop, and with a result in any case."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from ich.base.config import Config, ContextName, UserError, load_config
from ich.base.entry import Status
from ich.base.memory import keep_memory
from ich.base.processes import EARLIER_PROCESS_SECONDS, lock_run, watch_supervisor
from ich.base.records import FAILED, FINISHED, KILLED, FitResult, JobProgress, RunResult
from ich.base.results import RunPaths
from ich.tracking.journal import Journal
from ich.tracking.mirror import Mirror
from ich.training.checkpoint import Generations
from ich.training.fit import Terminated, fit
from ich.training.trainer import StepCallback

log = logging.getLogger("ich.train")
# What an ended training waits for MLflow; after SIGTERM, SIGKILL follows in GRACE_SECONDS.
_MIRROR_SECONDS, _MIRROR_SECONDS_KILLED = 60, 4


class ProgressFile:
    """Tells the supervising process where the training is, at most four times a second."""

    def __init__(self, run: RunPaths, epochs: int):
        self._run, self._epochs, self._written = run, epochs, 0.0

    def __call__(self, phase: str, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._written >= 0.25 or step == steps:
            self._written = now
            with contextlib.suppress(OSError):  # a full disk: it only tells
                self._run.write_progress(JobProgress(phase, epoch, self._epochs, step, steps))


class GracefulStop:
    """Handles SIGTERM: at once while a job starts; once it trains, between two steps, where its
    state is whole; not while its results are written."""

    def __init__(self, on_step: StepCallback) -> None:
        self._on_step, self._is_training, self._requested = on_step, False, False
        self.signal = signal.SIGTERM  # which it was, for the exit status

    def __call__(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        if not self._is_training:
            raise Terminated
        self._requested = True

    def on_step(self, phase: str, epoch: int, step: int, steps: int) -> None:
        """Passes a step on, and ends the training there if that was asked for."""
        # Never false again: after the last step a SIGTERM is noted and raises nothing, so that
        # weights, predictions and result are written whole.
        self._is_training = True
        self._on_step(phase, epoch, step, steps)
        if self._requested:
            raise Terminated


def train_run(run: RunPaths, parent: str | None, supervisor: int | None) -> int:
    """Trains the run in a folder and writes its result, whatever happens.

    Args:
        run: its folder, with a config.yaml.
        parent: the MLflow run of its sweep.
        supervisor: id of the process without which this one ends.

    Returns:
        The exit status.
    """
    keep_memory()
    cfg = load_config(run.config)
    # The head's epochs together are one more: they take less than one of the slice network's.
    epochs = cfg.train.epochs + (cfg.context.name is ContextName.study)
    stop = GracefulStop(ProgressFile(run, epochs))
    for number in (signal.SIGTERM, signal.SIGUSR2):  # the second comes from Slurm
        signal.signal(number, stop)
    # After the handlers are set, for it sends SIGTERM as soon as the supervisor is gone.
    if supervisor:
        watch_supervisor(supervisor)
    # A stack, so that only taking the lock is tried, and not the training under it.
    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, stop))
        try:
            stack.enter_context(lock_run(run, EARLIER_PROCESS_SECONDS))
        except BlockingIOError:
            log.error("another process trains in this folder, and did not end")
            return Status.FAILED
        # The mirror too only under the lock: it notes its MLflow run in the folder.
        return _train_and_close(cfg, run, Mirror(cfg, run, parent), stop)


def _train_and_close(cfg: Config, run: RunPaths, mirror: Mirror, stop: GracefulStop) -> int:
    result = _outcome(lambda: fit(cfg, run, Journal(run.metrics, mirror.notify), stop.on_step))
    # Before the mirror finishes: it copies what is in the folder, and ends its run by the result.
    _close(cfg, run, result)
    patience = _MIRROR_SECONDS if result.status != KILLED else _MIRROR_SECONDS_KILLED
    mirrored = mirror.finish(patience)
    status = {FINISHED: Status.DONE, KILLED: 128 + stop.signal}.get(result.status, Status.FAILED)
    if not mirrored:  # its thread is inside MLflow: leave without waiting for it
        # os._exit flushes nothing.
        logging.shutdown()
        os._exit(status)
    return status


def _outcome(training: Callable[[], FitResult]) -> RunResult:
    """A training's result, or how it ended: the table has a row for whatever it was."""
    try:
        return RunResult(FINISHED, fit=training())
    except (Terminated, KeyboardInterrupt):
        return RunResult(KILLED, "ended by SIGTERM or an interrupt")
    # A library that calls it would otherwise set the exit status: after 0, no failure is seen.
    except SystemExit as error:
        return RunResult(FAILED, f"called sys.exit({error.code!r})")
    except Exception as error:
        traceback.print_exc()
        if _is_out_of_gpu_memory(error):
            return RunResult(
                FAILED,
                f"out of GPU memory: {str(error).splitlines()[0]} Lower train.batch_size or "
                f"data.image_size, or hydra.launcher.jobs_per_gpu if jobs share the GPU.",
            )
        prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return RunResult(FAILED, f"{prefix}{' '.join(str(error).split())}")


def _is_out_of_gpu_memory(error: Exception) -> bool:
    """Whoever asked for it: torch, CUDA itself, or cuDNN, which then finds no way to compute."""
    # AcceleratorError, which newer torch raises for CUDA's own errors, is a RuntimeError.
    said = ("out of memory", "unable to find an engine", "CUDNN_STATUS_ALLOC_FAILED")
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    return by_text or isinstance(error, torch.OutOfMemoryError)


def _close(cfg: Config, run: RunPaths, result: RunResult) -> None:
    run.write_result(replace(result, job=cfg.job, model=cfg.model.name))
    run.progress.unlink(missing_ok=True)
    # Only once the result is on disk: until then, a checkpoint is all there is to go on from.
    if result.is_finished:
        Generations(run.root).drop()
        shutil.rmtree(run.study, ignore_errors=True)

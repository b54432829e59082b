"""What a supervising process and its children owe each other: signals, locks, an end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator

from ich.base.results import RunPaths

_POLL_SECONDS = 0.2
# How long whoever comes next waits for the training of a killed sweep or rerun to end.
EARLIER_PROCESS_SECONDS = 30
GRACE_SECONDS = 15  # between SIGTERM and SIGKILL; a checkpoint takes one or two


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignores further signals while children are ended: impatience must leave none behind."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_supervisor(pid: int) -> None:
    """Called by a child: asks it to stop, and then ends it, when its supervisor is gone.

    A supervisor that is killed cannot stop its children, and none may live on unseen.
    """

    def follow() -> None:
        while os.getppid() == pid:  # an orphan is given another parent
            time.sleep(_POLL_SECONDS)
        # As a sweep would: a training writes its checkpoint first.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True, name="watch supervisor").start()


@contextlib.contextmanager
def lock_run(run: RunPaths, seconds: float) -> Iterator[None]:
    """Keeps a run's folder for this process.

    The last process of a killed sweep may need some seconds to end.

    Raises:
        BlockingIOError: another process trains there, and has not ended in time.
    """
    deadline = time.monotonic() + seconds
    with run.lock.open("w") as handle:
        # Asked again and again, for flock itself waits without a limit.
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
        yield

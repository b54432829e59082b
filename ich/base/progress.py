"""How work says how far it is: what a terminal or a log shows, and nothing else depends on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

# Called first with nothing done, so that work whose first part takes long is known by its name.
ProgressCallback = Callable[[int, int], None]  # (done, in all)
StageCallback = Callable[[str, int, int], None]  # (what is done, done, in all)


def stage(report: StageCallback | None, what: str) -> ProgressCallback | None:
    """The progress of one kind of work among several; None if nobody asks."""
    return partial(report, what) if report else None


class Pace:
    """How long work will take yet, by what was done of it since it is watched.

    Args:
        fraction: of the work that was done before: by another process, or before a pause.
        clock: seconds, from any moment.
    """

    def __init__(self, fraction: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._clock, self._began = fraction, clock, clock()

    @property
    def seconds(self) -> float:
        """Since it is watched."""
        return self._clock() - self._began

    def seconds_left(self, fraction: float) -> float | None:
        """With so much of the work done; None before anything was done while it is watched."""
        gained = fraction - self._first
        return self.seconds * (1 - fraction) / gained if gained > 0 else None


@contextmanager
def repeating(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls a function in a thread, every so many seconds, until this is left.

    A thread, for what is waited for may tell nothing for minutes.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            function()

    # A daemon, so that one stuck in a file system's call keeps no interrupted command alive.
    thread = threading.Thread(target=repeat, daemon=True, name=f"repeat {function.__qualname__}")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

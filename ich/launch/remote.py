"""What a launching process and its jobs in other processes, perhaps on other machines, share.

That is the sweep's folder. There the jobs' progress is followed, and there an interrupt is written
down for jobs that no signal of the launching process reaches.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ich.base.config import Config
from ich.base.processes import GRACE_SECONDS, lock_run, signals_ignored
from ich.base.progress import repeating
from ich.base.results import RunPaths, SweepPaths
from ich.base.terminal import Board

_POLL_SECONDS = 0.5


class Interruption(threading.Event):
    """Set when the launch was interrupted, which a job elsewhere learns from the sweep's folder."""

    def __init__(self, sweep: SweepPaths):
        super().__init__()
        self._sweep = sweep

    def is_set(self) -> bool:
        return self._sweep.is_interrupted()


@contextlib.contextmanager
def ending_jobs(runs: Sequence[RunPaths], sweep: SweepPaths) -> Iterator[None]:
    """Ends the jobs of a launch, wherever they run, when an exception ends the launch."""
    try:
        yield
    except BaseException:
        sweep.interrupt()
        # One deadline for all: they end side by side.
        end = time.monotonic() + 2 * GRACE_SECONDS
        with signals_ignored():
            # A job that never began has no lock, and maybe no folder to make one in.
            for run in (run for run in runs if run.lock.exists()):
                # Held by its training until that has ended.
                with contextlib.suppress(BlockingIOError), lock_run(run, end - time.monotonic()):
                    pass
        raise


class Follower:
    """Shows at the launching terminal what jobs elsewhere write into the sweep's folder."""

    def __init__(self, configs: Sequence[Config], sweep: SweepPaths, board: Board):
        self._configs, self._sweep, self._board = configs, sweep, board
        self._known = {c.job: self._files(c) for c in configs}
        self._first = dict(self._known)
        self._watches: dict[str, Callable[[], None]] = {}

    def _files(self, config: Config) -> tuple[object, object]:
        run = self._sweep.run(config.job)
        return _version(run.progress), _version(run.result)

    def has_result(self, config: Config) -> bool:
        """Whether a job's result is one of this launch."""
        result = self._files(config)[1]
        return result not in (None, self._first[config.job][1])

    def look(self) -> None:
        """Shows the news since the last look."""
        for config in self._configs:
            run, job = self._sweep.run(config.job), config.job
            before, now = self._known[job], self._files(config)
            self._known[job] = now
            # New or written anew since: what an earlier launch left behind is no news.
            if now[0] not in (None, before[0]) and job not in self._watches:
                self._watches[job] = self._board.started(config, run, "")
            if job in self._watches:
                self._watches[job]()
            if now[1] not in (None, before[1]):
                self._watches.pop(job, None)
                self._board.ended(config, run.read_result(), before=False)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Looks again and again, in a thread."""

        def look() -> None:
            with contextlib.suppress(OSError):  # a network file system's bad moment
                self.look()

        try:
            with repeating(look, _POLL_SECONDS):
                yield
        finally:
            look()


def _version(path: Path) -> tuple[int, int] | None:
    """Changes whenever a file is written anew; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    # Files are replaced and not written over, so a new one has another inode even where the clock
    # of the file system is too coarse to tell them apart.
    return status.st_mtime_ns, status.st_ino

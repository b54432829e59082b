"""Worker processes for decoding and simulating: results as they come, nothing left on an error.

`run_parallel` is what callers use. `WorkerPool` starts the processes and says what it guarantees of
them; below it stands what these guarantees take.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

# No numpy here: `_begin` is to be done before it is imported.

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 512  # processes, whatever is asked for
_AHEAD = 2  # jobs given to each worker: one it does, one it need not wait for


def available_cores() -> int:
    """Cores this process may use: a batch system or a container may have set fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(wanted: int | None, units: int, units_per_start: int) -> int:
    """How many processes so much work is worth: as wanted, else up to one per core.

    Args:
        wanted: by the user; None if the user leaves it to us.
        units: of work, in all.
        units_per_start: done by a process in the time that another takes to start.
    """
    # Rounded up: work that is less than a start costs is done by this process alone.
    return wanted or min(available_cores(), -(-units // units_per_start))


def run_parallel(
    function: Callable[[Item], Result], jobs: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yields function(job) of every job in the order of completion.

    This process works too: it starts at once, while a new one first imports for a good part of a
    second. Jobs are taken from the iterator when they are due, so there may be any number of them.

    Args:
        function: a module's own function, so that a new process can import it; a light module
            starts sooner.
        jobs: what can be pickled.
        workers: processes, this one included.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    due, others = iter(jobs), min(workers, _MOST) - 1
    with WorkerPool(others) as pool:
        # One each at first: the executor starts a process for each job that finds none idle.
        running = pool.submit(function, islice(due, others))
        while running:
            own = [function(job) for job in islice(due, 1)]
            # With a result of its own to give it only looks; without one it has to wait.
            done, running = wait(running, 0 if own else None, FIRST_COMPLETED)
            running |= pool.submit(function, islice(due, _AHEAD * others - len(running)))
            # After the others have work again: the caller may take its time with a result.
            yield from own
            for future in done:
                yield future.result()


class WorkerPool:
    """Processes that start clean and that nothing leaves behind.

    The executor of the standard library starts processes while jobs are submitted, from whatever
    state this process is in then. What is guaranteed instead:

    - A process imports the module of its job, and no more. It would import the caller's `__main__`
      first: seconds where that imports torch, and a script without a guard would run once more.
      `__main__` is therefore an empty module while processes start.
    - It does linear algebra on one thread: with several each, processes wait for one another's
      cores.
    - No exception comes between the start of a process and the executor's noting it. It would
      leave a process that nobody tells to end, and for which Python waits for ever at its own end.
      SIGINT and SIGTERM, which raise one, are handled after the submission.
    - Processes end with the pool, and at once when this process is killed: each watches for that.

    They are spawned, not forked: this process may hold torch's and a progress bar's threads.
    """

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(processes, context, initializer=_begin)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def submit(
        self, function: Callable[[Item], Result], jobs: Iterable[Item]
    ) -> set[Future[Result]]:
        """Gives jobs to the processes; starts as many of these as are needed."""
        with _signals_held(), _empty_main():
            return {self._executor.submit(function, job) for job in jobs}


def _begin() -> None:
    """What a worker process does before its first job, and before it imports numpy for that."""
    # Read once, when the libraries are loaded; set later, it changes nothing.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        # A killed parent closes no queue: its workers would wait for jobs for ever.
        wait_for([parent.sentinel])
        # Not sys.exit, which would end this thread alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until this is left, in the main thread, where Python handles them."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread set handlers, and runs them nowhere else.
        yield
        return
    # Handlers and no signal mask: the kernel hands a masked signal to another thread, and Python
    # runs its handler in this one all the same. Others than Python's handlers stay: what is ignored
    # is so in the new process, too.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: h for number, h in before.items() if callable(h)}
    caught: list[int] = []
    holding = True

    def hold(number: int, frame: types.FrameType | None) -> None:
        if holding:
            caught.append(number)
        else:  # between two of the lines that put the handlers back
            handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def _empty_main() -> Iterator[None]:
    """Hides the caller's `__main__` from `multiprocessing.spawn`, which looks for its file."""
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module

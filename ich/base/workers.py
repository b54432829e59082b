"""Worker processes for decoding and simulating: results as they come, nothing left on an error."""

from __future__ import annotations

import ctypes
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

Job = TypeVar("Job")
Result = TypeVar("Result")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST = 512  # processes, whatever is asked for
_AHEAD = 2  # jobs given to each worker: one it does, one it need not wait for


def available_cores() -> int:
    """Cores this process may use: a batch system or a container may have set fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping; half of all there is where the system
    is no Linux and does not say."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def return_memory() -> None:
    """Gives freed memory back to the system, which the allocators of C and Arrow would keep.

    A preparation goes through stages that each need hundreds of megabytes for a moment, in pieces
    of other sizes; without this their peaks add up.
    """
    if (arrow := sys.modules.get("pyarrow")) is not None:
        arrow.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; musl has none
        if trim is not None:
            trim(0)


def keep_memory() -> None:
    """Lets the C allocator keep large blocks that are freed, for the rest of this process.

    glibc gives them back at once, and every step of a training has its pages zeroed and mapped
    again: 7 percent of a step of MobileNetV2 on a CPU, and a third of what a batch takes to make.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                set_option(option, 2**30)


def run_parallel(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
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
    workers = min(workers, _MOST)
    due = iter(jobs)
    # Spawned, not forked: the parent may hold torch's and a progress bar's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers - 1, mp_context=context, initializer=_end_with_parent)
    running: set[Future[Result]] = set()

    def give(each: int) -> None:
        # Submitting is what starts the processes.
        with _undisturbed(), _without_main(), _one_thread_each():
            for job in islice(due, each * (workers - 1) - len(running)):
                running.add(pool.submit(function, job))

    try:
        give(1)
        while running:
            own = [function(job) for job in islice(due, 1)]
            done, running = wait(running, 0 if own else None, FIRST_COMPLETED)
            give(_AHEAD)
            yield from own
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker process when its parent is killed; else it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM wait until this is left, in the main thread, where Python handles them.

    An exception between the start of a process and the pool's noting it leaves a process that
    nobody tells to end, and for which Python would wait for ever at its own end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Others than Python's stay: what is ignored is so in the new process, too.
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: h for number, h in found.items() if callable(h)}
    caught: list[int] = []
    waiting = True

    def wait_for_it(number: int, frame: types.FrameType | None) -> None:
        if waiting:
            caught.append(number)
        else:  # between two of the lines that put the handlers back
            handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, wait_for_it)
        yield
    finally:
        waiting = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started here do linear algebra on one thread: with several each, they would wait
    for one another's cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Keeps spawned processes from importing the caller's `__main__`: ours do not need it, it takes
    seconds where it imports torch, and a script may lack the guard that keeps it from running."""
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module

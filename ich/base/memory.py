"""What is done with memory that is not needed: by the C allocator, and by Python's collector.

glibc decides by an allocation's size alone. It gives blocks above 128 KB back to the system at
once, which costs a training its page faults; smaller ones it keeps, which adds up the peaks of a
preparation's stages.

While packages such as torch are imported, Python's collector looks again and again through a
million objects of which none can be garbage, and at the process's end it takes them apart one by
one: of the 6.0 s of processor time that a training of 1.5 s took on a Xeon, 2.4.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import NoReturn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# More than any step of a slice of 512 or 1024 pixels takes, and below the 32 MB up to which freeing
# a block moves glibc's threshold.
_SLICE_BYTES = 24 << 20


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping; half of all there is where the system
    is no Linux and does not say."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in file)
        # Not MemFree, which counts what the page cache would give back as taken.
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


@cache
def keep_slice_memory() -> None:
    """Keeps freed memory in this process for the next slice; larger blocks are still given back.

    glibc gives blocks of a slice's size back to the system each time, and faulting their pages in
    again took longer than decoding. Freeing one large block, never touched, raises its threshold
    (mallopt(3), M_MMAP_THRESHOLD); other allocators take no notice.
    """
    # bytes and not bytearray: calloc leaves its pages untouched.
    bytes(_SLICE_BYTES)


_status: list[int] = []  # given to `leave`


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports large packages with the collector at rest, which then leaves what they made alone."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def leave(status: int) -> NoReturn:
    """Ends this process as `sys.exit` does, threads and exit handlers included, and then leaves its
    memory to the system."""
    _status.append(status)
    sys.exit(status)


# Exit handlers are called in reverse: registered when a command begins, this one is the last.
@atexit.register
def _end() -> None:
    gc.unfreeze()  # for an end by an exception; extension modules would report leaks
    if _status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed file
                stream.flush()
        os._exit(_status[-1])

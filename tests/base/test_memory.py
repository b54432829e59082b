"""Python's collector at rest: while packages are imported, and when a process ends."""

from __future__ import annotations

import gc
import subprocess
import sys

from ich.base.memory import importing

LEAVING = """
from ich.base.memory import leave
import atexit, threading, time
atexit.register(print, "handled", end="")
threading.Thread(target=lambda: (time.sleep(0.2), print("threaded", end=" "))).start()
print("written", end=" ")
leave(3)
"""


def test_who_leaves_waits_for_threads_handlers_and_output() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "written threaded handled", "")


def test_the_collector_rests_during_imports_alone() -> None:
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()

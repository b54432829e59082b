"""NVIDIA's Multi-Process Service (MPS) for the jobs that share a GPU: started for a sweep, and gone
with it.

Without MPS, processes take turns on a GPU; with it their kernels run side by side. Its daemon is
kept by a process of ours (`python -m ich.launch.mps`), which watches the sweep and stops the daemon
when that ends, however it ends. What the daemon is told, and that a GPU is named by its UUID, is
from nvidia-cuda-mps-control(1) and NVIDIA's "Multi-Process Service". None of it has met a real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from ich.base.processes import GRACE_SECONDS, signals_ignored

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.2
_START_SECONDS, _ANSWER_SECONDS = 10, 10
# A killed sweep's trainings have GRACE_SECONDS for their checkpoint, and need the GPU until then.
_QUIT_SECONDS = GRACE_SECONDS + 5
_SIGNAL_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextlib.contextmanager
def multi_process_service(gpus: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    """Yields the environment by which processes find a daemon, and in words which that is.

    Args:
        gpus: their UUIDs: by numbers, a GPU of the daemon's is another than one of its clients'.
    """
    if not shutil.which(_CONTROL):
        yield {}, f"without MPS ({_CONTROL} is not installed)"
    elif _obeys("get_server_list", os.environ):
        yield {}, "with the MPS daemon that was running already"
    else:
        command = [sys.executable, "-m", "ich.launch.mps", str(os.getpid()), ",".join(gpus)]
        # In a session of its own: Ctrl-C is for the trainings, which need the daemon until they
        # have ended.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as keeper:
            try:
                assert keeper.stdout is not None
                begun = json.loads(keeper.stdout.readline() or '{"why": "its keeper died"}')
                if "why" in begun:
                    yield {}, f"without MPS, which did not start ({begun['why']})"
                else:
                    yield begun, "with an MPS daemon of this sweep's own"
            finally:
                with signals_ignored():
                    keeper.terminate()
                    keeper.wait()


def _obeys(command: str, environment: Mapping[str, str], seconds: float = _ANSWER_SECONDS) -> bool:
    """Whether there is a daemon, which does what it is told."""
    try:
        done = subprocess.run(
            [_CONTROL],
            input=f"{command}\n",
            env={**environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            text=True,
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return "Cannot find MPS" not in done.stdout


def main(sweep: int, gpus: str) -> None:
    """Keeps a daemon until its sweep is gone or says so by SIGTERM; prints where it is found, or
    why it did not start.

    Args:
        sweep: id of the process without which this one ends.
        gpus: UUIDs, joined by commas.
    """
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    # Not in the sweep's folder: the daemon's sockets lie there, whose paths have at most 107 bytes,
    # and which not every network file system takes.
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ich-mps-"))
        where = {_PIPES: folder, _LOGS: folder}
        environment = {**os.environ, **where, _VISIBLE: gpus}
        said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        daemon = subprocess.Popen(
            [_CONTROL, "-f"],  # in the foreground: as a child it can be waited for, and killed
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            begin = time.monotonic()
            while not (ready := _obeys("get_server_list", environment)):
                late = time.monotonic() > begin + _START_SECONDS
                if late or daemon.poll() is not None or told.wait(_POLL_SECONDS):
                    break
            said.seek(0)
            lines = said.read().strip().splitlines()
            why = {"why": lines[-1] if lines else "it says nothing"}
            print(json.dumps(where if ready else why), flush=True)
            # Of the three that it waits for, none sends a signal that cannot be missed.
            while ready and daemon.poll() is None and os.getppid() == sweep:
                if told.wait(_POLL_SECONDS):
                    break
        finally:
            _stop(daemon, environment)


def _end_with_parent() -> None:
    """Of the daemon, which is no program of ours: the kernel tells it if its keeper is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENT, signal.SIGTERM)


def _stop(daemon: subprocess.Popen[bytes], environment: Mapping[str, str]) -> None:
    """Ends a daemon and its servers, which wait for processes that still compute."""
    if daemon.poll() is None and _obeys(f"quit -t {_QUIT_SECONDS}", environment, _QUIT_SECONDS + 5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(_QUIT_SECONDS + 5)
    with contextlib.suppress(ProcessLookupError):  # servers too: it leads a session
        os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

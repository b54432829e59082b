"""The parts of the benchmark, and how they are measured together."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from ich.base.entry import one_line
from ich.base.memory import keep_memory
from ich.base.processes import watch_supervisor
from ich.benchmarks.commands import bench_demo, bench_evaluate, bench_tests
from ich.benchmarks.inputs import bench_input, bench_prepare
from ich.benchmarks.jobs import bench_busy, bench_memory, bench_slots, bench_start
from ich.benchmarks.measure import Part, PartResult
from ich.benchmarks.predictions import bench_intervals, bench_predict
from ich.benchmarks.settings import PARTS, Settings
from ich.benchmarks.steps import bench_step, bench_sweep
from ich.benchmarks.trainings import bench_report
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import PhantomSpec

_FUNCTIONS: dict[str, Part] = {
    "tests": bench_tests,
    "demo": bench_demo,
    "prepare": bench_prepare,
    "step": bench_step,
    "input": bench_input,
    "slots": bench_slots,
    "sweep": bench_sweep,
    "predict": bench_predict,
    "evaluate": bench_evaluate,
    "report": bench_report,
    "start": bench_start,
    "memory": bench_memory,
    "busy": bench_busy,
    "intervals": bench_intervals,
}
# Of the time that is left, what a part takes beside those after it. An estimate for eight networks
# at 224 px on an H100, in half minutes; whatever a part leaves is the next ones'.
_WEIGHTS = {"tests": 1.5, "demo": 2, "step": 7, "input": 1.5, "slots": 1.5, "report": 3}
_STARTING_SECONDS = 10  # of a process, about, with all that it imports
_ENDING_SECONDS = 30  # for a process that has sent all that it had to


def measure_parts(
    names: Collection[str], settings: Settings, save: Callable[[PartResult], object]
) -> PartResult:
    """Measures them on a phantom made for it, each in a process of its own.

    Args:
        names: of the parts.
        settings: with the time by which all of them should have ended.
        save: called with all that is known after each result; each ratio is on stderr too.
    """
    measured = PartResult()
    parts, took = [name for name in PARTS if name in names], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = PhantomSpec(patients=settings.patients, seed=0, size=512)
        write_phantom(folder / "phantom", spec)
        for number, name in enumerate(parts):
            begin = time.monotonic()
            own = _share(settings, parts[number:])
            try:
                if own.limit - begin < _STARTING_SECONDS:
                    raise PartError("there was no time left for it")
                for result in in_own_process(_FUNCTIONS[name], own, folder):
                    measured = measured.joined(result)
                    save(measured)
                    for what, row in result.rows.items():  # a long run is watched
                        print(f"{what}: {row.ratio:.3g}", file=sys.stderr, flush=True)
            except Exception as error:
                failure = PartResult(failures=[f"{name}: {one_line(error)}"])
                measured = measured.joined(failure)
                save(measured)
            took.append(f"{name} {time.monotonic() - begin:.0f} s")
    if settings.until < float("inf"):
        note = f"Of the time that was given, parts took: {', '.join(took)}."
        measured = measured.joined(PartResult(notes=[note]))
    return measured


def _share(settings: Settings, parts: list[str]) -> Settings:
    """The settings of the first of some parts, with its share of the time that is left."""
    weights = [_WEIGHTS.get(name, 1) for name in parts]
    until = time.monotonic() + settings.seconds_left * weights[0] / sum(weights)
    # One that does not end in time may take a quarter of what the others have.
    return replace(settings, until=until, limit=0.75 * until + 0.25 * settings.until)


class PartError(Exception):
    """A part did not come to its end."""


def in_own_process(part: Part, settings: Settings, folder: Path) -> Iterator[PartResult]:
    """What a part yields. A GPU that has failed once fails for the rest of its process, and what
    hangs can be ended.

    Raises:
        PartError: it failed, died or took too long.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, os.getpid(), part, settings, folder))
    process.start()
    sending.close()  # so that its death is the end of what can be received
    try:
        while True:
            left = settings.limit - time.monotonic()
            if not receiving.poll(None if left == float("inf") else max(left, 0)):
                raise PartError("it took too long, and was ended")
            said = receiving.recv()
            if said is None:
                process.join(_ENDING_SECONDS)
                return
            if isinstance(said, str):
                raise PartError(said)
            yield said
    except EOFError:
        process.join()
        raise PartError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(
    connection: Connection, supervisor: int, part: Part, settings: Settings, folder: Path
) -> None:
    """Measures a part, and sends its results, and how it ended."""
    watch_supervisor(supervisor)
    # A spawned process would spawn all of its own, and those of others' loaders are forked.
    multiprocessing.set_start_method(None, force=True)
    keep_memory()  # as every training does
    try:
        for result in part(settings, folder):
            connection.send(result)
        connection.send(None)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {one_line(error)}")

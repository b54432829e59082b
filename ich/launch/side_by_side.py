"""Whether trainings that share a GPU do more together than one alone, by a short measurement.

Processes are started as trainings would be. Each takes real steps on made-up slices, of one kind of
job after another: first one of them alone, then two at once, four, eight.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, NamedTuple

from ich.base.config import Config, saved_config, to_dict
from ich.base.memory import keep_memory
from ich.base.processes import watch_supervisor
from ich.base.records import ComputeMode

if TYPE_CHECKING:
    from ich.training.trainer import Trainer

AT_ONCE = (1, 2, 4, 8)
# What twice as many jobs must be faster by: each needs memory and cores, and may end the others.
_GAIN = 1.1
_SECONDS = 2.0  # of steps, at least, for each kind and number
_STEPS = 20  # after which the host waits once, as at the end of an epoch


class Kind(NamedTuple):
    """Jobs that compute alike: one of them, in its mode, and how many there are."""

    config: Config
    mode: ComputeMode
    jobs: int


def pick_number(seconds: Mapping[int, float]) -> int:
    """How many jobs share a GPU: more, as long as that is worth it.

    Args:
        seconds: for the same images, by how many jobs at once.
    """
    best = 1
    for number in sorted(seconds):
        if seconds[best] >= _GAIN * seconds[number]:
            best = number
    return best


def measure(
    kinds: Sequence[Kind],
    most: int,
    environment: Mapping[str, str],
    report: Callable[[int, int], None] = lambda *_: None,
) -> tuple[dict[int, float], str]:
    """Seconds for an image of each job, by how many jobs compute at once; and the last words of
    processes that died, which are left out.

    A compiled network is measured as it is: to compile it takes longer than all of this.

    Args:
        kinds: the jobs.
        most: of `AT_ONCE`, what the GPU's memory holds.
        environment: of the processes, beside this one's own.
        report: progress, in kinds.
    """
    seconds = {n: 0.0 for n in AT_ONCE if n <= most}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        _started(max(seconds), environment, said) as processes,
    ):
        for number, (config, mode, jobs) in enumerate(kinds):
            report(number, len(kinds))
            job = to_dict(config), asdict(mode) | {"compiled": False}
            alive = [p for p, answer in _tell(processes, job) if answer is not None]
            for n in [*seconds]:
                rates = [rate for _, rate in _tell(alive[:n], _SECONDS) if rate is not None]
                if len(rates) == n:
                    seconds[n] += jobs / sum(rates)
                else:
                    del seconds[n]
            processes = alive
        report(len(kinds), len(kinds))
        said.seek(0)
        lines = said.read().strip().splitlines()
    # Of others' words none matter.
    return seconds, lines[-1] if lines and max(seconds, default=0) * 2 <= most else ""


@contextlib.contextmanager
def _started(
    number: int, environment: Mapping[str, str], said: IO[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "ich.launch.side_by_side", str(os.getpid())]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(number):
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # before it is waited for
            processes.append(process)
        yield processes


def _tell(
    processes: Sequence[subprocess.Popen[str]], order: object
) -> list[tuple[subprocess.Popen[str], float | None]]:
    """Gives all an order, and waits for their answers; None of one that died."""
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            # Past Python's buffer, which would be written once more to one that died.
            os.write(process.stdin.fileno(), f"{json.dumps(order)}\n".encode())
    answers = [p.stdout.readline() if p.stdout else "" for p in processes]
    return [(p, float(a) if a else None) for p, a in zip(processes, answers, strict=True)]


def main(supervisor: int) -> None:
    """Reads orders from standard input, each a line of JSON: a job to prepare, or seconds for which
    to take its steps. Answers each with a number: the latter with images per second.

    Args:
        supervisor: id of the process without which this one ends.
    """
    watch_supervisor(supervisor)
    keep_memory()
    trainer = None
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, float):
            assert trainer is not None
            answer = _images_per_s(trainer, order)
        else:
            del trainer  # its memory is the next one's
            trainer = _trainer(*order)
            answer = trainer.time_epoch()  # which allocates and picks algorithms
        print(answer, flush=True)


def _trainer(values: dict[str, object], of_mode: dict[str, object]) -> Trainer:
    import torch

    from ich.training.devices import pick_device
    from ich.training.timing import random_dataset, with_random_weights
    from ich.training.trainer import Trainer

    config, mode = saved_config(values, "a job to measure"), ComputeMode.from_json(of_mode)
    assert mode is not None
    device = pick_device(config.train.device)
    steps = 1
    if device.type == "cuda":
        steps = _STEPS
        torch.cuda.empty_cache()
    return Trainer.build(with_random_weights(config), random_dataset(config, steps), device, mode)


def _images_per_s(trainer: Trainer, seconds: float) -> float:
    begin, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        trainer.time_epoch()
        images += len(trainer.train_loader.split.row)
    return images / passed


if __name__ == "__main__":
    main(int(sys.argv[1]))

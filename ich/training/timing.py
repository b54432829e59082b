"""What a training computes in: precision and memory layout, chosen per network by a short timing.

bfloat16 is several times as fast for some networks on some processors and slower for others; only
a few real steps tell. They are timed once per sweep, before its jobs start and in a process of its
own (`python -m ich.training.timing`), and the choice is written down: a resumed or repeated run
computes as it began. The layout is channels_last, which at batch 32 was never slower for one of the
eight networks; NCHW is what `ich.bench` compares with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ich.base.config import Config, Device, Precision, plain, typed
from ich.base.provenance import processor
from ich.base.workers import keep_memory
from ich.training.mode import CHANNELS_LAST, Mode, fastest, kind

log = logging.getLogger(__name__)
_ROUNDS = 3


def choose(configs: Sequence[Config]) -> Iterator[tuple[str, dict[str, str]]]:
    """Times each kind among some jobs in a process of its own; yields kind and mode as they come.

    A GPU's memory is free again when it ends, and the random state of this process is untouched.
    What cannot be timed is left out: its job decides for itself.
    """
    command = [sys.executable, "-m", "ich.training.timing"]
    text = json.dumps([plain(config) for config in configs])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for give in (lambda: child.stdin.write(text), child.stdin.close):
                with contextlib.suppress(BrokenPipeError):  # it died, and says no more
                    give()
            for line in child.stdout:
                found = json.loads(line)
                yield found["kind"], found["mode"]
        finally:
            child.kill()


def resolve(config: Config, recorded: dict[str, str] | None) -> Mode:
    """The mode of a job that is about to train here.

    Args:
        config: the job.
        recorded: what was chosen for it, as a dict of `Mode`; used if it was for this processor.
    """
    here = processor(config.train.device is not Device.cpu)
    if config.train.precision is not Precision.auto:
        return Mode(config.train.precision.value, CHANNELS_LAST, here)
    if recorded and recorded["processor"] == here:
        return Mode(**recorded)
    return fastest(time_modes(config), here)


def time_modes(config: Config, rounds: int = _ROUNDS) -> dict[tuple[str, str], float]:
    """Seconds per image of a training step, by (precision, layout), timed alternately: of all that
    `auto` may choose from, or of what the config asks for.

    The steps are real ones, on made-up slices and random weights; the first is not counted.
    """
    from ich.training.devices import pick_device
    from ich.training.trainer import Trainer, made_up_dataset

    config = replace(config, model=replace(config.model, pretrained=False, weights=None))
    device, dataset = pick_device(config.train.device), made_up_dataset(config)
    wanted = config.train.precision
    precisions = [Precision.fp32, Precision.bf16] if wanted is Precision.auto else [wanted]
    candidates = [(p.value, CHANNELS_LAST) for p in precisions]
    trainers = {c: Trainer.build(config, dataset, device, Mode(*c)) for c in candidates}
    best = dict.fromkeys(candidates, float("inf"))
    for round_ in range(rounds + 1):
        for candidate, trainer in trainers.items():
            seconds = trainer.time_step()
            if round_ > 0:
                best[candidate] = min(best[candidate], seconds / config.train.batch_size)
    return best


def main() -> None:
    """Reads jobs from standard input and writes a line for each kind of them."""
    keep_memory()  # as the trainings do
    configs: list[dict[str, Any]] = json.load(sys.stdin)
    for values in configs:
        config = typed(values)
        mode = resolve(config, None)
        print(json.dumps({"kind": kind(config), "mode": asdict(mode)}), flush=True)


if __name__ == "__main__":
    main()

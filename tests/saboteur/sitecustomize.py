"""Python runs this file at its start where the folder is on PYTHONPATH: faults for trainings.

SABOTAGE is JSON: job -> [what, at which training step of its process], or ["slow", seconds] for
every step. Nothing of it is known to `ich`: the loss that a training calls at every step is
replaced from outside.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def strike(what: str, at: float, loss: object) -> object:
    import torch

    if what == "raise":
        raise RuntimeError("a bug in the training")
    if what.startswith("exit"):
        sys.exit(int(what[4:]))
    if what == "nan":
        return loss * float("nan")  # type: ignore[operator]
    if what == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worst kind
        time.sleep(3600)
    if what == "slow":
        time.sleep(at)
        return loss
    os.kill(os.getpid(), getattr(signal, what))
    return loss


job = Path(sys.orig_argv[3]).name if "ich.train" in sys.orig_argv else ""
plan = json.loads(os.environ.get("SABOTAGE", "{}"))
if job in plan:
    from ich.training import losses

    what, at = plan[job]
    build, count = losses.build_loss, 0

    def build_loss(*args: object) -> object:
        whole = build(*args)  # type: ignore[arg-type]

        def call(logits: object, target: object) -> object:
            global count
            count += 1
            value = whole(logits, target)  # type: ignore[operator]
            return strike(what, at, value) if count == at or what == "slow" else value

        return call

    losses.build_loss = build_loss  # type: ignore[assignment]

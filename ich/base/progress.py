"""How work says how far it is: what a terminal shows, and nothing else depends on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

ProgressCallback = Callable[[int, int], None]  # (done, in all)
StageCallback = Callable[[str, int, int], None]  # (what is done, done, in all)


def stage(report: StageCallback | None, what: str) -> ProgressCallback | None:
    """The progress of one kind of work among several; None if nobody asks."""
    return partial(report, what) if report else None

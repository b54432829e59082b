"""What commands have in common: mistakes in one paragraph, signals, and the exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException

from ich.config import UserError, register


@contextmanager
def one_paragraph() -> Iterator[None]:
    """Turns a user's mistake, or a file that cannot be used, into text without a traceback."""
    try:
        yield
    except UserError as error:
        raise CompactHydraException(f"ich: {error}") from None
    except OSError as error:
        raise CompactHydraException(f"ich: a folder or file cannot be used: {error}") from None


def run(command: Callable[[], object]) -> None:
    """Runs a command that composes one config with Hydra: exit status 0, 1 after a mistake, 130 or
    143 after Ctrl-C or SIGTERM."""
    register()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)


def status(command: Callable[[], int]) -> int:
    """The exit status of a command without Hydra: its own, else as `run` has it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with one_paragraph():
            return command()
    except CompactHydraException as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

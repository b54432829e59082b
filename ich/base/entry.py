"""What commands have in common: mistakes in one paragraph, signals, and the exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException

from ich.base.config import UserError, register_schemas
from ich.base.terminal import printable

_received: list[int] = []  # signals that ended this process


def end_on_signals() -> None:
    """SIGTERM ends this process as Ctrl-C does, by an exception, so that whatever it started is
    ended and nothing half is left."""

    def end(number: int, _: object) -> None:
        _received.append(number)
        # As a shell has it: 128 and the signal.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it
        signal.signal(signal.SIGINT, end)


@contextmanager
def without_traceback() -> Iterator[None]:
    """Turns a user's mistake, or a file that cannot be used, into text without a traceback."""
    try:
        yield
    except Exception as error:
        if _received:  # an extension module turns what interrupts its import into an ImportError
            sys.exit(128 + _received[0])
        if not isinstance(error, UserError | OSError):
            raise
        what = "" if isinstance(error, UserError) else "a folder or file cannot be used: "
        # The one error that Hydra prints as its text alone; the exit status is then 1.
        raise CompactHydraException(printable(f"ich: {what}{error}")) from None


def run_hydra(command: Callable[[], object]) -> None:
    """Runs a command that composes one config with Hydra: exit status 0, 1 after a mistake, 130 or
    143 after Ctrl-C or SIGTERM."""
    register_schemas()
    end_on_signals()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)


def exit_status(command: Callable[[], int]) -> int:
    """The exit status of a command without Hydra: its own, else as `run_hydra` has it."""
    end_on_signals()
    try:
        # Commands without Hydra share its error, so that a mistake looks the same everywhere.
        with without_traceback():
            return command()
    except CompactHydraException as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

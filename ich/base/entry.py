"""What commands have in common: options, signals, mistakes in one paragraph, and exit statuses.

`ich --help` imports this: whatever takes longer than Python's own modules is left to the functions.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

# A notebook's kernel hands down a backend that only its own Python has, and with it matplotlib
# cannot even be imported. Ours draws into files. Here, for every command imports this before
# matplotlib, and hands the environment down to its own processes.
os.environ["MPLBACKEND"] = "agg"


class Status(IntEnum):
    """Exit statuses, the same of every command."""

    DONE = 0
    FAILED = 1  # a job failed, or a rerun differs; after a bug of ours, Python has the same
    MISTAKE = 2  # the user's, or a folder or file that cannot be used; argparse has the same
    LEFT_OUT = 3  # predictions are written, and some files had none
    # As a shell has it: 128 and the signal.
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


_LONGEST = 3000  # characters of an error's text
_received: list[int] = []  # signals that ended this process


def end_on_signals() -> None:
    """SIGTERM ends this process as Ctrl-C does, by an exception, so that whatever it started is
    ended and nothing half is left."""

    def end(number: int, _: object) -> None:
        _received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it
        signal.signal(signal.SIGINT, end)


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal ended the command, whatever has become of the exception it raised."""
    # An extension module turns what interrupts its import into an ImportError.
    ended = (Status.INTERRUPTED, Status.TERMINATED)
    by_code = isinstance(error, SystemExit) and error.code in ended
    return by_code or isinstance(error, KeyboardInterrupt) or bool(_received)


def printable(text: str) -> str:
    """One line of text that moves no cursor and sets no colour, whatever a file is called.

    What came from a file, a name or an error goes through this before it is printed.
    """
    # The escape character is not printable, nor is a line break, a half of a pair, or what turns
    # the direction of writing: each is shown as Python would write it.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def masked(text: str) -> str:
    """A text without the user and password that its URIs may hold."""
    return re.sub(r"://[^/\s@]+@", "://***@", text)


# In quotes a path may hold blanks. What follows a letter, a dot, a colon or a slash is none of this
# machine: `a/b`, `./a`, `http://host`; but for what a database's or a file's URI names.
_PATH = re.compile(
    r"(?:(?<![\w.:/])|(?<=sqlite:///)|(?<=file://))"
    r"~?(?:/[^\s/'\",;:=]+(?: [^\s/'\",;:=]+)*)+/([^\s/'\",;:=]+)"
)


def without_paths(text: str) -> str:
    """Of each absolute path its last part: the rest tells of the machine, and of its user."""
    return _PATH.sub(r"\1", text)


def public_command(command: str) -> str:
    """A command of ours as anybody may see it: paths within this folder are relative, of others the
    last part stands, and URIs have no passwords."""
    text = without_paths(masked(command).replace(f"{Path.cwd()}/", ""))
    # A path of one part is one too where a value begins.
    return re.sub(r"(?<=[=,\['\"])~?/(?=[^\s/'\",\]])", "", text)


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line and without passwords; whole, for its cause comes last."""
    # SQLAlchemy's quote the statement that a database did not take, with all its values: pages.
    text = masked(" ".join(str(error).split("[SQL: ")[0].split()))
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


class PrintableFormatter(logging.Formatter):
    """Log lines that hold no more than their text: of a traceback, each line for itself."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).splitlines()))


def print_warnings() -> None:
    """Makes harmless what a process prints of warnings that it has no log for."""
    if logging.lastResort:
        logging.lastResort.setFormatter(PrintableFormatter())


def shell_command(*words: object) -> str:
    """A command to paste into a shell, each word quoted where it has to be."""
    return " ".join(map(_shell_word, map(str, words)))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # $'...' of bash, zsh and ksh: plain quotes would need the line break itself.
    plain = [c.isprintable() and c not in "\\'" for c in word]
    codes = ["".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word]
    return (
        f"$'{''.join(c if ok else code for c, ok, code in zip(word, plain, codes, strict=True))}'"
    )


def recorded_command(command: str | None) -> str:
    """A command of ours as a record has it, to paste: somebody else may have written the record."""
    try:
        words = shlex.split(command or "")
    except ValueError:  # a quote that never ends
        words = []
    return shell_command(*words) if words[:2] == ["ich", "sweep"] else "ich sweep ..."


def exit_status(command: Callable[[], int]) -> int:
    """The exit status of a command: what it returns, or 2 after a mistake, said in one paragraph.

    A bug of ours is raised, and so is SystemExit, by which SIGTERM ends the command.
    """
    print_warnings()
    try:
        return command()
    except (Exception, KeyboardInterrupt) as error:
        if is_interrupt(error):
            return 128 + (_received or [signal.SIGINT])[0]
        if isinstance(error, BrokenPipeError):  # what read the output has ended, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return Status.FAILED
        # Imported here, for it imports Hydra. Every command that can fail has it.
        from ich.base.config import UserError

        if not isinstance(error, UserError | OSError):
            raise
        tell(_paragraph(error))
        return Status.MISTAKE


def tell(paragraph: str) -> None:
    """Says what is amiss, in one paragraph, on standard error."""
    print(printable(f"ich: {paragraph}"), file=sys.stderr)


def _paragraph(error: Exception) -> str:
    from ich.base.files import DamagedError

    if isinstance(error, DamagedError) or not isinstance(error, OSError):
        return str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return (
            f"{error.filename} cannot be used ({error.strerror}). Give this command in a folder of "
            f"your own, or name a place that can be written: data.cache_dir and sweep.output, or "
            f"output or -o, as the command has it."
        )
    # Of ours, whose text says what and where.
    if error.errno is None and isinstance(error, PermissionError | FileExistsError):
        return str(error)
    return f"a folder or file cannot be used: {str(error).rstrip('.')}. {keep_traceback()}"


def keep_traceback() -> str:
    """Writes the traceback of the exception at hand to a file, and says where: what reads like a
    full disk may be a bug of ours."""
    try:
        handle, path = tempfile.mkstemp(prefix="ich-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            traceback.print_exc(file=file)
    except OSError:
        return "Nor can a log with the traceback be written."
    return f"If that seems wrong, it is a bug of ich: the traceback is in {path}"


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing if no known word is like it."""
    found = get_close_matches(word, list(known), 1)
    return f" Did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """Options of `ich NAME`; a mistake is one paragraph, with the nearest option."""

    def __init__(
        self, name: str, about: str | None, epilog: str | None = None, add_help: bool = True
    ) -> None:
        super().__init__(
            f"ich {name}",
            description=about,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=add_help,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, which `parse_args` calls, with `~` as the home folder."""
        # A shell leaves it as it is after an equals sign: --cache-dir=~/x, data.root=~/scans.
        home, words = str(Path.home()), sys.argv[1:] if args is None else args
        whole = [re.sub(r"\A((?:-*[\w.-]+=)?)~(?=/)", lambda m: m[1] + home, w) for w in words]
        return super().parse_known_args(whole, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        # What argparse says of an option that it does not know.
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        options = [text for action in self._actions for text in action.option_strings]
        # Without the dashes, which would make all of them alike.
        named = {option.lstrip("-"): option for option in options if option.startswith("--")}
        found = get_close_matches(unknown.lstrip("-"), named, 1) if unknown[:1] == "-" else []
        hint = f" Did you mean {named[found[0]]}?" if found else ""
        text = printable(f"ich: {message}.{hint} See {self.prog} --help.")
        self.exit(Status.MISTAKE, f"{text}\n")

"""State on disk: the one writer, whose files are whole or not there; the one reader; and locks.

What is read here was written by ich, but may have been cut by a full disk or a power cut since,
edited, or made by somebody else. It is data: nothing in it is looked up or executed, its size is
bounded, and what cannot be used is a `DamagedError` that names the file.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import json
import logging
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
# A journal of 1,000 epochs has 1 MB, the record of a sweep of 1,000 jobs 5 MB.
_LARGEST = 64 << 20  # bytes
_LARGEST_YAML = 64 << 10  # a config has 3 KB; Python's YAML takes a second for this
_DEEPEST_YAML = 20  # a config has 4
# What a file system answers that cannot sync a folder, or may not open it.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


class DamagedError(OSError):
    """A file is there and cannot be used. An OSError, as FileNotFoundError is: who can do without
    the file catches both."""


# --- Writing -------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields where to write what then takes the place of `path`: whole and safe on disk, or not at
    all. Of two processes that write the same file, the second waits.

    Args:
        path: the file.
        sync: False for files that nobody misses after a power cut.

    Raises:
        OSError: naming the file, as on a full disk; what was there before is as it was.
    """
    # In the same folder: a rename is atomic within one file system only. Of one name, so that
    # whoever writes the file next takes away what a killed process has left.
    part = path.with_name(f"{path.name}.part")
    with naming(path, part):
        with _held(part):
            try:
                yield part
                if sync:  # a rename can be on disk before the data it names
                    _sync(part)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        if sync:
            sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Writes a file, whole or not at all."""
    with replacing(path, sync) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Writes JSON, whole or not at all. NaN and infinities become null."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    write_bytes(path, text.encode(), sync)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, whose rows are lines for every reader."""
    text: str = table.to_csv(index=False)
    # pandas quotes a line feed, but no carriage return, at which readers end a row as well.
    return text if "\r" not in text else table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


# Python would write NaN and Infinity, which are no JSON: other readers refuse the whole file.
def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append_line(path: Path, text: str) -> None:
    """Appends a line to a journal, safe on disk when this returns.

    Raises:
        OSError: naming the file; a part of the line may be there.
    """
    with naming(path):
        is_new = not path.exists()
        with path.open("ab") as file:
            file.write(f"{text}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def cut_unfinished_line(file: IO[bytes]) -> int:
    """Cuts a last line that a killed process left without its end, of at most 64 KB.

    Returns:
        Bytes of the whole lines that are left.
    """
    start = max(0, file.seek(0, os.SEEK_END) - (1 << 16))
    file.seek(start)
    # Without a line break `rfind` is -1, and nothing of what was read is kept.
    whole = start + file.read().rfind(b"\n") + 1
    file.truncate(whole)
    return whole


@contextmanager
def naming(path: Path, *aliases: Path) -> Iterator[None]:
    """Gives an OSError the file's name: that of a full disk has none, others a name that the file
    has for a moment."""
    try:
        yield
    except OSError as error:
        # With a text alone, it says what it has to say.
        if error.errno is not None and error.filename in (None, *map(str, aliases), *aliases):
            error.filename = str(path)
        raise


@contextmanager
def _held(part: Path) -> Iterator[None]:
    """An empty file that no other process writes until this is left."""
    while True:
        with part.open("ab") as handle:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                is_ours = os.path.samestat(os.fstat(handle.fileno()), part.stat())
            except FileNotFoundError:
                is_ours = False
            if is_ours:  # and has not been renamed by whoever had it before
                handle.truncate(0)
                yield
                return


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder safe on disk; the sync of a file leaves its name out."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Reading -------------------------------------------------------------------------------------


def read_bytes(path: Path, most: int = _LARGEST) -> bytes:
    """All of a file of at most so many bytes.

    Raises:
        FileNotFoundError: it is not there.
        DamagedError: it is larger, no file, or cannot be read.
    """
    try:
        # A pipe would otherwise be waited for, until somebody writes into it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DamagedError(f"{path} is no regular file")
            data = file.read(most + 1)
    # ValueError: a name that no file can have, with a NUL, which a record may give.
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except DamagedError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise DamagedError(f"{path} is damaged (it has more than {most >> 10:,} KB)")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: the file is not there.
        DamagedError: it holds no JSON object.
    """
    return _parsed(read_bytes(path), str(path))


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a journal, one a line, and of each line that is none a text that names it.

    A last line without its end may be neither: it is being written, or a crash cut it off.

    Raises:
        FileNotFoundError: the file is not there.
        DamagedError: it cannot be read at all.
    """
    objects, damaged = [], []
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(_parsed(line, f"line {number} of {path}"))
        except DamagedError as error:
            if number < len(lines):
                damaged.append(str(error))
    return objects, damaged


def _parsed(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode())
    # RecursionError: it may be nested deeper than Python's parser goes.
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} is damaged ({_reason(error)})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{what} is damaged (it holds no JSON object)")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of plain values: texts, numbers, lists and mappings.

    Raises:
        FileNotFoundError: the file is not there.
        DamagedError: it holds something else, or what OmegaConf would look up elsewhere: ich writes
            every setting as it was used.
    """
    import yaml  # here, for decoding processes start often, and read none

    try:
        text = read_bytes(path, _LARGEST_YAML).decode()
        depth = 0
        # By events, which come one by one: what is refused here takes the parser minutes else.
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            # A list of ten aliases of a list of ten aliases, and so on, holds more than any memory.
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_YAML:
                raise ValueError("it holds an alias, or is nested too deep")
        value = yaml.safe_load(text)
        require_plain(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({_reason(error)})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged (it holds no settings)")
    return value


def require_plain(value: object) -> None:
    """Refuses what is no plain value, and texts in which OmegaConf would look something up.

    Raises:
        ValueError: there is such a value.
    """
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError("a key is no text")
            require_plain(key)
            require_plain(child)
    elif isinstance(value, list):
        for child in value:
            require_plain(child)
    elif isinstance(value, str):
        # `${oc.env:TOKEN}` would put a secret of this machine into pages and cards.
        if "${" in value:
            raise ValueError("it holds ${, which a record never does")
    elif not isinstance(value, bool | int | float | None):
        raise ValueError(f"it holds a {type(value).__name__}")


def _reason(error: Exception) -> str:
    """The first words of an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:120]} ..."


@lru_cache(maxsize=1000)
def tell_damaged(what: str) -> None:
    """Warns of a file that cannot be used, and is done without; once, however often it is read."""
    log.warning("%s", what)


# --- Locks ---------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; whoever comes second waits."""
    # The file stays: were it removed, one process could hold the lock on the old file and another
    # that on a new one of its name. flock, since a POSIX lock is lost as soon as the process closes
    # any handle of the file.
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # until the file is closed, or its process is dead
        yield

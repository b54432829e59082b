"""Files that are whole or not there, and locks between processes."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, whose rows are lines for every reader."""
    text: str = table.to_csv(index=False)
    # pandas quotes a line feed, but no carriage return, at which readers end a row as well.
    return text if "\r" not in text else table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    # In the same folder: a rename is atomic within one file system only.
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Writes JSON atomically: a temporary name, sync, rename. NaN and infinities become null.

    `sync=False` is for files that nobody misses after a power cut.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as file:
        json.dump(_finite(value), file, indent=1, allow_nan=False)
        file.flush()
        if sync:  # a rename can be on disk before the data it names
            os.fsync(file.fileno())
    part.rename(path)


# Python would write NaN and Infinity, which are no JSON: other readers refuse the whole file.
def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; whoever comes second waits."""
    # The file stays: were it removed, one process could hold the lock on the old file and another
    # that on a new one of its name. flock, since a POSIX lock is lost as soon as the process closes
    # any handle of the file.
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # until the file is closed, or its process is dead
        yield

"""What `python -m ich.predict` is given: files, folders and zip archives, in any mixture."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from ich.base.config import UserError
from ich.data.decode import Asked
from ich.data.store import SliceStore


@dataclass(frozen=True)
class Group:
    """Files of one folder or archive. prefix: with a path it makes a name that can be given again;
    an archive's members are named as if it were a folder."""

    store: SliceStore
    prefix: str
    paths: list[str]


@dataclass(frozen=True)
class Inputs:
    """N files, each by its number, in the order in which they were given.

    refused: archives that cannot be opened, and why.
    """

    groups: Sequence[Group]
    refused: Sequence[tuple[str, str]] = ()

    @staticmethod
    def find(given: Sequence[str]) -> Inputs:
        """Looks up what there is; opens no file but the archives' directories. What is given twice
        is there once.

        Args:
            given: files, folders (with all below them but hidden folders), zip archives, or a
                folder within one, as `scans.zip/patient1`.

        Raises:
            UserError: one of them does not exist, or there is no file in any.
        """
        groups: list[Group] = []
        refused: list[tuple[str, str]] = []
        seen: set[str] = set()
        for name in given:
            try:
                store, prefix, paths = _expand(name)
            except BrokenArchive as error:
                refused.append((name, str(error)))
                continue
            root = store.root.resolve()
            new = [p for p in paths if f"{root}/{p}" not in seen]
            seen.update(f"{root}/{p}" for p in new)
            if groups and (groups[-1].store.root, groups[-1].prefix) == (store.root, prefix):
                groups[-1].paths.extend(new)  # as a shell gives the files of one folder
            else:
                groups.append(Group(store, prefix, new))
        if not any(g.paths for g in groups):
            if refused:
                raise UserError(f"{refused[0][0]}: {refused[0][1]}")
            raise UserError(
                f"there is no file in {', '.join(given)}. Give DICOM files, folders or zip "
                f"archives that hold some."
            )
        return Inputs(groups, refused)

    def __len__(self) -> int:
        return sum(len(g.paths) for g in self.groups)

    def name(self, number: int) -> str:
        """A file's name: what was given, and the path below it."""
        at = bisect_right(self._ends, number)
        group = self.groups[at]
        name = group.prefix + group.paths[number - self._ends[at] + len(group.paths)]
        return name.encode("utf-8", "backslashreplace").decode()  # whatever a file system allows

    def ask(self, numbers: Sequence[int], sizes: tuple[int, ...]) -> Iterator[Asked]:
        """What a reading process needs for these files; of each folder or archive in one piece."""
        by_group: dict[int, list[int]] = {}
        for number in numbers:
            by_group.setdefault(bisect_right(self._ends, number), []).append(number)
        for at, members in by_group.items():
            group, first = self.groups[at], self._ends[at] - len(self.groups[at].paths)
            locations = group.store.locate([group.paths[n - first] for n in members])
            yield Asked(group.store.root, locations, members, sizes)

    def batches(self, size: int, sizes: tuple[int, ...]) -> Iterator[Asked]:
        """All files in pieces of at most `size`; located when due, for there may be many."""
        for at, group in enumerate(self.groups):
            first = self._ends[at] - len(group.paths)
            for start in range(0, len(group.paths), size):
                part = group.paths[start : start + size]
                numbers = list(range(first + start, first + start + len(part)))
                yield Asked(group.store.root, group.store.locate(part), numbers, sizes)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(g.paths) for g in self.groups))


class BrokenArchive(UserError):
    """A zip archive whose directory cannot be read."""


def _expand(name: str) -> tuple[SliceStore, str, list[str]]:
    """Of one thing given: its store, the prefix of names, and paths in the store."""
    path, below = _existing(name)
    if path.is_dir() and not below:
        store = SliceStore(path)
        return store, f"{path.as_posix().rstrip('/')}/", store.paths
    if _is_archive(path):
        store = SliceStore(path)
        try:
            there = store.paths
        except UserError as error:
            raise BrokenArchive(str(error).replace(f" {path}", "")) from None
        inside = [p for p in there if not below or p == below or p.startswith(f"{below}/")]
        if below and not inside:
            raise UserError(
                f"the input is {name!r}, but the archive {path} holds no {below!r}. Give the "
                f"archive itself, or a folder that is in it."
            )
        return store, f"{path.as_posix()}/", inside
    if below:
        raise UserError(
            f"the input is {name!r}, which does not exist. Give DICOM files, folders or zip "
            f"archives."
        )
    # A link or a pipe is taken too: it is listed as what cannot be read, and stops nothing.
    folder = path.parent.as_posix()
    return SliceStore(path.parent), "" if folder == "." else f"{folder}/", [path.name]


def _existing(name: str) -> tuple[Path, str]:
    """The longest beginning of a path that exists, and what is left of it."""
    path = Path(name)
    below: list[str] = []
    while not os.path.lexists(path) and path != path.parent:
        below.insert(0, path.name)
        path = path.parent
    return path, "/".join(below)


def _is_archive(path: Path) -> bool:
    # Not opened before it is known to be a file: opening a pipe waits for ever.
    if not (path.exists() and stat.S_ISREG(path.stat().st_mode)):
        return False
    with path.open("rb") as file:  # a DICOM file may hold the end of an archive in its own end
        return file.read(2) == b"PK"

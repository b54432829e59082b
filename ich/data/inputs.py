"""What `ich predict` is given: files, folders and zip archives, in any mixture.

`Inputs` numbers all files in the order given. A number is what a file is called from there on, in
reading processes and in what comes back from them; its name is made of it for people alone.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

from ich.base.config import UserError
from ich.data.decode import ReadRequest
from ich.data.store import SliceStore


@dataclass(frozen=True)
class SourceFiles:
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

    sources: Sequence[SourceFiles]
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
        sources: list[SourceFiles] = []
        refused: list[tuple[str, str]] = []
        seen: set[str] = set()
        for name in given:
            try:
                source = _expand(name)
            # One broken archive among many inputs costs its own row, not the rest.
            except BrokenArchive as error:
                refused.append((name, str(error)))
                continue
            # By where it really lies: a file given by itself and in its folder is one.
            root = source.store.root.resolve()
            new = [p for p in source.paths if f"{root}/{p}" not in seen]
            seen.update(f"{root}/{p}" for p in new)
            last = sources[-1] if sources else None
            if last and (last.store.root, last.prefix) == (source.store.root, source.prefix):
                last.paths.extend(new)  # as a shell gives the files of one folder
            else:
                sources.append(replace(source, paths=new))
        if not any(source.paths for source in sources):
            if refused:
                raise UserError(f"{refused[0][0]}: {refused[0][1]}")
            raise UserError(
                f"there is no file in {', '.join(given)}. Give DICOM files, folders or zip "
                f"archives that hold some."
            )
        return Inputs(sources, refused)

    def __len__(self) -> int:
        return sum(len(source.paths) for source in self.sources)

    def name(self, number: int) -> str:
        """A file's name: what was given, and the path below it."""
        source, position = self._source_of(number)
        name = source.prefix + source.paths[position]
        return name.encode("utf-8", "backslashreplace").decode()  # whatever a file system allows

    def requests(self, numbers: Sequence[int], sizes: tuple[int, ...]) -> Iterator[ReadRequest]:
        """What a reading process needs for these files; of each folder or archive in one piece."""
        # Sorted first: groupby joins neighbours only.
        by_source = groupby(sorted(numbers), key=lambda n: bisect_right(self._ends, n))
        for _, members in by_source:
            chosen = list(members)
            source, first = self._source_of(chosen[0])
            paths = [source.paths[first + n - chosen[0]] for n in chosen]
            yield ReadRequest(source.store.root, source.store.locate(paths), chosen, sizes)

    def batches(self, size: int, sizes: tuple[int, ...]) -> Iterator[ReadRequest]:
        """All files in pieces of at most `size`; located when due, for there may be many."""
        for source, end in zip(self.sources, self._ends, strict=True):
            first = end - len(source.paths)
            for start in range(0, len(source.paths), size):
                paths = source.paths[start : start + size]
                numbers = list(range(first + start, first + start + len(paths)))
                yield ReadRequest(source.store.root, source.store.locate(paths), numbers, sizes)

    def _source_of(self, number: int) -> tuple[SourceFiles, int]:
        """The source of a file, and its position there."""
        # To the right: an end is the number of the next source's first file.
        i = bisect_right(self._ends, number)
        source = self.sources[i]
        return source, number - self._ends[i] + len(source.paths)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(source.paths) for source in self.sources))


class BrokenArchive(UserError):
    """A zip archive whose directory cannot be read."""


def _expand(name: str) -> SourceFiles:
    """The files of one thing given."""
    path, below = _existing(name)
    if path.is_dir() and not below:
        store = SliceStore(path)
        return SourceFiles(store, f"{path.as_posix().rstrip('/')}/", store.paths)
    if _is_archive(path):
        store = SliceStore(path)
        try:
            members = store.paths
        except UserError as error:
            raise BrokenArchive(str(error).replace(f" {path}", "")) from None
        inside = [p for p in members if not below or p == below or p.startswith(f"{below}/")]
        if below and not inside:
            raise UserError(
                f"the input is {name!r}, but the archive {path} holds no {below!r}. Give the "
                f"archive itself, or a folder that is in it."
            )
        return SourceFiles(store, f"{path.as_posix()}/", inside)
    if below:
        raise UserError(
            f"the input is {name!r}, which does not exist. Give DICOM files, folders or zip "
            f"archives."
        )
    # A link or a pipe is taken too: it is listed as what cannot be read, and stops nothing.
    folder = path.parent.as_posix()
    prefix = "" if folder == "." else f"{folder}/"
    return SourceFiles(SliceStore(path.parent), prefix, [path.name])


def _existing(name: str) -> tuple[Path, str]:
    """The longest beginning of a path that exists, and what is left of it."""
    path = Path(name)
    below: list[str] = []
    # A path into an archive exists as far as the archive; lexists, since a dangling link is there.
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

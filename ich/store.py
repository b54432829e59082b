"""Where slices lie: an unpacked folder, or a zip archive read in place."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ich.config import UserError


@dataclass(frozen=True)
class SliceStore:
    """A folder tree or one zip archive."""

    root: Path

    @staticmethod
    def open(root: str) -> SliceStore:
        """Checks that `root` is a folder or a zip archive.

        Raises:
            UserError: it does not exist or is neither.
        """
        path = Path(root)
        if not path.exists():
            raise UserError(
                f"data.root is {root!r}, which does not exist. Give the folder or the zip archive "
                f"that holds the slices, or use data=phantom, which needs no files."
            )
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise UserError(
                f"data.root is {root!r}, which is neither a folder nor a zip archive. Give the "
                f"folder or the zip that holds the slices; a broken download must be repeated."
            )
        return SliceStore(path)

    @property
    def is_zip(self) -> bool:
        return self.root.is_file()

    @cached_property
    def paths(self) -> list[str]:
        """Every file, relative to `root`, with forward slashes, sorted; no hidden folder."""
        if self.is_zip:
            with zipfile.ZipFile(self.root) as archive:
                return sorted(n for n in archive.namelist() if not n.endswith("/"))
        found = []
        for folder, below, files in os.walk(self.root):
            below[:] = sorted(d for d in below if not d.startswith("."))
            place = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if place == "." else f"{place}/"
            found += [prefix + name for name in files]
        return sorted(found)

    def read(self, path: str) -> bytes:
        """One small file of the store, whole: a label CSV."""
        if self.is_zip:
            with zipfile.ZipFile(self.root) as archive:
                return archive.read(path)
        return (self.root / path).read_bytes()

    def identity(self) -> str:
        """Changes with the store's place and, cheaply told, with what is in it."""
        tops = [self.root]
        if not self.is_zip:
            tops += sorted(p for g in ("*", "*/*") for p in self.root.glob(g) if p.is_dir())
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in tops]
        return f"{self.root.resolve()}|{stats}"

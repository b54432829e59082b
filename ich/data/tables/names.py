"""Names that differ in form only: of an image in a table, and of its file.

People write them with and without `.dcm`, in capitals or not, with backslashes, with `./` or a
folder before them, and macOS takes umlauts apart. What is the same but for these is matched where
only one name is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What slices become when they are looked at with other tools, whose tables then name these.
_OTHER_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jp2", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".npy", ".npz", ".nii", ".nrrd", ".mha"),
)
_LOOKED_AT = 2000  # names among which an example is chosen


class Matches(NamedTuple):
    """found: the one present name of each wanted one that has one. unclear: what is no such, as
    `'a' may be 'A.dcm' or 'a.ima'`."""

    found: dict[str, str]
    unclear: list[str]


def plain_path(path: str) -> str:
    """A path with forward slashes, and without parts that lead nowhere (`.`, or nothing)."""
    if "\\" not in path and "//" not in path and "./" not in path and path[-1:] != "/":
        return path
    parts = path.replace("\\", "/").split("/")
    # The first part of an absolute path is empty, and must be seen.
    return "/".join(p for n, p in enumerate(parts) if p not in ("", ".") or (n == 0 and p == ""))


def stem_of(file: str) -> str:
    """A file's name without a DICOM suffix; other dots belong to it."""
    stem, dot, suffix = file.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in DICOM_SUFFIXES else file


def match_by_form(
    wanted: Iterable[str], present: Iterable[str], any_folder: bool, are_files: bool = True
) -> Matches:
    """Finds the present name of each wanted one, where they differ in form only.

    Args:
        wanted: names or paths of images.
        present: names or paths, among which they are looked for; none that is taken already.
        any_folder: whether one of both may have folders before it that the other lacks; else all
            folders must agree.
        are_files: whether the present ones are files; in a table these too may have the ending of
            another tool, and a file of such an ending is no slice.
    """
    present = list(present)
    keys = {name: _keys(name) for name in wanted} if present else {}
    asked = {key for both in keys.values() for key in both}
    by_key: dict[str, list[str]] = {}
    for name in present:
        for key in _keys(name)[: 1 if are_files else None]:
            if key in asked:
                by_key.setdefault(key, []).append(name)
    found: dict[str, str] = {}
    unclear: list[str] = []
    takers: dict[str, str] = {}
    for name, both in keys.items():
        candidates: list[str] = []
        for key in both:
            same = [p for p in by_key.get(key, []) if _agree(name, p, any_folder)]
            candidates = candidates or same
        if len(candidates) > 1:
            unclear.append(f"{name!r} may be {candidates[0]!r} or {candidates[1]!r}")
        elif candidates and candidates[0] in takers:
            unclear.append(f"{takers[candidates[0]]!r} and {name!r} may both be {candidates[0]!r}")
            found.pop(takers[candidates[0]], None)
        elif candidates:
            takers[candidates[0]] = name
            found[name] = candidates[0]
    return Matches(found, unclear)


def example(wanted: str, present: Sequence[str]) -> str:
    """The present name that is most like a wanted one; empty if there is none."""
    # Evenly from all: names are sorted, and the first may be of another kind.
    some = present[:: max(1, len(present) // _LOOKED_AT)]
    return next(iter(get_close_matches(wanted, some, 1, 0.0)), "")


def _keys(wanted: str) -> list[str]:
    """What the file of this name may be called, the likelier first."""
    whole = _form(stem_of(_file(wanted)))
    stem, dot, suffix = whole.rpartition(".")
    return [whole, stem] if stem and f"{dot}{suffix}" in _OTHER_SUFFIXES else [whole]


def _file(path: str) -> str:
    return plain_path(path).rpartition("/")[2]


def _form(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Twice: what casefold makes of a composed letter need not be composed.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _agree(a: str, b: str, any_folder: bool) -> bool:
    """Whether the folders of two paths are the same in form; of the longer one the last ones."""
    first, second = (_form(plain_path(p)).split("/")[:-1] for p in (a, b))
    if not any_folder:
        return first == second
    shared = min(len(first), len(second))
    return first[len(first) - shared :] == second[len(second) - shared :]

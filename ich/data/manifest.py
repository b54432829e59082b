"""Label CSV -> manifest: one row per image, its labels, and where its file lies.

Two forms are read. The RSNA's is long: `ID_<image>_<label>,Label`, one row per image and label. The
other is wide: `image_id` or `path`, then one column per label. What is wrong is named by line or id
and refused; exact repetitions, which the RSNA's has four of, are dropped and counted.
`read_labels` does all that; `build_manifest` finds the images' files.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import pandas as pd

from ich.base.config import DataConfig, Source, UserError
from ich.data.store import SliceStore

# An id becomes part of a path and of tables, so only harmless characters are accepted.
# Ends are \Z: in Python $ also stands before a line break at the very end.
_ROW_ID = r"^(ID_[0-9A-Za-z]+)_(\w+)\Z"
_IMAGE_ID = r"[0-9A-Za-z][0-9A-Za-z_.-]*"
# Relative, with forward slashes and without `..`: it stays below data.root.
_PATH = r"(?!/)(?!(?:.*/)?\.\.(?:/|\Z))[^\x00-\x1f\\]+"
BLOCK = 100_000  # rows of a CSV read at a time: pandas needs far more memory while reading
_BAD_CSV = (
    pd.errors.ParserError,
    pd.errors.EmptyDataError,
    UnicodeDecodeError,
    OSError,
    zipfile.BadZipFile,
)
_TRAIN_CSV = re.compile(r"stage_[12]_train\.csv")
_TRAIN_DIR = re.compile(r"stage_[12]_train(_images)?")
_SUFFIXES = (".dcm", ".dicom", ".ima")

# What a wide CSV or a metadata file may call its key columns; the first is ours.
IMAGE = ("image_id", "Image", "ImageId", "SOPInstanceUID")
PATIENT = ("patient_id", "PatientID")
STUDY = ("study_id", "StudyInstanceUID")
PATH = ("path",)


@dataclass(frozen=True)
class Labels:
    """What a label CSV says.

    table: one row per image in order of first appearance: `image_id`, the labels as int8, and
        `path`, `patient_id` and `study_id` where the CSV has them.
    names: the labels, in order.
    repeated: images that stood more than once, in exact repetition.
    """

    table: pd.DataFrame
    names: tuple[str, ...]
    repeated: int


_NUMBER = re.compile(r"[-+]?[0-9.]{1,8}")  # what may be shown of a value
# Columns of tables that have one column per label too (`ich.predict`, `ich.serving`).
RESERVED_COLUMNS = frozenset({"file", "study", "slices", "positive", "reason"})


def read_labels(
    source: Path | IO[bytes],
    name: str,
    columns: Sequence[str] | None = None,
    any_label: str | None = None,
) -> Labels:
    """Reads a label CSV, long or wide.

    Args:
        source: a path (`.gz` is unpacked) or an open binary file.
        name: what the source is called in messages.
        columns: the labels, in order; None takes all there are.
        any_label: the label that must be the OR of the others, if one is.

    Raises:
        UserError: a malformed row (by line), contradicting repetitions, a missing label, or an
            `any_label` that is not the OR of the others (by id).
    """
    frame = read_csv(source, f"the label file {name}")
    long = {"ID", "Label"} <= set(frame.columns)
    read = _read_long if long else _read_wide
    labels = read(frame, name, columns)
    if taken := sorted(RESERVED_COLUMNS & set(labels.names)):
        raise UserError(
            f"the label file {name} has a label {taken[0]!r}, but where predictions are written "
            f"{', '.join(sorted(RESERVED_COLUMNS))} are other columns. Rename it, or choose the "
            f"labels with data.label_columns."
        )
    if any_label is not None:
        if any_label not in labels.names:
            raise UserError(
                f"data.any_label is {any_label!r}, but the label file {name} has the labels "
                f"{', '.join(labels.names)}. Name one of them, or set data.any_label=null."
            )
        others = [k for k in labels.names if k != any_label]
        # An `any` that is not their OR is a mistake somewhere, and it is not known in which column.
        either = labels.table[others].max(axis=1)
        _refuse_ids(
            name,
            labels.table.loc[either != labels.table[any_label], "image_id"],
            f"have an `{any_label}` that is not the OR of their other labels",
        )
    return labels


def read_csv(source: Path | IO[bytes], name: str) -> pd.DataFrame:
    """A CSV as text, blank lines kept so that line numbers hold; unreadable ones are refused."""
    # Else pandas skips blank lines, and takes an id such as NA for a gap.
    try:
        with pd.read_csv(
            source, dtype=str, keep_default_na=False, skip_blank_lines=False, chunksize=BLOCK
        ) as blocks:
            frame = pd.concat(blocks, ignore_index=True)
    except _BAD_CSV as error:
        raise UserError(f"{name} cannot be read as CSV: {error}") from None
    if frame.empty:
        raise UserError(f"{name} holds no row below its heading.")
    return frame


def _read_long(frame: pd.DataFrame, name: str, columns: Sequence[str] | None) -> Labels:
    parts = frame["ID"].str.extract(_ROW_ID)
    _refuse_rows(name, frame["ID"], parts[1].isna(), "is no id of the form ID_<image>_<label>")
    # dict.fromkeys keeps the order of appearance, which a set would not.
    names = tuple(columns or dict.fromkeys(parts[1]))
    _refuse_rows(name, frame["ID"], ~parts[1].isin(names), f"ends in none of {', '.join(names)}")
    value = _zero_or_one(name, frame["Label"])
    table = pd.DataFrame({"image_id": parts[0], "label": parts[1], "value": value})
    # Exact repetitions go first; what still stands twice contradicts itself.
    distinct = table.drop_duplicates()
    twice = distinct.duplicated(["image_id", "label"], keep=False)
    _refuse_ids(name, distinct.loc[twice, "image_id"], "have labels that contradict each other")
    repeated = table.loc[table.duplicated(["image_id", "label"]), "image_id"].nunique()
    counts = distinct["image_id"].value_counts()
    _refuse_ids(
        name,
        counts.index[counts != len(names)],
        f"lack some of the {len(names)} labels {', '.join(names)}",
    )
    # `pivot` sorts its rows; a split by the report's protocol depends on their order in the file.
    order = distinct["image_id"].unique()
    wide = distinct.pivot(index="image_id", columns="label", values="value").loc[order]
    wide.columns.name = None
    return Labels(wide[list(names)].reset_index(), names, int(repeated))


def _read_wide(frame: pd.DataFrame, name: str, columns: Sequence[str] | None) -> Labels:
    keys = {k[0]: first_of(frame, k) for k in (IMAGE, PATH, PATIENT, STUDY)}
    if keys["image_id"] is None and keys["path"] is None:
        raise UserError(
            f"the label file {name} has the columns {_listed(frame.columns)}, but must have ID and "
            f"Label (the RSNA's form), or image_id or path and one column per label. Point "
            f"data.labels at such a file."
        )
    # Whatever is no key: a wide file says by its columns what its labels are.
    names = tuple(columns or (c for c in frame.columns if c not in keys.values()))
    if missing := [k for k in names if k not in frame.columns]:
        raise UserError(
            f"the label file {name} has no column {', '.join(missing)}; it has "
            f"{_listed(frame.columns)}. Name the label columns with data.label_columns=[...]."
        )
    if not names:
        raise UserError(
            f"the label file {name} has no label column, only {_listed(frame.columns)}. Add one "
            f"column of 0 and 1 for each label."
        )
    table = pd.DataFrame({k: frame[c] for k, c in keys.items() if c is not None})
    for key, pattern in (("image_id", _IMAGE_ID), ("path", _PATH)):
        if key in table:
            bad = ~table[key].str.fullmatch(pattern)
            _refuse_rows(name, table[key], bad, f"is no {key.replace('_', ' ')}")
    if "image_id" not in table:
        table.insert(0, "image_id", table["path"])
    for label in names:
        table[label] = _zero_or_one(name, frame[label])
    distinct = table.drop_duplicates()
    _refuse_ids(
        name,
        distinct.loc[distinct["image_id"].duplicated(), "image_id"],
        "stand twice with different values",
    )
    repeated = table.loc[table["image_id"].duplicated(), "image_id"].nunique()
    return Labels(distinct.reset_index(drop=True), names, int(repeated))


def first_of(frame: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of some column names that a frame has."""
    return next((n for n in names if n in frame.columns), None)


def _listed(columns: Iterable[object]) -> str:
    names = [str(c) for c in columns]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _zero_or_one(name: str, values: pd.Series) -> pd.Series:
    # What is no number becomes NaN, which is neither 0 nor 1.
    number = pd.to_numeric(values, errors="coerce")
    _refuse_rows(name, values, ~number.isin([0, 1]), "is no label; labels are 0 or 1")
    return number.astype(np.int8)


def _refuse_rows(name: str, values: pd.Series, bad: pd.Series, what: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy())
        own = values.name in ("ID", "Label", "image_id", "path")
        # Any other column may hold names: one that was taken for a label, or patients.
        cells = [values.iloc[row][:80] for row in rows[:5]]
        texts = [repr(c) if own or not c or _NUMBER.fullmatch(c) else "a text" for c in cells]
        # Lines are counted from 1, and the heading is the first.
        shown = "; ".join(f"line {row + 2}: {t}" for row, t in zip(rows[:5], texts, strict=True))
        where = "" if values.name in ("ID", "Label") else f" in the column {values.name}"
        raise UserError(
            f"the label file {name} has {len(rows)} bad row(s){where}: a value {what} ({shown}). "
            f"Mend or remove them, or name the columns that are labels with data.label_columns; "
            f"the heading is line 1."
        )


def _refuse_ids(name: str, ids: Iterable[str], what: str) -> None:
    distinct = list(dict.fromkeys(ids))
    if distinct:
        more = f" and {len(distinct) - 5} more" if len(distinct) > 5 else ""
        raise UserError(
            f"in the label file {name}, {', '.join(distinct[:5])}{more} {what}. "
            f"Mend or remove these rows."
        )


def rsna_labels(store: SliceStore) -> str:
    """The path of the training labels in a store of the RSNA layout, the later stage's if both.

    Raises:
        UserError: there are none.
    """
    matches = [p for p in store.paths if _TRAIN_CSV.fullmatch(PurePosixPath(p).name)]
    if not matches:
        raise UserError(
            f"{store.root} holds no stage_2_train.csv, so there are no labels. Point data.root at "
            f"the data set's own folder or zip, or give the CSV with data.labels=FILE."
        )
    return max(matches, key=lambda p: PurePosixPath(p).name)


def build_manifest(labels: Labels, store: SliceStore | None, source: Source) -> pd.DataFrame:
    """Adds `path`, the file of each image in the store, to the wide labels.

    An image without a file keeps an empty path: it is quarantined when slices are decoded. Without
    a store no image has one.

    Raises:
        UserError: not one labelled image has a file, or several files could be one image's.
    """
    table = labels.table
    if store is None:
        return table.assign(path="")
    if "path" in table:
        existing = set(store.paths)
        paths = [p if p in existing else "" for p in table["path"]]
    else:
        find = _rsna_slices if source is not Source.folder else _by_file_name
        path_of = find(store, table["image_id"])
        paths = [path_of.get(i, "") for i in table["image_id"]]
    # A few without a file are quarantined; all of them mean that the two do not belong together.
    if not any(paths):
        form = "by their file name or path" if source is Source.folder else "as stage_2_train/*.dcm"
        raise UserError(
            f"{store.root} holds none of the {len(table):,} labelled images {form}; it has "
            f"{len(store.paths):,} files. Point data.root at the folder or zip that holds the "
            f"slices, and data.labels at the CSV that belongs to them."
        )
    return table.assign(path=paths)


def _rsna_slices(store: SliceStore, image_ids: pd.Series) -> dict[str, str]:
    """Image id -> path of its training file, in a store of the RSNA layout."""
    # Of training folders only: the data set's test images lie beside them, and have no label.
    path_of = {}
    for path in store.paths:
        folder, _, file = path.rpartition("/")
        if file.endswith(".dcm") and _TRAIN_DIR.fullmatch(folder.rpartition("/")[2]):
            path_of[file.removesuffix(".dcm")] = path
    return path_of


def _by_file_name(store: SliceStore, image_ids: pd.Series) -> dict[str, str]:
    """Image id -> path of the one file of that name, with or without a DICOM suffix."""
    wanted, path_of, twice = set(image_ids), dict[str, str](), list[str]()
    for path in store.paths:
        file = path.rpartition("/")[2]
        stem, dot, suffix = file.rpartition(".")
        image = stem if f"{dot}{suffix}".lower() in _SUFFIXES else file
        if image in wanted:
            if image in path_of:
                # Not the first, nor the last: either could be another patient's slice.
                twice.append(f"{image} ({path_of[image]} and {path})")
            path_of[image] = path
    if twice:
        raise UserError(
            f"{len(twice):,} image ids are the name of several files, as {twice[0]}. Give a column "
            f"`path`, relative to data.root, in data.labels instead of `image_id`."
        )
    return path_of


def label_source(cfg: DataConfig, store: SliceStore | None) -> tuple[Path | None, str]:
    """Where the labels are: a file of their own, or (None and) a path in the store.

    Raises:
        UserError: nowhere.
    """
    if cfg.labels is not None:
        path = Path(cfg.labels)
        if not path.is_file():
            raise UserError(
                f"data.labels is {cfg.labels!r}, which is no file. Give the label CSV, or "
                f"leave it null to take stage_2_train.csv from data.root."
            )
        return path, path.name
    if cfg.source is Source.folder or store is None:
        raise UserError(
            "data.labels is not set. Give the label CSV with data.labels=FILE: image_id or path, "
            "then one column per label (or the RSNA's stage_2_train.csv)."
        )
    return None, rsna_labels(store)

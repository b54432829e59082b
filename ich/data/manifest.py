"""Label CSV -> manifest: one row per image, its labels, and where its file lies.

Two forms are read. The RSNA's is long: `ID_<image>_<label>,Label`, one row per image and label. The
other is wide: `image_id` or `path`, then one column per label. What is wrong is named by line or id
and refused; exact repetitions, which the RSNA's has four of, are dropped and counted.
`read_labels` does all that; `build_manifest` finds the images' files, also those whose names differ
from the table's in form only (`ich.data.tables.names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import pandas as pd

from ich.base.config import DataConfig, Source, UserError
from ich.base.naming import clean_name, why_unusable
from ich.data.store import SliceStore
from ich.data.tables.names import example, match_by_form, plain_path, stem_of
from ich.data.tables.reading import bare, find_column, read_table, tell

# An id becomes part of a path and of tables, so only harmless characters are accepted.
# Ends are \Z: in Python $ also stands before a line break at the very end.
_ROW_ID = r"^(ID_[0-9A-Za-z]+)_(\w+)\Z"
_IMAGE_ID = r"[0-9A-Za-z][0-9A-Za-z_.-]*"
# Relative, with forward slashes and without `..`: it stays below data.root.
_PATH = r"(?!/)(?!(?:.*/)?\.\.(?:/|\Z))[^\x00-\x1f\\]+"
_TRAIN_CSV = re.compile(r"stage_[12]_train\.csv", re.IGNORECASE)
_TRAIN_DIR = re.compile(r"stage_[12]_train(_images)?", re.IGNORECASE)
# Of the text: as numbers, 0.9999999999999999999 and 1e-400 are 1 and 0.
_ZERO, _ONE = r"(?i:0(?:\.0+)?|false)", r"(?i:1(?:\.0+)?|true)"

# What a wide CSV or a metadata file may call its key columns, in any case; the first is ours.
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


def read_labels(
    source: Path | IO[bytes],
    name: str,
    columns: Sequence[str] | None = None,
    any_label: str | None = None,
) -> Labels:
    """Reads a label CSV, long or wide.

    Args:
        source: a path or an open binary file; `ich.data.tables.reading` says what is unpacked.
        name: what the source is called in messages.
        columns: the labels, in order; None takes all there are.
        any_label: the label that must be the OR of the others, if one is.

    Raises:
        UserError: a malformed row (by line), contradicting repetitions, a label that is missing or
            whose name cannot be used, or an `any_label` that is not the OR of the others (by id).
    """
    frame = read_table(source, f"the label file {name}", ("ID", "Label", *IMAGE, *PATH))
    columns = [clean_name(c) for c in columns] if columns else None
    read = _read_long if {"ID", "Label"} <= set(frame.columns) else _read_wide
    labels = read(frame, name, columns)
    if any_label is not None:
        _check_any(labels, name, clean_name(any_label))
    return labels


def _check_any(labels: Labels, name: str, any_label: str) -> None:
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


def _check_names(name: str, names: Sequence[str]) -> None:
    if reason := why_unusable(names):
        raise UserError(
            f"the label file {name} has {reason}. Rename the column, or choose the labels with "
            f"data.label_columns."
        )


def _read_long(frame: pd.DataFrame, name: str, columns: Sequence[str] | None) -> Labels:
    parts = frame["ID"].str.extract(_ROW_ID)
    _refuse_rows(name, frame["ID"], parts[1].isna(), "is no id of the form ID_<image>_<label>")
    # dict.fromkeys keeps the order of appearance, which a set would not.
    names = tuple(columns or dict.fromkeys(parts[1]))
    _check_names(name, names)
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
    groups = (IMAGE, PATH, PATIENT, STUDY)
    keys = {k[0]: find_column(frame, k, f"the label file {name}") for k in groups}
    if keys["image_id"] is None and keys["path"] is None:
        raise UserError(
            f"the label file {name} has the columns {_listed(frame.columns)}, but must have ID and "
            f"Label (the RSNA's form), or image_id or path and one column per label. Point "
            f"data.labels at such a file."
        )
    # Whatever is no key: a wide file says by its columns what its labels are.
    known = {bare(key) for group in groups for key in group}
    names = tuple(columns or (c for c in frame.columns if bare(c) not in known))
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
    _check_names(name, names)
    table = pd.DataFrame({k: frame[c] for k, c in keys.items() if c is not None})
    if "path" in table:
        table["path"] = table["path"].map(plain_path).astype("str")
    for key, pattern in (("image_id", _IMAGE_ID), ("path", _PATH)):
        if key in table:
            bad = ~table[key].str.fullmatch(pattern)
            _refuse_rows(name, table[key], bad, f"is no {key.replace('_', ' ')}")
    if "image_id" not in table:
        table.insert(0, "image_id", table["path"])
    # Together: thousands of columns, one after the other, would be copied as often.
    table = table.assign(**{label: _zero_or_one(name, frame[label]) for label in names})
    distinct = table.drop_duplicates()
    _refuse_ids(
        name,
        distinct.loc[distinct["image_id"].duplicated(), "image_id"],
        "stand twice with different values",
    )
    if "path" in distinct:
        shared = distinct["path"].duplicated(keep=False)
        _refuse_ids(
            name, distinct.loc[shared, "image_id"], "have one path, and a file is one image"
        )
    repeated = table.loc[table["image_id"].duplicated(), "image_id"].nunique()
    return Labels(distinct.reset_index(drop=True), names, int(repeated))


def _listed(columns: Iterable[object]) -> str:
    names = [str(c) for c in columns]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _zero_or_one(name: str, values: pd.Series) -> pd.Series:
    one = values == "1"
    if not (one | (values == "0")).all():
        one = values.str.fullmatch(_ONE)
        other = ~(one | values.str.fullmatch(_ZERO))
        _refuse_rows(name, values, other, "is no label; labels are 0 or 1")
        if values.str.isalpha().any():
            tell(f"in the label file {name}, True is read as 1 and False as 0")
    return one.astype(np.int8)


def _refuse_rows(name: str, values: pd.Series, bad: pd.Series, what: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy())
        own = values.name in ("ID", "Label", "image_id", "path")
        # Any other column may hold names: one that was taken for a label, or patients.
        cells = [values.iloc[row][:80] for row in rows[:5]]
        texts = [repr(c) if own or not c or _NUMBER.fullmatch(c) else "a text" for c in cells]
        lines = values.index[rows[:5]]
        shown = "; ".join(f"line {line}: {t}" for line, t in zip(lines, texts, strict=True))
        where = "" if values.name in ("ID", "Label") else f" in the column {values.name}"
        raise UserError(
            f"the label file {name} has {len(rows)} bad row(s){where}: a value {what} ({shown}). "
            f"Mend or remove them, or name the columns that are labels with data.label_columns."
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
    a store no image has one. A name that differs from its file's in form only is matched where one
    file alone can be meant, and that is said.

    Raises:
        UserError: not one labelled image has a file, several files could be one image's, or one
            file several images'.
    """
    table = labels.table
    if store is None:
        return table.assign(path="")
    by_path = "path" in table
    wanted = table["path" if by_path else "image_id"].tolist()
    # The data set's test images lie beside the training folders, and have no label.
    is_rsna = source is not Source.folder and not by_path
    files = [p for p in store.paths if _is_training_file(p)] if is_rsna else store.paths
    if by_path:
        path_of = {p: p for p in files}
    elif is_rsna:  # the files are sorted: of an image of both stages the later counts
        path_of = {stem_of(p.rpartition("/")[2]): p for p in files}
    else:
        path_of = _by_file_name(files, set(wanted))
    path_of = {name: path_of[name] for name in wanted if name in path_of}
    if len(path_of) < len(wanted):  # each is there once
        _add_by_form(path_of, wanted, files, by_path)
    paths = [path_of.get(name, "") for name in wanted]
    # A few without a file are quarantined; all of them mean that the two do not belong together.
    if not path_of:
        form = "as stage_2_train/*.dcm" if is_rsna else "by their file name or path"
        raise UserError(
            f"{store.root} holds none of the {len(table):,} labelled images {form}; it has "
            f"{len(store.paths):,} files. {_difference(wanted[0], files or store.paths)} Point "
            f"data.root at the folder or zip that holds the slices, and data.labels at the CSV "
            f"that belongs to them."
        )
    if missing := paths.count(""):
        taken = set(paths)
        free = [p for p in files if p not in taken]
        tell(
            f"{missing:,} of {len(paths):,} labelled images have no file. "
            f"{_difference(wanted[paths.index('')], free)}"
        )
    return table.assign(path=paths)


def _is_training_file(path: str) -> bool:
    folder, _, file = path.rpartition("/")
    is_training = _TRAIN_DIR.fullmatch(folder.rpartition("/")[2])
    return bool(is_training) and file.lower().endswith(".dcm")


def _by_file_name(files: Sequence[str], wanted: set[str]) -> dict[str, str]:
    """Image id -> path of the one file of that name, with or without a DICOM suffix."""
    path_of, twice = dict[str, str](), list[str]()
    for path in files:
        image = stem_of(path.rpartition("/")[2])
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


def _add_by_form(
    path_of: dict[str, str], wanted: Sequence[str], files: Sequence[str], by_path: bool
) -> None:
    """Adds the files of names that differ from theirs in form only."""
    taken = set(path_of.values())
    lost, free = [w for w in wanted if w not in path_of], [p for p in files if p not in taken]
    found, unclear = match_by_form(lost, free, any_folder=not by_path)
    if by_path and not (found or unclear or path_of):
        # All of them lie a folder higher or lower than the table says.
        found, unclear = match_by_form(lost, free, any_folder=True)
    if unclear:
        raise UserError(
            f"{len(unclear):,} labelled images cannot be told apart by their names: {unclear[0]}. "
            f"Give the files' own names in a column `path`, relative to data.root."
        )
    path_of |= found
    if found:
        name, path = next(iter(found.items()))
        tell(
            f"{len(found):,} of {len(wanted):,} labelled images have a file whose name differs in "
            f"form only, as {name!r} and {path!r}: these are taken to be the same"
        )


def _difference(wanted: str, files: Sequence[str]) -> str:
    like = example(wanted, files)
    return f"The labels name {wanted!r}; there is {like!r}." if like else ""


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

"""Label CSV -> manifest: one row per image, its six labels, and where its file lies.

The RSNA CSV is long: `ID_<image>_<label>,Label`, six rows an image. What is wrong in it is named by
line or id and refused; exact repetitions, which the original has four of, are dropped and counted.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import pandas as pd

from ich.config import UserError
from ich.store import SliceStore

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
LABELS = (*SUBTYPES, "any")

# An id becomes part of a path, so nothing but the data set's own form is accepted.
_ROW_ID = re.compile(r"(ID_[0-9A-Za-z]+)_([a-z]+)")
_BAD_CSV = (
    pd.errors.ParserError,
    pd.errors.EmptyDataError,
    UnicodeDecodeError,
    OSError,
    zipfile.BadZipFile,
)
_TRAIN_CSV = re.compile(r"stage_[12]_train\.csv")
_TRAIN_DIR = re.compile(r"stage_[12]_train(_images)?")


def read_labels(source: Path | IO[bytes], name: str) -> tuple[pd.DataFrame, int]:
    """Reads the long label CSV.

    Args:
        source: a path or an open binary file.
        name: what the source is called in messages.

    Returns:
        The wide table, one row per image in order of first appearance (`image_id`, then the six
        labels as int8), and the number of images that stood twice.

    Raises:
        UserError: a malformed row (by line), contradicting repetitions, a missing label, or an
            `any` that is not the OR of the subtypes (by id).
    """
    long = _read_csv(source, name)
    parts = long["ID"].str.extract(rf"^{_ROW_ID.pattern}\Z")
    _refuse_rows(name, long["ID"], parts[1].isna(), "is no id of the form ID_<image>_<label>")
    _refuse_rows(name, long["ID"], ~parts[1].isin(LABELS), f"ends in none of {', '.join(LABELS)}")
    value = pd.to_numeric(long["Label"], errors="coerce")
    _refuse_rows(name, long["Label"], ~value.isin([0, 1]), "is no label; labels are 0 or 1")
    table = pd.DataFrame({"image_id": parts[0], "label": parts[1], "value": value.astype(np.int8)})
    return _widen(table, name)


def _read_csv(source: Path | IO[bytes], name: str) -> pd.DataFrame:
    try:
        frame = pd.read_csv(source, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except _BAD_CSV as error:
        raise UserError(f"the label file {name} cannot be read as CSV: {error}") from None
    if list(frame.columns[:2]) != ["ID", "Label"]:
        raise UserError(
            f"the label file {name} has the columns {', '.join(map(str, frame.columns))}, but "
            f"must have ID and Label, as the RSNA stage_2_train.csv has. Point data.labels at it."
        )
    if frame.empty:
        raise UserError(f"the label file {name} holds no row below its heading.")
    return frame


def _refuse_rows(name: str, values: pd.Series, bad: pd.Series, what: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy())
        shown = "; ".join(f"line {row + 2}: {values.iloc[row]!r}" for row in rows[:5])
        raise UserError(
            f"the label file {name} has {len(rows)} bad row(s): a value {what} ({shown}). "
            f"Mend or remove them; the heading is line 1."
        )


def _widen(table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, int]:
    distinct = table.drop_duplicates()
    twice = distinct.duplicated(["image_id", "label"], keep=False)
    _refuse_ids(name, distinct.loc[twice, "image_id"], "have labels that contradict each other")
    repeated = table.loc[table.duplicated(["image_id", "label"]), "image_id"].nunique()
    counts = distinct["image_id"].value_counts()
    _refuse_ids(
        name,
        counts.index[counts != len(LABELS)],
        f"lack some of the {len(LABELS)} labels {', '.join(LABELS)}",
    )
    order = distinct["image_id"].unique()
    wide = distinct.pivot(index="image_id", columns="label", values="value").loc[order]
    wide = wide[list(LABELS)].reset_index()
    wide.columns.name = None
    either = wide[list(SUBTYPES)].max(axis=1)
    _refuse_ids(
        name,
        wide.loc[either != wide["any"], "image_id"],
        "have an `any` that is not the OR of their subtypes",
    )
    return wide, int(repeated)


def _refuse_ids(name: str, ids: Iterable[str], what: str) -> None:
    found = list(dict.fromkeys(ids))
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"in the label file {name}, {', '.join(found[:5])}{more} {what}. "
            f"Mend or remove these rows."
        )


def rsna_labels(store: SliceStore) -> str:
    """The path of the training labels in a store of the RSNA layout, the later stage's if both.

    Raises:
        UserError: there are none.
    """
    found = [p for p in store.paths if _TRAIN_CSV.fullmatch(PurePosixPath(p).name)]
    if not found:
        raise UserError(
            f"{store.root} holds no stage_2_train.csv, so there are no labels. Point data.root at "
            f"the data set's own folder or zip, or give the CSV with data.labels=FILE."
        )
    return max(found, key=lambda p: PurePosixPath(p).name)


def rsna_slices(store: SliceStore) -> dict[str, str]:
    """Image id -> path of its training file, in a store of the RSNA layout."""
    paths = (PurePosixPath(n) for n in store.paths)
    return {
        p.stem: str(p) for p in paths if p.suffix == ".dcm" and _TRAIN_DIR.fullmatch(p.parent.name)
    }


def build_manifest(labels: pd.DataFrame, store: SliceStore) -> pd.DataFrame:
    """Adds `path`, the file of each image in the store, to the wide labels.

    An image without a file keeps an empty path: it is quarantined when slices are decoded.

    Raises:
        UserError: not one labelled image has a file.
    """
    paths = rsna_slices(store)
    manifest = labels.assign(path=[paths.get(i, "") for i in labels["image_id"]])
    if not (manifest["path"] != "").any():
        raise UserError(
            f"{store.root} holds none of the {len(labels):,} labelled images as "
            f"stage_2_train/ID_*.dcm (it has {len(paths):,} training slices). Point data.root at "
            f"the folder or zip that holds both the labels and the slices."
        )
    return manifest

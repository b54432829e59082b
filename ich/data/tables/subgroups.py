"""Columns of the label or metadata file that make subgroups of images: scanner, sex, age, site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ich.base.config import DataConfig, UserError
from ich.data.manifest import IMAGE, PATIENT, STUDY
from ich.data.tables.names import match_by_form
from ich.data.tables.reading import bare, find_column, read_table

UNKNOWN = "unknown"
_MOST = 12  # different numbers, above which bands are made of them
_AGE = re.compile(r"0*(\d+)Y?")  # DICOM PS3.5 6.2, AS: 045Y
# Nobody is to be told apart by a table of subgroups.
_OF_A_PERSON = (*IMAGE, *PATIENT, *STUDY, "PatientName", "PatientBirthDate", "AccessionNumber")


def read_subgroups(data: DataConfig, names: Sequence[str], images: Sequence[str]) -> pd.DataFrame:
    """The subgroup of N images by each of these columns, as text. Of a column of more than 12
    different numbers the decade, if it is an age, else the quarter of the images.

    Args:
        data: whose `labels` and `metadata` have the columns.
        names: of columns. images: N ids, as the labels have them.

    Raises:
        UserError: no such column, or one that names persons or images.
    """
    tables = {
        f"the {what} file {Path(path).name}": Path(path)
        for what, path in (("label", data.labels), ("metadata", data.metadata))
        if path
    }
    read = {name: read_table(path, name, IMAGE) for name, path in tables.items() if path.is_file()}
    columns = {}
    for wanted in names:
        if bare(wanted) in map(bare, _OF_A_PERSON):
            raise UserError(
                f"report.subgroups names {wanted!r}, which tells images or persons apart and makes "
                f"no subgroup. Name columns as Manufacturer, PatientSex or PatientAge."
            )
        having = [name for name, table in read.items() if find_column(table, [wanted], name)]
        if not having:
            there = ", ".join(str(c) for table in read.values() for c in table) or "no column"
            raise UserError(
                f"report.subgroups names {wanted!r}, which is no column of data.labels or "
                f"data.metadata; these have {there[:300]}. Name one of them, or add it there."
            )
        values = _of_images(read[having[0]], wanted, images, having[0])
        columns[wanted] = bands(wanted, values)
    return pd.DataFrame(columns)


def _of_images(table: pd.DataFrame, wanted: str, images: Sequence[str], name: str) -> list[str]:
    """The column's value of each image; empty where the table does not name it."""
    image, column = (find_column(table, names, name) for names in ((*IMAGE, "path"), [wanted]))
    if image is None:
        raise UserError(
            f"{name} has no column for the image ({', '.join(IMAGE)}), so {wanted!r} makes no "
            f"subgroup. Add one."
        )
    values = dict(zip(table[image], table[column], strict=True))
    lost = [k for k in dict.fromkeys(images) if k not in values]
    free = sorted(set(values).difference(images))
    matched = match_by_form(lost, free, any_folder=True, are_files=False).found
    return [str(values.get(matched.get(k, k), "")) for k in images]


def bands(name: str, values: Sequence[str]) -> list[str]:
    """Values as subgroups: as they are, or many numbers in bands; UNKNOWN where there is none."""
    texts = [v.strip() for v in values]
    is_age = bare(name) in ("age", "patientage")
    if is_age:
        texts = [m[1] if (m := _AGE.fullmatch(v)) else v for v in texts]
    numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(float)
    known = np.array([bool(v) for v in texts], bool)
    if not np.isfinite(numbers[known]).all() or len(set(numbers[known])) <= _MOST:
        return [v or UNKNOWN for v in texts]
    if is_age:
        low = [int(n // 10 * 10) if np.isfinite(n) else 0 for n in numbers]
        return [f"{n} to {n + 9}" if k else UNKNOWN for n, k in zip(low, known, strict=True)]
    edges = np.unique(np.quantile(numbers[known], [0, 0.25, 0.5, 0.75, 1]))
    place = np.clip(np.searchsorted(edges, numbers, "right") - 1, 0, len(edges) - 2)
    return [
        f"{edges[p]:g} to {edges[p + 1]:g}" if k else UNKNOWN
        for p, k in zip(place, known, strict=True)
    ]

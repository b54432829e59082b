"""What makes subgroups of images: columns of the label or metadata file, as sex, age or site, and
what headers tell of scanner and age (`ich.data.subgroups.facts`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ich.base.config import Config, DataConfig, UserError
from ich.base.files import DamagedError, replacing, tell_damaged
from ich.base.progress import StageCallback, stage
from ich.data.cohorts import CohortFiles, cohort_files, open_store
from ich.data.manifest import IMAGE, PATIENT, STUDY
from ich.data.patients import Pseudonyms, scan_headers
from ich.data.subgroups.facts import FACTS, UNKNOWN
from ich.data.tables.names import match_by_form
from ich.data.tables.reading import bare, find_column, read_table

_MOST = 12  # different numbers, above which bands are made of them
_AGE = re.compile(r"0*(\d+)Y?")  # DICOM PS3.5 6.2, AS: 045Y
# Nobody is to be told apart by a table of subgroups.
_OF_A_PERSON = (*IMAGE, *PATIENT, *STUDY, "PatientName", "PatientBirthDate", "AccessionNumber")


class Subgroup(NamedTuple):
    """What N images are parted by. source: where that stands, in words. values: N texts."""

    source: str
    values: list[str]


def read_subgroups(
    data: DataConfig, names: Sequence[str], images: Sequence[str], files: CohortFiles | None = None
) -> dict[str, Subgroup]:
    """The subgroup of N images by each name: of a column, else of a header fact. Of a column of
    more than 12 different numbers the decade, if it is an age, else the quarter of the images.

    Args:
        data: whose `labels` and `metadata` have the columns.
        names: of columns, or of `FACTS`.
        images: N ids, as the labels have them; none to check the names alone.
        files: of the images' cohort, where `keep_header_facts` put the facts.

    Raises:
        UserError: no such column or fact, one that names persons or images, or a fact that was not
            kept.
    """
    tables = _tables(data)
    subgroups = {}
    for wanted in names:
        if bare(wanted) in map(bare, _OF_A_PERSON):
            raise UserError(
                f"report.subgroups names {wanted!r}, which tells images or persons apart and makes "
                f"no subgroup. Name columns as Manufacturer, PatientSex or PatientAge."
            )
        having = [name for name, table in tables.items() if find_column(table, [wanted], name)]
        if having:
            values = _of_images(tables[having[0]], wanted, images, having[0])
            subgroups[wanted] = Subgroup(having[0], bands(wanted, values))
        elif fact := _fact(wanted):
            subgroups[wanted] = Subgroup("the files' headers", _of_headers(files, fact, images))
        else:
            there = ", ".join(str(c) for table in tables.values() for c in table) or "no column"
            raise UserError(
                f"report.subgroups names {wanted!r}, which is no column of data.labels or "
                f"data.metadata, and no fact that headers tell ({', '.join(FACTS)}). The columns "
                f"are {there[:300]}. Name one of these, or add a column."
            )
    return subgroups


def _tables(data: DataConfig) -> dict[str, pd.DataFrame]:
    """Those that may have columns for subgroups, by what they are called."""
    paths = {
        f"the {what} file {Path(path).name}": Path(path)
        for what, path in (("label", data.labels), ("metadata", data.metadata))
        if path
    }
    return {name: read_table(path, name, IMAGE) for name, path in paths.items() if path.is_file()}


def _fact(name: str) -> str | None:
    """The header fact of this name, written as headings may be; None if there is none."""
    return next((fact for fact in FACTS if bare(fact) == bare(name)), None)


def keep_header_facts(config: Config, key: str, report: StageCallback | None = None) -> None:
    """Keeps beside a cohort what its headers tell, if `report.subgroups` names some of it that no
    table has: a report has no files to read. Headers that were scanned before are not read again.

    Args:
        config: a job of a launch.
        key: the fingerprint of its cohort.
        report: progress.
    """
    data, files = config.data, cohort_files(config, key)
    asked = [name for name in config.report.subgroups or [] if _fact(name)]
    if not asked:
        return
    try:
        _read_facts(files.header_facts)
        return
    except FileNotFoundError:
        pass
    except DamagedError as error:
        tell_damaged(f"{error}, and is made again")
    tables = _tables(data)
    if all(any(find_column(t, [name], n) for n, t in tables.items()) for name in asked):
        return
    try:
        images = files.read_columns("image_id", "path")
    except (FileNotFoundError, DamagedError):
        return  # of jobs that are done, whose cache is gone: the report says what it misses
    images = images.drop_duplicates("image_id").sort_values("image_id", ignore_index=True)
    progress, folder = stage(report, "reading headers"), Path(data.cache_dir)
    secret, paths = Pseudonyms.beside(folder), images["path"].tolist()
    store = open_store(data, report)
    scan = scan_headers(paths, store, folder, secret, data.workers, progress)
    with replacing(files.header_facts) as part:
        table = pd.concat([images["image_id"], scan[list(FACTS)]], axis=1)
        table.to_csv(part, index=False, compression={"method": "gzip", "mtime": 1})


def _read_facts(path: Path) -> pd.DataFrame:
    """
    Raises:
        FileNotFoundError: it has not been made.
        DamagedError: it was cut or edited.
    """
    try:
        facts = pd.read_csv(path, dtype=str, keep_default_na=False, compression="gzip")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever damaged files make of pandas and gzip
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"what headers tell, {path.name}, is damaged ({reason})") from None
    if facts.columns.tolist() != ["image_id", *FACTS]:
        raise DamagedError(f"what headers tell, {path.name}, is damaged (it has other columns)")
    return facts.set_index("image_id")


def _of_headers(files: CohortFiles | None, fact: str, images: Sequence[str]) -> list[str]:
    """A header fact of each image; `UNKNOWN` of one that the cohort does not have."""
    if not images:
        return []
    try:
        if files is None:
            raise FileNotFoundError
        facts = _read_facts(files.header_facts)
    except (FileNotFoundError, DamagedError) as error:
        why = f" ({error})" if isinstance(error, DamagedError) else ""
        raise UserError(
            f"report.subgroups names {fact!r}, which headers tell, but they were not read for the "
            f"report of this cohort{why}. Launch the sweep again with report.subgroups=[{fact}]: "
            f"what is finished is not trained again."
        ) from None
    return facts[fact].reindex(list(images), fill_value=UNKNOWN).tolist()


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

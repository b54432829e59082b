"""The order of slices: which follow one another along the normal of their plane, series by series.

Kept beside a cohort and apart from it, for a cohort is the same whether anybody asks for the order
or not. It comes from position columns of `data.metadata`, else from the files' headers, which are
read once (`ich.data.patients`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ich.base.config import DataConfig, UserError
from ich.base.files import DamagedError, replacing, tell_damaged
from ich.base.progress import StageCallback, stage
from ich.base.workers import run_parallel, worker_count
from ich.data.cohorts import CohortFiles
from ich.data.decode import ReadRequest
from ich.data.dicom import DicomError, Keys, along_normal, numbers
from ich.data.inputs import Inputs
from ich.data.manifest import IMAGE, PATIENT, STUDY
from ich.data.patients import (
    HEADERS_PER_START,
    Pseudonyms,
    keys_of_images,
    read_file_keys,
    scan_headers,
)
from ich.data.store import SliceStore
from ich.data.tables.reading import find_column, read_table, tell

# What metadata may call their columns, in any case; of a vector `_0`, `_1` ... follow, or it is one
# text, as DICOM (`1\2\3`) and as Python (`['1', '2', '3']`) write it.
SERIES = ("series_id", "SeriesInstanceUID")
POSITION = ("position",)  # mm along the normal
_VECTORS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6}
_NEEDED = (
    "position (ImagePositionPatient, ImageOrientationPatient)",
    "study or series (StudyInstanceUID, SeriesInstanceUID)",
)
_ORDER = ["image_id", "study", "series", "position", "readable"]
_HEADERS = 256  # that a process reads at a time
_SAME_PLACE = 0.01  # mm: headers round positions to less, and no scanner moves its table by less


@dataclass(frozen=True)
class Sequences:
    """Slices in the order in which they lie, a series after the other.

    rows: int64 [M], positions in the cache. start: int64 [S + 1], where each of S sequences begins
    in `rows`, and M. place: int64 [M], numbered through all sequences: slices at the same position
    of a series, as of two scans in one, have the same.
    """

    rows: np.ndarray
    start: np.ndarray
    place: np.ndarray

    def neighbours(self, row: np.ndarray, reach: int = 1) -> np.ndarray:
        """The slices around each, int64 [N, 2 * reach + 1], itself in the middle; at an end of its
        sequence the last one stands again.

        A slice's neighbours lie at other positions: of two at the same one, neither is the other's,
        and each has those of its own rank there, so that two scans in one series stay apart.

        Args:
            row: int64 [N], positions in the cache.
            reach: how far on either side.

        Raises:
            IndexError: one of them is in no sequence.
        """
        at = self._at[row]
        if (at < 0).any():
            raise IndexError(f"{int((at < 0).sum())} slices are in no sequence")
        place, first = self.place[at], self._first
        number = np.searchsorted(self.start, at, side="right") - 1
        lowest, highest = self.place[self.start[number]], self.place[self.start[number + 1] - 1]
        wanted = place[:, None] + np.arange(-reach, reach + 1)
        wanted = np.clip(wanted, lowest[:, None], highest[:, None])
        rank = np.minimum((at - first[place])[:, None], first[wanted + 1] - first[wanted] - 1)
        around: np.ndarray = self.rows[first[wanted] + rank]
        return around

    @cached_property
    def _at(self) -> np.ndarray:
        """Where each position in the cache stands in `rows`, -1 for those that do not."""
        at = np.full(int(self.rows.max()) + 1, -1)
        at[self.rows] = np.arange(len(self.rows))
        return at

    @cached_property
    def _first(self) -> np.ndarray:
        """Where each place begins in `rows`, and M."""
        return np.searchsorted(self.place, np.arange(self.place[-1] + 2))


def load_order(
    cfg: DataConfig,
    files: CohortFiles,
    rows: pd.DataFrame,
    store: SliceStore | None,
    report: StageCallback | None = None,
) -> pd.DataFrame:
    """Where the slices of a cohort lie, kept on disk once it is known.

    Args:
        cfg: the data.
        files: of the cohort.
        rows: its images: `image_id`, `path` and the key `study`.
        store: their files; None in a job, for which it is already known.
        report: progress.

    Returns:
        One row per image, by id: `image_id`, the keys `study` and `series`, empty where unknown,
        `position` in mm, NaN where unknown, and `readable`, whether its header could be read.

    Raises:
        UserError: it is not known yet, and there is no store to find out.
    """
    images = rows.drop_duplicates("image_id").sort_values("image_id", ignore_index=True)
    try:
        return _read_order(files.order, images["image_id"])
    except (FileNotFoundError, DamagedError) as error:
        if store is None:
            raise UserError(
                f"the order of this cohort's slices is not known yet under {files.folder} "
                f"({error}). Run `ich prepare` with the same data settings and context first."
            ) from None
        if isinstance(error, DamagedError):
            tell_damaged(f"{error}, and is made again")
    order = find_order(cfg, images, store, report)
    with replacing(files.order) as part:
        order.to_csv(part, index=False, compression={"method": "gzip", "mtime": 1})
    return order


def _read_order(path: Path, image_ids: pd.Series) -> pd.DataFrame:
    """
    Raises:
        FileNotFoundError: it has not been made.
        DamagedError: it was cut or edited.
    """
    text = dict.fromkeys(_ORDER[:3], str)
    try:
        order = pd.read_csv(
            path,
            dtype={**text, "position": float, "readable": bool},
            keep_default_na=False,
            na_values={"position": [""]},
            compression="gzip",
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever damaged files make of pandas and gzip
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"the order of slices in {path} is damaged ({reason})") from None
    if order.columns.tolist() != _ORDER or order["image_id"].tolist() != image_ids.tolist():
        raise DamagedError(f"the order of slices in {path} is damaged (it is of other images)")
    return order


def find_order(
    cfg: DataConfig, images: pd.DataFrame, store: SliceStore, report: StageCallback | None
) -> pd.DataFrame:
    """As `load_order`, from metadata or headers, in the order of the images."""
    pseudonyms = Pseudonyms.beside(Path(cfg.cache_dir))
    found = None
    if cfg.metadata is not None:
        found = read_positions(Path(cfg.metadata), images["image_id"].tolist(), pseudonyms)
        if found is None:
            tell(
                f"the metadata file {Path(cfg.metadata).name} has no positions of slices: they are "
                f"read from the files' headers"
            )
    if found is None:
        progress, folder = stage(report, "reading headers"), Path(cfg.cache_dir)
        paths = images["path"].tolist()
        found = scan_headers(paths, store, folder, pseudonyms, cfg.workers, progress)
    # What tables say of the study comes first, as in the cohort.
    study = images["study"].to_numpy()
    if "study" in found:
        study = np.where(study == "", found["study"], study)
    return pd.DataFrame(
        {
            "image_id": images["image_id"].to_numpy(),
            "study": study,
            "series": found["series"].to_numpy(),
            "position": found["position"].to_numpy(),
            "readable": found["readable"].to_numpy() if "readable" in found else True,
        }
    )


def read_positions(path: Path, images: list[str], pseudonyms: Pseudonyms) -> pd.DataFrame | None:
    """Where N images lie by a metadata file: `series`, a key or empty, and `position` in mm.

    A column `position` is taken as it is. ImagePositionPatient counts along the normal of
    ImageOrientationPatient, and without that along the axis in which the slices of a series (or,
    as far as the file tells, of a study or a patient) lie farthest apart.

    Returns:
        None if the file has no such columns.

    Raises:
        UserError: it gives an image two positions; and see `keys_of_images`.
    """
    name = f"the metadata file {path.name}"
    frame = read_table(path, name, IMAGE)
    image, series = find_column(frame, IMAGE, name), find_column(frame, SERIES, name)
    owners = (series, find_column(frame, STUDY, name), find_column(frame, PATIENT, name))
    position = _positions(frame, [c for c in owners if c], name)
    if image is None or position is None:
        return None
    known = {"": ""}
    if series is not None:
        known |= {v: pseudonyms.key("series", v) for v in frame[series].unique()}
    table = pd.DataFrame(
        {
            "image_id": frame[image],
            "series": frame[series].map(known) if series is not None else "",
            # As text: what an image that is not there has, is empty.
            "position": ["" if np.isnan(p) else repr(float(p)) for p in position],
        }
    ).drop_duplicates()
    twice = table.loc[table["image_id"].duplicated(), "image_id"]
    if len(twice):
        raise UserError(
            f"{name} gives {len(twice):,} images two series or positions (the first: "
            f"{', '.join(twice[:3])}). Mend or remove these rows."
        )
    found = keys_of_images(table.set_index("image_id"), images, path.name)
    return found.assign(position=pd.to_numeric(found["position"])).reset_index(drop=True)


def _positions(frame: pd.DataFrame, owners: list[str], name: str) -> np.ndarray | None:
    """float64 [N], mm, NaN where a row has none; None if there is no such column."""
    column = find_column(frame, POSITION, name)
    if column is not None:
        return pd.to_numeric(frame[column], errors="coerce").to_numpy(float)
    texts = {keyword: _vectors(frame, keyword, name) for keyword in _VECTORS}
    place, orientation = texts["ImagePositionPatient"], texts["ImageOrientationPatient"]
    if place is None:
        return None
    if orientation is not None:
        pairs = zip(place, orientation, strict=True)
        return np.array([along_normal(p, o) for p, o in pairs], float)
    points = pd.DataFrame(np.array([numbers(p, 3) for p in place]), index=frame.index)
    by = [frame[owners[0]]] if owners else [pd.Series(0, frame.index)]
    groups = points.groupby(by)
    extent = (groups.transform("max") - groups.transform("min")).fillna(0).to_numpy()
    return np.take_along_axis(points.to_numpy(), extent.argmax(1)[:, None], 1)[:, 0]


def _vectors(frame: pd.DataFrame, keyword: str, name: str) -> list[str] | None:
    """A vector of each row as DICOM writes it, from one column or one for each of its numbers."""
    count = _VECTORS[keyword]
    whole = find_column(frame, (keyword,), name)
    if whole is not None:
        number = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
        return ["\\".join(number.findall(text)) for text in frame[whole]]
    parts = [find_column(frame, (f"{keyword}_{n}",), name) for n in range(count)]
    if None in parts:
        return None
    return ["\\".join(values) for values in frame[parts].itertuples(index=False)]


def check_order(order: pd.DataFrame, context: str) -> None:
    """Refuses slices that cannot be put in order.

    Args:
        order: of `load_order`, or some of its rows.
        context: who asks, for messages.

    Raises:
        UserError: nobody knows where a slice lies or what it belongs to, or no two slices belong
            together.
    """
    belongs = (order["study"] != "") | (order["series"] != "")
    for known, what in (
        (
            np.isfinite(order["position"]),
            "position (ImagePositionPatient, ImageOrientationPatient)",
        ),
        (belongs, "study or series (StudyInstanceUID, SeriesInstanceUID)"),
    ):
        if not known.all():
            unknown = order.loc[~known, "image_id"]
            raise UserError(
                f"context={context} needs the order of slices, but {len(unknown):,} of "
                f"{len(order):,} images have no {what} in their header or in data.metadata (the "
                f"first: {', '.join(unknown[:3])}). Give data.metadata=FILE with columns for it, "
                f"leave these images out of the labels, or take context=slice."
            )
    if not order.duplicated(["study", "series"]).any():
        raise UserError(
            f"context={context} needs studies of several slices, but each of the {len(order):,} "
            f"images is alone in its study and series. Label all slices of each study, or take "
            f"context=slice."
        )


def order_slices(order: pd.DataFrame, row: Mapping[str, int], context: str) -> Sequences:
    """The sequences of a cohort's slices: one for each series of a study.

    Args:
        order: of `load_order`.
        row: of each image that could be decoded, its position in the cache; others are left out,
            and the slices on either side of one become neighbours.
        context: who asks, for messages.

    Raises:
        UserError: as `check_order`.
    """
    order = order[order["image_id"].isin(row.keys())]
    check_order(order, context)
    rows = order["image_id"].map(row).to_numpy(np.int64)
    sequences = sequences_of(order["study"] + "/" + order["series"], order["position"], rows)
    if twins := len(rows) - 1 - int(sequences.place[-1]):
        tell(
            f"{twins:,} of {len(rows):,} slices lie where another of their series does: they are "
            f"no neighbours of one another, and follow one another by their ids"
        )
    return sequences


def sequences_of(series: pd.Series, position: pd.Series, rows: np.ndarray) -> Sequences:
    """Of N slices, in an order that breaks ties.

    Args:
        series: whatever tells theirs apart.
        position: mm along the normal.
        rows: int64 [N], what each is called.
    """
    # By first appearance: keys have other values elsewhere, and no order may depend on them.
    number, _ = pd.factorize(series)
    place = position.to_numpy(float)
    sort = np.lexsort((place, number))  # stable
    number, place = number[sort], place[sort]
    is_first = np.diff(number, prepend=-1) != 0
    is_elsewhere = is_first | (np.diff(place, prepend=-np.inf) > _SAME_PLACE)
    return Sequences(
        rows=rows[sort],
        start=np.append(np.flatnonzero(is_first), len(rows)),
        place=np.cumsum(is_elsewhere) - 1,
    )


# Of files that belong to no cohort


class Surroundings(NamedTuple):
    """What a network sees of N files at once.

    around: int64 [N, 3], the numbers of those before, at and after each. sequence: int64 [N], all
    files, those of a series in a row and in their order.
    """

    around: np.ndarray
    sequence: np.ndarray


def surround(places: pd.DataFrame, is_usable: np.ndarray) -> Surroundings:
    """The slices around each of N files. One whose place is unknown, or that is the only one of its
    series, stands for its neighbours.

    Args:
        places: the keys `study` and `series`, empty if unknown, and `position` in mm, NaN if so.
        is_usable: bool [N]; what cannot be used is nobody's neighbour.
    """
    owner = places["study"] + "/" + places["series"]
    known = (is_usable & np.isfinite(places["position"]) & (owner != "/")).to_numpy(bool)
    own = np.arange(len(places))
    around, at, rest = np.stack([own] * 3, 1), own[known], own[~known]
    if not len(at):
        return Surroundings(around, rest)
    sequences = sequences_of(owner[known], places["position"][known], at)
    around[at] = sequences.neighbours(at)
    return Surroundings(around, np.concatenate([sequences.rows, rest]))


def read_places(
    inputs: Inputs, key: Callable[[str, str], str], workers: int | None = None
) -> pd.DataFrame:
    """Where N files lie, by their headers: `study`, `series` and `position` as `surround` takes
    them; nothing is known of a file that cannot be read.

    Args:
        inputs: the files.
        key: replaces an identifier: its kind ("study" or "series") and itself.
        workers: reading processes; None is up to one per core.
    """
    count = len(inputs)
    study, series, position = [""] * count, [""] * count, np.full(count, np.nan)
    processes = worker_count(workers, count, HEADERS_PER_START)
    for read in run_parallel(_read_places, inputs.batches(_HEADERS, ()), processes):
        for number, keys in read:
            study[number], series[number] = key("study", keys.study), key("series", keys.series)
            position[number] = keys.position
    return pd.DataFrame({"study": study, "series": series, "position": position})


def _read_places(request: ReadRequest) -> list[tuple[int, Keys]]:
    read = []
    for location, number in zip(request.locations, request.numbers, strict=True):
        # Who decodes it says why.
        with suppress(DicomError):
            read.append((number, read_file_keys(request.root, location)))
    return read

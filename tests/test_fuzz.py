"""Inputs that chance has damaged: each is read, or refused in words. `make test` tries a few of a
fixed seed; `make test-faults` thousands, of a seed from the clock that the failure names."""

from __future__ import annotations

import io
import os
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dicom_files import STORED, dataset, encoded
from made_up import write_sweep
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ich.base import provenance
from ich.base.config import Config, UserError, load_config
from ich.base.files import DamagedError
from ich.base.records import FINISHED, ComputeMode, Origin, TrackingState
from ich.base.results import SweepPaths
from ich.data.dicom import read_slice
from ich.data.elements import DicomError
from ich.data.manifest import read_labels
from ich.data.store import SliceStore

# Bytes that a damaged file of a few kilobytes may make its reader ask for. Arrow takes a
# gigabyte with its first.
_SPARE = 4 << 30
_CELLS = ["", "0", "1", "2", "-1", "1.0", "0.5", "nan", "inf", "1e-400", "0.99999999999999999999"]
_CELLS += [
    "0x1",
    "\uff11",
    "1 ",
    "true",
    '"',
    '"1"',
    "=1+1",
    "../../x",
    "\x1b[2J",
    "\0",
    "a,b",
    "a;b",
]


def _damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """One to four changes: bits, lengths, and blocks cut, zeroed, repeated or moved."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not changed:
            return b""
        first, other = sorted(int(n) for n in rng.integers(0, len(changed), 2))
        last = min(other, first + int(2 ** rng.uniform(0, 10)))
        match rng.integers(0, 7):
            case 0:
                changed[first] ^= 1 << int(rng.integers(0, 8))
            case 1:
                del changed[other:]
            case 2:
                del changed[first:last]
            case 3:
                changed[first:last] = bytes(last - first)
            case 4:
                changed[other:other] = changed[first:last]
            case 5:
                changed[first : first + 4] = rng.bytes(4)
            case 6:  # what a length or a count may be
                changed[first : first + 4] = int(2 ** rng.uniform(0, 32)).to_bytes(4, "little")
    return bytes(changed)


def _slices() -> list[bytes]:
    order = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
    plain = [encoded(dataset(STORED, syntax)) for syntax in order]
    packed = dataset(STORED)
    packed.compress(RLELossless)
    return [*plain, encoded(packed)]


def _table(rng: np.random.Generator, long: bool) -> bytes:
    """A label CSV of a few rows, with up to three of its cells made odd."""
    if long:
        rows = [["ID", "Label"]]
        rows += [[f"ID_{n:08x}_{k}", str(n % 2)] for n in range(6) for k in ("epidural", "any")]
    else:
        rows = [["image_id", "patient_id", "bleed", "any"]]
        rows += [[f"A{n}", f"P{n // 2}", str(n % 2), str(n % 2)] for n in range(6)]
    for _ in range(rng.integers(0, 4)):
        row = rows[rng.integers(0, len(rows))]
        if row:
            row[rng.integers(0, len(row))] = str(rng.choice(_CELLS))
        if rng.random() < 0.2:
            row.append(str(rng.choice(_CELLS)))
    return "\n".join(",".join(row) for row in rows).encode()


def _read_slice(rng: np.random.Generator, folder: Path, seeds: list[bytes]) -> None:
    hu = read_slice(_damaged(rng, seeds[rng.integers(0, len(seeds))])).hu
    assert hu.dtype == np.int16
    assert hu.ndim == 2
    assert hu.size > 0
    assert hu.min() >= -1024
    assert hu.max() <= 3071


def _read_table(rng: np.random.Generator, folder: Path) -> None:
    data = _table(rng, long=bool(rng.random() < 0.5))
    if rng.random() < 0.5:
        data = _damaged(rng, data)
    labels = read_labels(io.BytesIO(data), "labels.csv")
    values = labels.table[list(labels.names)].to_numpy()
    assert np.isin(values, (0, 1)).all()
    assert labels.table["image_id"].is_unique
    # Nothing is made up: each id stands in the file.
    text = data.decode("utf-8", "replace")
    assert all(image_id in text for image_id in labels.table["image_id"])


def _read_zip(rng: np.random.Generator, folder: Path, seed: bytes) -> None:
    path = folder / "slices.zip"
    path.write_bytes(_damaged(rng, seed))
    store = SliceStore.open(str(path))
    for name in store.paths:
        assert not os.path.isabs(name)  # noqa: PTH117
        assert ".." not in Path(name).parts
        try:
            store.read(name)
        except (DicomError, UserError, FileNotFoundError):
            continue


def _read_state(rng: np.random.Generator, folder: Path, sweep: SweepPaths) -> None:
    """One file of a finished sweep is damaged, and everything of it is looked at."""
    (job,) = sweep.read_record().jobs
    run = sweep.run(job)
    files = [run.config, run.result, run.metrics, run.origin, run.provenance, run.tracking]
    path = [*files, sweep.record][rng.integers(0, len(files) + 1)]
    whole = path.read_bytes()
    path.write_bytes(_damaged(rng, whole))
    try:
        sweep.read_record()
        sweep.read_results()
        for read in (run.read_config, run.read_metrics, run.read_origin, run.read_provenance):
            read()
        run.read_tracking()
        if run.read_result().status != FINISHED:
            raise DamagedError(run.read_result().reason)
        load_config(run.config)
    finally:
        path.write_bytes(whole)


def _sweep(folder: Path, composed: Callable[..., Config]) -> SweepPaths:
    """A finished sweep of one job with every file that one has."""
    sweep = write_sweep(folder / "s", {"vgg16": 1.0}, composed)
    run = sweep.run("vgg16")
    run.write_origin(Origin("cohort", "weights", "code", ComputeMode("fp32", "channels_last")))
    run.write_provenance(provenance.record())
    run.write_tracking(TrackingState("0123456789abcdef", complete=True))
    return sweep


def _archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for n, data in enumerate(_slices()):
            kind = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[n % 2]
            archive.writestr(f"p{n}/s{n}.dcm", data, compress_type=kind)
    return out.getvalue()


Read = Callable[[np.random.Generator, Path], None]
# How many in `make test` and in `make test-faults`, and what makes the reader.
KINDS: dict[str, tuple[int, int, Callable[[Path, Callable[..., Config]], Read]]] = {
    "slice": (150, 15_000, lambda *_: partial(_read_slice, seeds=_slices())),
    "table": (60, 3_000, lambda *_: _read_table),
    "zip": (60, 2_000, lambda *_: partial(_read_zip, seed=_archive())),
    "state": (20, 400, lambda *given: partial(_read_state, sweep=_sweep(*given))),
}


@contextmanager
def _little_memory() -> Iterator[None]:
    """A bomb ends in MemoryError here, and not in a machine that swaps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + _SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # it warns of what it then reads
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_damaged_input_is_read_or_refused(
    kind: str, many: bool, tmp_path: Path, composed: Callable[..., Config]
) -> None:
    in_test, in_faults, make = KINDS[kind]
    read, count = make(tmp_path, composed), in_faults if many else in_test
    seed = time.time_ns() if many else 0
    print(f"seed {seed}")
    refused = []
    for n in range(count):
        try:
            with _little_memory():
                read(np.random.default_rng([seed, n]), tmp_path)
        except (UserError, DicomError, DamagedError) as error:
            refused.append(str(error))
        except BaseException as error:
            error.add_note(f"{kind}, seed {seed}, number {n}")
            raise
    assert 0 < len(refused) < count  # the changes are neither too small nor too large
    assert [t for t in refused if not 10 < len(t) < 2000] == []

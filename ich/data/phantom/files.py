"""The folder of a phantom: DICOM files and labels in the layout of the RSNA 2019 set."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ich.base.files import naming, read_json
from ich.base.progress import ProgressCallback
from ich.base.workers import available_cores, run_parallel
from ich.data.phantom.anatomy import Scanner
from ich.data.phantom.rendering import draw_patient, identifier, inside_fov, simulate_study
from ich.data.phantom.spec import (
    GENERATOR_VERSION,
    LABELS,
    PADDING_SIGNED,
    RESCALE_INTERCEPT,
    PhantomSlice,
    PhantomSpec,
    require_int,
)


def _dataset(scanner: Scanner, ids: dict[str, str], s: PhantomSlice) -> Dataset:
    """The DICOM header and pixels of one slice, with the elements RSNA kept."""
    size = s.hu.shape[0]
    pixel = f"{scanner.fov / size:.6f}"
    raw = s.hu.astype(np.int32) - RESCALE_INTERCEPT
    if scanner.signed:
        raw = np.where(inside_fov(size), raw, PADDING_SIGNED)
    corner = -(size - 1) / 2 * scanner.fov / size
    c, t = math.cos(scanner.gantry), math.sin(scanner.gantry)
    d = Dataset()
    d.SOPInstanceUID, d.Modality, d.PatientID = s.image_id, "CT", ids["patient"]
    d.StudyInstanceUID, d.SeriesInstanceUID, d.StudyID = ids["study"], ids["series"], ""
    d.ImagePositionPatient = [f"{v:.6f}" for v in (corner, corner * c, s.z_mm - corner * t)]
    d.ImageOrientationPatient = [f"{v:.6f}" for v in (1, 0, 0, 0, c, -t)]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.Rows, d.Columns, d.PixelSpacing = size, size, [pixel, pixel]
    d.BitsAllocated, d.BitsStored = 16, 16 if scanner.signed else 12
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(scanner.signed)
    d.WindowCenter, d.WindowWidth = scanner.window
    d.RescaleIntercept, d.RescaleSlope = str(RESCALE_INTERCEPT), "1"
    d.add_new("PixelData", "OW", raw.astype("<i2" if scanner.signed else "<u2").tobytes())
    return d


def _save(path: Path, d: Dataset, signed: bool) -> None:
    """Write one dataset as a DICOM file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"2.25.{int(str(d.SOPInstanceUID)[3:], 16)}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if signed else ImplicitVRLittleEndian
    d.file_meta, d.preamble = meta, b"\0" * 128
    # Not by pydicom, which puts a traceback into the error of a full disk.
    buffer = io.BytesIO()
    d.save_as(buffer, enforce_file_format=False)
    with path.open("wb") as file:
        file.write(buffer.getvalue())


def _write_study(job: tuple[PhantomSpec, int, Path]) -> list[tuple[str, dict[str, int]]]:
    """Write one patient's files; the labels of its slices. Runs in a worker process."""
    spec, patient, folder = job
    scanner = draw_patient(spec, patient).scanner
    digits = {"patient": 8, "study": 10, "series": 10}
    ids = {k: identifier(spec.seed + i, patient, n) for i, (k, n) in enumerate(digits.items(), 1)}
    rows = []
    with pydicom.config.disable_value_validation():  # `ID_...` is no valid UID, and is RSNA's
        for s in simulate_study(spec, patient):
            _save(folder / f"{s.image_id}.dcm", _dataset(scanner, ids, s), scanner.signed)
            rows.append((s.image_id, s.labels))
    return rows


def _write_studies(
    spec: PhantomSpec, folder: Path, workers: int, progress: ProgressCallback | None
) -> dict[str, dict[str, int]]:
    """Write all patients; labels by image id."""
    rows: dict[str, dict[str, int]] = {}
    jobs = [(spec, patient, folder) for patient in range(spec.patients)]
    if progress is not None:
        progress(0, spec.patients)
    for done, study in enumerate(run_parallel(_write_study, jobs, workers), 1):
        rows.update(study)
        if progress is not None:
            progress(done, spec.patients)
    return rows


def _write_labels(path: Path, rows: dict[str, dict[str, int]]) -> None:
    """RSNA's long CSV: six rows per image."""
    lines = ["ID,Label"]
    lines += [f"{i}_{k},{rows[i][k]}" for i in sorted(rows) for k in LABELS]
    path.write_text("\n".join(lines) + "\n", encoding="ascii", newline="\n")


def _describe(spec: PhantomSpec) -> dict[str, Any]:
    return {"generator": "ich.phantom", "version": GENERATOR_VERSION, "spec": asdict(spec)}


def _is_built(out: Path, spec: PhantomSpec) -> bool:
    """True if `out` holds this phantom, False if there is nothing; else FileExistsError."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_json(out / "phantom.json")
        description = {k: found[k] for k in _describe(spec)}
    except (OSError, KeyError):
        raise FileExistsError(
            f"{out} exists and is no phantom (it has no readable phantom.json): nothing was"
            " written. Choose another folder."
        ) from None
    if description != _describe(spec):
        raise FileExistsError(
            f"{out} holds another phantom ({description['spec']}, generator version "
            f"{description['version']}), not {asdict(spec)}, version {GENERATOR_VERSION}: nothing "
            f"was written. Choose another folder, or remove it with: rm -r {out}"
        )
    return True


def _make_parent(out: Path) -> None:
    """Make the folder that is to hold `out`, or say at once that nothing can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror} ({error.filename}).") from None
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {out}: no permission to write in {out.parent}.")


def write_phantom(
    out: Path,
    spec: PhantomSpec,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write the phantom in the RSNA layout: all of it or nothing. Returns `out`.

    An equal phantom at `out` is left as it is; anything else there is a FileExistsError. Of two
    processes one builds, and the other waits.
    """
    out = Path(out)
    if workers is not None:
        require_int("workers", workers, 1, 1024)
    if _is_built(out, spec):
        return out
    _make_parent(out)
    with naming(out), _building(out) as folder:
        if _is_built(out, spec):  # by another process, that was waited for
            return out
        images = folder / "stage_2_train"
        images.mkdir()
        count = min(workers or available_cores(), spec.patients)
        rows = _write_studies(spec, images, count, progress)
        _write_labels(folder / "stage_2_train.csv", rows)
        description = json.dumps({**_describe(spec), "slices": len(rows)}, indent=2) + "\n"
        (folder / "phantom.json").write_text(description, encoding="utf-8")
        folder.rename(out)
    return out


_LOCK = ".lock"


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, but for its lock, to be renamed, which is atomic; of two
    processes the second waits.

    Of one name: whoever builds next takes away what a killed process has left.
    """
    folder = out.parent / f".{out.name}.part"
    while (handle := _locked(folder)) is None:
        pass
    with handle:
        for left in folder.iterdir():
            if left.name != _LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
        finally:
            if _holds(handle, folder):  # it was not renamed
                shutil.rmtree(folder, ignore_errors=True)
        (out / _LOCK).unlink(missing_ok=True)


def _locked(folder: Path) -> IO[str] | None:
    """Makes a folder and holds the lock in it; None if it was renamed or removed meanwhile."""
    folder.mkdir(exist_ok=True)
    try:
        handle = (folder / _LOCK).open("w")
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_EX)
    if _holds(handle, folder):
        return handle
    handle.close()
    return None


def _holds(handle: IO[str], folder: Path) -> bool:
    lock = folder / _LOCK
    return lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat())

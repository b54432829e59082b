"""The folder of a phantom: DICOM files and labels in the layout of the RSNA 2019 set."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ich.base.files import lock
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
    d.save_as(path, enforce_file_format=False)


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
        description = json.loads((out / "phantom.json").read_text(encoding="utf-8"))
        description = {k: description[k] for k in _describe(spec)}
    except (OSError, ValueError, KeyError, TypeError):
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

    An equal phantom at `out` is left as it is; anything else there is a FileExistsError.
    """
    out = Path(out)
    if workers is not None:
        require_int("workers", workers, 1, 1024)
    if _is_built(out, spec):
        return out
    _make_parent(out)
    # Beside `out`, so that the rename stays on one file system and is atomic.
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        images = temporary / "stage_2_train"
        images.mkdir()
        count = min(workers or available_cores(), spec.patients)
        rows = _write_studies(spec, images, count, progress)
        _write_labels(temporary / "stage_2_train.csv", rows)
        description = json.dumps({**_describe(spec), "slices": len(rows)}, indent=2) + "\n"
        (temporary / "phantom.json").write_text(description, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(out)
    except OSError:
        if not _is_built(out, spec):  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def ensure_phantom(out: Path, spec: PhantomSpec, progress: ProgressCallback | None = None) -> Path:
    """The phantom at `out`, made at first use; of two processes one builds, the other waits."""
    out = Path(out)
    if _is_built(out, spec):
        return out
    _make_parent(out)
    with lock(out.parent / f".{out.name}.lock"):
        return write_phantom(out, spec, progress=progress)

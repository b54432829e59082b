"""DICOM files made in memory, for tests of reading them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian

CANARY = "CANARY^PATIENT"
STORED = np.random.default_rng(0).integers(-2000, 5000, (12, 10)).astype(np.int16)


def dataset(stored: np.ndarray, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    """A CT slice of these stored values, int16 or uint16 [H, W], with intercept -1024."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = CTImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = UID("2.25.1")
    d.file_meta.TransferSyntaxUID = syntax
    d.PatientName = d.PatientID = CANARY
    d.StudyInstanceUID = "2.25.2"
    d.Modality, d.SamplesPerPixel, d.PhotometricInterpretation = "CT", 1, "MONOCHROME2"
    d.Rows, d.Columns = stored.shape
    signed = stored.dtype.kind == "i"
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation = 15, int(signed)
    d.WindowCenter, d.WindowWidth = ["40", "300"], ["80", "1500"]
    d.RescaleIntercept, d.RescaleSlope = "-1024", "1"
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    d.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder(order)).tobytes())
    return d


def encoded(d: Dataset, **changes: object) -> bytes:
    """The file's bytes, with these elements set, or removed if None."""
    for keyword, value in changes.items():
        if value is None:
            delattr(d, keyword)
        else:
            setattr(d, keyword, value)
    out = io.BytesIO()
    d.save_as(out, enforce_file_format=True)
    return out.getvalue()


def damage_files(files: Sequence[Path]) -> list[str]:
    """Breaks files, each in another way than the next: emptied, cut short, HTML, gone. Returns
    their names without ending, which are image ids."""
    for n, file in enumerate(files):
        if n % 4 == 0:
            file.write_bytes(b"")
        elif n % 4 == 1:
            file.write_bytes(file.read_bytes()[:-2000])
        elif n % 4 == 2:
            file.write_text("<html>not found</html>")
        else:
            file.unlink()
    return [f.stem for f in files]

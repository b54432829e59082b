"""DICOM files made in memory, for tests of reading them."""

from __future__ import annotations

import io

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

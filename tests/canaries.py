"""Identifiers that nobody may ever find again (FAULTS 36)."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pydicom

HEADERS = {
    "PatientName": "CANARY^NAME",
    "PatientID": "CANARY_PATIENT",
    "PatientBirthDate": "19010203",
    "StudyDate": "19040506",
    "StudyInstanceUID": "1.2.999.77777.1",
    "SeriesInstanceUID": "1.2.999.77777.2",
}
WORDS = (b"CANARY", b"19010203", b"19040506", b"1.2.999.77777")


class Canaries:
    """A phantom at `root` whose every header carries them, a private tag and a broken file too."""

    def __init__(self, phantom: Path, root: Path) -> None:
        self.root = root
        (root / "stage_2_train").mkdir(parents=True)
        (root / "stage_2_train.csv").write_bytes((phantom / "stage_2_train.csv").read_bytes())
        for n, file in enumerate(sorted((phantom / "stage_2_train").glob("*.dcm"))):
            dataset = pydicom.dcmread(file)
            for keyword, value in HEADERS.items():
                dataset.pop(keyword, None)
                setattr(dataset, keyword, value + (str(n % 9) if "ID" in keyword else ""))
            private = dataset.private_block(0x0009, "CANARY_CREATOR", create=True)
            private.add_new(1, "LO", "CANARY_TAG")
            dataset.save_as(root / "stage_2_train" / file.name)
        (root / "stage_2_train" / "broken.dcm").write_bytes(b"CANARY" * 100)

    def seen_in(self, folder: Path, *texts: str) -> list[str]:
        """Where one of them stands: in texts, or in any file at any depth, unpacked."""
        found = [text[:200] for text in texts if any(w.decode() in text for w in WORDS)]
        files = [p for p in folder.rglob("*") if p.is_file() and self.root not in p.parents]
        assert len(files) > 6
        for path in files:
            if any(word in content for content in _contents(path) for word in WORDS):
                found.append(str(path))
        return found


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):  # .npz
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name.encode() + archive.read(name)

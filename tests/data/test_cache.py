"""Slices on disk: decoded once, whatever ends a build; found damaged; read in place from a zip."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import damage_files
from sweeps import alive, wait_for

from ich.base.config import UserError
from ich.base.workers import run_parallel
from ich.data import cache as cache_module
from ich.data import cache_folder
from ich.data import store as store_module
from ich.data.cache import Cache, build_cache, read_cache, verify_cache
from ich.data.cache_folder import CacheFolder
from ich.data.content import sample_crcs
from ich.data.decode import DecodeRequest, checksum, decode_to_cache, resize_area, square
from ich.data.dicom import DicomError, read_hu
from ich.data.store import Location, SliceStore, Unreadable, read_bytes, read_dicom, read_directory

SIZE = 32


def images_of(store: SliceStore) -> pd.DataFrame:
    paths = [p for p in store.paths if p.endswith(".dcm")]
    return pd.DataFrame({"image_id": [Path(p).stem for p in paths], "path": paths})


def build(root: Path, folder: Path, images: pd.DataFrame | None = None, **options: object) -> Cache:
    store = SliceStore.open(str(root))
    chosen = images_of(store) if images is None else images
    defaults: dict[str, object] = {"max_quarantine": 0.0, "workers": 1}
    return build_cache(chosen, store, folder, SIZE, **(defaults | options))  # type: ignore[arg-type]


def slices_in(folder: Path) -> CacheFolder:
    """The only cache in a folder."""
    (path,) = folder.glob(f"hu{SIZE}-*/")
    return CacheFolder(path, SIZE)


def verify(root: Path, folder: Path, progress: Count | None = None) -> tuple[list[str], list[str]]:
    return verify_cache(SliceStore(root), slices_in(folder), 1, progress)


class Count:
    """A progress that remembers how many slices were to be decoded."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.total = total


@pytest.fixture
def copy(phantom: Path, tmp_path: Path) -> Path:
    """A copy of the phantom to damage."""
    return Path(shutil.copytree(phantom, tmp_path / "it's a copy"))


def files_of(root: Path) -> list[Path]:
    return sorted((root / "stage_2_train").glob("*.dcm"))


def zipped(root: Path, target: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in files_of(root):
            archive.write(file, f"rsna/{file.relative_to(root).as_posix()}")
    return target


# What is decoded


def test_a_slice_is_the_files_hu_resized(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    assert cache.hu.dtype == np.int16
    assert not cache.hu.flags.writeable
    assert len(cache.row) == len(files_of(phantom))
    for file in files_of(phantom)[::20]:
        hu = resize_area(square(read_hu(file.read_bytes())), SIZE)
        assert np.array_equal(cache.hu[cache.row[file.stem]], hu)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folder_and_zip_give_the_same_slices(phantom: Path, tmp_path: Path, method: int) -> None:
    a = build(phantom, tmp_path / "a", workers=2)
    b = build(zipped(phantom, tmp_path / "slices.zip", method), tmp_path / "b", workers=2)
    assert a.row.keys() == b.row.keys()
    for image in list(a.row)[::10]:
        assert np.array_equal(a.hu[a.row[image]], b.hu[b.row[image]])


def test_several_processes_decode_the_same_as_one(phantom: Path, tmp_path: Path) -> None:
    one, three = (build(phantom, tmp_path / str(n), workers=n) for n in (1, 3))
    assert one.row == three.row
    assert np.array_equal(one.hu, three.hu)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_the_cache_names_no_patient(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    keys = pydicom.dcmread(files_of(phantom)[0])
    texts = [p.read_text() for p in cache.folder.iterdir() if p.name != "hu.i16"]
    assert len(texts) == 3
    for text in texts:
        for secret in (keys.PatientID, keys.StudyInstanceUID, keys.SeriesInstanceUID):
            assert secret not in text


@pytest.mark.parametrize(
    ("side", "size"), [(512, 128), (512, 320), (512, 256), (512, 224), (64, 45), (45, 64), (37, 16)]
)
def test_resizing_is_the_exact_area_average(side: int, size: int) -> None:
    hu = np.random.default_rng(0).integers(-1024, 3072, (side, side)).astype(np.int16)
    # Each pixel repeated `size` times, then means over `side` of these: no fraction is involved.
    weights = np.repeat(np.eye(side), size, axis=0).reshape(size, side, side).mean(1)
    out = resize_area(hu, size)
    assert out.dtype == np.int16
    assert np.abs(out - weights @ hu @ weights.T).max() <= 0.501


def test_resizing_to_the_same_size_changes_nothing() -> None:
    hu = np.arange(-72, 72, dtype=np.int16).reshape(12, 12)
    assert np.array_equal(resize_area(hu, 12), hu)


def test_slices_that_are_not_square_are_padded_with_air() -> None:
    out = square(np.ones((638, 490), np.int16))
    assert out.shape == (638, 638)
    assert out[:, :74].max() == -1024
    assert out[:, 74:564].min() == 1


# What is not decoded again


def test_what_is_decoded_is_not_decoded_again(phantom: Path, tmp_path: Path) -> None:
    first = build(phantom, tmp_path)
    images = images_of(SliceStore(phantom)).sample(frac=1, random_state=0)
    count = Count()
    again = build(phantom, tmp_path, images, progress=count)
    assert count.total == 0
    assert again.row == first.row
    assert list(again.row) == images["image_id"].tolist()


def test_a_larger_cohort_decodes_only_what_is_new(phantom: Path, tmp_path: Path) -> None:
    images = images_of(SliceStore(phantom))
    small = build(phantom, tmp_path, images.iloc[::3])
    before = small.hu.copy()
    count = Count()
    large = build(phantom, tmp_path, progress=count)
    assert count.total == len(images) - len(small.row)
    assert {i: large.row[i] for i in small.row} == small.row
    assert np.array_equal(large.hu[: len(before)], before)
    whole = build(phantom, tmp_path / "whole")
    for image in list(whole.row)[::7]:
        assert np.array_equal(large.hu[large.row[image]], whole.hu[whole.row[image]])


def test_a_changed_file_is_decoded_anew_and_its_old_slice_kept(copy: Path, tmp_path: Path) -> None:
    first = build(copy, tmp_path / "cache")
    a, b = files_of(copy)[:2]
    shutil.copy(a, b)
    os.utime(b, ns=(1, 1))  # older than before: any other time counts
    before = first.hu.copy()
    count = Count()
    second = build(copy, tmp_path / "cache", progress=count)
    assert count.total == 1
    assert np.array_equal(second.hu[second.row[b.stem]], before[first.row[a.stem]])
    assert np.array_equal(first.hu, before)  # a job that runs meanwhile


def test_a_replaced_member_of_a_zip_is_decoded_anew(copy: Path, tmp_path: Path) -> None:
    archive = zipped(copy, tmp_path / "slices.zip")
    build(archive, tmp_path / "cache")
    a, b = files_of(copy)[:2]
    shutil.copy(a, b)
    zipped(copy, archive)
    count = Count()
    cache = build(archive, tmp_path / "cache", progress=count)
    assert count.total == 1
    assert np.array_equal(cache.hu[cache.row[a.stem]], cache.hu[cache.row[b.stem]])


# What ends a build

BUILD = """
import sys, time
from pathlib import Path
import pandas as pd
from ich.data import cache, cache_folder
from ich.data.store import SliceStore
cache_folder._SYNC_SECONDS, cache._CHUNK = 0.0, 4
root, folder, out, workers, wait = sys.argv[1:]
store = SliceStore.open(root)
paths = [p for p in store.paths if p.endswith(".dcm")]
images = pd.DataFrame({"image_id": [Path(p).stem for p in paths], "path": paths})
def progress(done, total):
    Path(out).write_text(f"{done} {total}")
    time.sleep(float(wait))
cache.build_cache(images, store, Path(folder), 32, 0.0, int(workers), progress)
"""


def start(root: Path, folder: Path, out: Path, workers: int, wait: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, root, folder, out, str(workers), str(wait)]
    return subprocess.Popen(list(map(str, command)), start_new_session=True)


def journaled(folder: Path) -> int:
    return sum(len(p.read_text().splitlines()) - 1 for p in folder.glob("*/index.csv"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_where_it_was(phantom: Path, tmp_path: Path, workers: int) -> None:
    folder, total = tmp_path / "cache", len(files_of(phantom))
    process = start(phantom, folder, tmp_path / "out", workers, wait=0.05)
    wait_for(lambda: journaled(folder) >= 12)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(process.pid))  # its worker processes and the resource tracker
    kept = journaled(folder)
    assert 12 <= kept < total
    count = Count()
    cache = build(phantom, folder, progress=count)
    assert count.total == total - kept
    assert len(cache.row) == len(set(cache.row.values())) == total
    whole = build(phantom, tmp_path / "whole")
    for image, row in whole.row.items():
        assert np.array_equal(cache.hu[cache.row[image]], whole.hu[row])
    assert verify(phantom, folder) == ([], [])


def test_two_builds_at_once_decode_once(phantom: Path, tmp_path: Path) -> None:
    folder, total = tmp_path / "cache", len(files_of(phantom))
    both = [start(phantom, folder, tmp_path / f"out{i}", 1, wait=0.01) for i in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert journaled(folder) == total
    assert sum((tmp_path / f"out{i}").exists() for i in range(2)) == 1


def test_a_process_whose_build_is_gone_writes_nothing(phantom: Path, tmp_path: Path) -> None:
    target = tmp_path / "hu.i16"
    target.write_bytes(b"")
    (location,) = SliceStore(phantom).locate([images_of(SliceStore(phantom))["path"].iloc[0]])
    with pytest.raises(RuntimeError, match="the build was ended"):
        decode_to_cache(DecodeRequest(phantom, [location], [0], str(target), SIZE, builder=-1))
    assert target.read_bytes() == b""


def test_an_interrupted_build_keeps_what_it_decoded(phantom: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(phantom, tmp_path, progress=stop)
    count = Count()
    cache = build(phantom, tmp_path, progress=count)
    assert count.total == len(cache.row) - 64


def test_a_full_disk_is_said_and_keeps_what_was_there(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(SliceStore(phantom))
    first = build(phantom, tmp_path, images[:10])
    before = first.hu.copy()
    real, calls = os.pwrite, iter(range(1000))

    def full(handle: int, data: memoryview, offset: int) -> int:
        if next(calls) >= 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:1000], offset)  # in parts, as a filling disk may write

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(cache_module, "_CHUNK", 4)
    message = r"No space left on device\). Free space there, or set data.cache_dir .*is kept"
    with pytest.raises(UserError, match=message):
        build(phantom, tmp_path)
    monkeypatch.undo()
    known = read_cache(images[:10], slices_in(tmp_path), tmp_path)
    assert np.array_equal(known.hu[:10], before)
    count = Count()
    assert len(build(phantom, tmp_path, progress=count).row) == len(images)
    assert 0 < count.total < len(images) - 10
    assert verify(phantom, tmp_path) == ([], [])


def test_a_worker_process_that_meets_a_full_disk_says_so(phantom: Path, tmp_path: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))" + BUILD
    arguments = [phantom, tmp_path / "cache", tmp_path / "out", "2", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ich.base.config.UserError: the decoded slices cannot be written" in done.stderr
    assert "(File too large). Free space there" in done.stderr


def test_too_little_space_is_said_before_decoding(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(UserError, match=r"decoded slices need 0.0 GB under .* are free. Set"):
        build(phantom, tmp_path)


def test_a_killed_worker_process_is_said(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "run_parallel", lambda f, j, w: run_parallel(_kill, j, 2))
    with pytest.raises(UserError, match="a decoding process was killed.* data.workers .*is kept"):
        build(phantom, tmp_path)


def _kill(chunk: DecodeRequest) -> list:
    if os.getpid() != chunk.builder:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return decode_to_cache(chunk)


# The journal


def test_a_cut_last_line_is_no_line(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    index = cache.folder / "index.csv"
    index.write_bytes(index.read_bytes()[:-5])
    images = images_of(SliceStore(phantom))
    with pytest.raises(UserError, match="1 of the .* slices are not decoded yet"):
        read_cache(images, slices_in(tmp_path), tmp_path)
    count = Count()
    again = build(phantom, tmp_path, progress=count)
    assert count.total == 1
    assert again.row == cache.row
    for length in (0, 7):  # cut in the heading
        index.write_bytes(index.read_bytes()[:length])
        assert len(build(phantom, tmp_path).row) == len(images)


def test_a_damaged_journal_is_refused_by_name(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    index = cache.folder / "index.csv"
    index.write_text(index.read_text().replace("\n3,", "\nx,"))
    with pytest.raises(UserError, match=r"index.csv, is damaged \(.*'x'.* Remove the folder"):
        build(phantom, tmp_path)


def test_slices_that_were_cut_are_decoded_again(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    total, slices = len(cache.row), cache.folder / "hu.i16"
    del cache
    os.truncate(slices, (total - 5) * SIZE * SIZE * 2 - 1)
    count = Count()
    assert len(build(phantom, tmp_path, progress=count).row) == total
    assert count.total == 6


def test_a_strange_file_name_is_kept_or_refused(phantom: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    names = ["a,\"b\" 'c'.dcm", "größe 头.dcm", "line\nbreak.dcm"]
    for name in names:
        shutil.copy(files_of(phantom)[0], root / name)
    for _ in range(2):
        cache = build(root, tmp_path / "cache", max_quarantine=0.5)
        assert len(cache.row) == 2
        assert cache.quarantine["reason"].tolist() == ["the file's name holds a line break"]


# Reading without looking


def test_a_cache_is_read_without_the_files(copy: Path, tmp_path: Path) -> None:
    store = SliceStore(copy)
    images = images_of(store)
    images.loc[3, "path"] = ""  # an image without a file
    files_of(copy)[5].write_text("<html>")
    built = build(copy, tmp_path / "cache", images, max_quarantine=0.5)
    shutil.rmtree(copy)
    read = read_cache(images, slices_in(tmp_path / "cache"), tmp_path / "cache")
    assert read.row == built.row
    assert np.array_equal(read.hu, built.hu)
    pd.testing.assert_frame_equal(read.quarantine, built.quarantine)
    assert read.quarantine["image_id"].tolist() == images["image_id"][[3, 5]].tolist()
    pd.testing.assert_frame_equal(pd.read_csv(read.folder / "quarantine.csv"), read.quarantine)
    part = read_cache(images[:3], slices_in(tmp_path / "cache"), tmp_path / "cache")
    assert len(part.row) == 3
    assert part.quarantine.empty


def test_slices_that_are_not_there_are_counted(phantom: Path, tmp_path: Path) -> None:
    store = SliceStore(phantom)
    images = images_of(store)
    message = r"{} of the {} slices are not decoded yet under .*Run `ich prepare`"
    with pytest.raises(UserError, match=message.format(len(images), len(images))):
        read_cache(images, None, tmp_path)
    build(phantom, tmp_path, images[:-2])
    with pytest.raises(UserError, match=message.format(2, len(images))):
        read_cache(images, slices_in(tmp_path), tmp_path)


# Verifying


def test_a_flipped_byte_is_found_and_decoded_again(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    images = images_of(SliceStore(phantom))
    assert verify(phantom, tmp_path) == ([], [])
    before = cache.hu.copy()
    image = images["image_id"].iloc[7]
    with (cache.folder / "hu.i16").open("r+b") as file:
        file.seek(cache.row[image] * SIZE * SIZE * 2 + 1001)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    count = Count()
    assert verify(phantom, tmp_path, count) == ([images["path"].iloc[7]], [])
    assert count.total == 2 * len(images)  # slices, and the files that they are of
    with pytest.raises(UserError, match="1 of the .* slices are not decoded yet"):
        read_cache(images, slices_in(tmp_path), tmp_path)
    count = Count()
    again = build(phantom, tmp_path, progress=count)
    assert count.total == 1
    assert np.array_equal(again.hu[again.row[image]], before[cache.row[image]])
    assert verify(phantom, tmp_path) == ([], [])


def test_slices_that_are_gone_are_found(phantom: Path, tmp_path: Path) -> None:
    cache = build(phantom, tmp_path)
    (cache.folder / "hu.i16").unlink()
    assert len(verify(phantom, tmp_path)[0]) == len(cache.row)
    assert len(build(phantom, tmp_path).row) == len(cache.row)


def test_a_file_of_other_bytes_under_the_same_name_size_and_date_is_found_and_decoded_again(
    copy: Path, tmp_path: Path
) -> None:
    first = build(copy, tmp_path / "cache")
    # One whose bytes stand for no other's in the data set's identity.
    images = images_of(SliceStore(copy))
    sampled = sample_crcs(SliceStore(copy), images["path"].tolist())
    file = next(copy / p for p in images["path"] if p not in sampled)
    was, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    count = Count()
    assert build(copy, tmp_path / "cache", progress=count).row == first.row
    assert count.total == 0
    assert verify(copy, tmp_path / "cache") == ([], [file.relative_to(copy).as_posix()])
    second = build(copy, tmp_path / "cache", progress=count)
    assert count.total == 1
    assert second.row[file.stem] != first.row[file.stem]
    assert verify(copy, tmp_path / "cache") == ([], [])


# Moved


def test_a_data_set_keeps_its_slices_wherever_it_lies_and_whatever_its_dates(
    copy: Path, tmp_path: Path
) -> None:
    first, count = build(copy, tmp_path / "cache"), Count()
    (copy / ".DS_Store").touch()
    files_of(copy)[0].touch()
    assert build(copy, tmp_path / "cache", progress=count).row == first.row
    other = Path(shutil.copytree(copy, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    shutil.rmtree(copy)
    assert build(other, tmp_path / "cache", progress=count).row == first.row
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in files_of(other):
            archive.write(file, file.relative_to(other).as_posix())
    assert build(packed, tmp_path / "cache", progress=count).row == first.row
    assert count.total == 0
    assert len(list((tmp_path / "cache").glob("hu*/"))) == 1


@pytest.mark.parametrize("changed", [1, 1000])
def test_another_version_of_a_data_set_under_the_same_names_gets_slices_of_its_own(
    copy: Path, tmp_path: Path, changed: int
) -> None:
    """As a denoised one: its files have the same names and sizes, all or some with other pixels."""
    first = build(copy, tmp_path / "cache")
    before = first.hu.copy()
    other = Path(shutil.copytree(copy, tmp_path / "denoised"))
    for file in files_of(other)[:changed]:
        data = bytearray(file.read_bytes())
        data[-2001:-1:2] = bytes(1000)
        was = file.stat()
        file.write_bytes(data)
        if changed > 1:  # an archive may give all files one date
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    image = files_of(other)[0].stem
    for _ in range(2):
        second = build(other, tmp_path / "cache")
        assert second.folder != first.folder
        assert (second.hu[second.row[image]] != before[first.row[image]]).any()
        again = build(copy, tmp_path / "cache")
        assert again.folder == first.folder
        assert np.array_equal(again.hu, before)


@pytest.mark.parametrize("length", [512, 578])
def test_the_checksum_tells_every_flipped_bit(length: int) -> None:
    data = bytearray(np.random.default_rng(0).bytes(length))
    sound = checksum(bytes(data))
    for place in range(length):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(bytes(data)) != sound
            data[place] ^= 1 << bit


# Quarantine


def damage(root: Path, every: int) -> list[str]:
    """Breaks some files, each in another way; returns their image ids."""
    return damage_files(files_of(root)[::every])


def test_bad_slices_are_quarantined_with_their_reason(copy: Path, tmp_path: Path) -> None:
    images = images_of(SliceStore(copy))
    bad = damage(copy, 30)
    cache = build(copy, tmp_path / "cache", images, max_quarantine=0.1)
    assert set(cache.quarantine["image_id"]) == set(bad)
    reasons = cache.quarantine["reason"]
    assert reasons.str.contains("empty|cannot be decoded|not a DICOM file|missing").all()
    assert reasons.nunique() == 4
    assert set(cache.row) == set(images["image_id"]) - set(bad)
    count = Count()
    again = build(copy, tmp_path / "cache", images, max_quarantine=0.1, progress=count)
    assert count.total == 0
    assert again.row == cache.row


def test_too_many_bad_slices_stop_the_build_early_and_keep_the_good(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK", 8)
    images = images_of(SliceStore(copy))
    damage(copy, 5)
    count = Count()
    message = (
        r"\d of \d+ slices cannot be used, more than data.max_quarantine=0.01 allows; the decoding "
        r"stopped after \d+ of them.*the file is empty \(\d+\).*Mend data.root, or raise"
    )
    with pytest.raises(UserError, match=message):
        build(copy, tmp_path / "cache", images, max_quarantine=0.01, progress=count)
    assert count.total == len(images)
    kept = journaled(tmp_path / "cache")
    assert 0 < kept < len(images) / 2
    build(copy, tmp_path / "cache", images, max_quarantine=1.0, progress=count)
    assert count.total == len(images) - kept


def test_the_quarantine_limit_holds_for_a_cache_that_is_there(copy: Path, tmp_path: Path) -> None:
    images = images_of(SliceStore(copy))
    bad = damage(copy, 5)
    build(copy, tmp_path / "cache", images, max_quarantine=1.0)
    with pytest.raises(UserError, match=f"{len(bad)} of .* more than data.max_quarantine=0.01"):
        build(copy, tmp_path / "cache", images, max_quarantine=0.01)


def test_a_mended_file_leaves_the_quarantine(copy: Path, tmp_path: Path) -> None:
    file = files_of(copy)[0]
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    assert len(build(copy, tmp_path / "cache", max_quarantine=1.0).quarantine) == 1
    file.write_bytes(data)
    count = Count()
    assert build(copy, tmp_path / "cache", progress=count).quarantine.empty
    assert count.total == 1


def test_a_new_decoder_is_tried_on_what_failed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_of(copy)[0].write_text("needs a codec")
    count = Count()
    build(copy, tmp_path / "cache", max_quarantine=1.0)
    monkeypatch.setattr(cache_folder, "_importable", lambda names: ["another"])
    build(copy, tmp_path / "cache", max_quarantine=1.0, progress=count)
    assert count.total == 1


def test_a_file_that_could_not_be_read_is_tried_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, location: Location, head: int | None) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store_module, "_read_file", fail)
    cache = build(copy, tmp_path / "cache", max_quarantine=1.0)
    assert cache.quarantine["reason"].unique().tolist() == ["cannot be read (OSError)"]
    monkeypatch.undo()
    assert build(copy, tmp_path / "cache").quarantine.empty


# Files that are none


def test_links_pipes_and_folders_are_refused(phantom: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.dcm").symlink_to(files_of(phantom)[0])
    os.mkfifo(root / "pipe.dcm")
    (root / "folder.dcm").mkdir()
    paths = ["link.dcm", "pipe.dcm", "folder.dcm", "none.dcm"]
    images = pd.DataFrame({"image_id": paths, "path": paths})
    cache = build(root, tmp_path / "cache", images, max_quarantine=1.0)
    assert cache.quarantine["reason"].tolist() == [
        "a symbolic link, which is not followed",
        "not a regular file",
        "not a regular file",
        "the file is missing",
    ]


def test_a_file_that_changes_or_is_too_large_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.dcm"
    file.write_bytes(b"abc")
    (location,) = SliceStore(tmp_path).locate(["a.dcm"])
    assert read_bytes(tmp_path, location) == b"abc"
    with pytest.raises(DicomError, match="the file has 3 bytes, more than 2"):
        read_bytes(tmp_path, location, limit=2)
    file.write_bytes(b"abcd")
    with pytest.raises(DicomError, match="the file changed while it was looked at"):
        read_bytes(tmp_path, location)
    os.truncate(file, 1 << 40)  # sparse
    (location,) = SliceStore(tmp_path).locate(["a.dcm"])
    with pytest.raises(DicomError, match="more than 67,108,864"):
        read_bytes(tmp_path, location)


# Archives


def members(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read_all(path: Path) -> dict[str, bytes]:
    store = SliceStore.open(str(path))
    located = store.locate(store.paths)
    return {at.path: read_bytes(path, at) for at in located}


def test_an_archives_directory_is_read_as_zipfile_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"a comment" * 99
        archive.mkdir("folder")
        archive.writestr("z/größe 头.dcm", b"one")
        archive.writestr("a.dcm", bytes(100_000), zipfile.ZIP_DEFLATED)
        with archive.open("large.dcm", "w", force_zip64=True) as member:
            member.write(b"three")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.dcm", b"the later counts")
    path.write_bytes(b"#!/bin/sh what stands before\n" + path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        expected = {n: archive.read(n) for n in sorted(names)}
    assert read_all(path) == expected
    assert SliceStore(path).read("a.dcm") == b"the later counts"
    with pytest.raises(FileNotFoundError, match=r"holds no b\.dcm"):
        SliceStore(path).read("b.dcm")


def test_zip64_sizes_and_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = members(tmp_path / "a.zip", **{f"{i}.dcm": bytes([i]) * 999 for i in range(5)})
    data = path.read_bytes()
    assert b"PK\x06\x06" in data
    assert read_all(path) == {f"{i}.dcm": bytes([i]) * 999 for i in range(5)}
    path.write_bytes(data.replace(b"PK\x06\x06", b"PK\x06\x00"))
    with pytest.raises(UserError, match=r"cannot be read \(its ZIP64 end is missing\)"):
        read_directory(path)


def test_what_cannot_be_read_from_an_archive_is_refused_by_name(tmp_path: Path) -> None:
    path = members(tmp_path / "a.zip", a=b"content" * 99)
    (good,) = SliceStore(path).locate(["a"])
    cases = [
        (good._replace(kind=good.kind | 1 << 16), "encrypted in the archive"),
        (good._replace(kind=9), "by Deflate64, which is not read: Deflate, bzip2 and LZMA are"),
        (good._replace(kind=6), "compressed in the archive by method 6, which is not read"),
        (good._replace(kind=12), r"cannot be read \(OSError\)"),
        (good._replace(kind=14), "cannot be read|its size or CRC-32 differs"),
        (good._replace(stamp=1), r"damaged in the archive \(its size or CRC-32 differs\)"),
        (good._replace(size=5), "its size or CRC-32 differs"),
        (good._replace(offset=3), "its local header differs"),
        (good._replace(path="b"), "its local header differs"),
        (good._replace(size=1 << 40), "the file has 1,099,511,627,776 bytes, more than"),
        (good._replace(packed=1 << 40), "more than 67,108,864"),
        (Location("c"), "the file is missing"),
    ]
    for location, message in cases:
        with pytest.raises(DicomError, match=message):
            read_bytes(path, location)
    path.unlink()
    with pytest.raises(DicomError, match=r"cannot be read \(FileNotFoundError\)"):
        read_bytes(path, good)


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
def test_members_are_read_however_they_are_compressed(
    tmp_path: Path, method: int, size: int
) -> None:
    data = np.random.default_rng(0).integers(0, 50, size, np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a", data)
    (location,) = SliceStore(tmp_path / "a.zip").locate(["a"])
    assert read_bytes(tmp_path / "a.zip", location) == data
    assert read_bytes(tmp_path / "a.zip", location, head=1000) == data[:1000]


@pytest.mark.parametrize("method", METHODS)
def test_a_member_cut_or_changed_is_damaged_however_it_is_compressed(
    tmp_path: Path, method: int
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a", b"content" * 99)
    (location,) = SliceStore(path).locate(["a"])
    whole = path.read_bytes()
    changed = [whole[:n] + bytes([whole[n] ^ 64]) + whole[n + 1 :] for n in range(31, 99, 2)]
    cut = [location._replace(packed=n) for n in range(location.packed)]
    refused = 0
    for data, place in [*((whole, c) for c in cut), *((c, location) for c in changed)]:
        path.write_bytes(data)
        try:  # the end of a stream, or the version of LZMA, tells nothing of the content
            assert read_bytes(path, place) == b"content" * 99
        except Unreadable:
            refused += 1
    assert refused > location.packed - 9


def test_lzma_is_given_no_more_memory_than_the_file_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"content" * 99)
    (location,) = SliceStore(path).locate(["a"])
    data = bytearray(path.read_bytes())
    dictionary = 31 + 5  # behind the header of 30 bytes, the name, version, length and one byte
    data[dictionary : dictionary + 4] = b"\xff" * 4  # 4 GB to look back on
    path.write_bytes(data)
    tracemalloc.start()
    assert read_bytes(path, location) == b"content" * 99
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(("change", "reason"), [(9, "by Deflate64"), (1 << 16, "encrypted")])
def test_labels_that_cannot_be_unpacked_are_refused_in_a_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, reason: str
) -> None:
    path = members(tmp_path / "a.zip", **{"stage_2_train.csv": b"ID,Label\n"})
    store = SliceStore(path)
    (location,) = store.locate(["stage_2_train.csv"])
    monkeypatch.setattr(SliceStore, "locate", lambda *_: [location._replace(kind=change)])
    with pytest.raises(
        UserError, match=rf"stage_2_train.csv in .*a.zip cannot be used: .*{reason}"
    ):
        store.read("stage_2_train.csv")


def test_a_name_is_the_same_in_any_normal_form(tmp_path: Path) -> None:
    """As a cohort made on one file system has it, and another gives it back."""
    composed, apart = "Sch\u00e4del/\u00fc.dcm", "Scha\u0308del/u\u0308.dcm"
    for there, asked in ((composed, apart), (apart, composed), (apart, apart)):
        root = tmp_path / f"{there == apart}{asked == apart}"
        (root / there).parent.mkdir(parents=True)
        (root / there).write_bytes(b"content")
        (location,) = SliceStore(root).locate([asked])
        assert location.path == asked
        assert read_bytes(root, location) == b"content"
    assert SliceStore(tmp_path).locate(["Sch\u00e4del"])[0].signature == ""


@pytest.mark.parametrize(
    ("raw", "flags", "extra", "name"),
    [
        (b"a/b.dcm", 0, b"", "a/b.dcm"),
        (b"a\\b.dcm", 0, b"", "a/b.dcm"),
        (b"\\\\a//b.dcm", 0, b"", "a//b.dcm"),
        ("Sch\u00e4del\\1.dcm".encode(), 0x800, b"", "Sch\u00e4del/1.dcm"),
        ("Sch\u00e4del/1.dcm".encode(), 0, b"", "Sch\u00e4del/1.dcm"),
        ("Scha\u0308del/1.dcm".encode(), 0, b"", "Sch\u00e4del/1.dcm"),
        ("Sch\u00e4del/1.dcm".encode("cp437"), 0, b"", "Sch\u00e4del/1.dcm"),
        ("Sch\u00e4del/1.dcm".encode("cp437"), 0x800, b"", "Sch\u00e4del/1.dcm"),
        (b"\x90/1.dcm", 0, "\u0391/1.dcm".encode(), "\u0391/1.dcm"),
    ],
)
def test_members_are_called_as_whoever_packed_them_called_them(
    tmp_path: Path, raw: bytes, flags: int, extra: bytes, name: str
) -> None:
    """Backslashes of Windows, UTF-8 without its flag (macOS), code page 437, and a second name."""
    path, data = tmp_path / "a.zip", b"content"
    field = b""
    if extra:
        body = b"\x01" + zlib.crc32(raw).to_bytes(4, "little") + extra
        field = struct.pack("<HH", 0x7075, len(body)) + body
    sizes = struct.pack("<LLLHH", zlib.crc32(data), len(data), len(data), len(raw), len(field))
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, flags, 0, 0, 0) + sizes + raw + field
    entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, flags, 0, 0, 0) + sizes
    entry += bytes(14) + raw + field
    end = struct.pack("<4s4xHHLLH", b"PK\5\6", 1, 1, len(entry), len(local + data), 0)
    path.write_bytes(local + data + entry + end)
    assert SliceStore(path).paths == [name]
    assert SliceStore(path).read(name) == data


def test_a_zip_bomb_is_inflated_no_further_than_it_says(tmp_path: Path) -> None:
    path = members(tmp_path / "a.zip", a=bytes(50 << 20))
    (location,) = SliceStore(path).locate(["a"])
    assert location.packed < 100_000
    with pytest.raises(DicomError, match="its size or CRC-32 differs"):
        read_bytes(path, location._replace(size=1000))


def test_of_what_is_no_dicom_only_the_beginning_is_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = members(tmp_path / "a.zip", a=bytes(50 << 20), b=b"no" * (20 << 20))
    (tmp_path / "c").write_bytes(bytes(2 << 20))
    seen: list[int] = []
    real = store_module.read_bytes

    def read(root: Path, location: Location, *words: int, **options: int) -> bytes:
        data = real(root, location, *words, **options)
        seen.append(len(data))
        return data

    monkeypatch.setattr(store_module, "read_bytes", read)
    for root, name in ((path, "a"), (path, "b"), (tmp_path, "c")):
        (location,) = SliceStore(root).locate([name])
        with pytest.raises(DicomError, match="no DICM prefix"):
            read_dicom(root, location)
    assert seen == [132] * 3


def test_an_archive_whose_members_overlap_is_refused(tmp_path: Path) -> None:
    path = members(tmp_path / "a.zip", **{f"{i}.dcm": bytes(99) for i in range(3)})
    data = bytearray(path.read_bytes())
    first, second = (m.start() for m in list(re.finditer(b"PK\1\2", data))[:2])
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    with pytest.raises(UserError, match="members of the zip archive .* overlap"):
        read_directory(path)


def test_flipped_bytes_of_a_member_are_found(tmp_path: Path) -> None:
    path = members(tmp_path / "a.zip", a=np.random.default_rng(0).bytes(300))
    (location,) = SliceStore(path).locate(["a"])
    data = bytearray(path.read_bytes())
    for place in range(31, 31 + location.packed):
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(DicomError, match="damaged|cannot be read"):
            read_bytes(path, location)
        data[place] ^= 4


@pytest.mark.parametrize(
    "extra", [struct.pack("<HHL", 1, 4, 7), struct.pack("<HHQQ", 1, 16, 2**64 - 1, 5)]
)
def test_zip64_sizes_that_are_none_are_refused(tmp_path: Path, extra: bytes) -> None:
    path = members(tmp_path / "a.zip", **{"a.dcm": b"x"})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 20 : at + 28] = b"\xff" * 8
    data[at + 30 : at + 32] = len(extra).to_bytes(2, "little")
    name = at + 46 + int.from_bytes(data[at + 28 : at + 30], "little")
    data[name:name] = extra
    end = data.index(b"PK\5\6")
    size = int.from_bytes(data[end + 12 : end + 16], "little") + len(extra)
    data[end + 12 : end + 16] = size.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="the directory of the zip archive .* cannot be read"):
        read_directory(path)


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    path = members(tmp_path / "a.zip", a=b"1", b=b"2")
    data = path.read_bytes()
    for bad in (
        data[:-30],
        data.replace(b"PK\x01\x02", b"PK\x01\x03"),
        data[:30] + data[60:],
        data[-40:],
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="a.zip cannot be read .*download must be repeated"):
            read_directory(path)


# Processes


def _double(job: int) -> int:
    if job < 0:
        raise ValueError("a negative job")
    return 2 * job


@pytest.mark.parametrize(("jobs", "workers"), [(0, 2), (1, 2), (2, 3), (50, 3), (5, 1)])
def test_every_job_is_done_once(jobs: int, workers: int) -> None:
    assert sorted(run_parallel(_double, iter(range(jobs)), workers)) == [2 * i for i in range(jobs)]


def test_an_error_in_a_worker_ends_the_run() -> None:
    with pytest.raises(ValueError, match="a negative job"):
        list(run_parallel(_double, [-1, *range(99)], 2))


_DISTURBED = """
import multiprocessing.process as processes, signal, sys, time
from ich.base.workers import run_parallel

start, started = processes.BaseProcess.start, []

def disturbed(process):
    start(process)
    started.append(process)
    if len(started) == int(sys.argv[1]):
        time.sleep(1)  # until it waits for jobs
        signal.raise_signal(signal.SIGTERM)

processes.BaseProcess.start = disturbed
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
list(run_parallel(abs, range(10), 3))
"""


@pytest.mark.parametrize("process", [1, 2])
def test_a_signal_while_a_process_starts_leaves_none(process: int) -> None:
    command = [sys.executable, "-c", _DISTURBED, str(process)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_decoding_processes_import_little() -> None:
    code = "import sys, ich.data.decode; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pandas", "torch", "scipy", "omegaconf", "hydra", "mlflow", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_cache_folder_is_its_owners_alone(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "hydra").mkdir(parents=True)  # as Hydra makes it before anything of ours
    build(phantom, tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    (tmp_path / "cache").chmod(0o750)  # by a user who shares it
    build(phantom, tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o750

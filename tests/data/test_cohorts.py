"""What a cohort is known by: its labels and files, and not where they lie or since when."""

from __future__ import annotations

import gzip
import os
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ich.base.config import Config
from ich.base.files import DamagedError
from ich.data import cohorts
from ich.data.cohorts import cohort_files, cohort_keys, describe_data_changes, load_cohort
from ich.data.content import LabelledFiles, sample_crcs
from ich.data.store import SliceStore

Compose = Callable[..., Config]
OWN = ("data=folder", "protocol=sound", "protocol.oversample=null", "data.cache_size=32")


@pytest.fixture
def project(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with slices of twelve patients and their labels, in which commands are given."""
    root = tmp_path / "project"
    rows = []
    for n, file in enumerate(sorted((phantom / "stage_2_train").glob("*.dcm"))[:96]):
        place = root / f"p{n // 8}" / f"{n}.dcm"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
        path = place.relative_to(root).as_posix()
        rows.append({"path": path, "patient_id": f"p{n // 8}", "bleed": n // 8 % 2})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def key(composed: Compose) -> Callable[..., str]:
    def key(root: Path | str = ".", labels: Path | str = "labels.csv", *more: str) -> str:
        config = composed(*OWN, f"data.root={root}", f"data.labels={labels}", *more)
        return cohort_keys({"": config})[""]

    return key


def test_a_sweeps_own_files_dates_and_places_change_nothing(
    project: Path, key: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key()
    (project / "multirun_reports" / "x").mkdir(parents=True)
    for junk in (".DS_Store", "p1/.DS_Store", "p1/Thumbs.db", "nohup.out", "p2/notes.dcm"):
        (project / junk).write_text("no slice that the labels name")
    for file in ("labels.csv", "p0/0.dcm", "p0"):
        os.utime(project / file, ns=(1, 1))
    assert key() == first
    assert key(project.absolute(), project / "labels.csv") == first
    copy = Path(shutil.copytree(project, tmp_path / "copy", copy_function=shutil.copyfile))
    (copy / "labels.csv").rename(tmp_path / "other name.csv")
    shutil.rmtree(project)
    monkeypatch.chdir(copy)
    assert key(".", f'"{tmp_path / "other name.csv"}"') == first
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(copy)
    assert key("link", f'"{tmp_path / "other name.csv"}"') == first


def test_labels_names_sizes_and_settings_change_it(project: Path, key: Callable[..., str]) -> None:
    keys = [
        key(),
        key(".", "labels.csv", "data.subset=0.5"),
        key(".", "labels.csv", "data.source=rsna"),
    ]
    keys.append(key(".", "labels.csv", "protocol.seed=1"))
    with (project / "p1" / "8.dcm").open("ab") as file:
        file.write(b"\0\0")
    keys.append(key())
    (project / "p2" / "16.dcm").unlink()
    keys.append(key())
    shutil.copy(project / "p0" / "0.dcm", project / "p2" / "16.dcm")
    keys.append(key())
    labels = (project / "labels.csv").read_text()
    (project / "labels.csv").write_text(labels.replace("p0,0", "p0,1"))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_another_export_under_the_same_names_and_sizes_is_other_data(
    project: Path, key: Callable[..., str]
) -> None:
    first, files = key(), sorted(project.glob("p*/*.dcm"))
    for file in files:
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    changed = key()
    assert changed != first
    # One file alone is looked at if it stands for the others: `prepare verify=true` reads all.
    sampled = sample_crcs(SliceStore(project), [f.relative_to(project).as_posix() for f in files])
    assert len(sampled) == 64
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[:-1] + b"\1")
        assert (key() != changed) == (file.relative_to(project).as_posix() in sampled)
        file.write_bytes(before)


def test_a_zip_is_known_by_its_own_checksums(project: Path, key: Callable[..., str]) -> None:
    def zipped(name: str, change: str = "") -> str:
        with zipfile.ZipFile(project / name, "w") as archive:
            archive.writestr("README", name)
            for file in sorted(project.glob("p*/*.dcm")):
                data = file.read_bytes()
                path = file.relative_to(project).as_posix()
                archive.writestr(path, data[:-1] + b"\1" if path == change else data)
        return key(name)

    first = zipped("a.zip")
    assert zipped("b.zip") == first
    for path in ("p0/0.dcm", "p3/31.dcm", "p11/95.dcm"):
        assert zipped("c.zip", path) != first


def test_names_in_another_normal_form_are_the_same(project: Path, tmp_path: Path) -> None:
    digests = []
    for form in ("NFC", "NFD"):  # macOS gives names back in the second
        root = Path(shutil.copytree(project, tmp_path / form))
        (root / "p0").rename(root / unicodedata.normalize(form, "Kopf_ä"))
        store = SliceStore(root)
        paths = [p for p in store.paths if p.endswith(".dcm")]
        digests.append(LabelledFiles.find(store, paths).names)
    assert digests[0] == digests[1]


def test_labels_are_read_again_only_where_they_or_the_files_are_others(
    project: Path, key: Callable[..., str], composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read the RSNA's takes a good part of a minute."""
    config = composed(*OWN, "data.root=.", "data.labels=labels.csv")
    first = key()
    assert load_cohort(config, SliceStore(Path()))[1] == first
    read = []
    real = cohorts.load_labels
    monkeypatch.setattr(cohorts, "load_labels", lambda *a: read.append(1) or real(*a))
    os.utime("labels.csv", ns=(1, 1))
    assert key() == first
    # As the cache does not lie in the data set here, nothing has come to it by then.
    assert load_cohort(config, SliceStore(Path()))[1] == first
    assert not read
    Path("notes.txt").touch()
    assert key() == first
    assert read == [1]
    load_cohort(config, SliceStore(Path()))
    del read[:]
    assert key() == first
    (memo,) = Path(config.data.cache_dir).glob("files-*.json")
    for damaged in ("", "[]", "{", '{"listing": 1}'):
        memo.write_text(damaged)
        assert key() == first
    assert read == [1] * 4
    sampled = sample_crcs(SliceStore(Path()), [p.as_posix() for p in Path().glob("p*/*.dcm")])
    load_cohort(config, SliceStore(Path()))
    file = Path(next(iter(sampled)))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")  # of the same size
    assert key() != first


def test_a_cohort_whose_labels_could_not_be_used_is_damaged(
    project: Path, composed: Compose
) -> None:
    """Records may be somebody else's, or of a version that took any name."""
    config = composed(*OWN, "data.root=.", "data.labels=labels.csv")
    _, key = load_cohort(config, SliceStore(Path()))
    files = cohort_files(config, key)
    files.facts.write_text(files.facts.read_text().replace('"bleed"', '"[/]"'))
    rows = gzip.decompress(files.rows.read_bytes()).replace(b"bleed", b"[/]")
    files.rows.write_bytes(gzip.compress(rows))
    with pytest.raises(DamagedError, match=r"is damaged \(it has a label '\[/\]'"):
        files.read()


def test_what_has_changed_is_said(project: Path, composed: Compose) -> None:
    config = composed(*OWN, "data.root=.", "data.labels=labels.csv")

    def made() -> str:
        return load_cohort(config, SliceStore(Path()))[1]

    first = made()
    (project / "p2" / "16.dcm").unlink()
    second = made()
    assert describe_data_changes(config, first, second) == [
        "96 labelled files then, 95 now",
    ]
    (project / "labels.csv").write_text((project / "labels.csv").read_text() + "p0/0.dcm,p0,0\n")
    with (project / "p1" / "8.dcm").open("ab") as file:
        file.write(b"\0\0")
    third = made()
    assert describe_data_changes(config, second, third) == [
        "the label CSV has other bytes",
        "labelled files have other names, sizes or bytes",
    ]
    cohort_files(config, second).facts.unlink()
    assert describe_data_changes(config, second, third) == [f"cohort {second} then, {third} now"]
    earlier = "its data were noted by an earlier version of ich, by place and date"
    assert describe_data_changes(config, "0123456789ab", third) == [earlier]

"""From a data config to slices and targets: the whole path, and what leaves it on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from dicom_files import damage_files

from ich.base.config import Config, UserError
from ich.data import cohorts
from ich.data import dataset as data_module
from ich.data.dataset import load_dataset

Compose = Callable[..., Config]


def damaged(phantom: Path, folder: Path, share: float) -> tuple[Path, list[str]]:
    """A copy of the phantom in which some files are broken, each in another way."""
    root = folder / "damaged"
    shutil.copytree(phantom, root)
    files = sorted((root / "stage_2_train").glob("*.dcm"))
    return root, damage_files(files[:: max(1, int(1 / share))])


@pytest.mark.parametrize("protocol", ["report", "sound"])
def test_quarantined_images_leave_the_cohort(
    composed: Compose, phantom: Path, tmp_path: Path, protocol: str
) -> None:
    root, bad = damaged(phantom, tmp_path, 0.03)
    config = composed(
        f"data.root={root}",
        f"protocol={protocol}",
        "data.workers=1",
        "data.max_quarantine=0.1",
        "data.cache_size=32",
    )
    dataset = load_dataset(config)
    splits = [s for s in (dataset.train, dataset.val, dataset.test) if s is not None]
    used = {i for s in splits for i in s.image_id}
    assert not used & set(bad)
    assert 0 < dataset.summary.quarantined <= len(bad)
    assert dataset.summary.steps["train"] == len(dataset.train.row)


def test_a_split_that_the_quarantine_empties_is_refused(
    composed: Compose, phantom: Path, tmp_path: Path
) -> None:
    config = composed(f'data.root="{phantom}"', "data.cache_size=32", "protocol=sound")
    dataset = load_dataset(config)
    assert dataset.test is not None
    root = tmp_path / "copy"
    shutil.copytree(phantom, root)
    for image in dataset.val.image_id:
        (root / "stage_2_train" / f"{image}.dcm").write_bytes(b"DICM" * 9)
    sides = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    who = {i: name for name, side in sides.items() for i in side.image_id}
    table = pd.DataFrame(who.items(), columns=["image_id", "patient_id"])
    table.to_csv(root / "meta.csv", index=False)
    files = (f"data.root={root}", f"data.metadata={root / 'meta.csv'}")
    other = composed(*files, "protocol=sound", "data.cache_size=32", "data.max_quarantine=1")
    with pytest.raises(UserError, match="no slice is left in the (train|val|test) set after"):
        load_dataset(other)


def test_a_job_looks_up_nothing_in_the_data_set(
    composed: Compose, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(f'data.root="{phantom}"', "data.cache_size=32")
    with pytest.raises(UserError, match="is not made yet .*Run `ich prepare`"):
        load_dataset(config, build=False)
    built = load_dataset(config)
    monkeypatch.setattr(data_module, "build_cache", None)
    monkeypatch.setattr(cohorts, "make_cohort", None)
    again = load_dataset(config, build=False)
    assert (again.train.row == built.train.row).all()
    assert again.summary == built.summary


def test_patients_are_numbered_alike_in_all_splits(composed: Compose, phantom: Path) -> None:
    dataset = load_dataset(composed(f'data.root="{phantom}"', "data.cache_size=32"))
    shared = set(dataset.train.patient) & set(dataset.val.patient)
    assert len(shared) >= 4
    assert dataset.summary.leak["patient"] > 0.5


def test_the_real_mini_set(composed: Compose, shared: Path) -> None:
    config = composed(
        "data=rsna",
        f"data.root={shared / 'rsna_mini.zip'}",
        "data.subset=1.0",
        "data.cache_size=64",
    )
    dataset = load_dataset(config)
    assert dataset.summary.steps["images"] == 155
    assert dataset.summary.steps["repeated_ids"] == 4
    assert dataset.summary.steps["oversampled"] == 155 + 7 * 6
    assert dataset.summary.quarantined == 0
    assert dataset.summary.leak["patient"] > 0.5
    brain = (dataset.hu > 0) & (dataset.hu < 80)
    assert 0.1 < brain.mean() < 0.5
    sound = composed(
        "data=rsna",
        f"data.root={shared / 'rsna_mini.zip'}",
        "data.subset=1.0",
        "data.cache_size=64",
        "protocol=sound",
    )
    assert load_dataset(sound).summary.leak == {"image": 0.0, "study": 0.0, "patient": 0.0}

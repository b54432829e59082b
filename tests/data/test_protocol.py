"""The report's cohort to the digit, the sound one beside it, and what each of them leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ich.base.config import ProtocolConfig, ProtocolName, Source, UserError
from ich.data.manifest import build_manifest, read_labels
from ich.data.phantom.spec import LABELS, SUBTYPES
from ich.data.protocol import ENOUGH, TOLERANCE, Cohort, apply_protocol, audit
from ich.data.stratify import partition
from ich.pages.data.tables import balance_table

REPORT = ProtocolConfig(ProtocolName.report, 0, "epidural", 8, None, 0.15, 0.0)
SOUND = ProtocolConfig(ProtocolName.sound, 0, "epidural", 8, None, 0.15, 0.15)


def simple(rows: int, epidural: int, subdural: int = 0) -> pd.DataFrame:
    """A manifest without patients."""
    table = pd.DataFrame(0, index=range(rows), columns=list(LABELS), dtype=np.int8)
    table.loc[: epidural - 1, "epidural"] = 1
    table.loc[epidural : epidural + subdural - 1, "subdural"] = 1
    table["any"] = table[list(SUBTYPES)].max(axis=1)
    ids = [f"ID_{i:09x}" for i in range(rows)]
    return table.assign(image_id=ids, path="x", patient="", study="")


def clinic(patients: int, seed: int = 0) -> pd.DataFrame:
    """Patients of 20 to 60 slices, bleeding in runs of slices, some with two studies."""
    rng, rows = np.random.default_rng(seed), []
    for patient in range(patients):
        slices = int(rng.integers(20, 61))
        label = SUBTYPES[rng.integers(5)] if rng.random() < 0.5 else None
        start, length = rng.integers(slices), rng.integers(2, 15)
        for n in range(slices):
            bleeds = label is not None and start <= n < start + length
            row = {k: int(bleeds and k in (label, "any")) for k in LABELS}
            study = f"s{patient}-{n % 2 if patient % 10 == 0 else 0}"
            rows.append({"image_id": "", "patient": f"p{patient}", "study": study, **row})
    table = pd.DataFrame(rows)
    table["image_id"] = [f"ID_{i:06x}" for i in rng.permutation(len(table))]
    return table.assign(path="x")


def cohort_of(manifest: pd.DataFrame, cfg: ProtocolConfig, subset: float = 1.0) -> Cohort:
    return apply_protocol(manifest, LABELS, cfg, subset)


# The report's protocol


def test_the_protocols_counts() -> None:
    cohort = cohort_of(simple(1000, 20, 100), REPORT, 0.5)
    counts = {"images": 1000, "oversampled": 1140, "subset": 570, "train": 484, "val": 86}
    assert cohort.steps == counts
    whole = cohort_of(simple(1000, 20, 100), REPORT)
    assert whole.rows["image_id"].value_counts().head(20).eq(8).all()
    assert sorted(whole.rows.loc[whole.rows["image_id"] == "ID_000000000", "repeat"]) == [*range(8)]
    assert whole.positives["oversampled"]["epidural"] == 160


def test_the_split_is_stratified_and_seeded() -> None:
    table = simple(2000, 30, 200)
    cohort = cohort_of(table, REPORT)
    rates = cohort.summary().rates
    for label in ("epidural", "subdural", "any"):
        assert rates["val"][label] == pytest.approx(rates["train"][label], rel=0.05)
    assert cohort_of(table, REPORT).rows.equals(cohort.rows)
    assert not cohort_of(table, replace(REPORT, seed=1)).rows["split"].equals(cohort.rows["split"])


def test_the_leak_is_measured() -> None:
    table = clinic(60)
    cohort = cohort_of(table, REPORT)
    train, val = cohort.split("train"), cohort.split("val")
    leak = cohort.summary().leak
    for kind, column in (("image", "image_id"), ("study", "study"), ("patient", "patient")):
        share = np.mean([v in set(train[column]) for v in val[column]])
        assert leak[kind] == pytest.approx(share, abs=1e-6)
    assert 0 < leak["image"] < leak["study"] <= leak["patient"]
    once = cohort_of(simple(400, 50), replace(REPORT, oversample_times=1))
    assert once.summary().leak == {"image": 0.0, "study": None, "patient": None}


def test_negatives_are_undersampled_to_the_ratio_after_oversampling() -> None:
    cohort = cohort_of(simple(1000, 20, 80), replace(REPORT, negatives_per_positive=2.0))
    positives = 20 * 8 + 80
    assert cohort.steps["undersampled"] == 3 * positives
    assert cohort.positives["undersampled"]["any"] == positives
    scarce = cohort_of(simple(300, 20, 80), replace(REPORT, negatives_per_positive=2.0))
    assert scarce.steps["undersampled"] == positives + 200


def test_one_label_is_enough() -> None:
    table = simple(400, 40)
    for cfg in (REPORT, replace(REPORT, oversample=None)):
        cohort = apply_protocol(table, ("epidural",), cfg, 0.5)
        rates = cohort.summary().rates
        assert rates["val"]["epidural"] == pytest.approx(rates["train"]["epidural"], rel=0.1)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="3 rows leave 0 after taking a share of 0.1"):
        cohort_of(simple(3, 0), REPORT, 0.1)


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """The report's cohort of the real labels, from the long form with its four repeated ids."""
    table = pd.read_csv(shared / "stage_2_labels_wide.csv.gz")
    long = table.melt("image_id", list(LABELS))
    long = pd.DataFrame({"ID": long["image_id"] + "_" + long["variable"], "Label": long["value"]})
    repeated = long[long["ID"].str.startswith(tuple(table["image_id"][[7, 99, 1234, 500_000]]))]
    file = tmp_path_factory.mktemp("labels") / "stage_2_train.csv"
    pd.concat([long, repeated]).sort_values("ID", kind="stable").to_csv(file, index=False)
    labels = read_labels(file, file.name, LABELS, "any")
    assert labels.repeated == 4
    manifest = build_manifest(labels, None, Source.rsna).assign(patient="", study="")
    return cohort_of(manifest, REPORT, 0.1)


def test_the_reports_counts_to_the_digit(real: Cohort) -> None:
    assert real.steps == {
        "images": 752_803,
        "oversampled": 774_818,
        "subset": 77_482,
        "train": 65_859,
        "val": 11_623,
    }


def test_the_reports_percentages_and_the_true_ones(real: Cohort) -> None:
    table = balance_table(real, Source.rsna).set_index("label")
    reported = {"any": (14.34, 17.26), "epidural": (0.42, 3.34), "subdural": (6.27, 6.94)}
    reported |= {"subarachnoid": (4.74, 5.27), "intraparenchymal": (4.8, 5.39)}
    reported |= {"intraventricular": (3.48, 3.69)}
    true = {"any": 16.77, "epidural": 3.25, "subdural": 6.74, "subarachnoid": 5.12}
    true |= {"intraparenchymal": 5.24, "intraventricular": 3.59}
    for label, (before, after) in reported.items():
        row = table.loc[label]
        assert (row["report's % before"], row["report's % after"]) == (before, after)
        assert (round(row["% before"], 2), round(row["% as reported"], 2)) == (before, after)
        assert round(row["% after"], 2) == true[label]


# The sound protocol


def test_no_patient_is_on_two_sides_and_only_training_is_resampled() -> None:
    table = clinic(300)
    cohort = cohort_of(table, replace(SOUND, negatives_per_positive=2.0))
    sides = {name: set(cohort.split(name)["patient"]) for name in ("train", "val", "test")}
    assert not sides["train"] & sides["val"]
    assert not sides["train"] & sides["test"]
    assert not sides["val"] & sides["test"]
    assert cohort.summary().leak == {"image": 0.0, "study": 0.0, "patient": 0.0}
    for name in ("val", "test"):
        part = cohort.split(name)
        assert (part["repeat"] == 0).all()
        assert set(part["image_id"]) == set(
            table.loc[table["patient"].isin(sides[name]), "image_id"]
        )
        assert len(part) / len(table) == pytest.approx(0.15, abs=0.005)
    train = cohort.split("train")
    epidural = train[train["epidural"] == 1]
    assert epidural["image_id"].value_counts().eq(8).all()
    positive = train[list(LABELS)].any(axis=1)
    assert (~positive).sum() == 2 * positive.sum()


@pytest.mark.parametrize("seed", range(3))
def test_label_rates_of_the_parts_agree(seed: int) -> None:
    cohort = cohort_of(clinic(400, seed), replace(SOUND, seed=seed))
    common = [k for k in LABELS if cohort.positives["images"][k] >= ENOUGH]
    assert "any" in common
    assert max(cohort.imbalance[k] for k in common) < TOLERANCE


def test_folds_are_disjoint_and_cover_everyone() -> None:
    table = clinic(100)
    folds = [cohort_of(table, replace(SOUND, folds=5, fold=k)) for k in range(5)]
    tests = [set(c.split("test")["image_id"]) for c in folds]
    assert sum(map(len, tests)) == len(set.union(*tests)) == len(table)
    for k, cohort in enumerate(folds):
        assert set(cohort.split("val")["image_id"]) == tests[(k + 1) % 5]


def test_the_split_depends_on_no_order_and_on_no_keys_value() -> None:
    table = clinic(60)
    first = cohort_of(table, SOUND)
    other = table.sample(frac=1, random_state=1)
    other = other.assign(patient=other["patient"].map(lambda p: f"k{hash(p) % 10**9}"))
    again = cohort_of(other, SOUND)
    same = first.rows[["image_id", "split"]].equals(again.rows[["image_id", "split"]])
    assert same
    assert not cohort_of(table, replace(SOUND, seed=1)).rows["split"].equals(first.rows["split"])


def test_a_subset_takes_whole_patients() -> None:
    table = clinic(200)
    cohort = cohort_of(table, replace(SOUND, oversample_times=1), 0.25)
    assert cohort.steps["subset"] / len(table) == pytest.approx(0.25, abs=0.01)
    taken = cohort.rows["patient"].value_counts()
    assert (table["patient"].value_counts()[taken.index] == taken).all()


@pytest.mark.parametrize("ratio", [0.5, 3.0, 100.0])
def test_negatives_leave_by_patient_where_patients_stay_whole(ratio: float) -> None:
    table, cfg = clinic(200), replace(SOUND, negatives_per_positive=ratio)
    everything = cohort_of(table, SOUND).split("train")
    kept = apply_protocol(table, LABELS, cfg, 1.0, whole=True).split("train")
    before, after = (rows.groupby("patient").size() for rows in (everything, kept))
    assert after.equals(before[after.index])  # all rows of a patient, copies too, or none
    bleeds = everything.groupby("patient")["any"].max() == 1
    assert set(bleeds[bleeds].index) <= set(after.index)
    negatives, positives = int((kept["any"] == 0).sum()), int((kept["any"] == 1).sum())
    of_bleeding = everything["patient"].isin(bleeds[bleeds].index) & (everything["any"] == 0)
    least, most = int(of_bleeding.sum()), int((everything["any"] == 0).sum())
    # As near as a patient of at most 60 slices allows.
    assert abs(negatives - np.clip(ratio * positives, least, most)) <= 30
    again = apply_protocol(table, LABELS, cfg, 1.0, whole=True).split("train")
    assert again.equals(kept)


def test_unknown_patients_and_too_few_are_refused() -> None:
    with pytest.raises(UserError, match=r"400 of 400 images have no patient .*data.metadata=FILE"):
        cohort_of(simple(400, 20), SOUND)
    with pytest.raises(UserError, match="at least one patient for each of 3 parts, but .* hold 2"):
        cohort_of(clinic(2), SOUND)


def test_a_study_of_two_patients_is_a_leak_and_an_error() -> None:
    table = clinic(30).assign(study="the same")
    with pytest.raises(UserError, match=r"protocol=sound leaks: \{'study': 1.0\}"):
        cohort_of(table, SOUND)


def test_unknown_keys_are_left_out_of_the_audit() -> None:
    rows = pd.DataFrame(
        {
            "image_id": list("abcd"),
            "study": ["", "s", "s", ""],
            "patient": ["p", "p", "q", ""],
            "split": ["train", "train", "val", "val"],
        }
    )
    assert audit(rows, "val") == {"image": 0.0, "study": 1.0, "patient": 0.0}


def test_real_patients_split_evenly(shared: Path) -> None:
    table = pd.read_csv(shared / "stage_1_test_meta.csv.gz")
    table = table.rename(
        columns={"Image": "image_id", "PatientID": "patient", "StudyInstanceUID": "study"}
    )
    cohort = cohort_of(table.assign(path=""), SOUND)
    assert cohort.steps["images"] == 78_545
    assert table["patient"].nunique() == 2_144
    assert cohort.summary().leak == {"image": 0.0, "study": 0.0, "patient": 0.0}
    common = [k for k in LABELS if cohort.positives["images"][k] >= ENOUGH]
    assert len(common) == 5
    assert max(cohort.imbalance[k] for k in common) < 0.01
    leak = cohort_of(table.assign(path=""), REPORT, 0.1).summary().leak
    assert leak["patient"] > 0.9


def test_the_fewest_patients_fill_every_part() -> None:
    for patients in (3, 4, 7):
        assert cohort_of(clinic(patients), SOUND).splits == ["train", "val", "test"]
    assert cohort_of(clinic(12), SOUND, 0.3).splits == ["train", "val", "test"]


def test_a_partition_gives_each_part_its_share() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(5, (500, 4)).astype(float)
    shares = np.array([0.6, 0.3, 0.1])
    part = partition(counts, shares, rng)
    held = np.array([counts[part == p].sum(0) for p in range(3)])
    assert np.abs(held / counts.sum(0) - shares[:, None]).max() < 0.01

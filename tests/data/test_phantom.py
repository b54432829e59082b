"""The phantom: labels equal masks, blood lies where anatomy puts it, files read back exactly."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy.ndimage import binary_erosion, uniform_filter

import ich
from ich.base.config import DataConfig, PhantomConfig, Source, UserError
from ich.data.cohorts import find_store
from ich.data.phantom import anatomy, bleeds, rendering, spec, tissue
from ich.data.phantom.files import write_phantom
from ich.data.phantom.rendering import simulate_study
from ich.data.phantom.spec import SUBTYPES, PhantomSlice, PhantomSpec
from ich.phantom import main

SMALL = PhantomSpec(patients=3, seed=5, size=64)


@pytest.fixture(scope="module")
def studies() -> list[list[PhantomSlice]]:
    """Eight patients at 128 px, all bleeding: enough for every subtype."""
    spec = PhantomSpec(patients=8, seed=3, size=128, prevalence=1.0)
    return [list(simulate_study(spec, i)) for i in range(spec.patients)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("ph") / "a 'quoted' folder", SMALL, workers=1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bleeding(studies: list[list[PhantomSlice]], subtype: str) -> Iterator[PhantomSlice]:
    slices = [s for study in studies for s in study if s.labels[subtype]]
    assert len(slices) >= 3, f"the fixture holds too few {subtype} slices to test"
    return iter(slices)


# --- slices ------------------------------------------------------------------------------------


def test_labels_equal_masks_and_any_is_their_or(studies: list[list[PhantomSlice]]) -> None:
    for s in (s for study in studies for s in study):
        assert list(s.labels) == [*SUBTYPES, "any"]
        assert {k: bool(s.labels[k]) for k in SUBTYPES} == {
            k: bool(s.masks[k].any()) for k in SUBTYPES
        }
        assert s.labels["any"] == max(s.labels[k] for k in SUBTYPES)


def test_masks_are_disjoint_and_at_least_the_stated_area(studies: list[list[PhantomSlice]]) -> None:
    for s in (s for study in studies for s in study if s.labels["any"]):
        areas = {k: s.masks[k].sum() for k in SUBTYPES}
        assert np.sum(list(s.masks.values()), axis=0).max() == 1
        # Fields of view are at least 225 mm wide, hence pixels at least (225 / 128)^2 mm2.
        assert all(n == 0 or n * (252 / 128) ** 2 >= spec.MIN_AREA_MM2 for n in areas.values())


def test_slices_have_the_promised_form(studies: list[list[PhantomSlice]]) -> None:
    ids = [s.image_id for study in studies for s in study]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"ID_[0-9a-f]{9}", i) for i in ids)
    for study in studies:
        assert 20 <= len(study) <= 40
        assert np.all(
            (np.diff([s.z_mm for s in study]) > 4.5) & (np.diff([s.z_mm for s in study]) < 6)
        )
        assert all(s.hu.dtype == np.int16 and s.hu.shape == (128, 128) for s in study)
        assert all(s.hu.min() >= -1024 and s.hu.max() <= 3071 for s in study)


def test_a_study_holds_bone_brain_csf_and_air(studies: list[list[PhantomSlice]]) -> None:
    for study in studies:
        volume = np.stack([s.hu for s in study])
        assert (volume > 700).mean() > 0.02
        assert ((volume > 20) & (volume < 50)).mean() > 0.08
        assert (uniform_filter(volume.astype(np.float32), (0, 3, 3)) < -950).mean() > 0.3


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_blood_is_as_dense_as_clotted_blood(
    studies: list[list[PhantomSlice]], subtype: str
) -> None:
    means = []
    for s in bleeding(studies, subtype):
        interior = binary_erosion(s.masks[subtype])
        if interior.sum() >= 8:
            means.append(float(np.median(s.hu[interior])))
    assert means
    assert min(means) >= 45
    assert max(means) <= 85


def test_noise_in_the_brain_is_that_of_a_routine_protocol() -> None:
    spec, patient, index = PhantomSpec(size=256, prevalence=0.0), 0, 16
    a, b = rendering.draw_patient(spec, patient), rendering.draw_patient(spec, patient)
    b.noise.standard_normal(10)  # the same anatomy, other noise
    hu, _, depth = rendering._render(a, spec.size, index)
    first = rendering._acquire(a, hu.copy(), depth, index).astype(float)
    second = rendering._acquire(b, hu.copy(), depth, index).astype(float)
    sd = (first - second)[depth > 10].std() / np.sqrt(2)
    assert 2.5 < sd < 7


# --- where blood lies --------------------------------------------------------------------------


def planes(
    spec: PhantomSpec, count: int
) -> Iterator[tuple[rendering.Patient, tissue.Points, dict]]:
    """The blood of every bleeding plane through some patients, before averaging over a slice."""
    for patient in range(count):
        who = rendering.draw_patient(spec, patient)
        for index in range(who.scanner.slices):
            _, blood, _ = rendering._render_plane(who, spec.size, index, 0.0)
            p = rendering._warp(who.anatomy, rendering._plane(who.scanner, spec.size, index, 0.0))
            if blood:
                yield who, p, {k: v.ravel() > 0.5 for k, v in blood.items()}


@pytest.fixture(scope="module")
def blood() -> list[tuple[rendering.Patient, tissue.Points, dict]]:
    return list(planes(PhantomSpec(patients=12, seed=3, size=96, prevalence=1.0), 12))


def test_intraventricular_blood_lies_in_the_ventricles(blood: list) -> None:
    seen = 0
    for who, p, masks in blood:
        if masks.get("intraventricular", np.zeros(1)).any():
            at = tissue._displace(p.take(masks["intraventricular"]), who.bleeds)
            inside = np.max(list(tissue._ventricles(who.anatomy, at).values()), axis=0)
            assert inside.min() > -0.5
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("subtype", ["epidural", "subdural"])
def test_extra_axial_blood_reaches_the_inner_table(blood: list, subtype: str) -> None:
    depths = []
    for who, p, masks in blood:
        crescents = [b for b in who.bleeds if b.subtype == subtype and b.pattern != "falx"]
        along_falx = any(b.pattern == "falx" for b in who.bleeds)
        if crescents and not along_falx and masks.get(subtype, np.zeros(1)).any():
            depth, _ = tissue.vault_distances(who.anatomy, p.take(masks[subtype]))
            depths.append((depth.min(), depth.max()))
    assert len(depths) >= 8
    nearest, deepest = np.array(depths).T
    assert np.median(nearest) < 3
    assert deepest.max() < 30


def test_intraparenchymal_blood_lies_in_tissue(blood: list) -> None:
    seen = 0
    for who, p, masks in blood:
        if masks.get("intraparenchymal", np.zeros(1)).any():
            q = p.take(masks["intraparenchymal"])
            depth = np.minimum(
                tissue.vault_distances(who.anatomy, q)[0], tissue.above_base(who.anatomy, q)
            )
            assert depth.min() > 0
            seen += 1
    assert seen >= 10


def test_a_lens_bulges_and_a_crescent_does_not() -> None:
    """Figure 1 of the report: epidural is short and thick, subdural long and thin."""
    head = anatomy.draw_anatomy(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    ratio = {"epidural": [], "subdural": []}
    for _ in range(50):
        (lens,) = bleeds._draw_epidural(rng, head, 1, True)
        ratio["epidural"].append(lens.thickness / lens.radii[1])
        assert lens.thickness > lens.radii[0] ** 2 / 150  # deeper than the chord: biconvex
        for b in bleeds._draw_subdural(rng, head, 1, True):
            ratio["subdural"].append(b.thickness / b.radii[1])
    assert min(ratio["epidural"]) > np.mean(ratio["subdural"])


def test_prevalence_zero_is_healthy_and_one_bleeds() -> None:
    healthy, ill = replace(SMALL, prevalence=0.0), replace(SMALL, prevalence=1.0)
    for patient in range(3):
        assert not any(s.labels["any"] for s in simulate_study(healthy, patient))
        assert any(s.labels["any"] for s in simulate_study(ill, patient))


def test_default_prevalence_gives_every_subtype_a_share() -> None:
    spec = PhantomSpec()
    drawn = [rendering.draw_patient(spec, i).bleeds for i in range(60)]
    share = {
        k: np.mean([any(b.subtype == k for b in bleeds) for bleeds in drawn]) for k in SUBTYPES
    }
    assert 0.6 < np.mean([bool(b) for b in drawn]) < 0.8
    assert min(share.values()) > 0.1


# --- determinism -------------------------------------------------------------------------------


def test_a_patient_does_not_depend_on_the_number_of_patients() -> None:
    one, many = replace(SMALL, patients=2), replace(SMALL, patients=50)
    for a, b in zip(simulate_study(one, 1), simulate_study(many, 1), strict=True):
        assert a.image_id == b.image_id
        np.testing.assert_array_equal(a.hu, b.hu)


def test_seeds_and_patients_differ() -> None:
    first = next(simulate_study(SMALL, 0))
    for other in (next(simulate_study(SMALL, 1)), next(simulate_study(replace(SMALL, seed=6), 0))):
        assert other.image_id != first.image_id
        assert (other.hu != first.hu).mean() > 0.3


def test_the_anatomy_does_not_depend_on_the_size() -> None:
    low, high = (rendering.draw_patient(replace(SMALL, size=n), 0) for n in (96, 192))
    a, _, _ = rendering._render(low, 96, 15)
    b, _, _ = rendering._render(high, 192, 15)
    halved = b.reshape(96, 2, 96, 2).mean((1, 3))
    assert (
        np.corrcoef(np.clip(a, -200, 200).ravel(), np.clip(halved, -200, 200).ravel())[0, 1] > 0.98
    )


def test_files_do_not_depend_on_the_workers(written: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    again = write_phantom(tmp_path / "two", SMALL, workers=2, progress=lambda *c: calls.append(c))
    assert files(again) == files(written)
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_script_without_a_main_guard_may_write(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('run')\nfrom ich.data.phantom.files import write_phantom\n"
        "from ich.data.phantom.spec import PhantomSpec\n"
        f"write_phantom({str(tmp_path / 'out')!r}, PhantomSpec(2, 5, 64), workers=2)\n"
    )
    root = str(Path(ich.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={"PYTHONPATH": root}
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "run\n", "")


# --- files -------------------------------------------------------------------------------------


def test_pydicom_reads_back_what_was_simulated(written: Path) -> None:
    inside = rendering.inside_fov(SMALL.size)
    encodings = set()
    for patient in range(SMALL.patients):
        for s in islice(simulate_study(SMALL, patient), 0, None, 6):
            d = pydicom.dcmread(written / "stage_2_train" / f"{s.image_id}.dcm")
            raw = d.pixel_array
            hu = raw.astype(int) * int(d.RescaleSlope) + int(d.RescaleIntercept)
            np.testing.assert_array_equal(hu[inside], s.hu[inside])
            signed = d.PixelRepresentation == 1
            assert np.all(raw[~inside] == (-2000 if signed else 0))
            assert (d.BitsStored, d.HighBit) == ((16, 15) if signed else (12, 11))
            assert d.file_meta.TransferSyntaxUID.is_implicit_VR == (not signed)
            encodings.add(signed)
    assert encodings == {True, False}


def test_headers_carry_what_rsna_kept_and_no_person(written: Path) -> None:
    headers = [pydicom.dcmread(p) for p in sorted((written / "stage_2_train").iterdir())]
    for d in headers:
        with pydicom.config.disable_value_validation():  # `ID_...` is no valid UID
            values = {e.keyword: str(e.value) for e in d if e.keyword != "PixelData"}
        assert re.fullmatch(r"ID_[0-9a-f]{8}", values["PatientID"])
        assert re.fullmatch(r"ID_[0-9a-f]{10}", values["StudyInstanceUID"])
        assert re.fullmatch(r"ID_[0-9a-f]{10}", values["SeriesInstanceUID"])
        assert d.filename is not None
        assert Path(d.filename).stem == values["SOPInstanceUID"]
        assert values["Modality"] == "CT"
        assert values["PhotometricInterpretation"] == "MONOCHROME2"
        assert 0.4 * 512 / 64 < d.PixelSpacing[0] < 0.5 * 512 / 64
        assert not {k for k in values if "Name" in k or "Date" in k or "Time" in k}
    assert len({d.PatientID for d in headers}) == len({d.StudyInstanceUID for d in headers}) == 3


def test_the_csv_is_rsnas(written: Path) -> None:
    text = (written / "stage_2_train.csv").read_bytes().decode("ascii")
    assert "\r" not in text
    assert text.endswith("\n")
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["ID", "Label"]
    simulated = {s.image_id: s.labels for i in range(3) for s in simulate_study(SMALL, i)}
    expected = {f"{i}_{k}": str(v) for i, labels in simulated.items() for k, v in labels.items()}
    assert dict(rows[1:]) == expected
    assert len(rows) == 1 + 6 * len(simulated)
    assert [r[0][13:] for r in rows[1:7]] == [*SUBTYPES, "any"]
    description = json.loads((written / "phantom.json").read_text())
    count = len(list((written / "stage_2_train").iterdir()))
    assert description["slices"] == len(simulated) == count


# --- folders -----------------------------------------------------------------------------------


def test_an_equal_phantom_is_left_alone(written: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in written.rglob("*")}
    assert write_phantom(written, SMALL, workers=1) == written
    assert write_phantom(written, SMALL) == written
    assert {p: p.stat().st_mtime_ns for p in written.rglob("*")} == before


def test_another_phantom_is_refused(written: Path) -> None:
    with pytest.raises(FileExistsError, match=r"holds another phantom .*'patients': 3.*rm -r"):
        write_phantom(written, replace(SMALL, patients=4))


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no phantom"):
        write_phantom(tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_phantom(tmp_path / "out", replace(SMALL, patients=1), workers=1)
    assert (tmp_path / "out" / "phantom.json").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, patients: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "out", SMALL, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_taken_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.part" / "stage_2_train"
    left.mkdir(parents=True)
    (left / "ID_of_another.dcm").write_bytes(b"x")
    (left.parent / "phantom.json").write_text("{")
    write_phantom(tmp_path / "out", replace(SMALL, patients=1), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    names = {p.name for p in (tmp_path / "out").rglob("*")}
    assert "phantom.json" in names
    assert not names & {".lock", "ID_of_another.dcm"}


def test_a_full_disk_is_a_paragraph_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ich.data.phantom.files._save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "here" / "out"
    assert main([str(out), "--patients", "1", "--size", "64", "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert f"No space left on device: '{out}'" in error
    assert error.count("\n") == 1
    assert list(out.parent.iterdir()) == []
    data = DataConfig(Source.phantom, cache_dir=str(tmp_path / "cache"))
    data.phantom = PhantomConfig(1, 0, 64, 0.7)
    with pytest.raises(UserError, match="the phantom of data.phantom cannot be made: .*No space"):
        find_store(data)


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    spec = replace(SMALL, patients=1)
    context = multiprocessing.get_context("spawn")
    pool = [context.Process(target=write_phantom, args=(tmp_path / "out", spec)) for _ in range(2)]
    for process in pool:
        process.start()
    for process in pool:
        process.join(60)
    assert [process.exitcode for process in pool] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# --- settings and command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"patients": 0}, r"patients=0 must be an integer from 1 to"),
        ({"seed": -1}, r"seed=-1 must be an integer from 0 to"),
        ({"seed": True}, r"seed=True must be an integer"),
        ({"size": 32}, r"size=32 must be an integer from 64 to 1024"),
        ({"prevalence": 1.5}, r"prevalence=1.5 must be a number from 0 to 1"),
        ({"prevalence": float("nan")}, r"prevalence=nan must be"),
    ],
)
def test_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhantomSpec(**setting)


def test_workers_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers=0 must be an integer from 1"):
        write_phantom(tmp_path / "out", SMALL, workers=0)


def test_main_writes_and_says_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out", tmp_path / "figure.png"
    argv = [str(out), "--patients", "2", "--size", "64", "--workers", "1", "--prevalence", "1"]
    assert main([*argv, "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^simulating patients: 2 done\n\d+ slices in .*\npositive: epidural", printed)
    assert f"ich sweep experiment=demo data.root={out}" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--patients", "0"], "patients=0 must be"), (["--workers", "0"], "workers=0 must be")],
)
def test_main_gives_one_paragraph_for_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main([str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_main_refuses_a_place_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "out"), "--patients", "1"]) == 2
    assert "cannot write" in capsys.readouterr().err

"""`ich prepare` as its user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_module


def test_a_dry_run_needs_no_image(phantom: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_bytes((phantom / "stage_2_train.csv").read_bytes())
    own = ("data=rsna", "data.labels=labels.csv", "data.subset=0.5", "dry_run=true")
    done = run_module("prepare", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "oversampled" in done.stdout
    assert "report's % after" in done.stdout
    assert "Patient: unknown: give data.metadata=FILE" in done.stdout
    assert not (tmp_path / "multirun_reports").exists()


def test_a_flipped_byte_is_found_and_mended(phantom: Path, tmp_path: Path) -> None:
    own = ("prepare", f'data.root="{phantom}"', "data.cache_size=32", "data.workers=1")
    first = run_module(*own, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (report,) = tmp_path.glob("multirun_reports/data/phantom-*/data_report.html")
    assert str(report.relative_to(tmp_path)) in first.stdout
    (slices,) = tmp_path.glob(".ich-cache/hu32-*/hu.i16")
    before = slices.read_bytes()
    slices.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
    mended = run_module(*own, "verify=true", cwd=tmp_path)
    assert mended.returncode == 0, mended.stderr
    assert "1 slices did not match their checksum and were decoded again" in mended.stdout
    assert "every slice matches" in run_module(*own, "verify=true", cwd=tmp_path).stdout


def test_the_order_of_slices_is_prepared_too(phantom: Path, tmp_path: Path) -> None:
    own = ("prepare", f'data.root="{phantom}"', "data.cache_size=32", "data.workers=1")
    refused = run_module(*own, "context=neighbours", cwd=tmp_path)
    assert refused.returncode == 2
    assert "protocol=report tears them apart" in refused.stderr
    done = run_module(*own, "context=neighbours", "protocol=sound", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(".ich-cache/cohort-*-order.csv.gz"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=nowhere", "data.root is 'nowhere', which does not exist"),
        ("data.subset=2", "data.subset is 2.0, but must be above 0"),
        ("verfiy=true", "no setting verfiy. Did you mean verify?"),
        ("data=folder", "data.root is not set"),
    ],
)
def test_mistakes_are_one_paragraph(tmp_path: Path, override: str, message: str) -> None:
    done = run_module("prepare", override, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

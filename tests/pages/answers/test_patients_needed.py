"""How many patients a plan says it takes, with finished runs and without."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from made_up import write_sweep

from ich.base.config import AssumedConfig, Config, ReportConfig
from ich.base.results import SweepPaths
from ich.pages.answers.patients import describe_patients
from ich.scoring.power import assumed_patients


def test_without_runs_it_is_by_what_is_assumed(
    tmp_path: Path, composed: Callable[..., Config]
) -> None:
    report = ReportConfig(assumed=AssumedConfig([0.9, 0.85], 0.2, 0.5))
    patients, positives = assumed_patients([0.9, 0.85], 0.2, 0.5)
    one = write_sweep(tmp_path / "one", {"xception": 2.0}, composed)
    for sweep in (SweepPaths(tmp_path / "none"), one):
        (text,) = describe_patients(sweep, report)
        assert "AUCs are 0.9 and 0.85" in text
        assert "a share of 0.2 is positive, and the scores correlate by 0.5" in text
        assert f"{patients:,} scored patients, {positives:,} of them positive" in text
    assert composed().report == ReportConfig()  # conf/ has what the schema has


def test_with_runs_it_is_by_their_predictions(
    tmp_path: Path, composed: Callable[..., Config]
) -> None:
    jobs = {"xception": 2.0, "resnet50": 1.8, "vgg16": 0.8}
    (text,) = describe_patients(write_sweep(tmp_path / "s", jobs, composed), ReportConfig())
    assert re.search(r"tell xception from resnet50, its second, [\d,]+ patients \([\d,]+ pos", text)
    assert "; from vgg16, " in text
    assert re.search(r"The 60 patients at hand \(\d+ positive\) tell .* of 0\.\d{3} AUC\.", text)

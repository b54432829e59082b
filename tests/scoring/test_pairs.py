"""Every setting against every other: what the table against the best says too, and the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from made_up import write_sweep

from ich.base.config import Config
from ich.base.results import SweepPaths
from ich.pages.answers.pairs import pair_blocks
from ich.pages.answers.told_apart import told_apart
from ich.pages.answers.words import some_names
from ich.pages.page import Bullets, Table
from ich.pages.tables import compare
from ich.scoring.comparison import Comparison, load_comparison

JOBS = {"vgg16": 0.8, "resnet50": 1.8, "xception": 2.0}


@pytest.fixture
def sweep(tmp_path: Path, composed: Callable[..., Config]) -> SweepPaths:
    return write_sweep(tmp_path / "s", JOBS, composed)


def test_pairs_with_the_best_are_those_of_the_table_and_the_others_are_there_too(
    sweep: SweepPaths,
) -> None:
    table = compare(sweep, resamples=300, page=False).set_index("job")
    pairs = pd.read_csv(sweep.pairs)
    assert pairs[["one", "other"]].to_numpy().tolist() == [
        *(["xception", "resnet50"], ["xception", "vgg16"]),
        ["resnet50", "vgg16"],
    ]
    for _, pair in pairs[pairs["one"] == "xception"].iterrows():
        row = table.loc[pair["other"]]
        assert (pair["verdict"], pair["p_holm"]) == (row["against_best"], row["p_from_best_holm"])
        assert pair["low"] == pytest.approx(-row["auc_minus_best_high"])
        assert pair["patients_to_tell"] == row["patients_to_tell"]
    last = pairs.iloc[2]
    assert last["auc_difference"] == pytest.approx(table["auc"]["resnet50"] - table["auc"]["vgg16"])
    assert last["low"] < last["within_low"] < last["auc_difference"] < last["within_high"]
    assert last["verdict"] == "different"
    compare(sweep, resamples=0, page=False)
    assert not sweep.pairs.exists()


def test_the_page_has_all_pairs_of_few_settings_and_of_many_each_with_the_next(
    sweep: SweepPaths, tmp_path: Path, composed: Callable[..., Config]
) -> None:
    (few,) = shown_pairs(load_comparison([sweep], 200))
    assert few.folded
    assert len(few.frame) == 3
    jobs = {f"{name},loss={loss}": signal for name, signal in JOBS.items() for loss in LOSSES}
    many = load_comparison([write_sweep(tmp_path / "many", jobs, composed)], 200)
    (table,) = shown_pairs(many)
    assert len(many.evaluation_sets[0].pairs) == math.comb(9, 2)
    assert table.frame["higher"][1:].tolist() == table.frame["lower"][:-1].tolist()
    assert "all 36 pairs are in pairs.csv" in table.caption
    conclusions, *_ = told_apart(many, tmp_path)
    assert isinstance(conclusions, Bullets)
    assert max(text.count("loss=") for text in conclusions.items) <= 6  # of eight beside the best


LOSSES = ("bce", "focal", "weighted_bce")


def shown_pairs(comparison: Comparison) -> list[Table]:
    (rows,) = comparison.evaluation_sets
    return [block for block in pair_blocks(rows, "") if isinstance(block, Table)]


def test_of_many_names_five_are_said() -> None:
    assert some_names(["a", "b"]) == "a, b"
    assert some_names(list("abcdef")) == "a, b, c, d, e, f"  # "and 1 more" is no shorter
    assert some_names(["a,b=1", "a,b=2"]) == "a,b=1; a,b=2"
    assert some_names(list("abcdefg")) == "7 settings (a, b, c, d, e and 2 more)"

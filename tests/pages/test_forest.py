"""The forest plot: what it says is what the table says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up import cohort, write_sweep

from ich.base.config import Config
from ich.base.results import SweepPaths
from ich.pages.columns import build_table
from ich.pages.figures import spread
from ich.pages.forest import draw_forest
from ich.report import main
from ich.scoring.comparison import load_comparison

Compose = Callable[..., Config]


def table_of(sweep: SweepPaths, resamples: int = 200) -> pd.DataFrame:
    return build_table(load_comparison([sweep], resamples))


def drawn(table: pd.DataFrame, folder: Path) -> list[str]:
    """The texts of the picture, in the order in which they are drawn: from top to bottom."""
    picture = draw_forest(table, folder)
    assert picture is not None
    assert (folder / "forest.png").read_bytes() == picture.png
    return re.findall(r"<text[^>]*>(.*?)</text>", (folder / "forest.svg").read_text())


@pytest.fixture
def seeds(tmp_path: Path, composed: Compose) -> SweepPaths:
    jobs = {f"{model},seed={s}": 2.0 for model in ("xception", "resnet50") for s in (0, 1)}
    jobs |= {"vgg16,seed=0": 0.8, "mobilenet_v2,seed=0": 1.0}
    return write_sweep(tmp_path / "seeds", jobs, composed, failed=["mobilenet_v2,seed=0"])


def test_settings_stand_by_auc_with_the_tables_marks_and_failed_ones_are_absent(
    seeds: SweepPaths, tmp_path: Path
) -> None:
    table = table_of(seeds)
    texts = drawn(table, tmp_path)
    settings = table[table["job"].isna() & table["setting"].notna()]
    best = settings.loc[settings["auc"].idxmax()]
    other = "resnet50" if best["setting"] == "xception" else "xception"
    names = [text for text in texts if text in {"xception", "resnet50", "vgg16", "mobilenet_v2"}]
    assert names == [best["setting"], other, "vgg16"]
    first = texts.index(best["setting"])
    limits = f"{best['auc_low']:.3f} to {best['auc_high']:.3f}"
    assert texts[first + 1 : first + 3] == [f"{best['auc']:.3f}", limits]
    assert texts[first + 3 : first + 5] == [f"{best['minutes']:.1f}", f"{best['params'] / 1e6:.1f}"]
    # The legend has what there is.
    assert {"best", "different", "several networks together", "mean of all"} <= set(texts)
    assert "equal to it within the margin" not in texts
    assert "AUC (micro), validation rows, mean of 1 or 2 seeds" in texts
    assert "a seed" in texts


def test_without_intervals_nothing_but_the_highest_is_marked(
    seeds: SweepPaths, tmp_path: Path
) -> None:
    texts = drawn(table_of(seeds, resamples=0), tmp_path)
    assert "95 % interval" not in texts
    assert "\u2248" not in texts
    assert {"best", "not compared"} <= set(texts)


def test_on_different_rows_there_is_no_common_best(tmp_path: Path, composed: Compose) -> None:
    jobs = {"xception": 2.0, "resnet50": 1.0, "vgg16": 0.5}
    sweep = write_sweep(tmp_path / "s", jobs, composed, rows={"vgg16": cohort(seed=1)})
    texts = drawn(table_of(sweep), tmp_path)
    headings = ["on the rows of xception", "on the rows of vgg16"]
    assert [text for text in texts if text in headings] == headings
    assert texts.count("best") == 1  # of the first rows, in the legend
    assert "not compared" in texts  # vgg16, alone on its rows


def test_runs_without_predictions_or_an_auc_have_rows(tmp_path: Path, composed: Compose) -> None:
    jobs = {"xception": 2.0, "resnet50": 1.0, "vgg16": 0.5}
    sweep = write_sweep(tmp_path / "s", jobs, composed)
    sweep.run("vgg16").predictions.unlink()
    table = table_of(sweep)
    table.loc[table["job"] == "resnet50", "auc"] = np.nan
    texts = drawn(table, tmp_path)
    assert "without predictions" in texts
    assert {"resnet50", "vgg16", "no AUC"} <= set(texts)


def test_names_beside_a_panel_do_not_touch_and_stay_within() -> None:
    assert spread([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]  # where there is room, none moves
    moved = spread([0.5, 0.5, 0.02, 0.01], 0.1)
    assert moved == pytest.approx([0.5, 0.4, 0.1, 0.0])


def test_settings_with_names_cut_to_one_text_stay_two(seeds: SweepPaths, tmp_path: Path) -> None:
    table = table_of(seeds).replace({"setting": {"xception": "same", "resnet50": "same"}})
    assert drawn(table, tmp_path).count("same") == 2


def test_a_long_name_is_broken_and_is_no_formula(tmp_path: Path, composed: Compose) -> None:
    sweep = write_sweep(tmp_path / "s", {"xception": 2.0, "vgg16": 1.0}, composed)
    long = "vgg16,optimizer.weight_decay=0.01,data.image_size=224,$x_1$"
    texts = drawn(table_of(sweep, 0).replace({"setting": {"vgg16": long}}), tmp_path)
    assert {"vgg16,optimizer.weight_decay=0.01,", "data.image_size=224,$x_1$"} <= set(texts)


def test_it_is_drawn_again_from_the_csv_alone(
    seeds: SweepPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(seeds)
    # A fingerprint that reads like a number.
    table["rows"] = table["rows"].where(table["rows"].isna(), "12e345678901")
    drawn(table, tmp_path)
    table.to_csv(seeds.csv, index=False)
    assert main([str(seeds.root), "--forest"]) == 0
    assert str(seeds.figures / "forest.png") in capsys.readouterr().out
    for name in ("forest.png", "forest.svg"):
        assert (seeds.figures / name).read_bytes() == (tmp_path / name).read_bytes()


def test_without_a_table_to_draw_it_from_the_remedy_is_named(
    seeds: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    def message() -> str:
        assert main([str(seeds.root), "--forest"]) == 2
        return capsys.readouterr().err

    assert re.search(r"has no comparison\.csv.*Make it first: ich report", message())
    table = table_of(seeds, 0)
    table.drop(columns="against_best").to_csv(seeds.csv, index=False)
    assert "lacks the columns against_best: an earlier version wrote it" in message()
    table.assign(status="failed").to_csv(seeds.csv, index=False)
    assert "has no finished job: there is nothing to draw" in message()
    assert main([str(seeds.root), "--forest", "--promote"]) == 2
    assert "takes no -o or --promote" in capsys.readouterr().err

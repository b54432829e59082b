"""The columns of the comparison, and what is best in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from made_up import FIT

from ich.base.records import FAILED, FINISHED, RunResult
from ich.base.results import RunPaths
from ich.pages.columns import COLUMNS, best_cells, build_table
from ich.scoring.comparison import Comparison, Run


def run_of(job: str, status: str = FINISHED, accuracy: float = 0.9, params: int = 10) -> Run:
    """A run of which nothing but its result is left."""
    fit = replace(FIT, scores={"accuracy": accuracy, "auc": 0.8}, params=params)
    return Run(job, RunPaths(Path(job)), RunResult(status, "", job, job, fit), None, None)


def test_the_best_of_each_column_is_marked_and_ties_are_all_best() -> None:
    runs = [
        run_of("vgg16"),
        run_of("xception", accuracy=0.95, params=5),
        run_of("mobilenet_v2", status=FAILED, params=1),
    ]
    table = build_table(Comparison("three", runs, [], 0, []))
    assert {(1, "accuracy"), (0, "auc"), (1, "auc"), (1, "params")} <= best_cells(table)
    assert (2, "params") not in best_cells(table)
    assert table.loc[0, "report_auc"] == 0.9619
    assert table["model"].iloc[-1] == "always negative"
    assert table["accuracy"].iloc[-1] == 0.88


def test_no_two_columns_share_a_name_or_a_position() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    shown = [column.shown for column in COLUMNS if column.shown]
    assert len({s.position for s in shown}) == len(shown)
    dropped = [s.dropped for s in shown if s.dropped is not None]
    assert sorted(dropped) == list(range(1, len(dropped) + 1))

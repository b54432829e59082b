"""What goes into a paper: the verdict, the methods, the LaTeX table, the reporting checklist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from made_up import write_sweep

from ich.base.config import Config
from ich.base.records import CohortSummary
from ich.base.results import SweepPaths
from ich.pages.tables import compare
from ich.pages.writing.answers import answers, events_text, methods
from ich.pages.writing.checklist import CLAIM_2024, TRIPOD_AI, checklist_row
from ich.pages.writing.report import COLUMNS, tex, verdicts
from ich.scoring.comparison import load_comparison

Compose = Callable[..., Config]


@pytest.fixture
def sweep(tmp_path: Path, composed: Compose) -> SweepPaths:
    jobs = {"vgg16": 0.8, "xception,loss=focal": 2.0, "resnet50": 1.99, "inception_v3": 1.0}
    return write_sweep(tmp_path / "a_sweep", jobs, composed, failed=["inception_v3"])


def test_the_report_begins_with_the_verdict_and_names_what_failed(sweep: SweepPaths) -> None:
    compare(sweep, resamples=200)
    head, _, rest = sweep.text.read_text().partition("## Table")
    assert re.search(r"\*\*xception,loss=focal has the highest AUC, 0\.\d{3} \(0\.\d{3} to", head)
    assert "Lower: vgg16" in head
    assert "(figures/forest.png)" in head
    rows = [line for line in rest.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        *("| xception,loss=focal", "| resnet50", "| vgg16", "| mean of all (3)"),
    ]
    assert "Jobs without a score: inception_v3." in rest
    assert "2,000" not in rest
    assert "from 200 bootstrap resamples of 60 patients" in rest
    assert 'href="checklist.html"' in sweep.page.read_text()


def test_without_intervals_the_verdict_says_so(sweep: SweepPaths) -> None:
    (text,) = verdicts(load_comparison([sweep], 0))
    assert "without intervals, nothing says whether that is more than chance" in text


def test_where_nothing_finished_all_of_it_is_the_authors(tmp_path: Path, composed: Compose) -> None:
    none = write_sweep(tmp_path / "none", {"vgg16": 1.0}, composed, failed=["vgg16"])
    compare(none, resamples=0)
    assert "nothing can be compared" in none.text.read_text()
    assert "0 of 52 entries" in none.checklist.read_text()
    assert methods(load_comparison([none], 0)) == ""


def test_the_methods_name_what_the_record_has(sweep: SweepPaths) -> None:
    text = methods(load_comparison([sweep], 0))
    for said in (
        "synthetic phantom",
        "without regard to patients",
        "brain: center 40.0, width 80.0",
        "xception",
        "Adam 0.0001 (learning rate)",
        "The loss was bce or focal.",
        "3 trainings finished",
    ):
        assert said in text, said


def test_what_latex_reads_as_its_own_is_escaped() -> None:
    assert tex(r"a_b&c%d#e$f{g}h~i^j\k") == (
        r"a\_b\&c\%d\#e\$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
    )


def test_the_latex_table_has_a_cell_for_each_column(sweep: SweepPaths) -> None:
    compare(sweep, resamples=50, page=False)
    text = sweep.latex.read_text()
    assert "\\begin{tabular}{lrrrrrrr}" in text
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    rows = [line for line in lines if line.endswith("\\\\")]
    assert {line.count(" & ") for line in rows} == {len(COLUMNS) - 1}
    assert [line.split(" & ")[0] for line in rows] == [
        *("setting", "xception,loss=focal", "resnet50", "vgg16", "mean of all (3)"),
        "always negative",
    ]
    table = pd.read_csv(sweep.csv).set_index("model")
    metrics = pd.read_csv(sweep.metrics).set_index(["setting", "level", "metric"])
    value = metrics["value"]["mean of all", "slice", "auc"]
    assert value == table["auc"]["mean of all"]
    assert f"& {value:.3f} &" in rows[4]
    assert ("mean of all", "study", "auc") in metrics.index
    for rule in ("toprule", "bottomrule"):
        assert lines.count(f"\\{rule}") == 1
    assert lines.count("\\midrule") == 2
    # All special characters that are left are LaTeX's own.
    assert not re.search(r"(?<!\\)[%#$_^~]", "\n".join(lines))


def test_the_checklists_are_whole_and_every_answer_has_a_source(sweep: SweepPaths) -> None:
    main = dict.fromkeys(int(re.sub(r"\D", "", number)) for number, _, _ in TRIPOD_AI)
    assert list(main) == list(range(1, 28))
    assert [number for number, _, _ in CLAIM_2024] == [str(n) for n in range(1, 45)]
    # What is made up has no rates and no provenance.
    record = sweep.read_record()
    for config in record.configs.values():
        config["report"]["subgroups"] = ["PatientSex"]
    sweep.write_record(record)
    said = answers(load_comparison([sweep], 50))
    assert re.search(r"AUC: mean of all, of 3 networks: 0\.\d{3} \(0", said["ensembling"])
    assert "By PatientSex, the best setting" in said["subgroups"]
    known = said.keys() | {"events", "software"}
    for _, _, keys in (*TRIPOD_AI, *CLAIM_2024):
        assert set(keys.removesuffix("+").split()) <= known


def test_events_are_counted_in_each_split() -> None:
    steps, rates = (
        {"images": 10, "train": 1200, "val": 40},
        {"train": {"a": 0.25}, "val": {"a": 0.5}},
    )
    assert events_text(CohortSummary(steps, rates, "val", {})) == (
        "Rows, and those with each label: train: 1,200 rows (a 300); val: 40 rows (a 20)."
    )


@pytest.mark.parametrize(
    ("keys", "by", "answer"),
    [
        ("", "author", "The author's to write."),
        ("gone +", "author", "The author's to write."),
        ("a b", "record", "One. Two."),
        ("a gone +", "record and author", "One. The rest is the author's to write."),
    ],
)
def test_an_item_says_who_answers_it(keys: str, by: str, answer: str) -> None:
    row = checklist_row(("1", "topic", keys), {"a": "One.", "b": "Two."})
    assert (row["by"], row["answer"]) == (by, answer)

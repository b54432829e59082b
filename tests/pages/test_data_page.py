"""The data report: tables by hand, a page alone on a disk, its pictures, and what it hides."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ich.base.config import (
    DataConfig,
    PrepareConfig,
    ProtocolConfig,
    ProtocolName,
    Source,
    WindowConfig,
    WindowsConfig,
)
from ich.data.cache import Cache
from ich.data.dataset import Prepared
from ich.data.protocol import ENOUGH, Cohort, apply_protocol, oversample
from ich.pages.data import slices
from ich.pages.data.report import write_data_report
from ich.pages.data.slices import apply_windows, choose_examples, hu_counts
from ich.pages.data.tables import REPORT_PERCENT, balance_table, counts_table, leak_table
from ich.pages.page import format_cells

REPORT = ProtocolConfig(ProtocolName.report, 0, None, 8, None, 0.25, 0.0)
SOUND = ProtocolConfig(ProtocolName.sound, 0, None, 8, None, 0.25, 0.25)
WINDOWS = [
    WindowConfig("brain", 40, 80),
    WindowConfig("subdural", 80, 200),
    WindowConfig("soft_tissue", 40, 380),
    WindowConfig("bone", 600, 2800),
    WindowConfig("grey_white", 32, 8),
]
HOSTILE = "<script>x & |$a$\n\"b\" 'c' **d** 日本"


def manifest(images: int, labels: tuple[str, ...], known: bool = True) -> pd.DataFrame:
    """Label k is positive in every (k + 2)nd image; patients have four images in two studies."""
    table = pd.DataFrame({"image_id": [f"ID_{n:04d}" for n in range(images)], "path": "x"})
    for k, label in enumerate(labels):
        table[label] = (np.arange(images) % (k + 2) == 0).astype(np.int8)
    names = [f"CANARY-patient-{n // 4}" for n in range(images)]
    studies = [f"CANARY-study-{n // 2}" for n in range(images)]
    return table.assign(patient=names if known else "", study=studies if known else "")


def prepared(cohort: Cohort, bad: dict[str, str] | None = None, folder: Path = Path()) -> Prepared:
    """Slices of 24 x 24 pixels, HU from -1024 to 200; `bad` is image id -> reason."""
    ids = sorted(set(cohort.rows["image_id"]))
    hu = np.random.default_rng(0).integers(-20, 200, (len(ids), 24, 24), dtype=np.int16)
    hu[:, :6] = -1024
    bad = bad or {}
    quarantine = pd.DataFrame(list(bad.items()), columns=["image_id", "reason"])
    row = {i: n for n, i in enumerate(ids) if i not in bad}
    cache = Cache(hu, row, quarantine, folder / "hu24-abc")
    return Prepared(cohort.without(set(bad)), cohort, cache, "0123456789ab", None)


def config(
    protocol: ProtocolConfig, windows: int = 3, source: Source = Source.folder
) -> PrepareConfig:
    data = DataConfig(source=source, root="/home/CANARY-user/set.zip", any_label=None)
    return PrepareConfig(data=data, protocol=protocol, windows=WindowsConfig(WINDOWS[:windows]))


def by_hand(**changes: object) -> Cohort:
    """20 images, `a` in 4 and twice oversampled to 8 rows, `b` in none; one row each scored."""
    rows = pd.DataFrame(
        {
            "image_id": ["i", "i", "j", "k", "i", "j", "l", "m"],
            "patient": ["p", "p", "q", "q", "p", "q", "", "r"],
            "study": [""] * 8,
            "split": ["train"] * 4 + ["val"] * 4,
        }
    )
    fields: dict = {
        "rows": rows,
        "labels": ("a", "b"),
        "steps": {"repeated_ids": 3, "images": 20, "oversampled": 24, "train": 18, "val": 6},
        "positives": {
            "images": {"a": 4, "b": 0},
            "oversampled": {"a": 8, "b": 0},
            "train": {"a": 6, "b": 0},
            "val": {"a": 2, "b": 0},
        },
        "imbalance": {"a": 0.2, "b": float("inf")},
    }
    return Cohort(**{**fields, **changes})


# Tables


def test_counts() -> None:
    table = counts_table(by_hand())
    assert table["step"].tolist() == ["images", "oversampled", "train", "val"]
    assert table["rows"].tolist() == [20, 24, 18, 6]
    assert "3 ids stood more than once" in table["what"][0]
    assert table["what"][3] == "validation rows, which are scored"
    assert format_cells(table)[1][:2] == ["oversampled", "24"]


def test_balance_of_the_reports_protocol() -> None:
    table = balance_table(by_hand(), Source.folder)
    assert list(table.columns) == [
        "label",
        "positives",
        "% before",
        "positives after",
        "% after",
        "% as reported",
        "% train",
        "% val",
    ]
    assert table.iloc[0].tolist() == pytest.approx(
        ["a", 4, 20.0, 8, 100 * 8 / 24, 40.0, 100 * 6 / 18, 100 * 2 / 6]
    )
    assert table.iloc[1, 1:].tolist() == [0] * 7
    assert format_cells(table)[0] == ["a", "4", "20.00", "8", "33.33", "40.00", "33.33", "33.33"]


def test_the_reports_percentages_stand_beside_its_own_labels_alone() -> None:
    cohort = by_hand(
        labels=("epidural", "b"),
        positives={k: {"epidural": 1, "b": 0} for k in ("images", "oversampled", "train", "val")},
    )
    table = balance_table(cohort, Source.rsna)
    assert table.loc[0, ["report's % before", "report's % after"]].tolist() == [0.42, 3.34]
    assert table.loc[1, ["report's % before", "report's % after"]].isna().all()
    assert format_cells(table)[1][6:8] == ["", ""]
    assert "report's % before" not in balance_table(cohort, Source.folder)


def test_balance_of_the_sound_protocol_says_how_far_its_parts_are_apart() -> None:
    labels = ("far", "near", "few", "gone", "none")
    many = {"far": ENOUGH, "near": ENOUGH, "few": ENOUGH - 1, "gone": 1, "none": 0}
    cohort = by_hand(
        labels=labels,
        steps={"images": 4000, "subset": 2000, "train": 18, "val": 6},
        positives={"images": many, "subset": many, "train": many, "val": many},
        imbalance={"far": 0.11, "near": 0.1, "few": 0.11, "gone": np.inf, "none": np.inf},
    )
    table = balance_table(cohort, Source.rsna)
    assert list(table.columns) == [
        "label",
        "positives",
        "% before",
        "% train",
        "% val",
        "parts apart",
    ]
    assert table["parts apart"].tolist() == [
        "11.0 % (too far)",
        "10.0 %",
        "11.0 %",
        "a part has no positive",
        "no positive",
    ]
    assert table["% before"][0] == 100 * ENOUGH / 4000


def test_the_reports_own_percentages_come_out_of_the_real_labels(shared: Path) -> None:
    real = pd.read_csv(shared / "stage_2_labels_wide.csv.gz")
    labels = tuple(REPORT_PERCENT)
    both = {"images": real, "oversampled": oversample(real, "epidural", 8)}
    cohort = by_hand(
        labels=labels,
        rows=by_hand().rows[:0],
        steps={k: len(rows) for k, rows in both.items()},
        positives={k: rows[list(labels)].sum().to_dict() for k, rows in both.items()},
    )
    assert cohort.steps == {"images": 752_803, "oversampled": 774_818}
    table = balance_table(cohort, Source.rsna)
    assert table.set_index("label").loc["epidural", ["positives", "positives after"]].tolist() == [
        3145,
        3145 * 8,
    ]
    for ours, theirs in (
        ("% before", "report's % before"),
        ("% as reported", "report's % after"),
    ):
        assert table[ours].round(2).tolist() == table[theirs].tolist()
    true = dict(zip(table["label"], table["% after"].round(2), strict=True))
    assert true == {
        "any": 16.77,
        "epidural": 3.25,
        "subdural": 6.74,
        "subarachnoid": 5.12,
        "intraparenchymal": 5.24,
        "intraventricular": 3.59,
    }


def test_leaks_are_counted_over_the_scored_rows_of_known_key() -> None:
    image, study, patient = leak_table(by_hand())
    assert image == "Image: 50.0 % of the 4 validation rows share their image with another split."
    assert study.startswith("Study: unknown: give data.metadata=FILE")
    assert patient.startswith("Patient: 66.7 % of the 3 validation rows of known patient")


def test_no_leak_is_said_in_words() -> None:
    cohort = apply_protocol(manifest(80, ("a", "b")), ("a", "b"), SOUND, 1.0)
    sentences = leak_table(cohort)
    assert len(sentences) == 3
    assert all(": none of the " in s and " test rows" in s for s in sentences)


def test_a_leak_that_rounds_to_zero_is_not_called_none() -> None:
    rows = pd.DataFrame({"image_id": ["i", "i", *map(str, range(2999))], "split": "val"})
    rows.loc[0, "split"] = "train"
    sentence = leak_table(by_hand(rows=rows.assign(patient="", study="")))[0]
    assert sentence.startswith("Image: less than 0.05 % of the 3,000 validation rows")


# The page


class Page(HTMLParser):
    """Reads a page, and refuses tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def images(self) -> Iterator[dict[str, str | None]]:
        return (attrs for tag, attrs in self.tags if tag == "img")


CASES = [
    # labels, windows, protocol, are patients known
    (("a",), 1, SOUND, True),
    (("a", HOSTILE), 2, REPORT, False),
    (("epidural", "b", "any"), 3, SOUND, True),
    (("label", "label %"), 4, REPORT, True),
    (tuple(f"finding number {k} of a good many" for k in range(20)), 5, REPORT, False),
]


@pytest.mark.parametrize(("labels", "windows", "protocol", "known"), CASES)
def test_the_report_is_whole_and_alone(
    tmp_path: Path, labels: tuple[str, ...], windows: int, protocol: ProtocolConfig, known: bool
) -> None:
    cohort = apply_protocol(manifest(80, labels, known), labels, protocol, 1.0)
    bad = {"ID_0003": "the file is missing", "ID_0005": 'no <pixels> & "none"'}
    done = prepared(cohort, bad, tmp_path)
    files = write_data_report(config(protocol, windows), done, tmp_path / "o")
    assert files[:2] == [tmp_path / "o/data_report.html", tmp_path / "o/data_report.md"]
    assert {p for p in (tmp_path / "o").rglob("*") if p.is_file()} == set(files)

    text = files[0].read_text()
    page = Page(text)
    seen = " ".join(page.text)
    for expected in (*labels, *bad.values(), *bad, "0123456789ab", "set.zip", "quarantine.csv"):
        assert expected in seen
    assert ("unknown: give data.metadata" in seen) is not known
    assert not re.search(
        r"https?:|//|url\((?!#)|@import|<script|<link|\bon\w+=", _without_data(text)
    )
    assert all(a["alt"] and a["src"].startswith("data:image/png;base64,") for a in page.images())
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)

    markdown = files[1].read_text()
    links = re.findall(r"\]\((.*?)\)", markdown)
    assert [files[1].parent / link for link in links] == files[2:]
    # Charts stand in the page as SVG, photographs as they are.
    charts = sum(attrs.get("class") == "chart" for _, attrs in page.tags)
    (source,) = (base64.b64decode(str(a["src"]).partition(",")[2]) for a in page.images())
    assert source == files[-1].read_bytes()
    assert charts == len(files[2:]) - 1
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert any(labels[0] in line for line in tables)
    for k in range(1, len(tables)):
        if tables[k].startswith("| ---"):
            assert _columns(tables[k - 1]) == _columns(tables[k]) == _columns(tables[k + 1])


def _without_data(text: str) -> str:
    return re.sub(r"(data:image/png;base64,|sha256-)[A-Za-z0-9+/=]*", "", text)


def _columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


def test_nothing_of_a_patient_a_study_or_the_machine_is_written(tmp_path: Path) -> None:
    labels = ("a", "b")
    for protocol in (REPORT, SOUND):
        table = manifest(80, labels)
        # Where ids are paths, folders are often named after patients.
        table["image_id"] = table["patient"] + "/" + table["image_id"]
        cohort = apply_protocol(table, labels, protocol, 1.0)
        done = prepared(cohort, {cohort.rows["image_id"][0]: "the file is missing"}, tmp_path)
        for file in write_data_report(config(protocol), done, tmp_path / "out"):
            assert b"CANARY" not in file.read_bytes()
            assert os.fsencode(tmp_path) not in file.read_bytes()


def test_an_empty_quarantine_and_a_label_without_a_positive_are_said(tmp_path: Path) -> None:
    table = manifest(80, ("a", "b")).assign(b=np.int8(0))
    cohort = apply_protocol(table, ("a", "b"), SOUND, 1.0)
    _, markdown, *_ = write_data_report(config(SOUND), prepared(cohort), tmp_path)
    assert "No image is in quarantine" in markdown.read_text()
    assert "No decoded slice for: b." in markdown.read_text()


def test_a_quarantine_of_many_lists_the_first_and_the_commonest(tmp_path: Path) -> None:
    cohort = apply_protocol(manifest(200, ("a", "b")), ("a", "b"), REPORT, 1.0)
    bad = {f"ID_{n:04d}": f"reason {n}" if n < 30 else "common" for n in range(40)}
    # A cache is shared: what another cohort's images suffer from is not told here.
    done = prepared(cohort, bad | {"ID_9999": "of another cohort"})
    _, markdown, *_ = write_data_report(config(REPORT), done, tmp_path)
    text = markdown.read_text()
    assert "| common | 10 |" in text
    assert "the 20 commonest of 31" in text
    assert "ID_0019 and 20 more" in text
    assert "ID_0020" not in text.partition("## Quarantine")[2].partition("## Range")[0]
    assert "another cohort" not in text
    assert "| quarantined | 40 |" in text


# Pictures


def test_windows_are_those_of_the_training() -> None:
    torch = pytest.importorskip("torch")
    from ich.training.transforms import CTWindows

    hu = np.random.default_rng(0).integers(-1024, 3072, (16, 16), dtype=np.int16)
    expected = CTWindows(WINDOWS)(torch.from_numpy(hu).float()[None, None])[0].numpy()
    *grey, colours = apply_windows(hu, WINDOWS)
    np.testing.assert_allclose(np.stack(grey), expected, atol=1e-6)
    np.testing.assert_array_equal(colours, np.dstack(grey[:3]))
    assert len(apply_windows(hu, WINDOWS[:1])) == 1
    np.testing.assert_array_equal(apply_windows(hu, WINDOWS[:2])[2][..., 2], 0)


def test_examples_have_few_other_labels_and_much_tissue() -> None:
    rows = pd.DataFrame(
        [  # id, a, b, any, HU
            ("both", 1, 1, 1, 40),
            ("air", 1, 0, 1, -1000),
            ("brain", 1, 0, 1, 40),
            ("bone", 0, 0, 0, 900),
            ("healthy", 0, 0, 0, 30),
        ],
        columns=["image_id", "a", "b", "any", "hu"],
    ).assign(split="train")
    cohort = by_hand(rows=rows, labels=("a", "b", "any"))
    hu = np.repeat(rows["hu"].to_numpy(np.int16), 16).reshape(-1, 4, 4)
    row = {i: n for n, i in enumerate(rows["image_id"])}
    cache = Cache(hu, row, pd.DataFrame(), Path())
    chosen = choose_examples(cohort, cache, "any")
    # `brain` is taken by `a`, so `any` shows what else is positive for one label.
    assert chosen == [("a", "brain"), ("b", "both"), ("any", "air"), ("negative", "healthy")]
    del row["brain"]
    assert dict(choose_examples(cohort, cache, "any"))["a"] == "air"
    shuffled = by_hand(rows=rows[::-1], labels=cohort.labels)
    assert choose_examples(shuffled, cache, "any") == choose_examples(cohort, cache, "any")


def test_pixels_are_counted_over_the_cohorts_slices_alone() -> None:
    rows = pd.DataFrame({"image_id": ["i", "i", "j"], "split": "train"})
    hu = np.array([[[-1024, 0]], [[3071, 0]], [[7, 7]]], dtype=np.int16)
    cache = Cache(hu, {"i": 0, "j": 1, "other": 2}, pd.DataFrame(), Path())
    counts, slices = hu_counts(by_hand(rows=rows), cache, seed=0)
    assert slices == 2
    assert {int(k) - 1024: int(counts[k]) for k in np.flatnonzero(counts)} == {
        -1024: 1,
        0: 2,
        3071: 1,
    }


class Watched:
    """Slices that remember which of them were read."""

    def __init__(self, hu: np.ndarray):
        self.hu, self.read = hu, list[int]()

    def __getitem__(self, row: int) -> np.ndarray:
        self.read.append(int(row))
        return self.hu[row]


def test_a_large_cache_is_never_read_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slices, "SAMPLED", 10)
    monkeypatch.setattr(slices, "CANDIDATES", 4)
    cohort = apply_protocol(manifest(400, ("a", "b")), ("a", "b"), REPORT, 1.0)
    done = prepared(cohort)
    hu = Watched(done.cache.hu)
    cache = Cache(hu, done.cache.row, done.cache.quarantine, done.cache.folder)  # type: ignore[arg-type]
    write_data_report(config(REPORT), Prepared(done.cohort, done.wanted, cache, "", None), tmp_path)
    shown = 3  # a, b and negative
    assert len(hu.read) <= 10 + 4 * shown + shown
    assert hu_counts(cohort, cache, 0)[1] == 10
    np.testing.assert_array_equal(hu_counts(cohort, cache, 0)[0], hu_counts(cohort, cache, 0)[0])
    assert (hu_counts(cohort, cache, 0)[0] != hu_counts(cohort, cache, 1)[0]).any()

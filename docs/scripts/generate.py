"""What docs/ holds and nobody types: tables of committed results, and the architecture's picture.

`python docs/scripts/generate.py` (and `make docs`) writes both; a test compares them with what is
committed.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow import draw_flow

DOCS = Path(__file__).resolve().parents[1]
REPORTS = DOCS.parent / "multirun_reports" / "benchmarks"
EXAMPLES = DOCS.parent / "multirun_reports" / "examples"
# Between the two lines of a pair stands what `_BLOCKS` makes of its name.
_MARKED = re.compile(r"(<!-- made: (\w+)( [\w -]+)? -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Row:
    """A line of a report: `part, detail: one / other`, as `ich bench` names it.

    mode: what `ich` computed in, where that is said. rates: of the two, per second unless `detail`
    says otherwise; none where the ratio is a mean of others. ratio: of the rates, the median of the
    rounds; `low` and `high` are its extremes.
    """

    part: str
    detail: str
    sides: str
    mode: str
    rates: tuple[float, ...]
    ratio: float
    low: float
    high: float
    report: str

    @staticmethod
    def of(name: str, values: dict[str, float], report: str) -> Row:
        what, _, sides = name.partition(": ")
        part, _, detail = what.partition(" ")
        mode = re.search(r" \((.*)\)", sides)  # as in `ours (fp32, channels_last) / fp32 NCHW`
        sides = sides.replace(mode[0], "") if mode else sides
        rates = tuple(values[k] for k in ("ours", "plain") if k in values)
        limits = (values[k] for k in ("ratio", "lowest", "highest"))
        return Row(part.rstrip(","), detail, sides, mode[1] if mode else "", rates, *limits, report)

    @property
    def network(self) -> str:
        """Of what is timed per network, its name and the side of its input; else empty."""
        found = re.match(r"\w+, \d+ px", self.detail)
        return found[0] if found else ""


def read_reports() -> list[tuple[str, dict[str, Any]]]:
    """Each committed report by its file's stem."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted(REPORTS.glob("*.json"))]


def _link(stem: str, report: dict[str, Any]) -> str:
    return f"[`{report['commit'][:7]}`](../multirun_reports/benchmarks/{stem}.md)"


def _rows(parts: Sequence[str]) -> list[Row]:
    found = [
        Row.of(name, values, _link(stem, report))
        for stem, report in read_reports()
        for name, values in report["rows"].items()
    ]
    asked = [r for r in found if r.part in parts and r.rates]  # means of others are made again
    # What ich is compared with comes first, then what it could reach at most.
    return sorted(asked, key=lambda r: (not r.sides.startswith("ours"), r.sides))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """As Markdown; the first `texts` columns are texts, the others numbers, the last one links."""
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts - 1) + ["---"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rule, *rows])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _limits(row: Row) -> str:
    return f"{row.low:.3g} to {row.high:.3g}"


def rates_table(parts: Sequence[str]) -> str:
    """The rows of these parts of `ich bench` that are of no single network, of all reports."""
    lines = []
    for row in _rows(parts):
        if not row.network:
            rates = [_number(r) for r in row.rates]
            what = row.detail if len(parts) == 1 else ", ".join([row.part, row.detail])
            lines.append(
                [what, row.sides, *rates, f"**{row.ratio:.3g}**", _limits(row), row.report]
            )
    headings = ["what", "one / other", "one", "other", "ratio", "of the rounds", "commit"]
    return _table(headings, lines, 2)


def networks_table(parts: Sequence[str]) -> str:
    """The others: a line per network and size, a column per comparison."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in _rows(parts):
        if row.network:
            lines.setdefault((row.network, row.report), {})[row.sides] = row
    sides = list(dict.fromkeys(side for rows in lines.values() for side in rows))
    table = []
    for (network, report), rows in lines.items():
        ratios = [f"**{r.ratio:.3g}** ({_limits(r)})" if r else "" for r in map(rows.get, sides)]
        first = next(iter(rows.values()))
        precision = first.mode.partition(",")[0]  # the layout is the same for all
        table.append([network, precision, _number(first.rates[0]), *ratios, report])
    return _table(["network", "in", "images per s", *sides, "commit"], table, 2)


def summary_table(parts: Sequence[str]) -> str:
    """Per comparison of networks, the extremes and the geometric mean of their ratios."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in _rows(parts):
        if row.network:
            size = row.network.partition(", ")[2]
            groups.setdefault((size, row.sides, row.report), []).append(row)
    lines = []
    for (size, sides, report), rows in groups.items():
        least, most = (pick(rows, key=lambda r: r.ratio) for pick in (min, max))
        mean = math.exp(sum(math.log(r.ratio) for r in rows) / len(rows))
        ends = [f"{r.ratio:.3g} ({r.network.partition(',')[0]})" for r in (least, most)]
        lines.append([size, sides, ends[0], f"**{mean:.3g}**", ends[1], report])
    headings = ["what", "one / other", "lowest", "geometric mean", "highest", "commit"]
    return _table(headings, lines, 2)


def notes(_: Sequence[str]) -> str:
    """What the reports say in words, below their rows."""
    told = [(n, _link(stem, report)) for stem, report in read_reports() for n in report["notes"]]
    return "\n".join(f"- {note} ({link})" for note, link in told)


def reports_table(_: Sequence[str]) -> str:
    """What each report was measured on, and by which command."""
    lines = []
    for stem, report in read_reports():
        versions = report["versions"]
        machine = f"{report['processor']}, {report['cores']} cores, {report['memory_gib']} GiB"
        with_gpus = ", ".join([machine, *report["gpus"]])
        code = f"`ich bench {report['settings']}`"
        software = f"{versions['python']}, {versions['torch']}"
        lines.append([report["date"], with_gpus, software, code, _link(stem, report)])
    return _table(["date", "machine", "Python, torch", "command", "commit"], lines, 4)


# Of a sweep's comparison.md, what a page has room for.
_SHOWN = ("job", "accuracy", "AUC", "95 % interval", "sd of seeds", "AUC any", "AUC macro")


def example_table(parts: Sequence[str]) -> str:
    """The table of a committed sweep, and the commit it was made by."""
    folder = EXAMPLES / parts[0]
    lines = (folder / "comparison.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    shown = [cells[0].index(name) for name in (*_SHOWN, "trained M", "minutes")]
    # An empty cell at the end of a line was stripped with its bar.
    rows = [[*row, *[""] * len(cells[0])] for row in cells]
    rule = ["---"] + ["---:"] * (len(shown) - 1)
    table = [rule if row[0] == "---" else [row[i].strip() for i in shown] for row in rows]
    return _with_commit("\n".join(f"| {' | '.join(line)} |" for line in table), folder)


def _with_commit(table: str, folder: Path) -> str:
    commit = json.loads((folder / "sweep.json").read_text())["provenance"]["git"]["commit"]
    return f"{table}\n\n*Made by commit `{commit[:7]}`, an earlier one than this page's.*"


_CONTEXT = {"auc_any": "AUC any", "auc_macro": "AUC macro", "log_loss_weighted": "log loss"}


def context_table(parts: Sequence[str]) -> str:
    """What each network of a committed sweep sees, and what that is worth, per slice or study."""
    name, level = parts
    folder = EXAMPLES / name
    with (folder / "context.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["level"] == level and r["metric"] in _CONTEXT]
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["network"], row["way"]), {})[row["metric"]] = row
    lines = [[*key, *(_worth(values[k]) for k in _CONTEXT)] for key, values in found.items()]
    table = _table(["network", "sees", *_CONTEXT.values()], lines, 2)
    return _with_commit(table, folder)


def _worth(row: dict[str, str]) -> str:
    value, low, high = (float(row[k]) for k in ("value", "low", "high"))
    if not row["difference"]:
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    keys = ("difference", "difference_low", "difference_high")
    difference, low, high = (float(row[k]) for k in keys)
    return f"{value:.3f}; {difference:+.3f} ({low:+.3f} to {high:+.3f})"


def stages_table(parts: Sequence[str]) -> str:
    """Seconds of each stage of a committed sweep's jobs, the mean over their seeds."""
    jobs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((EXAMPLES / parts[0]).glob("*/result.json")):
        result = json.loads(path.read_text())
        jobs.setdefault(path.parent.name.rpartition(",")[0], []).append(result)
    lines = []
    for job, results in jobs.items():
        heads = [r["head"] for r in results if r.get("head")]
        keys = ("slice_minutes", "feature_minutes", "minutes") if heads else ("minutes",)
        seconds = [60 * sum(r[k] for r in heads or results) / len(results) for k in keys]
        cells = [*map(_number, seconds), "", ""][:3]
        lines.append([job, *cells, ", ".join(h["inputs"] for h in heads)])
    headings = ["job", "network's training, s", "features, s", "heads, s", "the kept heads take"]
    return _table(headings, lines)


_BLOCKS = {
    "context": context_table,
    "example": example_table,
    "rates": rates_table,
    "networks": networks_table,
    "summary": summary_table,
    "notes": notes,
    "reports": reports_table,
    "stages": stages_table,
}


def _made_again(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        parts = (match[3] or "").split()
        return f"{match[1]}{_BLOCKS[match[2]](parts)}\n{match[4]}"

    return _MARKED.sub(block, text)


def generate() -> Iterator[tuple[Path, str]]:
    """Each file with what it should hold."""
    for page in sorted(DOCS.glob("*.md")):
        yield page, _made_again(page.read_text())
    yield DOCS / "assets" / "flow.svg", draw_flow()


if __name__ == "__main__":
    for path, text in generate():
        path.write_text(text)

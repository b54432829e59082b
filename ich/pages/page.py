"""A page of text, tables and pictures, written once and shown as HTML and as Markdown.

A page opens from a disk, anywhere: nothing in it is fetched, and its policy forbids it to. A script
is there only for a `Ranking`, whose columns sort and whose lines open; the policy names its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pandas as pd

_CSS_DPI = 96  # CSS pixels per inch


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table; its first column names the rows. `folded`: in HTML behind a click."""

    caption: str
    frame: pd.DataFrame
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG; `width` in CSS pixels. `name` is its file's stem."""

    name: str
    png: bytes
    width: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Link:
    """A paragraph that leads to another file of the same folder."""

    text: str
    target: str


@dataclass(frozen=True)
class Cell:
    """One value of a ranking. value: what it is sorted by. below: a second, smaller line."""

    text: str
    value: float | None = None
    below: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a ranking. parts: rows behind a click, `opens` is its text. is_last: stays below
    the others, however they are sorted."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    parts: Sequence[Line] = field(default_factory=list)
    opens: str = ""
    is_last: bool = False


@dataclass(frozen=True)
class Ranking:
    """A table that sorts by any column, and whose lines may open into parts."""

    caption: str
    columns: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Frame:
    """One slice of a stack. pictures: of each its heading and its file, PNG or JPEG, all of one
    size. said: of each label its text, and whether it stands out."""

    title: str
    pictures: Sequence[tuple[str, bytes]]
    said: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Curve:
    """A value of each frame, 0..1, and the limit from which it counts."""

    name: str
    values: Sequence[float]
    limit: float


@dataclass(frozen=True)
class Stack:
    """Slices to scroll through, with curves of values above. first: the frame that is shown."""

    caption: str
    curves: Sequence[Curve]
    frames: Sequence[Frame]
    first: int = 0


Block = Text | Bullets | Grid | Picture | Link | Ranking | Stack
Section = tuple[str, list[Block]]


def cells(table: pd.DataFrame) -> list[list[str]]:
    """A table of this module as text: percent with two decimals, counts with commas."""
    columns = [
        [_cell(value, "{:.2f}" if "%" in str(name) else "{:,}") for value in column]
        for name, column in table.items()
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _cell(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else form.format(value)


def drawn(draw: Callable[..., Any], *args: Any) -> tuple[bytes, int]:
    """A figure as PNG, and its width in CSS pixels."""
    import matplotlib

    out = io.BytesIO()
    # Names come from users: `$` in them is no formula, and a script the font lacks no fault.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw(*args)
        colour = figure.get_facecolor()
        figure.savefig(out, format="png", facecolor=colour, bbox_inches="tight", pad_inches=0.1)
    png = out.getvalue()
    pixels = int.from_bytes(png[16:20], "big")  # PNG (RFC 2083), 4.1.1: the header's width
    return png, round(pixels / figure.dpi * _CSS_DPI)


# --- HTML and Markdown -------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--page:#fff;--line:#d0d7de;
--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--page:#0f141a;
--line:#30363d;--card:#1a212a}a{color:#58a6ff!important}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 4rem;overflow-wrap:anywhere}
a{color:#0969da}h1{font-size:1.7rem;line-height:1.2}
h2{margin:2.5rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
p,li{max-width:48rem}
dl{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:0;color:var(--soft)}
dl div{display:flex;gap:.4rem}dt{white-space:nowrap}dd{margin:0;color:var(--ink)}
figure{margin:1.25rem 0}
figcaption{color:var(--soft);font-size:.9em;max-width:48rem;padding:.5rem 0}
.scroll{overflow-x:auto;max-width:100%;overflow-wrap:normal}
.scroll img{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .75rem;border-bottom:1px solid var(--line);text-align:right}
thead th{background:var(--card);vertical-align:bottom}
td.text,th[scope=row],th.text{text-align:left}th[scope=row]{font-weight:600}
th[scope=row]{overflow-wrap:break-word}td.text{min-width:12rem}
.ranking th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-align:inherit}
.ranking thead button::after{content:" \\2195";color:var(--soft)}
.ranking th[aria-sort=descending] button::after{content:" \\2193"}
.ranking th[aria-sort=ascending] button::after{content:" \\2191"}
.ranking small{display:block;color:var(--soft);font-weight:400;white-space:nowrap}
.ranking td.best{font-weight:700}.ranking tr.part th{padding-left:1.75rem;font-weight:400}
.ranking tbody th{position:sticky;left:0;background:var(--page);background-clip:padding-box}
.ranking tbody.last{color:var(--soft)}
.stack input{width:100%;margin:.5rem 0}.stack svg{width:100%;height:5rem;display:block;
background:var(--card)}
.stack polyline{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.stack line{stroke:var(--ink);vector-effect:non-scaling-stroke}.stack rect.jump{fill:transparent;
cursor:pointer}
.stack .curve{display:grid;grid-template-columns:9rem 1fr;gap:.5rem;align-items:center}
.stack .curve svg{height:2rem;margin:1px 0}.frames:focus-visible{outline:2px solid}
.frame .row{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:.5rem}
.frame figure{margin:0}
.frame img{width:100%;height:auto;display:block;background:#000;border-radius:4px}
.frame figcaption{padding:.15rem 0}.frame ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;
list-style:none;padding:0;font-variant-numeric:tabular-nums;color:var(--soft)}
.frame li.out{color:var(--ink);font-weight:700}
.ranking th button.opens{display:block;color:var(--soft);font-weight:400;font-size:.85em;
text-decoration:underline}
summary{cursor:pointer;color:var(--soft);padding:.25rem 0}
@media print{:root{--ink:#000;--soft:#444;--page:#fff;--line:#bbb;--card:#eee}
figure,tr{break-inside:avoid}.scroll{overflow:visible}
.scroll img{min-width:0!important}body{font-size:11px}th,td{padding:.2rem .4rem}}
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.ranking")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === (column ? "descending" : "ascending");
    const falling = column ? !up : up;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (body) => body.rows[0].cells[column].dataset.value ?? "";
    const bodies = [...table.tBodies].filter((body) => !body.classList.contains("last"));
    bodies.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column ? x - y : x.localeCompare(y);
      return falling ? -order : order;
    });
    const last = [...table.tBodies].filter((body) => body.classList.contains("last"));
    table.append(...bodies, ...last);
  }));
  for (const button of table.querySelectorAll("button.opens")) {
    const parts = [...button.closest("tbody").querySelectorAll("tr.part")];
    const show = (open) => {
      button.setAttribute("aria-expanded", open);
      parts.forEach((part) => { part.hidden = !open; });
    };
    button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
    show(false);
  }
}
"""
_STACK_SCRIPT = """
for (const stack of document.querySelectorAll(".stack")) {
  const frames = [...stack.querySelectorAll(".frame")];
  const slider = stack.querySelector("input"), marks = [...stack.querySelectorAll("line.now")];
  const jumps = [...stack.querySelectorAll("rect.jump")];  // of each curve, one per frame
  const show = (number) => {
    const n = Math.max(0, Math.min(frames.length - 1, number));
    frames.forEach((frame, i) => { frame.hidden = i !== n; });
    slider.value = n;
    for (const mark of marks) for (const end of ["x1", "x2"]) mark.setAttribute(end, n + 0.5);
  };
  const move = (by) => show(Number(slider.value) + by);
  slider.addEventListener("input", () => show(Number(slider.value)));
  stack.querySelector(".frames").addEventListener("wheel", (event) => {
    event.preventDefault();
    move(Math.sign(event.deltaY));
  }, { passive: false });
  stack.addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1, PageUp: -5, PageDown: 5 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  });
  jumps.forEach((jump, n) => jump.addEventListener("click", () => show(n % frames.length)));
  slider.hidden = false;
  show(Number(slider.value));
}
"""
_SCRIPTS = {Ranking: _SCRIPT, Stack: _STACK_SCRIPT}
_PHONE = 560  # CSS pixels below which a picture scrolls rather than shrinks


def to_html(title: str, facts: dict[str, str], sections: list[Section]) -> str:
    """One page that opens from a disk, anywhere."""
    known = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()
    )
    body = []
    for heading, blocks in sections:
        inside = "\n".join(_block_html(b) for b in blocks)
        body.append(f"<section>\n<h2>{html.escape(heading)}</h2>\n{inside}\n</section>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    kinds = {type(b) for _, blocks in sections for b in blocks}
    wanted = [script for kind, script in _SCRIPTS.items() if kind in kinds]
    if wanted:
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in wanted]
        policy += "; script-src " + " ".join(f"'sha256-{d}'" for d in digests)
    script = "".join(f"<script>{text}</script>\n" for text in wanted)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<dl>{known}</dl>\n"
        + "\n".join(body)
        + f"\n</main>\n{script}</body>\n</html>\n"
    )


def _block_html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(i)}</li>" for i in items) + "</ul>"
        case Picture():
            data = base64.b64encode(block.png).decode()
            least = min(block.width, _PHONE)
            return (
                f'<figure>\n<div class="scroll" tabindex="0" role="group" aria-label="figure">'
                f'<img alt="{html.escape(block.alt)}" width="{block.width}" '
                f'style="min-width:{least}px" src="data:image/png;base64,{data}"></div>\n'
                f"<figcaption>{html.escape(block.caption)}</figcaption>\n</figure>"
            )
        case Grid():
            table = _table_html(block)
            if block.folded:
                return f"<details><summary>{html.escape(block.caption)}</summary>{table}</details>"
            caption = html.escape(block.caption)
            return f"<figure><figcaption>{caption}</figcaption>{table}</figure>"
        case Link(text, target):
            return f'<p><a href="{html.escape(quote(target))}">{html.escape(text)}</a></p>'
        case Ranking():
            return _ranking_html(block)
        case Stack():
            return _stack_html(block)


def _stack_html(stack: Stack) -> str:
    count = len(stack.frames)
    curves = "\n".join(_curve_html(curve) for curve in stack.curves)
    frames = "\n".join(_frame_html(frame) for frame in stack.frames)
    return (
        f'<div class="stack"><p>{html.escape(stack.caption)}</p>\n{curves}\n'
        f'<div class="curve"><span>slice</span><input type="range" min="0" max="{count - 1}" '
        f'value="{stack.first}" aria-label="slice" hidden></div>\n'
        f'<div class="frames" tabindex="0">\n{frames}\n</div></div>'
    )


def _curve_html(curve: Curve) -> str:
    count = len(curve.values)
    points = " ".join(f"{n + 0.5:g},{1 - v:.3f}" for n, v in enumerate(curve.values))
    if count == 1:
        points = f"0,{1 - curve.values[0]:.3f} 1,{1 - curve.values[0]:.3f}"
    jumps = "".join(
        f'<rect class="jump" x="{n}" y="0" width="1" height="1"/>' for n in range(count)
    )
    out = max(curve.values) >= curve.limit
    color = "#d1242f" if out else "var(--soft)"
    name = html.escape(curve.name)
    return (
        f'<div class="curve"><span>{name}</span><svg viewBox="0 0 {count} 1" role="img" '
        f'preserveAspectRatio="none" aria-label="{name} by slice"><line x1="0" x2="{count}" '
        f'y1="{1 - curve.limit:.3f}" y2="{1 - curve.limit:.3f}" stroke-dasharray="2 3"/>'
        f'<polyline points="{points}" style="stroke:{color}"/>'
        f'<line class="now" x1="0.5" x2="0.5" y1="0" y2="1"/>{jumps}</svg></div>'
    )


def _frame_html(frame: Frame) -> str:
    row = []
    for heading, data in frame.pictures:
        kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        text = html.escape(heading)
        row.append(
            f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
        )
    said = "".join(
        f"<li{' class=out' if out else ''}>{html.escape(text)}</li>" for text, out in frame.said
    )
    return (
        f'<div class="frame"><h3>{html.escape(frame.title)}</h3><ul>{said}</ul>'
        f'<div class="row">{"".join(row)}</div></div>'
    )


def _ranking_html(ranking: Ranking) -> str:
    head = "".join(
        f'<th scope="col"{"" if n else chr(32) + "class=text"}><button type="button">'
        f"{html.escape(c)}</button></th>"
        for n, c in enumerate(ranking.columns)
    )
    bodies = []
    for line in ranking.lines:
        rows = [_line_html(line, ""), *(_line_html(part, ' class="part"') for part in line.parts)]
        kind = ' class="last"' if line.is_last else ""
        bodies.append(f"<tbody{kind}>" + "\n".join(rows) + "</tbody>")
    caption = html.escape(ranking.caption)
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="scroll" tabindex="0" role="group" '
        f'aria-label="table"><table class="ranking"><thead><tr>{head}</tr></thead>\n'
        + "\n".join(bodies)
        + "</table></div></figure>"
    )


def _line_html(line: Line, kind: str) -> str:
    opens = f'<button type="button" class="opens">{html.escape(line.opens)}</button>'
    note = f"<small>{html.escape(line.note)}</small>" if line.note else ""
    name = html.escape(line.name)
    cells_ = [f'<th scope="row" data-value="{name}">{name}{note}{opens if line.parts else ""}</th>']
    for cell in line.cells:
        below = f"<small>{html.escape(cell.below)}</small>" if cell.below else ""
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        best = ' class="best"' if cell.is_best else ""
        cells_.append(f"<td{best}{value}>{html.escape(cell.text)}{below}</td>")
    return f"<tr{kind}>{''.join(cells_)}</tr>"


def _table_html(grid: Grid) -> str:
    aligned = ["" if n else ' class="text"' for n in _is_number(grid.frame)]
    head = "".join(
        f'<th scope="col"{a}>{html.escape(str(c))}</th>'
        for c, a in zip(grid.frame.columns, aligned, strict=True)
    )
    rows = []
    for first, *rest in cells(grid.frame):
        data = "".join(
            f"<td{a}>{html.escape(c)}</td>" for c, a in zip(rest, aligned[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{data}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _is_number(frame: pd.DataFrame) -> list[bool]:
    """Which columns are set flush right: numbers, and texts that begin like one."""
    return [
        all(re.match(r"[+-]?[\d.,]*($|[\d ])", c) for c in column)
        for column in zip(*cells(frame), strict=True)
    ] or [False] * frame.shape[1]


def to_markdown(title: str, facts: dict[str, str], sections: list[Section]) -> str:
    """The same in Markdown, readable as it stands; pictures are links into `figures/`."""
    lines = [f"# {_plain(title)}", "", ", ".join(f"{k}: {_plain(v)}" for k, v in facts.items())]
    for heading, blocks in sections:
        lines += ["", f"## {heading}"]
        for block in blocks:
            lines += ["", *_block_markdown(block)]
    return "\n".join(lines) + "\n"


def _block_markdown(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [_plain(text)]
        case Bullets(items):
            return [f"- {_plain(i)}" for i in items]
        case Picture():
            link = f"![{_plain(block.alt)}](figures/{block.name}.png)"
            return [link, "", _plain(block.caption)]
        case Grid():
            columns = [_plain(str(c)) for c in block.frame.columns]
            rule = ["---:" if n else "---" for n in _is_number(block.frame)]
            rows = [[_plain(c) for c in row] for row in cells(block.frame)]
            table = [f"| {' | '.join(row)} |" for row in [columns, rule, *rows]]
            return [_plain(block.caption), "", *table]
        case Link(text, target):
            return [f"[{_plain(text)}]({quote(target)})"]
        case Ranking():
            return [_plain(block.caption), "", *_ranking_markdown(block)]
        case Stack():
            return [_plain(block.caption)]  # pictures are for the page


def _ranking_markdown(ranking: Ranking) -> list[str]:
    rule = "| --- |" + " ---: |" * (len(ranking.columns) - 1)
    lines = [f"| {' | '.join(_plain(c) for c in ranking.columns)} |", rule]
    for line in ranking.lines:
        for row, name in ((line, line.name), *((p, f"- {p.name}") for p in line.parts)):
            note = f" ({_plain(row.note)})" if row.note else ""
            texts = []
            for cell in row.cells:
                text = _plain(" ".join(t for t in (cell.text, cell.below) if t))
                texts.append(f"**{text}**" if cell.is_best and text else text)
            lines.append(f"| {' | '.join([_plain(name) + note, *texts])} |")
    return lines


def _plain(text: str) -> str:
    """Text on one line that Markdown, or HTML inside it, does not read as anything else."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))

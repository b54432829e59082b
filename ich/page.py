"""A page of text, tables and pictures, written once and shown as HTML and as Markdown."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


Block = Text | Bullets | Grid | Picture
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
--line:#30363d;--card:#1a212a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2}
h2{margin:2.5rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
p,li{max-width:48rem}
dl{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:0;color:var(--soft)}
dl div{display:flex;gap:.4rem}dd{margin:0;color:var(--ink)}
figure{margin:1.25rem 0}
figcaption{color:var(--soft);font-size:.9em;max-width:48rem;padding:.5rem 0}
.scroll{overflow-x:auto;max-width:100%;overflow-wrap:normal}
.scroll img{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .75rem;border-bottom:1px solid var(--line);text-align:right}
thead th{background:var(--card);vertical-align:bottom}
td.text,th[scope=row],th.text{text-align:left}th[scope=row]{font-weight:600}
th[scope=row]{overflow-wrap:break-word}td.text{min-width:12rem}
summary{cursor:pointer;color:var(--soft);padding:.25rem 0}
@media print{:root{--ink:#000;--soft:#444;--page:#fff;--line:#bbb;--card:#eee}
figure,tr{break-inside:avoid}.scroll{overflow:visible}
.scroll img{min-width:0!important}body{font-size:11px}th,td{padding:.2rem .4rem}}
"""
_PHONE = 560  # CSS pixels below which a picture scrolls rather than shrinks


def to_html(title: str, facts: dict[str, str], sections: list[Section]) -> str:
    """One page without a script or a link to anything: it opens from a disk, anywhere."""
    known = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()
    )
    body = []
    for heading, blocks in sections:
        inside = "\n".join(_block_html(b) for b in blocks)
        body.append(f"<section>\n<h2>{html.escape(heading)}</h2>\n{inside}\n</section>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<dl>{known}</dl>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
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
        all(re.match(r"[\d.,]*($|[\d ])", c) for c in column)
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


def _plain(text: str) -> str:
    """Text on one line that Markdown, or HTML inside it, does not read as anything else."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))

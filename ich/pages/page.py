"""A page of text, tables and pictures, written once and shown as HTML and as Markdown.

A page opens from a disk, anywhere: nothing in it is fetched, and its policy forbids it to. Scripts
are there only for a `Ranking`, which is sorted, searched and unfolded, and for a `Stack`, which is
scrolled through; the policy names their hashes.

How a block looks is for `templates/` to say: `blocks.html.j2` has a macro for each class below.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ich.pages.vector import inline_svg

_CSS_DPI = 96  # CSS pixels per inch
_EDGE = 0.1  # inches around a figure
_SEARCHED = 10  # rows of a ranking, from which on it has a search box


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Verdict:
    """What a page says, in large letters. cautions: what its reader must know beside it."""

    text: str
    cautions: Sequence[str] = ()


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows. `folded`: in HTML behind a click."""

    caption: str
    frame: pd.DataFrame
    folded: bool = False

    @property
    def columns(self) -> list[str]:
        return [str(c) for c in self.frame]

    @cached_property
    def rows(self) -> list[list[str]]:
        return format_cells(self.frame)

    @cached_property
    def is_number(self) -> list[bool]:
        """Which columns are set flush right: numbers, and texts that begin like one."""
        return [
            all(re.match(r"(< )?[+-]?[\d.,]*($|[\d ])", c) for c in column)
            for column in zip(*self.rows, strict=True)
        ] or [False] * len(self.columns)


@dataclass(frozen=True)
class Picture:
    """A PNG; `width` in CSS pixels. `name` is its file's stem. svg: the same, as
    matplotlib writes it, which a page shows instead; empty for a photograph."""

    name: str
    png: bytes
    width: int
    alt: str
    caption: str
    svg: str = ""


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
class Span:
    """A value with its interval, drawn as a line of a forest plot.

    Positions are 0..1, from left to right. kind: names its look in `page.css`. dots: smaller ones.
    limits: None without an interval. text: what is said of it where the pointer is.
    """

    kind: str
    value: float
    limits: tuple[float, float] | None
    dots: Sequence[float]
    text: str


@dataclass(frozen=True)
class Scale:
    """Of a ranking's spans. ticks: position and text of each. mark: a line through all rows.
    kinds: of the spans, and what each means."""

    heading: str
    ticks: Sequence[tuple[float, str]]
    mark: float | None
    kinds: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A row of a ranking. parts: rows behind a click, `opens` is its text. is_last: stays below
    the others, however they are sorted. span: where the ranking has a scale."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    parts: Sequence[Row] = field(default_factory=list)
    opens: str = ""
    is_last: bool = False
    span: Span | None = None


@dataclass(frozen=True)
class Ranking:
    """A table that sorts by any column, and whose rows may open into parts.

    columns: the first names the rows. optional: those that are not shown until they are asked for.
    scale: draws the rows' spans, in a column after their names.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    optional: Collection[str] = ()
    scale: Scale | None = None

    @property
    def is_long(self) -> bool:
        """Whether its rows are worth a search."""
        return len(self.rows) >= _SEARCHED


@dataclass(frozen=True)
class Frame:
    """One slice of a stack. pictures: of each its heading and its file, PNG or JPEG, all of one
    size. labels: of each its text, and whether it stands out."""

    title: str
    pictures: Sequence[tuple[str, bytes]]
    labels: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Curve:
    """A value of each frame, 0..1 or NaN, and the threshold from which it counts."""

    name: str
    values: Sequence[float]
    threshold: float

    @property
    def reaches(self) -> bool:
        return any(value >= self.threshold for value in self.values)

    @property
    def lines(self) -> list[list[tuple[float, float]]]:
        """Points from left to right, y downwards from 0 to 1. A frame is one unit wide, and its
        middle is its point; a NaN is a gap."""
        lines = []
        for known, run in groupby(enumerate(self.values), lambda pair: not math.isnan(pair[1])):
            points = [(number + 0.5, 1 - value) for number, value in run]
            if known:
                # A line needs two points: one alone is drawn from edge to edge.
                (x, y), *more = points
                lines.append(points if more else [(x - 0.5, y), (x + 0.5, y)])
        return lines


@dataclass(frozen=True)
class Stack:
    """Slices to scroll through, with curves of values above. first: the frame that is shown."""

    caption: str
    curves: Sequence[Curve]
    frames: Sequence[Frame]
    first: int = 0


Block = Text | Verdict | Heading | Bullets | Table | Picture | Link | Ranking | Stack
Section = tuple[str, list[Block]]


def format_cells(table: pd.DataFrame) -> list[list[str]]:
    """A table as text: percent with two decimals, counts with commas, nothing where it is NaN."""
    columns = [
        [_format_cell(value, "{:.2f}" if "%" in str(name) else "{:,}") for value in column]
        for name, column in table.items()
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _format_cell(value: Any, form: str) -> str:
    # A text has been formatted by whoever made the table.
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else form.format(value)


def draw_picture(
    name: str,
    alt: str,
    caption: str,
    draw: Callable[..., Any],
    *args: Any,
    is_photograph: bool = False,
) -> Picture:
    """A figure as a picture of a page: `draw` takes `args` and returns a matplotlib figure.

    Args:
        name: unique in its page.
        is_photograph: there is no SVG of it.
    """
    import matplotlib  # half a second with its fonts, which only who draws shall wait for

    png, svg = io.BytesIO(), io.BytesIO()
    # Names come from users: `$` in them is no formula, and a script the font lacks no fault.
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw(*args)
        # Laid out once, for both: that takes longer than to draw it.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        box = figure.get_tightbbox().padded(_EDGE)
        figure.savefig(png, format="png", bbox_inches=box)
        if not is_photograph:
            # Without a date, so that equal figures are equal files.
            figure.savefig(svg, format="svg", bbox_inches=box, metadata={"Date": None})
    pixels = int.from_bytes(png.getvalue()[16:20], "big")  # PNG (RFC 2083), 4.1.1: its width
    # In its own size in inches: more dots per inch make it sharper, and not larger.
    width = round(pixels / figure.dpi * _CSS_DPI)
    return Picture(name, png.getvalue(), width, alt, caption, svg.getvalue().decode())


# --- HTML and Markdown -------------------------------------------------------------------------

# Of matplotlib, for any picture of a page.
_RC = {
    "text.parse_math": False,
    "svg.hashsalt": "ich",  # equal figures are equal files
    "svg.fonttype": "none",  # letters as text, which can be searched and copied
}
# Out of the package, so that an installed wheel has its templates too.
_LOADER = PackageLoader("ich.pages")
_TEMPLATES = Environment(
    loader=_LOADER,
    autoescape=True,  # names, notes and errors come from users and their files
    # A misspelt name in a template raises, and is not an empty text.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Only with the block that needs it: a page without a script forbids them all.
_SCRIPTS = {Ranking: "ranking.js", Stack: "stack.js"}


def _source(name: str) -> str:
    """A file of the templates as it stands: braces of CSS and JavaScript are no expressions."""
    return _LOADER.get_source(_TEMPLATES, name)[0]


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names a script (CSP3, 2.3.1)."""
    # By its hash, so that a script which somebody wrote into a name or a note does not run.
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _anchor(heading: str) -> str:
    """The end of a link that leads to a section."""
    return re.sub(r"\W+", "-", heading).strip("-").lower()


_TEMPLATES.globals["source"] = _source
_TEMPLATES.filters |= {
    **{"kind": _kind, "sha256": _sha256, "data_uri": _data_uri, "quote": quote},
    **{"inline_svg": inline_svg, "percent": "{:.2%}".format, "anchor": _anchor},
}


def render(name: str, filters: Mapping[str, Callable[[str], str]], **values: object) -> str:
    """A text by a template that is no HTML. Nothing is escaped but by its filters: these, and
    `plain`, for Markdown."""
    texts = _TEMPLATES.overlay(autoescape=False)
    texts.filters = {**_TEMPLATES.filters, "plain": _plain, **filters}
    # Jinja leaves the last line break out.
    return texts.get_template(name).render(values).rstrip() + "\n"


def to_html(
    title: str, facts: dict[str, str], sections: list[Section], lead: Sequence[Block] = ()
) -> str:
    """One page that opens from a disk, anywhere.

    Args:
        title: of the page. facts: small ones, below it. sections: each with its heading.
        lead: blocks above the sections, and above the links that lead to them.
    """
    kinds = {type(b) for blocks in (lead, *(blocks for _, blocks in sections)) for b in blocks}
    scripts = [_source(name) for kind, name in _SCRIPTS.items() if kind in kinds]
    page = _TEMPLATES.get_template("page.html.j2")
    return page.render(title=title, facts=facts, sections=sections, lead=lead, scripts=scripts)


def to_markdown(
    title: str, facts: dict[str, str], sections: list[Section], lead: Sequence[Block] = ()
) -> str:
    """The same in Markdown, readable as it stands; pictures are links into `figures/`."""
    lines = [f"# {_plain(title)}", "", ", ".join(f"{k}: {_plain(v)}" for k, v in facts.items())]
    for heading, blocks in (("", lead), *sections):
        lines += ["", f"## {heading}"] if heading else []
        for block in blocks:
            lines += ["", *_block_markdown(block)]
    return "\n".join(lines) + "\n"


def _block_markdown(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [_plain(text)]
        case Verdict(text, cautions):
            return [f"**{_plain(text)}**", *(line for c in cautions for line in ("", _plain(c)))]
        case Heading(text):
            return [f"### {_plain(text)}"]
        case Bullets(items):
            return [f"- {_plain(i)}" for i in items]
        case Picture():
            link = f"![{_plain(block.alt)}](figures/{block.name}.png)"
            return [link, "", _plain(block.caption)]
        case Table():
            rule = ["---:" if n else "---" for n in block.is_number]
            head, *rows = [[_plain(c) for c in row] for row in [block.columns, *block.rows]]
            table = [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]
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
    for line in ranking.rows:
        # Markdown opens nothing: seeds stand below their setting, as items of a list.
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

"""A page's blocks as HTML: what users name stays text, and the policy lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from ich.pages.page import (
    Block,
    Bullets,
    Cell,
    Curve,
    Frame,
    Link,
    Picture,
    Ranking,
    Row,
    Stack,
    Table,
    Text,
    to_html,
)

HOSTILE = "<evil a='1'> \"b\" & {{ 7 * 7 }} {% endfor %} </style></script>"
PNG = b"\x89PNG"
FRAME = pd.DataFrame({HOSTILE: [HOSTILE], "n": [1000]})
PART = Row(HOSTILE, [Cell(HOSTILE, 1.0, HOSTILE)], HOSTILE)
# One of each kind, and how often it shows the name that a user chose.
BLOCKS: list[tuple[Block, int]] = [
    (Text(HOSTILE), 1),
    (Bullets([HOSTILE, HOSTILE]), 2),
    (Link(HOSTILE, HOSTILE), 1),
    (Picture("name", PNG, 100, HOSTILE, HOSTILE), 2),
    (Table(HOSTILE, FRAME), 3),
    (Table(HOSTILE, FRAME, folded=True), 3),
    (Ranking(HOSTILE, [HOSTILE], [Row(HOSTILE, [], HOSTILE, [PART], HOSTILE)]), 11),
    (
        Stack(
            HOSTILE,
            [Curve(HOSTILE, [0.5], 0.5)],
            [Frame(HOSTILE, [(HOSTILE, PNG)], [(HOSTILE, True)])],
        ),
        7,
    ),
]


class Reader(HTMLParser):
    """What a browser sees: tags, and all text and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.seen += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


@pytest.mark.parametrize(("block", "times"), BLOCKS)
def test_what_a_user_names_is_shown_as_it_is_and_never_run(block: Block, times: int) -> None:
    page = to_html(HOSTILE, {HOSTILE: HOSTILE}, [(HOSTILE, [block])])
    found = Reader(page)
    assert "evil" not in found.tags
    assert " ".join(found.seen).count(HOSTILE) == 2 + 2 + 1 + times  # title, facts, heading


@pytest.mark.parametrize("kinds", [(), (Ranking,), (Stack,), (Ranking, Stack)])
def test_the_policy_names_what_is_in_the_page_and_nothing_else(kinds: tuple[type, ...]) -> None:
    blocks = [block for block, _ in BLOCKS if isinstance(block, kinds)]
    page = to_html("title", {}, [("heading", blocks)])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    parts = dict(part.split(" ", 1) for part in html.unescape(policy[1]).split("; "))
    for kind, tag, count in (("style-src", "style", 1), ("script-src", "script", len(kinds))):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in inside]
        assert len(inside) == count
        assert parts.get(kind, "") == " ".join(f"'sha256-{d}'" for d in digests)
    assert parts["default-src"] == "'none'"
    assert not re.search(r" (style|on\w+)=", page.partition("</style>")[2].partition("<script>")[0])


def test_a_curve_has_a_gap_where_it_is_undefined() -> None:
    """NaN in the points of a line draws none of it in a browser."""
    curve = Curve("any", [0.5, math.nan, 0.25, 0.75, math.nan], 0.7)
    assert curve.lines == [[(0, 0.5), (1, 0.5)], [(2.5, 0.75), (3.5, 0.25)]]
    assert curve.reaches
    assert not Curve("any", [math.nan], 0.7).reaches
    page = to_html("t", {}, [("s", [Stack("", [curve], [Frame("", [], [])] * 5)])])
    assert page.count("<polyline") == 2
    assert "nan" not in page.partition("<svg")[2].partition("</svg>")[0]

"""A matplotlib figure as SVG in a page: in the page's colours, and naming what is pointed at.

A page's policy forbids style attributes, which is what matplotlib writes: they become presentation
attributes of the same meaning (SVG 2, chapter 6.6).
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_HOVER = "hover-"
# Of matplotlib's SVG: what is no picture, or is for `page.css` to say.
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", re.S)
_STYLE = re.compile(r' style="([^"]*)"')
_FONT = re.compile(r"(?:(italic|oblique) )?(?:(\w+) )?([\d.]+)px ")
_PLACES = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_TITLED = Markup('<g class="hover"><title>{}</title>')
_BLANKS = re.compile(r">\s+<")
_NUMBER = re.compile(r"(\d\.\d{2})\d+")
# What a page that is dark shows in its own ink.
_BLACK = {"#000000", "black"}


def name_on_hover(artist: Any, text: str) -> None:
    """What a browser says of an artist that the pointer is on."""
    # A group's id is all that matplotlib passes on; hexadecimal has no character of XML's.
    artist.set_gid(_HOVER + text.encode().hex())


@dataclass(frozen=True)
class Drawing:
    """box: the `viewBox` of an svg element. inside: what stands in it."""

    box: str
    inside: Markup


def inline_svg(svg: str, name: str) -> Drawing:
    """A figure as it stands in a page.

    Args:
        svg: as matplotlib's `savefig` writes it, with `svg.fonttype` "none".
        name: unique in the page: ids begin with it.
    """
    body = _DROPPED.sub("", svg[svg.index("<svg") :])
    body = _STYLE.sub(lambda match: _attributes(html.unescape(match[1])), body)
    body = body.replace("base64,\n", "base64,")  # of a heat map's cells
    body = re.sub(r'<g id="hover-([0-9a-f]+)">', _titled, body)
    body = re.sub(r' id="|(?<=href=")#|(?<=url\()#', lambda m: f"{m[0]}{name}-", body)
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="([^"]*)"', head)
    inside = _PLACES.sub(_shorter, rest.rpartition("</svg>")[0])
    return Drawing(box[1] if box else "", Markup(_BLANKS.sub("><", inside).strip()))


def _shorter(match: re.Match[str]) -> str:
    # Less than a hundredth of a point is not seen, and is a third of the bytes.
    return " " + " ".join(_NUMBER.sub(r"\1", match[0]).split())


def _titled(match: re.Match[str]) -> str:
    return _TITLED.format(bytes.fromhex(match[1]).decode())


def _attributes(style: str) -> str:
    """Declarations of CSS as attributes; a font's family is the page's."""
    found: dict[str, str] = {}
    for declaration in style.split(";"):
        name, _, value = declaration.strip().partition(": ")
        if name == "font" and (font := _FONT.match(value)):
            found |= {"font-size": font[3]}
            found |= {"font-style": font[1]} if font[1] else {}
            found |= {"font-weight": font[2]} if font[2] else {}
        elif name and name != "font-family":
            found[name] = "currentColor" if value in _BLACK else value
    return "".join(f' {k}="{html.escape(v)}"' for k, v in found.items())

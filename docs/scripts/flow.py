"""The picture of architecture.md, as SVG: what a slice goes through, from a CSV to a table.

All text stands on filled cards, so that it reads on a white page and on a black one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, CARD, GAP, SIDE = 880, 56, 26, 190  # pixels; SIDE is the width of what comes in or goes out
_LEFT, _RIGHT = SIDE + 40, WIDTH
_DATA, _TRAINING, _RESULT, _OUTSIDE = "#1d4e79", "#6a3d7c", "#1f6650", "#5f6b75"
_ARROW = "#8a949e"


@dataclass(frozen=True)
class Stage:
    """A card. where: the code that makes it. beside: what comes in (or, `leaves`, goes out)."""

    name: str
    what: str
    where: str
    color: str
    beside: str = ""
    leaves: bool = False


STAGES = (
    Stage("CSV", "labels of images, and patients where known", "data.labels", _DATA),
    Stage("manifest", "one row per image, file and patient", "ich/data/manifest.py", _DATA),
    Stage(
        *("cohort", "rows for training, validation, test; the leak", "ich/data/protocol.py"),
        *(_DATA, "conf/protocol"),
    ),
    Stage(
        *("cache", "int16 HU, one square slice per image", "ich/data/cache.py", _DATA),
        "DICOM, folder or zip",
    ),
    Stage(
        *("batch", "CT windows as channels, flips, crops", "ich/training/transforms.py"),
        *(_TRAINING, "conf/windows, augment"),
    ),
    Stage(
        *("run", "a process: epochs, best weights, predictions", "ich/training/fit.py"),
        *(_TRAINING, "conf/model, loss, train"),
    ),
    Stage(
        *("table", "metrics, intervals, figures, report.html", "ich/pages/tables.py", _RESULT),
        *("MLflow, a copy", True),
    ),
)


def _text(x: int, y: int, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'


def _card(x: int, y: int, width: int, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{CARD}" rx="8" fill="{color}"/>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    line = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {line} stroke="{_ARROW}" stroke-width="2.5" marker-end="url(#tip)"/>'


def _draw(stage: Stage, y: int) -> Iterator[str]:
    yield _card(_LEFT, y, _RIGHT - _LEFT, stage.color)
    middle = y + CARD // 2 + 5
    yield _text(_LEFT + 18, middle, stage.name, 'font-size="18" font-weight="bold"')
    yield _text(_LEFT + 120, middle - 10, stage.what, 'font-size="15"')
    mono = 'font-size="13" font-family="monospace" fill-opacity="0.85"'
    yield _text(_LEFT + 120, middle + 11, stage.where, mono)
    if stage.beside:
        yield _card(0, y, SIDE, _OUTSIDE)
        yield _text(SIDE // 2, middle, stage.beside, 'font-size="14" text-anchor="middle"')
        ends = (SIDE + 4, _LEFT - 10)
        start, end = (_LEFT - 4, SIDE + 10) if stage.leaves else ends
        yield _arrow(start, y + CARD // 2, end, y + CARD // 2)


def draw_flow() -> str:
    """The picture as SVG."""
    step = CARD + GAP
    height = len(STAGES) * step - GAP
    title = "From a CSV to a table: " + ", ".join(s.name for s in STAGES)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" fill="#ffffff" role="img">',
        f"<title>{escape(title)}</title>",
        '<marker id="tip" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="5" markerHeight="5" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{_ARROW}"/></marker>',
    ]
    center = (_LEFT + _RIGHT) // 2
    for number, stage in enumerate(STAGES):
        y = number * step
        parts += _draw(stage, y)
        if number + 1 < len(STAGES):
            parts.append(_arrow(center, y + CARD + 2, center, y + step - 6))
    return "\n".join([*parts, "</svg>", ""])

"""Every setting against every other: on the page, and as `pairs.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pandas as pd

from ich.pages.answers.words import probability
from ich.pages.description import interval_text
from ich.pages.page import Block, Table
from ich.scoring.comparison import Comparison, EvaluationSet
from ich.scoring.pairs import Pair

_COLUMNS = ["one", "other", "rows", "auc_difference", "low", "high", "margin", "verdict"]
_COLUMNS += ["within_low", "within_high", "p", "p_holm"]
_COUNTS = ["patients_to_tell", "positives_to_tell"]
_SHOWN = 28  # pairs, which are those of eight settings


def pairs_table(comparison: Comparison) -> pd.DataFrame:
    """All pairs of settings that were scored on the same rows; columns in docs/results.md."""
    lines = [
        _line(rows.fingerprint, pair) for rows in comparison.evaluation_sets for pair in rows.pairs
    ]
    table = pd.DataFrame(lines, columns=[*_COLUMNS, *_COUNTS, "smallest_told"])
    # Nullable integers: with one empty cell, pandas would make floats of a column.
    return table.astype(dict.fromkeys(_COUNTS, "Int64"))


def _line(rows: str, pair: Pair) -> tuple[object, ...]:
    about = (pair.one, pair.other, rows, pair.difference, pair.interval.low, pair.interval.high)
    words = (pair.margin, pair.verdict, pair.within.low, pair.within.high, pair.p, pair.p_holm)
    return (*about, *words, pair.size.patients, pair.size.positives, pair.size.smallest)


def pair_blocks(rows: EvaluationSet, where: str) -> Iterator[Block]:
    """A folded table of all pairs; of more settings than eight, of each with the next one."""
    # Two settings stand in the table above already.
    if len(rows.pairs) < 2:
        return
    shown, what = rows.pairs, "All pairs of settings"
    if len(shown) > _SHOWN:
        order = list(dict.fromkeys(name for pair in shown for name in (pair.one, pair.other)))
        following = set(pairwise(order))
        shown = [pair for pair in shown if (pair.one, pair.other) in following]
        what = f"Each setting and the next by AUC; all {len(rows.pairs):,} pairs are in pairs.csv"
    unit = rows.predictions.unit
    caption = (
        f"{where}{what}: the difference in AUC with its 95 % interval, the verdict by the margin, "
        f"p without and with Holm's correction over all pairs, and how many {unit} would tell the "
        f"two apart, as below."
    )
    yield Table(caption, pd.DataFrame([_shown(pair, unit) for pair in shown]), folded=True)


def _shown(pair: Pair, unit: str) -> dict[str, str]:
    return {
        "higher": pair.one,
        "lower": pair.other,
        "difference": f"{pair.difference:+.4f}",
        "95 % interval": interval_text(pair.interval, "+.4f"),
        "verdict": pair.verdict,
        "p": probability(pair.p),
        "p, corrected": probability(pair.p_holm),
        f"{unit} to tell": f"{pair.size.patients:,}" if pair.size.patients else "no number",
    }

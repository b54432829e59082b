"""Numbers and lists as the answers write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NAMED = 5  # of many, as many as a sentence bears


def probability(p: float) -> str:
    """With four decimals; empty where there is none."""
    return "" if np.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def some_names(names: Sequence[str], most: int = _NAMED) -> str:
    """`a, b` of few; of more, how many and the first ones."""
    # A setting's name has commas of its own.
    between = "; " if any("," in name for name in names) else ", "
    if len(names) <= most + 1:  # "and 1 more" is no shorter than its name
        return between.join(names)
    return f"{len(names)} settings ({between.join(names[:most])} and {len(names) - most} more)"

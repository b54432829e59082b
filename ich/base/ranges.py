"""Which values a setting may have, said beside the field that holds it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """Which values a setting may have beside null, and how a message says it: "must be {text}"."""

    text: str
    holds: Callable[[Any], object]


def allowed(text: str, holds: Callable[[Any], object]) -> dict[str, Allowed]:
    """Metadata of a dataclass field, which `ich.base.validation.validate` reads.

    Null is no matter of ranges: OmegaConf refuses it where the field's type has no `| None`.
    """
    return {"allowed": Allowed(text, holds)}


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "above": operator.gt,
    "at_least": operator.ge,
    "at_most": operator.le,
    "below": operator.lt,
}


def number(text: str, **limits: float) -> dict[str, Allowed]:
    """Metadata of a number within limits: `above`, `at_least`, `at_most` and `below`.

    NaN is within none, and `below=inf` asks for a finite number.
    """
    # Each says what must hold, none what must not: of NaN no comparison holds, so it is refused.
    tests = [(_COMPARE[name], limit) for name, limit in limits.items()]
    return allowed(text, lambda value: all(test(value, limit) for test, limit in tests))


AT_LEAST_1 = number("at least 1", at_least=1)
AT_LEAST_1_OR_NULL = number("at least 1, or null", at_least=1)
POSITIVE_SHARE = number("above 0 and at most 1", above=0, at_most=1)
PROPER_SHARE = number("above 0 and below 1", above=0, below=1)
SHARE = number("a number from 0 to 1", at_least=0, at_most=1)
FINITE_NOT_NEGATIVE = number("a finite number, 0 or more", at_least=0, below=math.inf)

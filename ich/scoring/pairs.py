"""Every setting against every other: are the two equal, different, or is it not known; and how many
patients would tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ich.scoring.equivalence import ALPHA, holm, p_values, verdict
from ich.scoring.power import SampleSize, sample_sizes
from ich.scoring.uncertainty import Interval, ScoredRows


@dataclass(frozen=True)
class Pair:
    """Two settings, by name, `one` with the higher AUC.

    difference: of their AUCs, 0 or more. interval: of it, 95 %. within: the same, 90 %, for the
    verdict against `margin`. p: two-sided, of no difference; p_holm: the same, corrected over all
    pairs. size: what telling them apart takes.
    """

    one: str
    other: str
    difference: float
    interval: Interval
    within: Interval
    margin: float
    p: float
    p_holm: float
    size: SampleSize

    @property
    def verdict(self) -> str:
        """EQUAL, DIFFERENT or UNKNOWN, of `ich.scoring.equivalence`."""
        return verdict(self.within, self.p_holm, self.margin)


def compare_pairs(
    names: Sequence[str],
    means: Sequence[float],
    replicates: np.ndarray,
    of_patients: np.ndarray,
    rows: Sequence[Sequence[ScoredRows]],
    margin: float,
) -> list[Pair]:
    """All pairs of S settings: the first with each of the others, then the second, and so on.

    Args:
        names, means: of the settings, the highest AUC first, and their AUCs.
        replicates: AUC in each resample of patients and seeds, [S, R]. of_patients: of patients
            alone, [S, R].
        rows: of each setting its seeds, all of the same rows.
        margin: within which two are equal.
    """
    numbers = list(combinations(range(len(names)), 2))
    # What one of them lacks in a resample ranks nothing there.
    p = p_values(np.array(means), replicates[:, np.isfinite(replicates).all(0)])
    corrected = holm(p)
    sizes = sample_sizes(rows, means, replicates, of_patients, numbers)
    found = []
    for (i, j), size in zip(numbers, sizes, strict=True):
        drawn = replicates[i] - replicates[j]
        found.append(
            Pair(
                names[i],
                names[j],
                means[i] - means[j],
                Interval.of(drawn),
                Interval.of(drawn, tail=ALPHA),
                margin,
                float(p[i, j]),
                float(corrected[i, j]),
                size,
            )
        )
    return found

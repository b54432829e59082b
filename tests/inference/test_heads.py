"""Heads over studies at work: series by series, in whatever order files come."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ich.data.decode import ReadResult
from ich.data.order import surround
from ich.inference.session import PredictResult
from ich.inference.study import StudyHeads, slices_that_moved
from ich.training.study.head import StudyHead

LABELS, FEATURES = 3, 8


def made_up_head(features: int) -> StudyHead:
    """Of weights that nobody trained, in eval mode."""
    torch.manual_seed(features)
    head = StudyHead(features, LABELS).eval()
    torch.nn.init.normal_(head.out.weight)
    return head


def places_of(*rows: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["study", "series", "position"])


def series(name: str, count: int, study: str = "a", gap: float = 5.0) -> list[tuple]:  # type: ignore[type-arg]
    return [(study, name, gap * n) for n in range(count)]


# Of each what its files' places are, and the numbers of those that cannot be read.
CASES = {
    "one slice": (places_of(*series("s", 1), *series("t", 3, "b")), ()),
    "600 slices": (places_of(*series("s", 600)), (7,)),
    "two series, interleaved": (
        places_of(*[r for pair in zip(series("s", 5), series("t", 5), strict=True) for r in pair]),
        (4,),
    ),
    "the same place twice": (places_of(*series("s", 5), *series("s", 2), *series("s", 1)), ()),
    "places are missing": (
        places_of(
            *series("s", 3),
            ("a", "s", np.nan),
            ("", "", 3.0),
            *series("t", 2),
            *[("", "", np.nan)] * 2,
        ),
        (1,),
    ),
    "nobody says where": (places_of(*[("a", "s", np.nan)] * 3), ()),
    "nothing can be read": (places_of(*series("s", 3)), (0, 1, 2)),
}


def by_a_loop(
    head: StudyHead, places: pd.DataFrame, outputs: np.ndarray, refused: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, L] and which of them are the head's, one series after another."""
    logits, seen = outputs[:, :LABELS].copy(), np.zeros(len(places), bool)
    for owner in {(s, t) for s, t, _ in places.itertuples(index=False) if s or t}:
        members = []
        for n, (study, name, position) in enumerate(places.itertuples(index=False)):
            if (study, name) == owner and np.isfinite(position) and n not in refused:
                members.append((position, n))
        if len(members) < 2:
            continue
        numbers = [n for _, n in sorted(members)]
        distinct = sorted({p for p, _ in members})
        place = torch.tensor([[distinct.index(p) for p, _ in sorted(members)]])
        features = torch.from_numpy(outputs[numbers, LABELS:].astype(np.float16).astype(np.float32))
        given = torch.from_numpy(outputs[numbers, :LABELS])
        with torch.no_grad():
            logits[numbers] = head(features[None, :, : head.features], given[None], place)[0]
        seen[numbers] = True
    return logits, seen


def result(number: int, outputs: np.ndarray | None) -> PredictResult:
    return PredictResult(ReadResult(number, {}, "" if outputs is not None else "cut"), outputs)


@pytest.mark.parametrize("features", [0, FEATURES])
@pytest.mark.parametrize("name", CASES)
def test_heads_are_those_of_a_plain_loop(name: str, features: int) -> None:
    places, unread = CASES[name]
    refused, count = set(unread), len(places)
    head, rng = made_up_head(features), np.random.default_rng(0)
    outputs = rng.normal(size=(count, LABELS + FEATURES)).astype(np.float32)
    expected, seen = by_a_loop(head, places, outputs, refused)
    for order in (surround(places, np.ones(count, bool)).sequence, rng.permutation(count)):
        # A network without a head beside it keeps its logits.
        logits = np.full((count, 2, LABELS), np.nan, np.float32)
        in_study = np.zeros(count, bool)
        heads = StudyHeads([None, head], places, logits, in_study)
        for start in range(0, count, 4):
            batch = []
            for n in order[start : start + 4].tolist():
                both = None if n in refused else np.stack([outputs[n]] * 2)
                if both is not None:
                    logits[n] = both[:, :LABELS]
                batch.append(result(n, both))
            heads.add(batch)
        heads.finish()
        read = [n for n in range(count) if n not in refused]
        np.testing.assert_allclose(logits[read, 1], expected[read], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(logits[read, 0], outputs[read, :LABELS])
        assert in_study.tolist() == seen.tolist()
        assert heads.waiting == 0


def test_memory_holds_the_series_that_are_being_read() -> None:
    places = places_of(*[row for n in range(50) for row in series(f"s{n}", 6)])
    logits = np.zeros((300, 1, LABELS), np.float32)
    heads = StudyHeads([made_up_head(FEATURES)], places, logits, np.zeros(300, bool))
    most, outputs = 0, np.zeros((1, LABELS + FEATURES), np.float32)
    for start in range(0, 300, 4):
        heads.add([result(n, outputs) for n in range(start, start + 4)])
        most = max(most, heads.waiting)
    assert most < 6


def test_what_came_back_of_a_series_is_seen_together_and_again_as_a_whole() -> None:
    """A process may be killed; and a neighbour that cannot be read is found out too late."""
    places, head = places_of(*series("s", 4), *series("t", 3)), made_up_head(FEATURES)
    outputs = np.random.default_rng(1).normal(size=(7, LABELS + FEATURES)).astype(np.float32)
    logits, in_study = outputs[:, None, :LABELS].copy(), np.zeros(7, bool)
    heads = StudyHeads([head], places, logits, in_study)
    heads.add([result(n, outputs[n][None]) for n in (0, 2, 4)])
    heads.finish()
    expected, seen = by_a_loop(head, places, outputs, {1, 3, 5, 6})
    np.testing.assert_allclose(logits[[0, 2], 0], expected[[0, 2]], atol=1e-4)
    assert in_study.tolist() == seen.tolist()
    usable = np.array([True, False, True, True, True, True, True])
    again = heads.again(np.arange(7) == 2, usable)
    assert np.flatnonzero(again).tolist() == [0, 2, 3]
    logits[again, 0] = outputs[again, :LABELS]
    heads.add([result(n, outputs[n][None]) for n in (3, 0, 2)])
    expected, _ = by_a_loop(head, places, outputs, {1})
    np.testing.assert_allclose(logits[[0, 2, 3], 0], expected[[0, 2, 3]], atol=1e-4)


def test_what_moved_a_head_is_what_it_falls_by_without_a_slice() -> None:
    head, rng = made_up_head(FEATURES), np.random.default_rng(2)
    features = rng.normal(size=(11, FEATURES)).astype(np.float32)
    logits, place = rng.normal(size=(11, LABELS)).astype(np.float32), np.arange(11)
    moved = slices_that_moved(head, features, logits, place)
    assert moved.shape == (11, LABELS)

    def answer(features: np.ndarray, logits: np.ndarray) -> np.ndarray:
        given = (torch.from_numpy(x)[None] for x in (features, logits, place))
        with torch.no_grad():
            return head(*given)[0].numpy()

    before = answer(features, logits)
    for n in range(11):
        one, other = features.copy(), logits.copy()
        one[n], other[n] = features.mean(0), logits.mean(0)
        after = answer(one, other)
        for k in range(LABELS):
            top = before[:, k].argmax()
            assert moved[n, k] == pytest.approx(before[top, k] - after[top, k], abs=1e-4)

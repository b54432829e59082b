"""The registered model: which version has the alias `best`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ich.tracking.registry import (
    AliasMove,
    Registration,
    VersionTags,
    alias_for,
    decide_alias,
)

PRESENT = VersionTags("demo", "vgg16", "a1b2", 0.9)


@pytest.mark.parametrize(
    ("rows", "auc", "promote", "move"),
    [
        ("a1b2", 0.91, False, AliasMove.moved),
        ("a1b2", 0.9, False, AliasMove.moved),  # the same run again
        ("a1b2", 0.89, False, AliasMove.lower),
        ("a1b2", 0.89, True, AliasMove.moved),
        ("c3d4", 0.99, False, AliasMove.incomparable),
        ("c3d4", 0.5, True, AliasMove.moved),
    ],
)
def test_the_alias_best_moves_to_what_is_no_worse_on_the_same_rows(
    rows: str, auc: float, promote: bool, move: AliasMove
) -> None:
    new = VersionTags("other", "xception", rows, auc)
    assert decide_alias(new, PRESENT, promote) is move
    assert decide_alias(new, None, promote) is AliasMove.moved


def test_a_run_registered_again_is_no_lower_than_itself() -> None:
    run = VersionTags("demo", "vgg16", "a1b2", 0.8460456007470429)  # written down as 0.846046
    present = VersionTags.read(run.write())
    assert present.auc > run.auc
    assert decide_alias(run, present, promote=False) is AliasMove.moved


def test_a_version_without_tags_is_not_taken_for_a_worse_one() -> None:
    unknown = VersionTags.read({})
    assert VersionTags.read({"ich.auc": "n/a"}) == unknown
    assert decide_alias(PRESENT, unknown, promote=False) is AliasMove.incomparable
    assert VersionTags.read(PRESENT.write()) == PRESENT


def test_names_of_sweeps_become_aliases_that_mlflow_takes() -> None:
    assert alias_for("demo-1a2b") == "demo-1a2b"
    assert alias_for("my sweep.2") == "my-sweep-2"
    assert alias_for("v3") == "sweep-v3"
    assert alias_for("best") == "sweep-best"


def test_a_version_that_somebody_made_by_hand_is_called_by_its_number() -> None:
    """It was None/None."""
    by_hand = ("3", VersionTags.read({}))
    folder = Path("multirun reports/x")
    told = Registration(PRESENT, "4", by_hand, AliasMove.incomparable, folder).describe()
    assert "The alias best stays with version 3, which was scored on other rows; " in told
    assert "ich report 'multirun reports/x' --promote moves it" in told
    ours = Registration(PRESENT, "4", ("3", PRESENT), AliasMove.lower, folder).describe()
    assert "version 3, demo/vgg16, which" in ours

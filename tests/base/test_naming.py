"""What labels may be called."""

from __future__ import annotations

import numpy as np
import pytest

from ich.base.naming import clean_name, why_unusable
from ich.pages.columns import COLUMNS
from ich.scoring.metrics import all_metrics


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        *((name, "a label's name is made of letters") for name in ("", " a", "a ", "_a", "-a")),
        *((f"a{c}b", "a label's name is made of") for c in ";\n\r\t()%@<>,[]{}'\"$&*/\\:=#|\0\x1b"),
        ("[/]", "a label's name is made of"),
        ("=1+1", "a label's name is made of"),
        ("a\u202eb", "a label's name is made of"),
        ("a\ud800", "a label's name is made of"),
        ("x" * 201, "at most 200 bytes"),
        ("ü" * 101, "at most 200 bytes"),
        *((name, "that is something else") for name in ("split", "Patient", "STUDY", "image_id")),
        *((name, "that is something else") for name in ("repeat", "macro", "low", "top", "Null")),
        *((name, "that is something else") for name in ("negative", "label", "at_90_any", "true")),
        *((name, "that is a number") for name in ("1", "1e3", "nan", "inf", "1_000", "0.5")),
        (("bleed", "Bleed"), "the labels 'bleed' and 'Bleed', which differ in case"),
        (("a b", "x", "a_b"), "the labels 'a b' and 'a_b', which differ in case, blanks"),
        (("mid", "mid_slice"), "'mid_slice', but so a further column of 'mid' is called"),
        (("any", "any_target"), "'any_target', but so a further column"),
        (("any_top3", "any"), "'any_top3', but so a further column"),
    ],
)
def test_names_that_something_could_not_use_are_refused(
    names: str | tuple[str, ...], reason: str
) -> None:
    assert reason in why_unusable(("fracture", *((names,) if isinstance(names, str) else names)))


def test_names_in_any_script_may_have_blanks_dots_and_dashes() -> None:
    names = (
        "any",
        "extra axial",
        "Blutung ältere",
        "出血",
        "3rd ventricle",
        "a.b-c_d",
        "mid_slice",
    )
    assert why_unusable(names) == ""
    assert why_unusable([clean_name(" a\u0308lter ")]) == ""


def test_no_label_makes_the_name_of_another_number() -> None:
    """`auc_<label>` is a label's, unless a column or metric is called so already."""
    rng = np.random.default_rng(0)
    metrics = all_metrics(rng.normal(size=(9, 2)), rng.integers(0, 2, (9, 2)), ("any", "sdh"))
    others = {c.name for c in COLUMNS} | {k for k in metrics if not k.endswith(("any", "sdh"))}
    for name in others:
        for prefix in ("auc_", "ap_", "accuracy_", "f1_", "threshold_"):
            if name.startswith(prefix):
                assert why_unusable([name.removeprefix(prefix)]), name

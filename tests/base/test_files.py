"""Files that every reader reads alike."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest

from ich.base.files import csv_text


@pytest.mark.parametrize("name", ["a\rb.dcm", "a\nb.dcm", 'a"b', "a,b", "a\r\nb", " a "])
def test_a_row_of_csv_is_one_row_whatever_a_file_is_called(name: str) -> None:
    table = pd.DataFrame({"file": [name, "c"], "any": [0.25, float("nan")], "n": [1, 2]})
    text = csv_text(table)
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["file", name, "c"]
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(text, newline="")), table)
    # Outside of quotes no line ends but at the end of a row.
    assert len("".join(text.split('"')[::2]).splitlines()) == 3

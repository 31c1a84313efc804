import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Rejected

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")  # noqa: RUF001
HOSTILE = st.text(st.sampled_from("=+-@;'\"\t\r\n, a＝\xa0"), min_size=1)  # noqa: RUF001
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))  # no name has a lone surrogate


@given(st.lists(st.tuples(HOSTILE | TEXT, HOSTILE), max_size=5))
def test_a_csv_file_holds_no_formula_and_is_read_as_it_was(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("manifest") / "rejected.csv"
    rows = [Rejected(path, label, "unreadable", "-1 byte") for path, label in texts]
    manifest.write(path, Rejected, rows)
    assert list(manifest.read(path, Rejected)) == rows
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    parts = [part for cell in cells for part in re.split("[;\t\r\n]", cell)]
    assert not [part for part in parts if FORMULA.match(part)]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1/a.jpg", "'=1+1/a.jpg"),
        ("'=1", "''=1"),
        ("a;=1;b", "a;'=1;b"),
        (" @x", " '@x"),
        ("mint/-c.jpg", "mint/-c.jpg"),
        ("'quoted'", "'quoted'"),
    ],
)
def test_an_apostrophe_stands_before_a_formula_only(text, cell):
    assert manifest.to_cell(text) == cell
    assert manifest.from_cell(cell) == text

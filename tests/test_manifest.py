import csv
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import Example, Rejected

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


NAMES = (
    HOSTILE | TEXT | st.sampled_from(["a\udce9.png", "1-a", "猫-1.jpg", "x'y", "'-", "a/b-c.png"])
)  # \udce9: not UTF-8


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(-(2**63), 2**63 - 1), NAMES, NAMES), max_size=5))
def test_columns_and_rows_are_the_same_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("columns")
    rows = [Example(*row) for row in rows]
    manifest.write(folder / "rows.csv", Example, rows)
    batches = list(manifest.read_columns(folder / "rows.csv", Example))
    columns = [[value for batch in batches for value in batch[name].to_pylist()] for name in Example._fields]
    columns = [[manifest.decode(v) if isinstance(v, bytes) else v for v in column] for column in columns]
    assert [Example(*row) for row in zip(*columns, strict=True)] == rows
    manifest.write_columns(folder / "columns.csv", Example, batches)
    assert (folder / "columns.csv").read_bytes() == (folder / "rows.csv").read_bytes()


def test_columns_of_more_than_one_batch_are_the_same_file(tmp_path):
    rows = [Example(f"a/{n}{'=' * (n % 5000 == 7)}", "a", n % 3, f"{n:064}", f"{n:064}") for n in range(10_000)]
    manifest.write(tmp_path / "rows.csv", Example, rows)
    manifest.write_columns(tmp_path / "columns.csv", Example, manifest.read_columns(tmp_path / "rows.csv", Example))
    assert (tmp_path / "columns.csv").read_bytes() == (tmp_path / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it is missing"),
        ("", "expected the columns path,label"),
        ("path,label\r\n", "expected the columns path,label,class_index,sha256,group, found 'path,label'"),
        ("path,label,class_index,sha256,group\r\na,b,0,c\r\n", "Expected 5 columns, got 4"),
        ("path,label,class_index,sha256,group\r\na,b,x,c,d\r\n", "invalid value 'x'"),
        ("path,label,class_index,sha256,group\r\na,b,0,c,d\r\n\r\n", "invalid value ''"),
    ],
)
def test_columns_of_an_edited_file_are_an_error(tmp_path, content, reason):
    path = tmp_path / "images.csv"
    if content is not None:
        path.write_bytes(content.encode())
    with pytest.raises(PipelineError, match=f"{re.escape(str(path))}: .*{reason}.*delete the folder"):
        list(manifest.read_columns(path, Example))


def test_an_error_about_a_changed_file_can_leave_a_worker_process(tmp_path):
    path = tmp_path / "training.json"
    path.write_text("{")
    with pytest.raises(PipelineError) as raised:
        manifest.read_json(path)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is type(raised.value) and str(copy) == str(raised.value)
    assert str(path) in str(copy) and str(tmp_path) not in str(copy.of_version(3))

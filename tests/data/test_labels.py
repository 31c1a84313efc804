import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline.data import labels
from dgmd_pipeline.errors import NoUsableInput, PipelineError


def test_labels_are_numbered_in_alphabetical_order():
    rows = labels.assign({"mint": 2, "anise": 3}, known=[], minimum=2)
    assert [(row.label, row.class_index, row.images, row.state) for row in rows] == [
        ("anise", 0, 3, "used"),
        ("mint", 1, 2, "used"),
    ]


def test_a_known_label_keeps_its_index_and_new_ones_follow():
    rows = labels.assign({"basil": 2, "anise": 2, "zest": 2}, known=["zest", "mint"], minimum=2)
    assert [(row.label, row.class_index, row.state) for row in rows] == [
        ("zest", 0, "used"),
        ("mint", 1, "gone"),
        ("anise", 2, "used"),
        ("basil", 3, "used"),
    ]


def test_a_label_with_too_few_images_gets_no_index():
    rows = labels.assign({"anise": 2, "mint": 2, "basil": 1}, known=[], minimum=2)
    assert rows[-1] == labels.LabelRow("basil", -1, 1, "too few")


def test_a_known_label_with_too_few_images_keeps_its_index_unused():
    rows = labels.assign({"anise": 2, "mint": 2, "basil": 1}, known=["basil"], minimum=2)
    assert rows[0] == labels.LabelRow("basil", 0, 1, "too few")


def test_fewer_than_two_usable_labels_are_an_error_with_the_counts():
    with pytest.raises(NoUsableInput, match=r"at least two labels with 2 usable images.*anise \(5\), mint \(1\)"):
        labels.assign({"anise": 5, "mint": 1}, known=[], minimum=2)


def test_labels_that_differ_in_case_spaces_or_unicode_form_are_confusable():
    found = labels.confusable_labels(
        ["Cat", "cat ", "dog", "é", "e\N{COMBINING ACUTE ACCENT}", "black  cat", "black cat"]
    )
    assert sorted(map(set, found), key=str) == sorted(
        [{"Cat", "cat "}, {"é", "e\N{COMBINING ACUTE ACCENT}"}, {"black  cat", "black cat"}], key=str
    )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True))
def test_a_mapping_is_read_as_it_was_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("map") / "mapping.json"
    labels.write_mapping(path, names)
    assert labels.read_mapping(path) == names
    assert list(json.loads(path.read_text())) == [str(index) for index in range(len(names))]


@pytest.mark.parametrize("text", ["", "[]x", "[1]", '{"0": "a", "2": "b"}', '{"0": "a", "1": "a"}', '{"0": 5}', "7"])
def test_an_invalid_mapping_is_an_error_with_a_remedy(tmp_path, text):
    path = tmp_path / "mapping.json"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"mapping\.json: expected .* Correct the file, or delete its folder"):
        labels.read_mapping(path)

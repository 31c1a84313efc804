import pickle

from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline.data import columns
from dgmd_pipeline.data.columns import Examples
from dgmd_pipeline.manifest import Example

TEXTS = st.sampled_from(["", "a/1.png", "a/2.png", "b/a\udce9.png", "猫/1.png"])  # \udce9: not UTF-8
HASHES = st.sampled_from([f"{number:064x}" for number in (0, 1, 2, 2**255)])
ROWS = st.lists(st.builds(Example, TEXTS, TEXTS, st.integers(0, 2**31 - 1), HASHES, HASHES | TEXTS), max_size=9)


@given(ROWS, st.integers(-9, 9), st.integers(-9, 9))
def test_examples_are_a_sequence_of_their_rows(rows, first, stop):
    examples = Examples.of(iter(rows))
    assert (len(examples), [*examples], [*reversed(examples)]) == (len(rows), rows, rows[::-1])
    assert [*examples[first:stop]] == pickle.loads(pickle.dumps(examples[first:stop])) == rows[first:stop]


@given(ROWS)
def test_examples_are_sorted_by_the_rank_of_their_content_and_then_by_path(rows):
    examples = Examples.of(rows)
    ranks = examples.sort("records")

    def rank(row):
        return tuple(columns.ranks("records", [row.sha256.encode()])[0].tolist())

    assert [*map(tuple, ranks.tolist())] == [*map(rank, examples)]
    in_order = sorted(rows, key=lambda row: (rank(row), row.path.encode("utf-8", "surrogateescape")))
    assert [*examples] == in_order  # both sorts are stable


def test_more_rows_than_a_batch_are_sorted():
    rows = [Example(f"a/{n}", "a", n, f"{n:064x}", f"{n // 2:064x}") for n in range(2 * columns.BATCH_ROWS + 1)]
    examples = Examples.of(rows)
    examples.sort("records")
    assert sorted(examples) == sorted(rows)
    assert [*examples] == [examples[position] for position in range(len(rows))] != rows

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline.workflow import timing
from dgmd_pipeline.workflow.success_file import StepRecord


def record(step, seconds, worked=None, volume=None):
    return StepRecord(
        step, 1, "identity", {}, {}, {}, "2025-01-01T00:00:00+00:00", seconds, "0.1.0", worked=worked, volume=volume
    )


RAN = [
    record("raw", 10.0, 1500, 80_000_000),
    record("label_map", 0.02, 1500),
    record("features_training", 17.2, 1806, 99_000_000),
    record("registered_model", 2.5),
]


def test_each_step_has_a_row_and_what_is_left_of_the_run_another():
    rows = timing.table_rows(RAN, 62.8)
    assert rows[0] == timing.Row("raw", 10.0, 150.0, 8.0, 16)
    assert [row.name for row in rows] == ["raw", "label_map", "features_training", "registered_model", "the rest"]
    assert rows[-1].seconds == pytest.approx(62.8 - 29.72)
    assert [row.share for row in rows] == [16, 0, 27, 4, 53]


def test_the_table_has_blanks_where_a_number_says_nothing_and_names_the_slowest_step():
    assert timing.table_lines(timing.table_rows(RAN, 62.8)) == [
        "  step                  seconds   img/s     MB/s share",
        "  raw                      10.0     150      8.0  16 %",
        "  label_map                 0.0  75,000            0 %",
        "  features_training        17.2     105      5.8  27 %",
        "  registered_model          2.5                    4 %",
        "  the rest                 33.1                   53 %",
        "Slowest: features_training, 17.2 s of 62.8 s (27 %), 105 images/s",
    ]


def test_the_table_leaves_room_for_a_log_s_time_in_80_columns():
    longest = [record("tfrecord_validation", 199_999.9, 10**9, 10**13), record("registered_model", 99_999.9)]
    *table, slowest = timing.table_lines(timing.table_rows(longest, 999_999.9))
    assert max(map(len, table)) <= 80 - len("2025-01-01 00:00:00+00:00 ")
    assert len(slowest) <= 80


def test_the_slowest_step_may_be_one_without_images():
    assert (
        timing.table_lines(timing.table_rows([RAN[3]], 2.5))[-1] == "Slowest: registered_model, 2.5 s of 2.5 s (100 %)"
    )


def test_a_step_that_is_slow_is_shown_with_the_digits_that_it_has():
    assert timing.table_lines(timing.table_rows([record("trained_model", 100.0, 240)], 100.0))[-1].endswith(
        ", 2.4 images/s"
    )


def test_a_step_that_did_nothing_or_took_no_time_has_no_speed():
    rows = timing.table_rows([record("raw", 3.0, 0, 0), record("split", 0.0, 30, 1000)], 4.0)
    assert [(row.images, row.megabytes) for row in rows] == [(None, None)] * 3


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0.001, 1e7))
def test_shares_sum_to_100_and_are_off_by_less_than_one(seconds, total):
    rows = timing.table_rows([record(f"step {number}", each) for number, each in enumerate(seconds)], total)
    assert sum(row.share for row in rows) == 100
    whole = sum(row.seconds for row in rows)
    assert all(abs(row.share - 100 * row.seconds / whole) < 1.001 for row in rows)


def test_metrics_are_named_by_folder_and_shares_are_fractions_of_all_steps():
    metrics = timing.metrics(RAN)
    assert metrics["system/step_seconds/raw"] == 10.0
    assert metrics["system/step_images_per_second/raw"] == 150.0
    assert metrics["system/step_megabytes_per_second/raw"] == 8.0
    assert sum(value for name, value in metrics.items() if name.startswith("system/step_share/")) == pytest.approx(1)
    assert {name for name in metrics if name.endswith("/registered_model")} == {
        "system/step_seconds/registered_model",
        "system/step_share/registered_model",
    }


def test_a_record_of_before_there_were_speeds_has_seconds_and_a_share():
    old = replace(RAN[0], worked=None, volume=None)
    assert timing.metrics([old]) == {"system/step_seconds/raw": 10.0, "system/step_share/raw": 1.0}
    assert timing.metrics([record("raw", 0.0)]) == {"system/step_seconds/raw": 0.0}

import csv

import pytest

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import Rejected


def test_the_detail_of_a_rejected_file_is_one_bounded_line_whoever_writes_it(tmp_path):
    long = "OSError: damaged; " + "Skipping tag\n" * 10_000 + "the last"
    row = Rejected("a/x", "a", "unreadable", long)
    assert len(row.detail) == 1000
    assert row.detail.startswith("OSError: damaged; Skipping tag Skipping")
    assert row.detail.endswith("Skipping tag the last")
    assert Rejected("a/x", "a", "unreadable", "\x1b[31m red\r\nline ").detail == "\\x1b[31m red line"
    manifest.write(tmp_path / "rejected.csv", Rejected, [row])
    assert list(manifest.read(tmp_path / "rejected.csv", Rejected)) == [row]


@pytest.mark.parametrize("length", [133_000, 7_000_000])
def test_the_long_details_that_earlier_versions_wrote_are_read_and_bounded(length, tmp_path):
    with (tmp_path / "rejected.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Rejected._fields, ("a/x", "a", "unreadable", "x" * length), tuple("abcd")])
    first, second = manifest.read(tmp_path / "rejected.csv", Rejected)
    assert len(first.detail) == 1000
    assert second == Rejected("a", "b", "c", "d")


def test_the_message_about_a_changed_file_is_bounded(tmp_path):
    manifest.write(tmp_path / "listing.csv", manifest.SourceObject, [("key", "x" * 100_000, "etag", "path")])
    with pytest.raises(PipelineError, match="invalid literal for int") as error:
        list(manifest.read(tmp_path / "listing.csv", manifest.SourceObject))
    assert len(str(error.value)) < 1500

import logging
import os
import pty
import select
import subprocess
import sys
import termios

from dgmd_pipeline.workflow import progress


def test_items_come_through_and_a_log_gets_a_line_now_and_then(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        items = list(progress.progress([3, 4], "download", 7, "objects", count=int, size=lambda item: item * 1_000_000))
    assert items == [3, 4]
    assert [record.message.split(" objects")[0] for record in caplog.records] == [
        "  download: 3 of 7",
        "  download: 7 of 7",
    ]
    assert all("objects/s" in record.message and "MB/s" in record.message for record in caplog.records)


def test_a_log_is_not_flooded(caplog):
    with caplog.at_level(logging.INFO):
        list(progress.progress(range(1000), "inspect", 1000, "images"))
    assert caplog.records == []


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path):
    code = "from dgmd_pipeline.workflow.progress import progress; list(progress(range(50), 'inspect', 50, 'images'))"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    drawn = ""
    while select.select([ours], [], [], 0)[0]:
        drawn += os.read(ours, 100_000).decode()
    assert "inspect:" in drawn
    assert "/50" in drawn
    assert all(len(line) <= 80 for line in drawn.split("\r"))

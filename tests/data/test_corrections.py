"""corrections.csv: its format, its effect on the rows, and that it is an input of the inspection."""

import pytest
from support.images import encode, put, scene

from dgmd_pipeline import cli, manifest
from dgmd_pipeline.data import corrections, inspection
from dgmd_pipeline.data.corrections import EXCLUDE
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import RawFile
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.tasks.data import InspectImages
from dgmd_pipeline.workflow.run_context import RunContext, activate
from dgmd_pipeline.workflow.success_file import digest, read_record


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / corrections.NAME
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_read_returns_the_label_of_each_key_and_nothing_without_a_file(write, tmp_path):
    path = write('key,label\na/1.jpg,b\r\n\n"a/2,3.jpg",exclude\na/4.jpg,Exclude\nä/5.jpg,"b ""c"""\na/1.jpg,b\n')
    expected = {"a/1.jpg": "b", "a/2,3.jpg": EXCLUDE, "a/4.jpg": EXCLUDE, "ä/5.jpg": 'b "c"'}
    assert corrections.read(path) == expected
    assert corrections.read(tmp_path / "none" / corrections.NAME) == {}
    assert corrections.read(write("key,label\n")) == {}


def test_a_file_written_by_a_spreadsheet_can_be_read(write):
    text = "key,label\r\n'=a/1.jpg,'-b\r\n'quoted'/2.jpg,b\r\n"
    assert corrections.read(write(b"\xef\xbb\xbf" + text.encode())) == {"=a/1.jpg": "-b", "'quoted'/2.jpg": "b"}


def inspect_copies(raw, scratch, rows):
    """Inspect two identical files with these corrections; return label by path, and reason by path."""
    for path in ("a/1.png", "a/2.png"):
        put(raw, path, encode(scene(), "PNG"))
    files = [RawFile(path, "a") for path in ("a/1.png", "a/2.png")]
    corrected = corrections.apply(files, rows)
    usable, rejected = inspection.inspect(corrected.files, raw, scratch)
    usable, copies = corrections.exclude_copies(usable, corrected.excluded, raw)
    return {row.path: row.label for row in usable}, {row.path: row.reason for row in rejected + copies}


def test_a_correction_applies_to_copies_of_the_file(tmp_path):
    raw = tmp_path / "raw"
    assert inspect_copies(raw, tmp_path, {"a/1.png": "b"}) == ({"a/1.png": "b"}, {"a/2.png": "duplicate"})
    assert inspect_copies(raw, tmp_path, {"a/2.png": "b"}) == ({"a/1.png": "b"}, {"a/2.png": "duplicate"})
    assert inspect_copies(raw, tmp_path, {"a/1.png": EXCLUDE}) == ({}, {"a/2.png": "excluded"})
    both = {"a/1.png": "b", "a/2.png": "c"}
    assert inspect_copies(raw, tmp_path, both) == ({}, {"a/1.png": "conflict", "a/2.png": "conflict"})


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("", 1, "expected the columns key,label, found ''"),
        ("label,key\nb,a/1.jpg\n", 1, "expected the columns key,label, found 'label,key'"),
        ("key;label\na/1.jpg;b\n", 1, "expected the columns key,label, found 'key;label'"),
        ("key,label\na/1.jpg,b\na/2.jpg\n", 3, "expected a key and a label, found 1 values"),
        ("key,label\n,b\n", 2, "the key is empty"),
        ("key,label\na/1.jpg,\n", 2, "the label is empty"),
        ("key,label\na/1.jpg, b\n", 2, "the label ' b' begins or ends with a space"),
        ('key,label\na/1.jpg,"b\nc"\n', 3, "the label 'b\\nc' begins or ends with a space, or has a character that"),
        ("key,label\na/1.jpg,b/c\n", 2, "the label 'b/c' contains a slash or begins with a dot"),
        ("key,label\na/1.jpg,.b\n", 2, "the label '.b' contains a slash or begins with a dot"),
        ("key,label\na/1.jpg,b\n\na/1.jpg,c\n", 4, "'a/1.jpg' has the label 'c' here and 'b' in line 2"),
        ("key,label\na/1.jpg,exclude\na/1.jpg,c\n", 3, "has the label 'c' here and 'exclude' in line 2"),
        (b"key,label\na/1.jpg,b\na/2.jpg,\xe9t\xe9\n", 3, "expected UTF-8"),
        ("key,label\n".encode("utf-16"), 1, "expected UTF-8"),
        ('key,label\n"a/1.jpg,b\n', 2, "expected comma-separated values"),
    ],
)
def test_a_malformed_file_is_an_error_of_one_line_with_the_line_number(content, line, problem, write):
    path = write(content)
    with pytest.raises(NoUsableInput) as raised:
        corrections.read(path)
    assert str(raised.value).startswith(f"{path}, line {line}: ")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_instead_of_the_file_is_an_error(tmp_path):
    (tmp_path / corrections.NAME).mkdir()
    with pytest.raises(NoUsableInput, match="cannot be read"):
        corrections.read(tmp_path / corrections.NAME)


def test_files_are_relabelled_or_excluded_and_mismatches_are_returned():
    files = [RawFile(f"{label}/{number}.jpg", label) for label in ("a", "b", EXCLUDE) for number in range(2)]
    rows = {"a/0.jpg": "b", "a/1.jpg": EXCLUDE, "b/0.jpg": "b", "b/1.jpg": "typo", "z/1.jpg": "new", "0.jpg": EXCLUDE}
    found = corrections.apply(files, rows)
    assert found.files == [
        RawFile("a/0.jpg", "b"), RawFile("b/0.jpg", "b"), RawFile("b/1.jpg", "typo"), *files[4:],
    ]  # fmt: skip
    assert found.excluded == [("a/1.jpg", "a", "excluded", "by corrections.csv")]
    assert (found.relabelled, found.unknown_keys, found.new_labels) == (2, ["0.jpg", "z/1.jpg"], ["typo"])


@pytest.mark.parametrize(
    ("rows", "kept", "reasons"),
    [
        ({}, [], ["conflict", "conflict"]),
        ({"b/1.png": "a"}, [("a/1.png", "a")], ["duplicate"]),
        ({"b/1.png": EXCLUDE}, [("a/1.png", "a")], ["excluded"]),
        ({"a/1.png": "c", "b/1.png": "c"}, [("a/1.png", "c")], ["duplicate"]),
    ],
)
def test_a_correction_resolves_a_conflict(rows, kept, reasons, tmp_path):
    for label in "ab":
        put(tmp_path, f"{label}/1.png", encode(scene(), "PNG"))
    found = corrections.apply(inspection.find(tmp_path), rows)
    usable, rejected = inspection.inspect(found.files, tmp_path, tmp_path)
    assert [(row.path, row.label) for row in usable] == kept
    assert [row.reason for row in [*rejected, *found.excluded]] == reasons


def test_excluded_files_do_not_count_as_undecodable(tmp_path):
    rejected = [manifest.Rejected("a/x", "a", "unreadable", "")]
    rejected += [manifest.Rejected(f"a/{number}e", "a", "excluded", "") for number in range(9)]
    inspection.check_rejected({"a": 2}, rejected, 0.4, tmp_path)
    with pytest.raises(NoUsableInput, match=r"a \(1 of 3 files\)"):
        inspection.check_rejected({"a": 2}, rejected, 0.3, tmp_path)


def test_without_corrections_the_fingerprint_contains_only_the_other_inputs(tmp_path):
    with activate(RunContext(Settings(DATA_DIR=tmp_path))):
        step = InspectImages()
        assert step.extra_inputs() == {}
        expected = digest(["inspected", step.format_version, {}, {"raw": "x"}])
        assert step.expected_fingerprint({"raw": "x"}) == expected


def test_the_fingerprint_depends_on_the_rows_not_on_their_order_or_format(tmp_path, write):
    def inputs(text):
        write(text)
        with activate(RunContext(Settings(DATA_DIR=tmp_path))):
            return InspectImages().extra_inputs()

    expected = inputs("key,label\na/1.jpg,b\na/2.jpg,c\n")
    assert inputs('key,label\r\n"a/2.jpg",c\r\n\r\na/1.jpg,b\r\n') == expected
    assert inputs("key,label\na/1.jpg,b\na/2.jpg,d\n") != expected
    assert inputs("key,label\n") == {}
    assert list(expected) == ["corrections.csv"]


@pytest.fixture
def data_dir(tmp_path, monkeypatch, _own_process):
    """A DATA_DIR with images of two labels that were not downloaded."""
    for number in range(8):
        put(tmp_path / "data" / "raw", f"{'ab'[number % 2]}/{number // 2}.png", encode(scene(number), "PNG"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


UNTIL = ["--until", "inspect"]


def test_the_command_applies_corrections_and_logs_them(data_dir, capfd):
    assert cli.main(UNTIL) == 0
    uncorrected = read_record(data_dir / "inspected")
    assert uncorrected.inputs.keys() == {"raw"}

    rows = [f"c/{number}.png,a" for number in range(12)]
    (data_dir / corrections.NAME).write_text("\n".join(["key,label", "a/0.png,b", "a/1.png,exclude", *rows]))
    capfd.readouterr()
    assert cli.main(["plan"]) == 0
    shown = capfd.readouterr().out
    assert "corrections.csv changes" in next(line for line in shown.splitlines() if "  inspected " in line)
    assert cli.main(UNTIL) == 0
    shown = capfd.readouterr().out
    assert "8 files (0 new, 8 reused) -> 7 images; corrections.csv: 1 relabelled, 1 excluded" in shown
    assert "'c/0.png'" in shown
    assert "and 2 more" in shown
    usable = {row.path: row.label for row in manifest.read(data_dir / "inspected" / "images.csv", manifest.Image)}
    assert usable["a/0.png"] == "b"
    assert "a/1.png" not in usable
    rejected = list(manifest.read(data_dir / "inspected" / "rejected.csv", manifest.Rejected))
    assert rejected == [("a/1.png", "a", "excluded", "by corrections.csv")]

    (data_dir / corrections.NAME).unlink()
    assert cli.main(UNTIL) == 0
    assert read_record(data_dir / "inspected").identity == uncorrected.identity


@pytest.mark.parametrize("arguments", [["plan"], UNTIL])
def test_the_command_reports_a_malformed_file_without_a_traceback(arguments, data_dir, capfd):
    (data_dir / corrections.NAME).write_text("key,label\na/0.png,\n")
    assert cli.main(arguments) == 20
    shown = "".join(capfd.readouterr())
    assert f"{corrections.NAME}, line 2: the label is empty" in shown
    assert "Traceback" not in shown

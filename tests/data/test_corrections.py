"""corrections.csv: what it may hold, what it does to files, and that it is part of the inspection's inputs."""

import pytest
from conftest import picture, run_pipeline

from dgmd_pipeline import manifest
from dgmd_pipeline.data import corrections
from dgmd_pipeline.data import inspection as data_inspection
from dgmd_pipeline.data.corrections import EXCLUDE
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import RawFile
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.tasks.data import InspectImages
from dgmd_pipeline.workflow.provenance import digest, read_record
from dgmd_pipeline.workflow.run_context import RunContext, activate


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / corrections.NAME
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_keys_get_their_label_and_a_missing_file_corrects_nothing(write, tmp_path):
    path = write('key,label\na/1.jpg,b\r\n\n"a/2,3.jpg",exclude\na/4.jpg,Exclude\nä/5.jpg,"b ""c"""\na/1.jpg,b\n')
    expected = {"a/1.jpg": "b", "a/2,3.jpg": EXCLUDE, "a/4.jpg": EXCLUDE, "ä/5.jpg": 'b "c"'}
    assert corrections.read(path) == expected
    assert corrections.read(tmp_path / "none" / corrections.NAME) == {}
    assert corrections.read(write("key,label\n")) == {}


def test_a_file_that_a_spreadsheet_has_written_can_be_read(write):
    text = "key,label\r\n'=a/1.jpg,'-b\r\n'quoted'/2.jpg,b\r\n"
    assert corrections.read(write(b"\xef\xbb\xbf" + text.encode())) == {"=a/1.jpg": "-b", "'quoted'/2.jpg": "b"}


def inspected(raw, scratch, rows):
    """What becomes of byte-identical files under these corrections: label by path, and reason by path."""
    for path in ("a/1.png", "a/2.png"):
        (raw / path).parent.mkdir(parents=True, exist_ok=True)
        (raw / path).write_bytes(picture("a", 1))
    files = [RawFile(path, "a") for path in ("a/1.png", "a/2.png")]
    corrected = corrections.apply(files, rows)
    usable, rejected = data_inspection.inspect(corrected.files, raw, scratch)
    usable, copies = corrections.without_copies(usable, corrected.excluded, raw)
    return {row.path: row.label for row in usable}, {row.path: row.reason for row in rejected + copies}


def test_a_correction_holds_for_copies_of_the_file(tmp_path):
    assert inspected(tmp_path / "raw", tmp_path, {"a/1.png": "b"}) == ({"a/1.png": "b"}, {"a/2.png": "duplicate"})
    assert inspected(tmp_path / "raw", tmp_path, {"a/2.png": "b"}) == ({"a/1.png": "b"}, {"a/2.png": "duplicate"})
    assert inspected(tmp_path / "raw", tmp_path, {"a/1.png": EXCLUDE}) == ({}, {"a/2.png": "excluded"})
    both = {"a/1.png": "b", "a/2.png": "c"}
    assert inspected(tmp_path / "raw", tmp_path, both) == ({}, {"a/1.png": "conflict", "a/2.png": "conflict"})


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("", 1, "expected the columns key,label, found ''"),
        ("label,key\nb,a/1.jpg\n", 1, "expected the columns key,label, found 'label,key'"),
        ("key;label\na/1.jpg;b\n", 1, "expected the columns key,label, found 'key;label'"),
        ("key,label\na/1.jpg,b\na/2.jpg\n", 3, "expected a key and a label, found 1 values"),
        ("key,label\n,b\n", 2, "the key is empty"),
        ("key,label\na/1.jpg,\n", 2, "the label is empty"),
        ("key,label\na/1.jpg, b\n", 2, "the label ' b' has a space at an end"),
        ('key,label\na/1.jpg,"b\nc"\n', 3, "the label 'b\\nc' has a space at an end or a character that cannot"),
        ("key,label\na/1.jpg,b/c\n", 2, "the label 'b/c' contains a slash or begins with a dot"),
        ("key,label\na/1.jpg,.b\n", 2, "the label '.b' contains a slash or begins with a dot"),
        ("key,label\na/1.jpg,b\n\na/1.jpg,c\n", 4, "'a/1.jpg' has the label 'c' here and 'b' in line 2"),
        ("key,label\na/1.jpg,exclude\na/1.jpg,c\n", 3, "has the label 'c' here and 'exclude' in line 2"),
        (b"key,label\na/1.jpg,b\na/2.jpg,\xe9t\xe9\n", 3, "expected UTF-8"),
        ("key,label\n".encode("utf-16"), 1, "expected UTF-8"),
        ('key,label\n"a/1.jpg,b\n', 2, "expected comma-separated values"),
    ],
)
def test_a_malformed_file_is_one_sentence_with_the_line(content, line, problem, write):
    path = write(content)
    with pytest.raises(NoUsableInput) as raised:
        corrections.read(path)
    assert str(raised.value).startswith(f"{path}, line {line}: ")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / corrections.NAME).mkdir()
    with pytest.raises(NoUsableInput, match="cannot be read"):
        corrections.read(tmp_path / corrections.NAME)


def test_files_are_relabelled_or_excluded_and_what_does_not_fit_is_named():
    files = [RawFile(f"{label}/{number}.jpg", label) for label in ("a", "b", EXCLUDE) for number in range(2)]
    asked = {"a/0.jpg": "b", "a/1.jpg": EXCLUDE, "b/0.jpg": "b", "b/1.jpg": "typo", "z/1.jpg": "new", "0.jpg": EXCLUDE}
    found = corrections.apply(files, asked)
    assert found.files == [
        RawFile("a/0.jpg", "b"), RawFile("b/0.jpg", "b"), RawFile("b/1.jpg", "typo"), *files[4:],
    ]  # fmt: skip
    assert found.excluded == [("a/1.jpg", "a", "excluded", "by corrections.csv")]
    assert (found.relabelled, found.unknown, found.new) == (2, ["0.jpg", "z/1.jpg"], ["typo"])


@pytest.mark.parametrize(
    ("asked", "kept", "reasons"),
    [
        ({}, [], ["conflict", "conflict"]),
        ({"b/1.png": "a"}, [("a/1.png", "a")], ["duplicate"]),
        ({"b/1.png": EXCLUDE}, [("a/1.png", "a")], ["excluded"]),
        ({"a/1.png": "c", "b/1.png": "c"}, [("a/1.png", "c")], ["duplicate"]),
    ],
)
def test_a_correction_solves_a_conflict(asked, kept, reasons, tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(picture("a", 1))
    found = corrections.apply(data_inspection.find(tmp_path), asked)
    usable, rejected = data_inspection.inspect(found.files, tmp_path, tmp_path)
    assert [(row.path, row.label) for row in usable] == kept
    assert [row.reason for row in [*rejected, *found.excluded]] == reasons


def test_excluded_files_do_not_count_for_the_share_that_cannot_be_decoded(tmp_path):
    good = [manifest.Image(f"a/{number}", "a", "", "PNG", 8, 8, "") for number in range(2)]
    rejected = [manifest.Rejected("a/x", "a", "unreadable", "")]
    rejected += [manifest.Rejected(f"a/{number}e", "a", "excluded", "") for number in range(9)]
    data_inspection.check_rejected(good, rejected, 0.4, tmp_path)
    with pytest.raises(NoUsableInput, match=r"a \(1 of 3 files\)"):
        data_inspection.check_rejected(good, rejected, 0.3, tmp_path)


def test_without_corrections_the_fingerprint_is_what_it_was_before_there_were_any(tmp_path):
    with activate(RunContext(Settings(DATA_DIR=tmp_path))):
        step = InspectImages()
        assert step.extra_inputs() == {}
        expected = digest(["inspected", step.format_version, {}, {"raw": "x"}])
        assert step.expected_fingerprint({"raw": "x"}) == expected


def test_the_fingerprint_depends_on_what_the_file_says_and_not_on_how(tmp_path, write):
    def identity(text):
        write(text)
        with activate(RunContext(Settings(DATA_DIR=tmp_path))):
            return InspectImages().extra_inputs()

    one = identity("key,label\na/1.jpg,b\na/2.jpg,c\n")
    assert identity('key,label\r\n"a/2.jpg",c\r\n\r\na/1.jpg,b\r\n') == one
    assert identity("key,label\na/1.jpg,b\na/2.jpg,d\n") != one
    assert identity("key,label\n") == {}
    assert list(one) == ["corrections.csv"]


@pytest.fixture
def by_hand(tmp_path):
    """A DATA_DIR with pictures of two labels that were put there by hand, and how to run the pipeline in it."""
    for label in "ab":
        (tmp_path / "data" / "raw" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "data" / "raw" / label / f"{number}.png").write_bytes(picture(label, number))
    return tmp_path / "data", lambda *arguments: run_pipeline(tmp_path, *arguments)


@pytest.mark.slow
def test_the_command_applies_corrections_and_says_so(by_hand):
    data, run = by_hand
    until = ("--until", "label")
    assert run(*until).returncode == 0
    first = read_record(data / "inspected")
    assert first.inputs.keys() == {"raw"}

    rows = [f"c/{number}.png,a" for number in range(12)]
    (data / corrections.NAME).write_text("\n".join(["key,label", "a/0.png,b", "a/1.png,exclude", *rows]))
    shown = run("plan").stdout
    assert "corrections.csv changes" in next(line for line in shown.splitlines() if "  inspected " in line)
    result = run(*until)
    assert result.returncode == 0, result.stdout
    assert "8 files -> 7 images; 1 left out; corrections.csv: 1 relabelled, 1 excluded" in result.stdout
    assert "'c/0.png'" in result.stdout
    assert "and 2 more" in result.stdout
    usable = {row.path: row.label for row in manifest.read(data / "inspected" / "images.csv", manifest.Image)}
    assert usable["a/0.png"] == "b"
    assert "a/1.png" not in usable
    rejected = list(manifest.read(data / "inspected" / "rejected.csv", manifest.Rejected))
    assert rejected == [("a/1.png", "a", "excluded", "by corrections.csv")]

    (data / corrections.NAME).write_text("key,label\na/0.png,\n")
    for command in (("plan",), until):
        broken = run(*command)
        assert broken.returncode == 20
        assert f"{corrections.NAME}, line 2: the label is empty" in broken.stdout + broken.stderr
        assert "Traceback" not in broken.stdout + broken.stderr

    (data / corrections.NAME).unlink()
    assert run(*until).returncode == 0
    assert read_record(data / "inspected").identity == first.identity

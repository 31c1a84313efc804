"""What the documents say is true: generated parts are up to date, code runs, links lead somewhere."""

import re
import runpy
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, environment_with

from dgmd_pipeline.tasks import LAST
from dgmd_pipeline.workflow import planning
from dgmd_pipeline.workflow.run_context import RunContext, activate

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE_WIDTH = 100


def read(name):
    return (ROOT / name).read_text("utf-8")


def test_the_configuration_document_is_what_the_settings_generate():
    generated = runpy.run_path(str(ROOT / "docs" / "scripts" / "configuration.py"))["markdown"]()
    assert read("docs/configuration.md") == generated, "run `make docs`"


def test_the_readme_lists_ten_variables_with_their_defaults():
    row = re.compile(r"^\| (`[A-Z_]+` \| `.+?`) \|", re.MULTILINE)
    listed = row.findall(read("README.md"))
    assert len(listed) == 10
    assert set(listed) <= set(row.findall(read("docs/configuration.md")))


@pytest.mark.parametrize("backbone", ["cnn", "MobileNetV2"])
def test_the_operating_document_lists_the_settings_that_redo_each_step(backbone, monkeypatch):
    from dgmd_pipeline import settings

    monkeypatch.setenv("BACKBONE", backbone)
    start = "A step runs again if one of its settings in this table changes."
    section = read("docs/operating.md").partition(start)[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    with activate(RunContext(settings.load())):
        for step in planning.upstream_steps(LAST()):
            listed = set(re.findall(r"`([A-Z_]+)`", rows[step.verb].partition("; the content")[0]))
            assert listed == set(map(str.upper, step.params)), step.verb


def test_the_code_for_ml_engineers_runs_on_the_folders_of_a_run(tmp_path):
    """Except that for the model, which the stored folders do not have: see test_consumers.py."""
    with tarfile.open(ROOT / "tests" / "support" / "data_dirs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "frozen").rename(tmp_path / "data")
    page = read("docs/for-ml-engineers.md").partition("### The model")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment_with({}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accuracy ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_to_files(document):
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    files = [target for target in targets if not target.startswith("http")]
    assert [target for target in files if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_prose_have_at_most_100_characters(document):
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > PROSE_WIDTH and not line.startswith("|")] == []

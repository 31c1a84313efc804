"""The house rules of docs/design.md, section 3."""

import ast
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

PACKAGE = ROOT / "dgmd_pipeline"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
DATA = ["images", "labels", "balance", "split", "encoding", "records", "features"]  # the way of one image
OWN = {  # module -> what of ours it may import, besides errors
    "errors": [],
    "settings": ["backbones"],  # the names of the backbones
    "manifest": [],
    "workers": [],
    "progress": [],
    "folders": [],
    "signals": [],
    "schedule": [],
    "status": [],
    "notify": [],
    "step": ["folders"],
    "timing": ["step"],
    "bucket": ["manifest", "transfer"],
    "transfer": [],
    "listing": ["manifest"],
    "corrections": ["manifest"],
    "images": ["manifest"],
    "labels": ["manifest"],
    "balance": ["manifest"],
    "split": ["manifest"],
    "folds": [],
    "encoding": ["images"],  # the rule for opening a picture
    "records": ["manifest", "images", "encoding"],
    "features": [],
    "backbones": [],
    "model": ["backbones", "encoding", "manifest"],  # the fits; what to say of a changed file
    "augmentation": [],
    "averaging": [],
    "training": ["augmentation", "averaging", "encoding", "folders", "model"],  # encoding: a type
    "linear": [],
    "head": ["folds", "linear", "model", "training"],
    "fine_tuning": ["features", "folders", "folds", "head", "training"],
    "evaluation": ["manifest"],  # what a spreadsheet takes for a formula
    "label_suspects": ["evaluation", "folds"],
    "plots": ["evaluation", "training"],  # the rows that they draw
    "leaks": ["evaluation"],  # the form of its table
    "report": ["comparison", "evaluation", "folders", "label_suspects", "leaks", "manifest", "plots", "training"],
    "comparison": [],
    "assessment": ["images", "model", "settings"],
    "review": ["assessment", "comparison", "evaluation", "manifest", "model", "records"],
    "registry": ["manifest", "settings"],
    "served": [],
    "production": ["registry"],
    "demo": ["bucket", "settings", "step"],
}
DOORS = {
    "boto3": {"bucket"},
    "botocore": {"bucket", "transfer"},
    "awscrt": {"transfer"},
    "mlflow": {"registry", "production"},
    "luigi": {"tasks", "step", "run"},
}


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module):
    """Every imported name, those inside functions too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(module):
    return {name.split(".")[1] for name in imports(module) if name.startswith("dgmd_pipeline.")}


@pytest.mark.parametrize("module", MODULES)
def test_data_flows_one_way(module):
    if module in ("cli", "operations", "run", "tasks"):  # they wire
        assert "cli" not in own(module) - {module}
    else:
        assert own(module) - {"errors"} <= set(OWN[module])


@pytest.mark.parametrize("module", MODULES)
def test_each_outside_world_has_one_door(module):
    for name in imports(module):
        assert module in DOORS.get(name.split(".")[0], {module}), name


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("settings", "demo")])
def test_only_settings_reads_the_environment(module):
    text = (PACKAGE / f"{module}.py").read_text()
    assert not [name for name in ("os.environ", "os.getenv", "import environ", "import getenv") if name in text]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "tasks"])
def test_only_tasks_names_step_folders(module):
    folders = {"inspected", "label_map", "balanced", "tfrecord_training", "features_training"}
    constants = {node.value for node in ast.walk(tree(module)) if isinstance(node, ast.Constant)}
    assert not constants & folders


def test_every_module_says_from_what_to_what_in_its_first_line():
    for module in MODULES:
        assert (ast.get_docstring(tree(module)) or "").split("\n")[0], module


def test_the_package_docstring_is_a_map_with_a_line_for_each_file():
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    assert [module for module in MODULES if f"\n{module}.py " not in text] == []


def test_every_variable_is_in_the_readme():
    from dgmd_pipeline.settings import Settings, variable

    readme = (ROOT / "README.md").read_text()
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else str(field.default)
        assert f"| `{variable(name)}` |" in readme, name
        if name not in ("keras_home", "data_dir"):
            row = next(line for line in readme.splitlines() if line.startswith(f"| `{variable(name)}` |"))
            assert default.lower() in row.lower(), row


def test_compose_passes_every_variable_on():
    from dgmd_pipeline.settings import Settings, variable

    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["model-pipeline-scheduled"]
    of_the_image = {"DATA_DIR", "KERAS_HOME", "GIT_REVISION"}
    assert set(map(variable, Settings.model_fields)) - of_the_image <= set(service["environment"])


def test_every_exit_code_is_in_the_readme():
    from dgmd_pipeline import errors
    from dgmd_pipeline.cli import EXIT_CODES

    readme = (ROOT / "README.md").read_text()
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")} | {0, 130, 143}
    for code in codes:
        assert f"| {code} |" in readme
        assert f"\n  {code} " in EXIT_CODES


@pytest.mark.parametrize(
    ("arguments", "exits"),
    [(["--help"], 0), (["plan"], 0), (["plan", "--env-file", "missing"], 2), (["health"], 1)],
)
def test_light_commands_import_nothing_heavy(arguments, exits, tmp_path):
    code = f"""
import sys
from dgmd_pipeline.cli import main
try:
    code = main({arguments!r})
except SystemExit as exited:
    code = exited.code
assert code == {exits}, code
heavy = {{"tensorflow", "keras", "mlflow", "sklearn", "matplotlib", "boto3", "PIL", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)

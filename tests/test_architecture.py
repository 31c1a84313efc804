"""The rules of docs/architecture.md."""

import ast
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

PACKAGE = ROOT / "dgmd_pipeline"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
BASE = {"errors", "formatting"}
ALLOWED = {  # package, or module at the top -> what of ours it may import; see docs/architecture.md
    "cli": {"commands", "settings", "environment", "workflow"} | BASE,
    "commands": {
        "tasks",
        "evaluation",
        "registry",
        "serving",
        "s3",
        "data",
        "training",
        "workflow",
        "settings",
        "manifest",
    }
    | BASE,
    "tasks": {"evaluation", "registry", "serving", "s3", "data", "training", "workflow", "settings", "manifest"} | BASE,
    "evaluation": {"training", "data", "serving", "manifest"} | BASE,
    "registry": {"serving", "manifest"} | BASE,
    "serving": {"data", "manifest"} | BASE,
    "s3": {"manifest", "workflow.disk", "workflow.files"} | BASE,  # whether the disk has room
    "data": {"manifest", "workflow.files"} | BASE,
    "training": {"manifest", "workflow.disk", "workflow.files"} | BASE,
    "workflow": BASE,
    # the names of the backbones and their smallest images; whether a database's driver is installed; the CPU quota
    "settings": {
        "certificates",
        "env_file",
        "environment",
        "invalid_settings",
        "training.backbones",
        "registry.database",
        "workflow.machine",
    }
    | BASE,
    "env_file": {"errors"},
    "environment": set(),
    "certificates": set(),
    "invalid_settings": BASE,
    "manifest": BASE,
    "errors": set(),
    "formatting": set(),
    "__init__": set(),
}
ADAPTERS = {  # library -> the only package that imports it
    "boto3": "s3",
    "botocore": "s3",
    "awscrt": "s3",
    "mlflow": "registry",  # and the module that MLflow imports in a consumer's process
    "luigi": "workflow",
    "dask": "workflow",
    "distributed": "workflow",
}


# A worker of a cluster removes a variable that Dask has set.
READ_THE_ENVIRONMENT = (
    "settings.py", "environment.py", "commands/demo.py", "registry/login.py", "workflow/cluster_worker.py",
)  # fmt: skip


def tree(module):
    return ast.parse((PACKAGE / module).read_text())


def imports(module):
    """Every imported name, those inside functions too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module):
    return module.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module):
    package = package_of(module)
    for name in imports(module):
        if name.startswith("dgmd_pipeline."):
            parts = name.split(".")[1:]
            own = parts[0] == package
            assert own or {parts[0], ".".join(parts[:2])} & ALLOWED[package], name


def test_the_table_in_the_architecture_document_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = text.partition("\n## Imports\n")[2].partition("\n## ")[0]
    packages = set(ALLOWED) - {"__init__"}
    found = {}
    for left, right in re.findall(r"^\| (`.*`) \| (.*) \|$", section, re.MULTILINE):
        names = set(re.findall(r"`([\w.]+)`", right))
        names = packages - names if right.startswith("everything except") else names
        found |= dict.fromkeys(re.findall(r"`(\w+)`", left), names)
    assert {name: allowed - {name} for name, allowed in found.items()} == {name: ALLOWED[name] for name in packages}


@pytest.mark.parametrize("module", MODULES)
def test_each_library_for_an_outside_world_has_one_adapter(module):
    for name in imports(module):
        adapter = ADAPTERS.get(name.split(".")[0])
        also = {"workflow": "tasks/", "registry": "serving/pyfunc.py"}.get(adapter, "/")
        assert adapter in (None, package_of(module)) or module.startswith(also), name


def test_one_module_imports_dask():
    found = [(module, name.split(".")[0]) for module in MODULES for name in imports(module)]
    assert {module for module, name in found if name in ("dask", "distributed")} == {"workflow/cluster.py"}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in READ_THE_ENVIRONMENT])
def test_few_modules_read_the_environment(module):
    text = (PACKAGE / module).read_text()
    assert not re.findall(r"os\.environ|os\.getenv|from os import .*\b(?:environ|getenv)\b", text)


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) != "tasks"])
def test_only_tasks_names_step_folders(module):
    folders = {"inspected", "label_map", "balanced", "tfrecord_training", "features_training"}
    constants = {node.value for node in ast.walk(tree(module)) if isinstance(node, ast.Constant)}
    assert not constants & folders


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    assert len((PACKAGE / module).read_text().splitlines()) <= 400
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            limit = 20 if package_of(module) == "tasks" and node.name == "work" else 60
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_of_a_module_says_what_it_does(module):
    assert (ast.get_docstring(tree(module)) or "").split("\n")[0]


def test_the_package_docstring_names_every_package_and_module_at_the_top():
    text = ast.get_docstring(tree("__init__.py")) or ""
    assert [name for name in {package_of(module) for module in MODULES} - {"__init__"} if f"\n{name}" not in text] == []


def test_compose_passes_every_variable_on():
    from dgmd_pipeline.settings import UNSET_IF_EMPTY, Settings, variable

    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["model-pipeline-scheduled"]
    of_the_image = {"DATA_DIR", "KERAS_HOME", "GIT_REVISION"}
    assert set(map(variable, Settings.model_fields)) - of_the_image <= set(service["environment"])
    assert set(UNSET_IF_EMPTY) - {"CURL_CA_BUNDLE"} <= set(service["environment"])


def test_every_exit_code_is_in_the_operating_document_and_in_the_help():
    from dgmd_pipeline import errors
    from dgmd_pipeline.cli import EXIT_CODES

    document = (ROOT / "docs" / "operating.md").read_text("utf-8")
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")} | {0, 130, 143}
    for code in codes:
        assert f"| {code} |" in document
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
heavy = {{"tensorflow", "keras", "mlflow", "sklearn", "matplotlib", "boto3", "PIL", "numpy", "dask", "distributed"}}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)

"""The code that a registered model carries."""

import json
import subprocess
import sys

from dgmd_pipeline.serving import source

IMPORTED = """
import importlib, json, sys
before = set(sys.modules)
sys.path.insert(0, "code")
importlib.import_module(sys.argv[1])
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_copied_modules_need_each_other_and_numpy_and_pillow_only(tmp_path):
    package, module = source.write(tmp_path / "code").split(".", 1)
    assert module == "serving.pyfunc"  # imports MLflow and Keras, which a consumer has
    command = [sys.executable, "-I", "-c", IMPORTED, f"{package}.serving.inputs"]
    imported = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)
    own = {name.replace(".", "/") for name in imported if name.partition(".")[0] == package}
    copied = {f"{package}/{name}".removesuffix(".py").removesuffix("/__init__") for name in source.MODULES}
    assert own == copied - {f"{package}/serving/pyfunc"}
    others = {name.partition(".")[0] for name in imported} - {*sys.stdlib_module_names, "__mp_main__"}
    assert others == {package, "numpy", "PIL"}


def test_other_code_has_another_name(tmp_path, monkeypatch):
    first = source.write(tmp_path / "first")
    assert source.write(tmp_path / "again") == first
    assert "dgmd_pipeline" not in "".join(path.read_text() for path in (tmp_path / "first").rglob("*.py"))
    monkeypatch.setattr(source, "MODULES", source.MODULES[1:])
    assert source.write(tmp_path / "second") != first

"""The code that a registered model carries: a copy of the modules that serving needs, under another package name."""

import hashlib
from pathlib import Path

MODULES = (  # what serving/pyfunc.py imports
    "__init__.py",
    "errors.py",
    "formatting.py",
    "data/__init__.py",
    "data/colour_modes.py",
    "data/decoding.py",
    "data/encoding.py",
    "data/file_types.py",
    "data/limits.py",
    "data/png.py",
    "serving/__init__.py",
    "serving/inputs.py",
    "serving/pyfunc.py",
)
LOADER = "serving.pyfunc"
_OWN_NAME = __name__.partition(".")[0]


def write(folder: Path) -> str:
    """Write the code into a folder; return the name of the module that MLflow loads.

    The package gets another name, so that a model does not use an installed version of this package.
    The name contains a hash of the code, so that a process can load two models with different code.
    """
    root = Path(__file__).parents[1]
    texts = {name: (root / name).read_text("utf-8") for name in MODULES}
    package = f"dgmd_served_{hashlib.sha256(repr(texts).encode()).hexdigest()[:12]}"
    for name, text in texts.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(_OWN_NAME, package), "utf-8")
    return f"{package}.{LOADER}"

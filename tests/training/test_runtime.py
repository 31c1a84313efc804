"""Libraries that are loaded late, in a process of its own."""

import subprocess
import sys

CODE = """
import sys
from dgmd_pipeline.training import runtime

def threads():
    import threadpoolctl
    return sorted({pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"})

assert "scipy" not in sys.modules
print(runtime.one_blas_thread(threads)())
runtime.start_tensorflow()
print("keras" in sys.modules, "sklearn" in sys.modules)
import sklearn
"""


def test_each_blas_uses_one_thread_and_keras_does_not_import_scikit_learn():
    assert subprocess.check_output([sys.executable, "-c", CODE], text=True).splitlines() == ["[1]", "True False"]

"""Libraries that are loaded late, in a process of its own."""

import subprocess
import sys
from importlib.metadata import version

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


THREADS = """
import sys, threading
from dgmd_pipeline.training import runtime

thread = threading.Thread(target=runtime.start_tensorflow)
thread.start()
while "tensorflow" not in sys.modules:  # until the thread has begun the import
    pass
runtime.start_tensorflow()
thread.join()
import tensorflow
print(tensorflow.__version__, file=sys.stderr)
"""


def test_a_second_thread_waits_for_the_import_and_standard_error_is_back_afterwards():
    ran = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1:] == [version("tensorflow-cpu")]


EXECUTOR = """
import threading, time
from dgmd_pipeline.training import runtime

runtime.start_tensorflow()
import numpy as np
import tensorflow as tf

def thread_of_operation(_):
    time.sleep(0.01)
    return np.int64(threading.get_ident())

def power_and_threads(x):
    power = tf.while_loop(lambda number, _: number < 3, lambda number, y: (number + 1, y * y), (0, x))[1]
    threads = [tf.numpy_function(thread_of_operation, [x + i], tf.int64, stateful=False) for i in range(20)]
    return power, tf.stack(threads)

power, threads = runtime.one_executor_thread(tf.function(power_and_threads, autograph=False))(tf.constant(2))
print(int(power), len(set(threads.numpy())))
"""


def test_operations_run_in_one_thread():
    assert subprocess.check_output([sys.executable, "-c", EXECUTOR], text=True) == "256 1\n"

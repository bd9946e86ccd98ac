import gc
import os
import sys
from pathlib import Path

# The tests' tensors are small: one thread is as fast as two, and far faster where other work shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(100_000, 20, 20)  # the interpreters of kernels make objects by the million, few of them in cycles
# Tests start processes that import PyTorch. Where Python is told to leave no byte code behind, each would compile all of it, for seconds.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / "build" / "byte_code")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
    import quick_interpreter

    quick_interpreter.install()

# CI: the same draws every time
settings.register_profile("repository", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("repository")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what importing has made stays: no collection walks through it again


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

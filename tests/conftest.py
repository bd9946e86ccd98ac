import gc
import os
import random
import sys
from pathlib import Path

# The tests' tensors are small: one thread is as fast as two, and far faster where other work shares the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(100_000, 20, 20)  # the interpreters of kernels make objects by the million, few of them in cycles
# Tests start processes that import PyTorch. Where Python is told to leave no byte code behind, each would
# compile all of it, for seconds.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / "build" / "byte_code")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# tests/ptx/triton: Triton's kernels as PTX on an emulated GPU, in a process of their own, since Triton decides when
# it is imported whether it interprets them
EMULATED = bool(os.environ.get("HOPE_KERNELS_PTX"))
collect_ignore = [] if EMULATED else ["ptx/triton"]
if EMULATED:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("TRITON_INTERPRET", None)

import pytest  # noqa: E402
import torch  # noqa: E402

try:  # tests without random draws need no hypothesis: those of a bare GPU machine
    from hypothesis import is_hypothesis_test, settings
except ImportError:
    settings, is_hypothesis_test = None, lambda test: False

if not torch.cuda.is_available() and not EMULATED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
    import quick_interpreter

    quick_interpreter.install()

# the C++ library to test instead of the installed one: tools/sanitize.sh has one
if os.environ.get("HOPE_KERNELS_TEST_LIBRARY"):
    from hope_kernels.ops.shared import cpu_library

    cpu_library.LIBRARY = os.environ["HOPE_KERNELS_TEST_LIBRARY"]

# Every @given test runs twice: on draws that are always the same, and on a tenth as many that are new in
# every run (CI: the same ones).
FRESH = "HOPE_KERNELS_TEST_SEED", "HOPE_KERNELS_TEST_DRAWS"  # the new ones' seed, and their number
SEED = int(os.environ.get(FRESH[0]) or (0 if os.environ.get("CI") else random.SystemRandom().randrange(2**31)))
if settings is not None:
    settings.register_profile("repository", deadline=None, print_blob=True, derandomize=True)
    settings.load_profile("repository")


def pytest_configure(config):
    folder = os.environ.get("HOPE_KERNELS_EVIDENCE")
    if folder:
        import evidence

        config.pluginmanager.register(evidence.Evidence(folder), "evidence")


def pytest_report_header():
    return f"new draws of hypothesis: {FRESH[0]}={SEED}; {FRESH[1]} sets their number"


def pytest_generate_tests(metafunc):
    if is_hypothesis_test(metafunc.function):
        metafunc.parametrize("draws", ["fixed", f"seed {SEED}"], indirect=True)


@pytest.fixture(autouse=True)
def draws(request):
    """Turns a @given test to its fixed draws or to new ones."""
    if getattr(request, "param", "fixed") != "fixed":
        test, patch = request.node.function, request.getfixturevalue("monkeypatch")
        fixed = test._hypothesis_internal_use_settings
        count = int(os.environ.get(FRESH[1]) or fixed.max_examples // 10 + 1)
        patch.setattr(
            test, "_hypothesis_internal_use_settings",
            settings(fixed, max_examples=count, derandomize=False, database=None)
        )
        patch.setattr(test, "_hypothesis_internal_use_seed", SEED, raising=False)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what importing has made stays: no collection walks through it again


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

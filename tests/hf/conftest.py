"""Every test here needs transformers, and has the marker ``hf``."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MISSING = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers (the extra hf)")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.hf)
            item.add_marker(MISSING)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    if find_spec("transformers") is not None:
        import transformers

        transformers.logging.disable_progress_bar()

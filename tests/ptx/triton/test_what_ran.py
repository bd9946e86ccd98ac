"""The rows of the tile tables that the tests before this one have launched: all of them, the slow tests included.

Last by its name. Runs of some tests alone say nothing about the tables.
"""

import json
from pathlib import Path

import pytest

from tools.ptx import coverage

HERE = Path(__file__).parent


def test_every_row_of_the_tables_has_run(device, request):
    session = request.session
    files = {item.path for item in session.items}
    if files != set(HERE.glob("test_*.py")) or session.config.option.keyword:
        pytest.skip("needs all tests of this folder in one run")
    missing = coverage.missing(device.launches, (80, 90))
    Path("/tmp/missing.json").write_text(json.dumps(missing, indent=1))
    assert not missing

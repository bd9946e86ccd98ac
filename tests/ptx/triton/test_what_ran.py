"""The rows of the tile tables that the tests before this one have launched: all of them, the slow tests included.

Last by its name. Runs of some tests alone say nothing about the tables; the quick tests' share is in the summary.
"""

from pathlib import Path

import pytest

from benchmarks import launched_rows

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_row_of_the_tables_has_run(device, request):
    config = request.config
    files = {item.path for item in request.session.items}
    if files != set(HERE.glob("test_*.py")) or config.option.keyword or config.option.markexpr:
        pytest.skip("needs all tests of this folder in one run, the slow ones included")
    assert not launched_rows.missing(device.launches, (80, 90))

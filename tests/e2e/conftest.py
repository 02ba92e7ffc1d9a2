"""What the tests of whole daemons have in common."""

from __future__ import annotations

import pytest

#: Of a test that names no limit: most start several programs, and each wait has a limit of its own, on a machine that may be busy.
LIMIT_SECS = 300


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(LIMIT_SECS))

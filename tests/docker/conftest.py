"""What all tests of this folder have in common: `make test-docker` alone runs them, and none may be skipped."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.docker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip counts as a failure: it would hide that something is not installed."""
    report = yield
    if report.skipped and item.path.is_relative_to(HERE):
        report.outcome = "failed"
        report.longrepr = f"{item.name} was skipped, which does not count here: {report.longrepr}"
    return report

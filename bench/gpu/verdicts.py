"""A pytest plugin that prints each test's verdict immediately, for runs that may be killed.

A line that starts with :data:`MARK` has the verdict and the test's name; a failure is followed by its
traceback.
"""

from __future__ import annotations

import pytest

MARK = "== verdict "


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print the verdict; under xdist this runs in the main process."""
    if report.failed or (report.passed and report.when == "call"):
        print(f"\n{MARK}{report.outcome} {report.nodeid}", flush=True)
    if report.failed:
        print(report.longreprtext, flush=True)

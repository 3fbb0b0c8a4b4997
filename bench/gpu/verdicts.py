"""A pytest plugin for runs that may be cut off before their end: each test's verdict when it is known.

A line that begins with :data:`MARK` names the verdict and the test; behind a failed one stands its traceback.
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

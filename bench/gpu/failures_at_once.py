"""A pytest plugin: each failure's text when it happens, for runs that may be cut off before their end."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print the traceback of a failed test; under xdist this runs in the main process."""
    if report.failed:
        print(f"\n==== {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)

"""Where these tests leave the counts that are printed at the end, and a fast place for files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def report(record_property):
    """Call it with a line that is to be printed at the end."""
    return lambda line: record_property("counts", line)


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A directory in memory where there is one: what is synced matters to no test here."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="crash-", dir=shm if shm.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """Reports carry the lines, because a test may have run in another process (pytest-xdist)."""
    for outcome in ("passed", "failed"):
        for found in terminalreporter.getreports(outcome):
            for name, line in found.user_properties:
                if name == "counts" and found.when == "call":
                    terminalreporter.write_line(line)

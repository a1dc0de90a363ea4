"""Where these tests leave the counts that are printed at the end, and a fast place for files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_lines: list[str] = []


@pytest.fixture
def report():
    """Call it with a line that is to be printed at the end."""
    return _lines.append


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A directory in memory where there is one: what is synced matters to no test here."""
    shm = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="crash-", dir=shm if shm.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    for line in _lines:
        terminalreporter.write_line(line)

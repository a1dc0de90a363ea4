"""A smoke test of the measurement of processes that propose."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_proposals():
    command = [sys.executable, "-m", "benchmarks.proposals", "--rounds", "1", "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| 0 \| [\d.]+ .*\| at most 49 \|$", done.stdout, re.MULTILINE)
    assert re.search(r"^\| 1 \| [\d.]+ .*\| \d+ \|$", done.stdout, re.MULTILINE)

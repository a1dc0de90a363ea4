"""What the study of interventions prints, and a smoke test."""

import os
import subprocess
import sys

import pytest

from benchmarks.study_interventions import BLOCK, report


def episode(ticks, interventions, success):
    return {"ticks": ticks, "interventions": interventions, "success": success}


def test_a_block_tells_who_was_helped_and_whether_it_helped(capsys):
    first = [episode(100, 0, True)] * 10 + [episode(100, 40, True)] * 10
    second = [episode(100, 40, False)] * 5 + [episode(10, 0, True)] * BLOCK
    report([*first, *second, episode(10, 0, True)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| 1–25 | 2500 | 60 | 20 | 40 % |",
        "| 26–50 | 2750 | 0 | 0 | 100 % |",
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_study_interventions(tmp_path):
    command = [sys.executable, "-m", "benchmarks.study_interventions", "--task", "pointmass"]
    done = subprocess.run(
        [*command, "--steps", "2500", "--root", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    assert "| 1–25 |" in done.stdout

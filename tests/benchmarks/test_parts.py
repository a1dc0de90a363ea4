"""Measurements in parts: what their command keeps, and a smoke test of one."""

import json
import subprocess
import sys

import pytest

from benchmarks.buffer.measure import Row
from benchmarks.parts import measure_parts


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch, capsys):
    kept, asked = tmp_path / "rows.json", []

    def run(part, quick):
        asked.append((part, quick))
        return [Row(part, "ours", 2.5, "ms")]

    def measured(*options):
        monkeypatch.setattr(sys, "argv", ["measurement", "--json", str(kept), *options])
        measure_parts("About.", ("one", "two"), run, by="hand")
        return capsys.readouterr().out

    assert "2.5" in measured("--quick", "--only", "two") and asked == [("two", True)]
    shown = measured()
    assert asked == [("two", True), ("one", False)] and set(json.loads(kept.read_text())) == {
        "one",
        "two",
    }
    assert ", hand\n" in shown and shown.index("one: ") < shown.index("two: ")
    with pytest.raises(SystemExit):
        measured("--only", "three")
    assert "unknown parts ['three']; known: one, two" in capsys.readouterr().err


@pytest.mark.slow
def test_world_latency():
    command = [sys.executable, "-m", "benchmarks.world_latency", "--quick", "--only", "state-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("diffusion", "uwm", "uva"):
        assert f"| {name} |" in done.stdout

"""What a run gains by generating and learning at once, and what the learner loses by it.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.asynchrony [--quick] [--only …] [--json FILE]

Real runs of `embodied train`: their actors, buffer, loader, learner and weights, as processes. With
--json, parts whose rows are in the file are not run again. Parts:

  π0 + HG-DAgger, CNN + SAC, equal   proportions of generation to training, see proportions.py; two
                                     are those for which RLinf-USER reports asynchronous and
                                     synchronous times
  utilisation                        the learner's speed beside actors, see utilisation.py
"""

import signal
import sys
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.asynchrony import proportions, utilisation
from benchmarks.asynchrony.proportions import PROPORTIONS
from benchmarks.buffer.measure import Row
from benchmarks.parts import measure_parts

PARTS = (*PROPORTIONS, "utilisation")
DEMO = ("experiment=demo", "learner.minutes=null")


def run(part: str, quick: bool) -> list[Row]:
    """Rows of one part."""
    with tempfile.TemporaryDirectory(prefix="asynchrony-") as name:
        folder = Path(name) / "run"
        if part in PROPORTIONS:
            return proportions.measure(folder, part, _step_s(), 1 if quick else 5)
        rounds, seconds = (2, 0.5) if quick else (8, 3.0)
        overrides = proportions.TASK if quick else DEMO
        rows, made, share = utilisation.in_the_run(folder, overrides, rounds, seconds)
        return [*rows, *utilisation.bare(made, share, rounds, seconds / 2)]


@cache
def _step_s() -> float:
    """Of a gradient step of the proportions' policy."""
    with tempfile.TemporaryDirectory(prefix="asynchrony-") as folder:
        return proportions.calibrate(Path(folder) / "run")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that what was started ends as well
    measure_parts(__doc__, PARTS, run)

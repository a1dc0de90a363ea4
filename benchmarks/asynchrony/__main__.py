"""What a run gains by generating and learning at once, and what the learner loses by it.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.asynchrony [--quick] [--only …] [--json FILE]

Real runs of `embodied train`: their actors, buffer, loader, learner and weights, as processes. With
--json, parts whose rows are in the file are not run again. Parts:

  π0 + HG-DAgger, CNN + SAC, equal   proportions of generation to training, see proportions.py; two
                                     are those for which RLinf-USER reports asynchronous and
                                     synchronous times
  utilisation                        the learner's speed beside actors, see utilisation.py
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.asynchrony import proportions, utilisation
from benchmarks.asynchrony.proportions import PROPORTIONS
from benchmarks.buffer.measure import HEAD, Row, load, machine, markdown

PARTS = (*PROPORTIONS, "utilisation")
DEMO = ("experiment=demo", "learner.minutes=null")


def run(part: str, folder: Path, step_s: float, *, quick: bool) -> list[Row]:
    """Rows of one part. step_s: of a gradient step of the proportions' policy."""
    if part in PROPORTIONS:
        return proportions.measure(folder, part, step_s, 1 if quick else 5)
    rounds, seconds = (2, 0.5) if quick else (8, 3.0)
    overrides = proportions.TASK if quick else DEMO
    rows, made, share = utilisation.in_the_run(folder, overrides, rounds, seconds)
    return [*rows, *utilisation.bare(made, share, rounds, seconds / 2)]


def main() -> None:
    """Run the parts that are wanted and not there yet; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions, little tasks: a smoke test"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that what was started ends as well
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    kept: Path | None = arguments.json
    known: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    missing = [part for part in wanted if part not in known]
    with tempfile.TemporaryDirectory(prefix="asynchrony-") as folder:
        root = Path(folder)
        step_s = 0.0
        if any(part in PROPORTIONS for part in missing):
            step_s = proportions.calibrate(root / "calibration")
        for number, part in enumerate(missing):
            before, started_s = load(), time.monotonic()
            rows = run(part, root / f"part{number}", step_s, quick=arguments.quick)
            seconds = time.monotonic() - started_s
            known[part] = {
                "rows": [row.as_json() for row in rows],
                "about": f"{seconds:.0f} s{', quick' * arguments.quick}; before: {before}; "
                f"after: {load()}",
            }
            if kept:
                kept.write_text(json.dumps(known, indent=1))
    print(f"{machine()}\n\n{HEAD}")
    for part in [part for part in PARTS if part in known and part in wanted]:
        rows = [{k: v for k, v in row.items() if k != "good"} for row in known[part]["rows"]]
        print(markdown(part, [Row(**row) for row in rows]))
    print()
    for part in [part for part in PARTS if part in known and part in wanted]:
        print(f"{part}: {known[part]['about']}")


if __name__ == "__main__":
    main()

"""The buffer against the machine's limits and against other buffers, in one table.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.buffer [--quick] [--only reads,cold]

Contenders take turns within every round; a rate is the median over rounds, a ratio the median of
the ratios within the rounds. With --json, parts whose rows are in the file are not run again, so a
run can be stopped and started. Parts:

  reads     random batches of 256, all in memory
  cold      batches of which a share must come from the disk
  writes    64 steps a commit; and 50 Hz with a commit a step through the buffer service
  memory    resident memory of a reader whose data are ten times its budget
  opening   a million small steps: after a clean close, and after SIGKILL
  policies  hit rates of cache policies on traces of the samplers
"""

import argparse
import contextlib
import importlib
import json
import os
import time
from pathlib import Path

from benchmarks.buffer.measure import HEAD, Options, Row, load, machine, markdown

PARTS = ("reads", "cold", "writes", "memory", "opening", "policies")


def main() -> None:
    """Run the parts that are wanted and not there yet; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small data, few rounds: a smoke test")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark_buffer"))
    parser.add_argument("--rounds", type=int, help="default: 7, or 3 with --quick")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    seconds = 0.2 if arguments.quick else 0.5
    arguments.root.mkdir(parents=True, exist_ok=True)
    options = Options(arguments.root.resolve(), rounds, arguments.quick, seconds)
    kept = arguments.json
    known = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for part in [part for part in wanted if part not in known]:
        before, started_s = load(), time.monotonic()
        rows = importlib.import_module(f"benchmarks.buffer.{part}").run(options)
        known[part] = {
            "rows": [row.as_json() for row in rows],
            "seconds": round(time.monotonic() - started_s, 1),
            "before": before,
            "after": load(),
            "quick": options.quick,
        }
        if kept:
            kept.write_text(json.dumps(known, indent=1))
        print(f"{part}: {known[part]['seconds']} s, {before}; after: {load()}", flush=True)
    with contextlib.suppress(OSError):  # every part has removed its own
        options.root.rmdir()
    print(f"\n{machine()}\n\n{HEAD}")
    for part in [part for part in PARTS if part in known and part in wanted]:
        rows = [dict(row) for row in known[part]["rows"]]
        for row in rows:
            del row["good"]
        print(markdown(part, [Row(**row) for row in rows]))
    print()
    for part in [part for part in PARTS if part in known and part in wanted]:
        entry = known[part]
        quick = ", quick" * entry["quick"]
        print(
            f"{part}: {entry['seconds']:.0f} s{quick}; before: {entry['before']}; "
            f"after: {entry['after']}"
        )


if __name__ == "__main__":
    main()

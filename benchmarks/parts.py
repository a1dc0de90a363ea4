"""The command line of a measurement that is made in parts; each is kept once it is there."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.buffer.measure import HEAD, Row, load, machine, markdown


def measure_parts(
    about: str | None, parts: Sequence[str], run: Callable[[str, bool], list[Row]], by: str = ""
) -> None:
    """Run the parts that are wanted and not there yet; print the table.

    about: what --help says. run: rows of a part, in a smoke test (--quick) or in full. by: what it
    is measured with beside the machine.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little of each: a smoke test")
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(parts)}")
    kept: Path | None = arguments.json
    known: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for part in [part for part in wanted if part not in known]:
        before, started_s = load(), time.monotonic()
        rows = run(part, arguments.quick)
        seconds = time.monotonic() - started_s
        known[part] = {
            "rows": [row.as_json() for row in rows],
            "about": f"{seconds:.0f} s{', quick' * arguments.quick}; before: {before}; "
            f"after: {load()}",
        }
        if kept:
            kept.write_text(json.dumps(known, indent=1))
    print(f"{machine()}{', ' * bool(by)}{by}\n\n{HEAD}")
    shown = [part for part in parts if part in known and part in wanted]
    for part in shown:
        rows = [{k: v for k, v in row.items() if k != "good"} for row in known[part]["rows"]]
        print(markdown(part, [Row(**row) for row in rows]))
    print()
    for part in shown:
        print(f"{part}: {known[part]['about']}")

"""Random kills and cuts of a run across a network, and how long it takes until all is back.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.kills --kills 200 --output runs/kills

A learner's site, a robot's host with an agent and a virtual SO-101, and a link with mutual TLS
through a relay, all real processes; see benchmarks/links/chaos. Every fault is a line of
OUTPUT/kills.jsonl as it happens. In the end OUTPUT/account.json says what was found of steps and
weights, and the status is 1 if a promise did not hold.
"""

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.links.chaos.faults import FAULTS
from benchmarks.links.chaos.lab import StuckError
from benchmarks.links.chaos.recovery import Recovery
from benchmarks.links.chaos.run import Account, suffer
from embodied.core.files import write_atomic

WANTED_S = 10.0


def table(recoveries: Sequence[Recovery]) -> str:
    """Seconds until all is back, by kind of fault, in Markdown."""
    lines = [
        "| fault | number | p50, s | p99, s | max, s | above 10 s | link, s | control, s | step, s "
        "| learner, s | arm stops, s |",
        "|" + "---|" * 11,
    ]
    kinds = [fault.name for fault in FAULTS]
    groups = [(kind, [one for one in recoveries if one.kind == kind]) for kind in kinds]
    for kind, group in [*groups, ("all", list(recoveries))]:
        if not group:
            continue
        p50, p99, most = np.percentile([one.back_s for one in group], (50, 99, 100))
        late = sum(one.back_s > WANTED_S for one in group)
        parts = [_greatest(group, name) for name in ("link_s", "control_s", "step_s", "learn_s")]
        stops = (
            _greatest(group, "stop_s") if any(one.control_s is not None for one in group) else ""
        )
        row = [kind, len(group), f"{p50:.1f}", f"{p99:.1f}", f"{most:.1f}", late, *parts, stops]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def _greatest(group: Sequence[Recovery], name: str) -> str:
    found = [value for one in group if (value := getattr(one, name)) is not None]
    return f"{max(found):.1f}" if found else ""


def _said(account: Account) -> str:
    taken = sum(not one.kept for one in account.recoveries)
    halted = sum(bool(one.halted) for one in account.recoveries)
    speed = max((one.speed_rad_s for one in account.recoveries), default=0.0)
    jump = max((one.jump_rad for one in account.recoveries), default=0.0)
    return (
        f"{account.steps} steps, each once at both ends; {account.published} versions of weights "
        f"published, {account.acted} seen at the host, {account.compared} compared bit for bit; "
        f"robots lost by a holder that lived: {taken}; halts latched: {halted}; the arm's greatest "
        f"speed {speed:.2f} rad/s, greatest step of a goal {jump:.3f} rad; "
        f"promises broken: {len(account.faults)}"
    )


def main() -> int:
    """Report every fault as it happens, then the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="faults in all, of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="s until all must be back")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    options = parser.parse_args()

    seen: list[Recovery] = []

    def report(one: Recovery) -> None:
        seen.append(one)
        with open(options.output / "kills.jsonl", "ab") as file:
            file.write(msgspec.json.encode(one) + b"\n")
        wrong = "  ".join(filter(None, (one.halted, *one.faults)))
        print(f"{one.kind:9} back after {one.back_s:5.1f} s  {wrong}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running
    try:
        account = suffer(options.output, options.kills, options.seed, options.timeout, report)
    except StuckError as error:
        print(f"\n{table(seen)}\n\nstuck: {error}")
        return 1
    write_atomic(options.output / "account.json", msgspec.json.encode(account))
    print(f"\n{table(account.recoveries)}\n\n{_said(account)}")
    for fault in account.faults:
        print(fault)
    return bool(account.faults)


if __name__ == "__main__":
    raise SystemExit(main())

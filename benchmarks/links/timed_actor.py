"""The actor role with a clock beside it: what each control step and each change of weights took.

    python -m benchmarks.links.timed_actor ROLE RUN SOCKETS SUPERVISOR_PID FOLDER

It is the product's own loop (embodied/run/roles/actor.py). A control step lasts from one tick's end
to the next one's, polling for weights included; its own time is that without the policy's
computation and without what it was to sleep, so a late wake-up counts. FOLDER gets acted.jsonl, a
line for each version when it first acts (monotonic seconds), and at the end steps.npy.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import embodied.run.actor as product
from embodied.core.clock import RealClock
from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.run.context import STOPPED, Context, Stop
from embodied.run.roles.actor import actor_role

STEP = np.dtype(
    [("end_s", "f8"), ("own_ms", "f8"), ("policy_ms", "f8"), ("poll_ms", "f8"), ("swapped", "?")]
)
"""policy_ms: of the decision, 0 without one. poll_ms: of asking for weights, taking them included.
swapped: whether others act from then on."""


class Acted(msgspec.Struct, frozen=True):
    """A version has made its first decision."""

    version: int
    t_s: float


class Record:
    """What is noted, in memory until the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._acted = os.open(folder / "acted.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._version = 0
        self._ended_s = time.monotonic()
        self._slept_s = self._poll_s = 0.0
        self._swapped = False
        self._steps: list[tuple[float, float, float, float, bool]] = []

    def slept(self, planned_s: float) -> None:
        """The loop waited for its clock."""
        self._slept_s += planned_s

    def polled(self, took_s: float, swapped: bool) -> None:
        """The loop asked for weights."""
        self._poll_s += took_s
        self._swapped |= swapped

    def ticked(self, policy_s: float, version: int, decided_s: float) -> None:
        """A control step has ended. decided_s: when its decision was there, 0 without one."""
        now_s = time.monotonic()
        own_s = now_s - self._ended_s - self._slept_s - policy_s
        step = (now_s, 1e3 * own_s, 1e3 * policy_s, 1e3 * self._poll_s, self._swapped)
        self._steps.append(step)
        self._ended_s, self._slept_s, self._poll_s, self._swapped = now_s, 0.0, 0.0, False
        if decided_s and version > self._version:
            self._version = version
            os.write(self._acted, msgspec.json.encode(Acted(version, decided_s)) + b"\n")

    def write(self) -> None:
        """Keep the steps."""
        np.save(self._folder / "steps.npy", np.array(self._steps, STEP))


class TimedActor(product.Actor):
    """The product's actor; `record` is told of its steps."""

    record: Record

    def poll_weights(self) -> bool:
        """See Actor."""
        began_s = time.monotonic()
        swapped = super().poll_weights()
        self.record.polled(time.monotonic() - began_s, swapped)
        return swapped

    def tick(self) -> list[Any]:
        """See Actor."""
        began_s, decisions = time.monotonic(), len(self.latencies_s)
        results = super().tick()
        policy_s = sum(self.latencies_s[decisions:])
        self.record.ticked(policy_s, self.version, began_s + policy_s if policy_s else 0.0)
        return results


def extra_times(
    steps: np.ndarray, stretches: list[tuple[float, float]], begins_s: float
) -> list[np.ndarray]:
    """Times (ms) beyond the usual of steps around updates, elsewhere and with a swap, and of polls
    that swap. stretches: around updates; what was before begins_s does not count."""
    around = np.zeros(len(steps), bool)
    for low_s, high_s in stretches:
        around |= (low_s <= steps["end_s"]) & (steps["end_s"] <= high_s)
    counted = steps["end_s"] >= begins_s
    elsewhere, swapping = counted & ~around, counted & steps["swapped"]
    extra_ms = steps["own_ms"] - np.median(steps["own_ms"][elsewhere])
    return [
        extra_ms[counted & around],
        extra_ms[elsewhere],
        extra_ms[swapping],
        steps["poll_ms"][swapping],
    ]


def main() -> int:
    """Act until told to end."""
    role, path, sockets, supervisor, folder = sys.argv[1:]
    die_with_parent(int(supervisor))
    context = Context(role, RunDir(Path(path)), sockets, int(supervisor))
    record = TimedActor.record = Record(Path(folder))
    sleep_until = RealClock.sleep_until

    def timed(self: RealClock, t_ns: int) -> None:
        record.slept(max(0, t_ns - time.monotonic_ns()) / 1e9)
        sleep_until(self, t_ns)

    RealClock.sleep_until = timed
    product.Actor = TimedActor
    try:
        actor_role(context)
    except Stop:
        return STOPPED
    finally:
        record.write()
        context.pulse.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

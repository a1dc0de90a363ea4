"""What is killed or cut, by name, and what has to come back after it."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from benchmarks.links.chaos.lab import Lab

_CUT_S = 2.0
_SILENT_S = (3.5, 6.0)
_TRANSFER_BYTES = 4000
_TRANSFER_S = 30.0


@dataclass(frozen=True)
class Fault:
    """strike: brings it about; returns once nothing but the fault's consequences is left to mend.

    relinks: the link breaks. releases: the robot's holder loses it. learns: the learner begins
    anew. stop_s: the longest that the arm may still move for want of its holder (docs/safety.md).
    """

    name: str
    strike: Callable[[Lab, Random], None]
    relinks: bool = False
    releases: bool = False
    learns: bool = False
    stop_s: float = 0.0


def _role(run: str, role: str) -> Callable[[Lab, Random], None]:
    def strike(lab: Lab, rng: Random) -> None:
        os.kill(lab.role_pid(getattr(lab, run), role), signal.SIGKILL)

    return strike


def _supervisor(name: str) -> Callable[[Lab, Random], None]:
    """Its command is started again at once, as an init system would."""

    def strike(lab: Lab, rng: Random) -> None:
        lab.kill(name)
        lab.start(name)

    return strike


def _robot(module: str) -> Callable[[Lab, Random], None]:
    def strike(lab: Lab, rng: Random) -> None:
        os.kill(lab.robot_pid(module), signal.SIGKILL)

    return strike


def _reset(lab: Lab, rng: Random) -> None:
    """Connections are reset, new ones refused for a while."""
    duration_s = rng.uniform(0.0, _CUT_S)
    lab.relay.cut(duration_s)
    time.sleep(duration_s)


def _torn(lab: Lab, rng: Random) -> None:
    """Connections are reset at some byte of what passes."""
    cuts = lab.relay.cuts
    lab.relay.cut_after(rng.randrange(_TRANSFER_BYTES), rng.choice(("up", "down")))
    lab.until(lambda: lab.relay.cuts > cuts, _TRANSFER_S, lambda: "nothing passes the link")


def _silent(lab: Lab, rng: Random) -> None:
    """No byte passes, and nobody is told."""
    duration_s = rng.uniform(*_SILENT_S)
    lab.relay.fall_silent(duration_s)
    time.sleep(duration_s)


_HEARTBEAT_S = 0.5 + 2 / 50 + 0.25
_BRAKING_S = 0.25

FAULTS = (
    Fault("actor", _role("host", "actor0"), releases=True, stop_s=_HEARTBEAT_S),
    Fault("spool", _role("host", "buffer")),
    Fault("link", _role("host", "link"), relinks=True),
    Fault("site", _supervisor("site"), relinks=True, releases=True, stop_s=_HEARTBEAT_S),
    Fault("agent", _supervisor("agent"), releases=True, stop_s=_HEARTBEAT_S),
    Fault("watchdog", _robot("hal.process.watchdog"), releases=True, stop_s=_HEARTBEAT_S),
    Fault("servo", _robot("hal.process.servo"), releases=True, stop_s=_BRAKING_S),
    Fault("gateway", _role("learner", "gateway"), relinks=True),
    Fault("learner", _role("learner", "learner"), learns=True),
    Fault("buffer", _role("learner", "buffer")),
    Fault("train", _supervisor("train"), relinks=True, learns=True),
    Fault("reset", _reset, relinks=True),
    Fault("torn", _torn, relinks=True),
    Fault("silent", _silent, relinks=True),
)


def sequence(count: int, seed: int) -> list[Fault]:
    """So many faults: all kinds in a random order, then again in another, and so on.

    A role that ends more than five times in two minutes ends its run, by design; so no kind may
    come in a row.
    """
    rng = Random(f"{seed}/order")
    found: list[Fault] = []
    while len(found) < count:
        found += rng.sample(FAULTS, len(FAULTS))
    return found[:count]

"""How long it takes until everything is back after a fault, and how the arm behaved meanwhile."""

import time
from itertools import islice
from operator import gt

import msgspec
import numpy as np

from benchmarks.links.chaos.faults import Fault
from benchmarks.links.chaos.lab import Lab
from benchmarks.links.chaos.ledger import Steps, Weights
from hal.drivers.so101_arm import SPEC
from hal.safety.config import SafetyConfig
from sim.so101.arm import ArmState

BUSY_S = 0.5
"""What a busy machine may add to the time in which the arm stops."""

_STILL_RAD_S, _REST_S = 0.02, 0.3
_STAYS_RAD = 0.05
_SAFETY = SafetyConfig()
_JUMP_RAD = 0.1
"""A servo step's motion; where the robot is held, from where it was commanded to where it is."""


class Recovery(msgspec.Struct, frozen=True):
    """Times in seconds since the fault (since the network was back, where that was cut).

    link_s: until both ends say that they are connected; None where it did not break. control_s:
    until the robot is leased again and moves; None where its holder did not lose it. step_s: until
    a step that was recorded after the fault, in a new episode where the holder lost the robot, is
    durable at the learner's site. learn_s: until the learner has made a gradient step. stop_s:
    how long the arm still moved without a holder. kept: whether a holder that did not die kept its
    robot. halted: the latch that was set, and cleared by this program in a person's place. faults:
    promises that did not hold.
    """

    kind: str
    at_s: float
    back_s: float
    link_s: float | None
    control_s: float | None
    step_s: float
    learn_s: float | None
    stop_s: float
    speed_rad_s: float
    jump_rad: float
    kept: bool
    halted: str
    faults: tuple[str, ...]


class Watch:
    """Looks at everything several times a second, before, while and after it breaks."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.spool, self.buffer = Steps(lab.host.buffer), Steps(lab.learner.buffer)
        self.weights = Weights(lab)

    def refresh(self) -> None:
        """Read what is new in logs and stores."""
        self.spool.refresh()
        self.buffer.refresh()
        self.weights.refresh()

    def close(self) -> None:
        """Close the logs."""
        self.spool.close()
        self.buffer.close()


class Observer:
    """One fault's consequences, until all that it broke is back."""

    def __init__(self, lab: Lab, watch: Watch, fault: Fault) -> None:
        self._lab, self._watch, self._fault = lab, watch, fault
        watch.refresh()
        self._recorded = 0
        self._learned_before = self._learned()
        self._episode = -1
        self._token = self._token_now()
        self._linked_s = self._links()
        lab.arm.clear_peaks()
        self._times: dict[str, float] = {}
        self._stop_s = self._moved_rad = 0.0
        self._rest_rad: np.ndarray | None = None
        self._kept = True
        self._halted = ""
        self._faults: list[str] = []

    def measure(self, timeout_s: float) -> Recovery:
        """Watch from now until all is back. Raises StuckError after timeout_s."""
        struck_s, at_s = time.monotonic(), time.time()
        self._watch.refresh()
        newest = self._watch.spool.last
        self._episode = -1 if newest is None or not self._fault.releases else newest[1]
        self._begin()
        wanted = ["step"]
        wanted += ["link"] * self._fault.relinks + ["control"] * self._fault.releases
        wanted += ["learn"] * self._fault.learns

        def back() -> bool:
            self._look(struck_s)
            return all(name in self._times for name in wanted)

        self._lab.until(
            back, timeout_s, lambda: f"of {wanted} after {self._fault.name} only {self._times} came"
        )
        peaks = self._judge()
        return Recovery(
            kind=self._fault.name,
            at_s=at_s,
            back_s=max(self._times[name] for name in wanted),
            link_s=self._times.get("link") if self._fault.relinks else None,
            control_s=self._times.get("control") if self._fault.releases else None,
            step_s=self._times["step"],
            learn_s=self._times.get("learn") if self._fault.learns else None,
            stop_s=self._stop_s,
            speed_rad_s=peaks[0],
            jump_rad=peaks[1],
            kept=self._kept,
            halted=self._halted,
            faults=tuple(self._faults),
        )

    def _begin(self) -> None:
        """Count what is recorded from now on."""
        self._recorded = len(self._watch.spool.payloads)

    def _learned(self) -> int:
        """How often a learner has made its first gradient step."""
        if not self._fault.learns:
            return 0
        return sum(event["event"] == "learning" for event in self._lab.learner.events())

    def _look(self, struck_s: float) -> None:
        self._watch.refresh()
        state = self._lab.arm.state()
        token = self._token_now()  # after the state: what moves under a new lease moves after it
        now_s = time.monotonic() - struck_s
        if not self._fault.releases:
            self._kept &= token == self._token
        elif token <= self._token:
            self._stand(state, now_s)
        elif np.abs(state.dq_rad_s).max() > _STILL_RAD_S:
            self._times.setdefault("control", now_s)
        self._halted = self._lab.clear_halt() or self._halted
        if "link" not in self._times and min(map(gt, self._links(), self._linked_s)):
            self._times["link"] = now_s
        if self._fault.relinks and "link" not in self._times:
            self._begin()  # what dying processes still do does not count
            return
        if "step" not in self._times and self._stepped():
            self._times["step"] = now_s
        if "learn" not in self._times and self._learned() > self._learned_before:
            self._times["learn"] = now_s

    def _stand(self, state: ArmState, now_s: float) -> None:
        """The arm has no holder: it comes to rest, and stays where it is."""
        if self._rest_rad is not None:
            moved_rad = float(np.abs(state.q_rad - self._rest_rad).max())
            self._moved_rad = max(self._moved_rad, moved_rad)
        elif np.abs(state.dq_rad_s).max() > _STILL_RAD_S:
            self._stop_s = now_s
        elif now_s - self._stop_s > _REST_S:
            self._rest_rad = state.q_rad

    def _links(self) -> tuple[float, float]:
        """Unix times since when host and gateway say that they are connected; 0 for not."""
        here, there = (
            0.0 if end is None or not end.connected else end.since_s for end in self._lab.link()
        )
        return here, there

    def _stepped(self) -> bool:
        """Whether a step that was recorded since the fault is at the learner's site."""
        recorded = self._watch.spool.payloads
        new = islice(reversed(recorded), len(recorded) - self._recorded)
        return any(key[1] > self._episode and key in self._watch.buffer.payloads for key in new)

    def _token_now(self) -> int:
        device = self._lab.device()
        return 0 if device is None or not device.holder else device.token

    def _judge(self) -> tuple[float, float]:
        """Greatest true speed and jump of a goal, by the arm itself.

        A robot that did not do as it was told is to latch its halt: then that promise held.
        """
        peaks = self._lab.arm.state().peaks
        speed_rad_s, jump_rad = float(peaks.dq_rad_s.max()), float(peaks.step_rad.max())
        low, high = SPEC.action.bounds()
        beyond_rad = np.maximum(low - peaks.q_low_rad, peaks.q_high_rad - high).max()
        assert SPEC.motion is not None
        fastest_rad_s = _SAFETY.velocity_factor * SPEC.motion.velocity[0]
        found = {
            f"left its limits by {beyond_rad:.3f} rad": beyond_rad > _SAFETY.position_margin,
            f"moved at {speed_rad_s:.2f} rad/s": speed_rad_s > fastest_rad_s,
            f"was sent {jump_rad:.3f} rad away at once": jump_rad > _JUMP_RAD,
            f"moved for {self._stop_s:.2f} s without a holder": self._stop_s
            > self._fault.stop_s + BUSY_S,
            f"moved by {self._moved_rad:.3f} rad without a holder": self._moved_rad > _STAYS_RAD,
        }
        if not self._halted:
            self._faults += [
                f"{self._fault.name}: the arm {what}" for what, so in found.items() if so
            ]
        return speed_rad_s, jump_rad

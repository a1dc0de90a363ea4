"""How a device is: its state, why, and how well it keeps time."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from embodied.core.protocols import Condition


class Health(StrEnum):
    """State of a device.

    absent: not open. ready: can be leased. leased: somebody commands it. degraded: works, but a
    deadline, a read or a temperature is not as it should be. halted: latched, only a person
    clears it. lost: its driver failed; it is opened again until it answers.
    """

    ABSENT = "absent"
    READY = "ready"
    LEASED = "leased"
    DEGRADED = "degraded"
    HALTED = "halted"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is and how it is, without any I/O.

    rate_hz is that of the last second, 0 if idle. counts: events since open, by name.
    hops_ms: (p50, p99) of each part of a tick in milliseconds.
    """

    id: str
    kind: str
    host: str
    health: Health = Health.ABSENT
    reason: str = ""
    tick_hz: float = 0.0
    rate_hz: float = 0.0
    condition: Condition = field(default_factory=Condition)
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    hops_ms: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )


class Monitor:
    """Derives the state from what is known, in order of gravity, and counts events.

    A counted event that degrades does so for degraded_s.
    """

    def __init__(self, degraded_s: float = 5.0, max_temperature_c: float = 55.0) -> None:
        self._degraded_s = degraded_s
        self._max_temperature_c = max_temperature_c
        self._recent: dict[str, tuple[float, int, str]] = {}
        self.counts: dict[str, int] = {}
        self.condition = Condition()
        self.opened = False
        self.lost = ""
        self.halted = ""
        self.holder = ""
        self.transitions: deque[tuple[Health, str]] = deque(maxlen=64)
        self.rate = RateMeter()
        self.hops = Hops()

    def info(self, identity: DeviceInfo) -> DeviceInfo:
        """The device as it is now."""
        health, reason = self.state()
        return replace(
            identity,
            health=health,
            reason=reason,
            rate_hz=self.rate.per_second(),
            condition=self.condition,
            counts=dict(self.counts),
            hops_ms=self.hops.percentiles_ms(),
        )

    def count(self, event: str, n: int = 1, *, degrades: bool = False, why: str = "") -> None:
        """Note n events of a name; the last one's reason is shown while it degrades the device."""
        if n <= 0:
            return
        self.counts[event] = self.counts.get(event, 0) + n
        if degrades:
            since_s, before, _ = self._recent.get(event, (0.0, 0, ""))
            now_s = time.monotonic()
            fresh = now_s - since_s < self._degraded_s
            self._recent[event] = (now_s, before + n if fresh else n, why)

    def condition_is(self, condition: Condition) -> None:
        """Take a new reading; repeated reads and heat degrade the device."""
        self.count("retries", condition.retries - self.condition.retries, degrades=True)
        self.condition = condition

    def state(self) -> tuple[Health, str]:
        """Present state and its reason; a change is kept in `transitions`."""
        state = self._derive()
        if not self.transitions or self.transitions[-1] != state:
            self.transitions.append(state)
        return state

    def _derive(self) -> tuple[Health, str]:
        if self.lost:
            return Health.LOST, self.lost
        if not self.opened:
            return Health.ABSENT, ""
        if self.halted:
            return Health.HALTED, self.halted
        if reasons := self._degradations():
            return Health.DEGRADED, reasons
        return (Health.LEASED, self.holder) if self.holder else (Health.READY, "")

    def _degradations(self) -> str:
        now_s = time.monotonic()
        reasons = [
            f"{n} {event} lately" + (f" ({why})" if why else "")
            for event, (since_s, n, why) in list(self._recent.items())
            if now_s - since_s < self._degraded_s
        ]
        hot = self.condition.temperature_c
        if hot is not None and hot >= self._max_temperature_c:
            reasons.append(f"{hot:.0f} °C")
        return ", ".join(reasons)


class RateMeter:
    """Events per second over the last full second."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._count = 0
        self._rate = 0.0

    def count(self, n: int = 1) -> None:
        """Note n events."""
        self._count += n
        elapsed_s = time.monotonic() - self._start_s
        if elapsed_s >= 1.0:
            self._rate = self._count / elapsed_s
            self._start_s += elapsed_s
            self._count = 0

    def per_second(self) -> float:
        """Rate of the last window; 0 once nothing has happened for two seconds."""
        return self._rate if time.monotonic() - self._start_s < 2.0 else 0.0


class Hops:
    """The newest durations of each part of a cycle, for percentiles."""

    def __init__(self, window: int = 1000) -> None:
        self._window = window
        self._durations_ns: dict[str, deque[int]] = {}

    def add(self, hop: str, duration_ns: int) -> None:
        """Note one duration."""
        kept = self._durations_ns.get(hop)
        if kept is None:
            kept = self._durations_ns[hop] = deque(maxlen=self._window)
        kept.append(duration_ns)

    def percentiles_ms(self) -> dict[str, tuple[float, float]]:
        """(p50, p99) of every hop."""
        summary: dict[str, tuple[float, float]] = {}
        for hop, durations in list(self._durations_ns.items()):
            ordered = sorted(durations.copy())
            last = len(ordered) - 1
            p50, p99 = (round(ordered[round(share * last)] / 1e6, 4) for share in (0.5, 0.99))
            summary[hop] = p50, p99
        return summary

"""One class around any driver: clock, command queue, limits, latch."""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from embodied.core.clock import Clock, RealClock, VirtualClock
from embodied.core.errors import DeviceLostError, EmbodiedError
from embodied.core.frames import Chunk, Frame, Observation, Rejection, Ticket
from embodied.core.protocols import Driver, Renders, SimulatedDriver
from hal.limits import Limits


class Health(StrEnum):
    """State of a device."""

    ABSENT = "absent"
    READY = "ready"
    HALTED = "halted"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is, without any I/O. rate_hz is that of the last second, 0 if idle."""

    id: str
    kind: str
    host: str
    health: Health = Health.ABSENT
    reason: str = ""
    tick_hz: float = 0.0
    rate_hz: float = 0.0
    overruns: int = 0


class Device:
    """A robot, simulated or real, as a stream of frames and a queue of actions by absolute tick.

    Ticks count from 0 and never restart. With a VirtualClock, time passes only in `advance`:
    simulation waits for the policy. With a RealClock a thread ticks at spec.tick_hz whether
    commands come or not; in a tick without a command the driver holds.

    frame_capacity: how many closed frames are kept for `frames`; asking for one that is
    older is an error, never a silent gap.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        info: DeviceInfo,
        clock: Clock | None = None,
        frame_capacity: int = 4096,
        max_obs_age_ticks: int = 64,
    ) -> None:
        self.spec = driver.spec
        self._driver = driver
        self._clock = clock or VirtualClock()
        self._realtime = isinstance(self._clock, RealClock)
        self._limits = Limits(self.spec, max_obs_age_ticks)
        self._period_ns = round(1e9 / self.spec.tick_hz)
        self._info = replace(info, tick_hz=self.spec.tick_hz)
        self._queue: dict[int, np.ndarray] = {}
        self._closed: deque[Frame] = deque(maxlen=frame_capacity)
        self._open: Frame | None = None
        self._evicted_tick = -1
        self._previous_D: np.ndarray | None = None
        self._order = (-1, -1)
        self._token = 0
        self._halt_reason = ""
        self._overruns = 0
        self._next_ns = 0
        self._rate = RateMeter()
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def info(self) -> DeviceInfo:
        """Identity, health and rates."""
        return replace(self._info, rate_hz=self._rate.per_second(), overruns=self._overruns)

    @property
    def tick(self) -> int:
        """The tick that is open now."""
        return self._opened().tick

    def open(self) -> "Device":
        """Connect, sense the first frame and, with a real clock, start ticking."""
        with self._changed:
            try:
                self._driver.open()
                self._next_ns = self._clock.now_ns()
                self._open = self._sense(0)
            except BaseException as error:
                self._driver.close()
                if isinstance(error, EmbodiedError) or not isinstance(error, Exception):
                    raise
                raise self._lost("open", error) from error
            self._set_health(Health.READY)
        if self._realtime:
            self._thread = threading.Thread(target=self._run, name=self._info.id, daemon=True)
            self._thread.start()
        return self

    def reset(self, seed: int) -> int:
        """Bring a simulated device to the start state of `seed`; return the new frame's tick."""
        with self._changed:
            tick = self._opened().tick
            if not isinstance(self._driver, SimulatedDriver):
                raise EmbodiedError(
                    f"{self._info.id} is not simulated: a task must move it to its start"
                )
            self._queue.clear()
            self._previous_D = None
            try:
                self._driver.reset(seed)
            except Exception as error:
                raise self._lost("reset", error) from error
            self._next_ns = self._clock.now_ns()
            self._open = self._sense(tick + 1)
            return tick + 1

    def submit(self, chunk: Chunk) -> Ticket:
        """Queue a chunk. It replaces everything queued from its first tick on."""
        with self._changed:
            tick = self._opened().tick
            fault = self._fenced(chunk)
            if fault is not None:
                end = chunk.start_tick + len(chunk.actions_HD)
                nothing = np.zeros((0, *self.spec.action.shape), self.spec.action.dtype)
                rejected = (Rejection(chunk.start_tick, end, fault),)
                return Ticket(chunk.seq, tick, nothing, rejections=rejected)
            checked = self._limits.check(chunk, tick)
            self._order = (chunk.epoch, chunk.seq)
            if len(checked.actions_HD):
                for queued in [t for t in self._queue if t >= checked.first_tick]:
                    del self._queue[queued]
            for k, action_D in enumerate(checked.actions_HD):
                self._queue[checked.first_tick + k] = action_D
            return Ticket(
                chunk.seq,
                checked.first_tick,
                checked.actions_HD,
                checked.clipped,
                checked.late_ticks,
                checked.rejections,
            )

    def lease(self) -> int:
        """A fencing token for a new holder: chunks without it are refused from now on."""
        with self._changed:
            self._token += 1
            self._order = (-1, -1)
            self._queue.clear()
            return self._token

    def advance(self, until_tick: int, timeout_s: float = 60.0) -> None:
        """Return once `until_tick` is open: steps a virtual clock, waits for the real one."""
        with self._changed:
            if not self._realtime:
                while self._opened().tick < until_tick:
                    self._tick()
                return
            deadline_s = time.monotonic() + timeout_s
            while self._opened().tick < until_tick:
                if not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                    raise DeviceLostError(
                        f"{self._info.id} did not reach tick {until_tick} in {timeout_s} s"
                    )

    def latest(self) -> Frame:
        """The open frame: newest observation and signals."""
        with self._changed:
            return self._opened()

    def frames(self, since_tick: int) -> list[Frame]:
        """Every frame from `since_tick` to the open one, in order.

        The frame that was open when the device was reset belongs to no episode and is left out.
        """
        with self._changed:
            newest = self._opened()
            if since_tick <= self._evicted_tick:
                raise EmbodiedError(
                    f"{self._info.id}: frames up to tick {self._evicted_tick} are gone "
                    f"(asked for {since_tick}); read more often or raise frame_capacity"
                )
            kept: list[Frame] = []
            for frame in reversed(self._closed):
                if frame.tick < since_tick:
                    break
                kept.append(frame)
            return [*reversed(kept), newest] if newest.tick >= since_tick else []

    def halt(self, reason: str) -> None:
        """Stop taking commands and hold, until `clear`. Idempotent, from any thread."""
        with self._changed:
            self._queue.clear()
            if self._info.health is Health.READY:
                self._halt_reason = reason
                self._set_health(Health.HALTED, reason)
            self._changed.notify_all()

    def clear(self) -> None:
        """Leave the halted state; for a person on the host."""
        with self._changed:
            if self._info.health is Health.HALTED:
                self._halt_reason = ""
                self._set_health(Health.READY)

    def render(self, width: int, height: int) -> np.ndarray | None:
        """A picture for a video, if the driver can draw itself."""
        with self._changed:
            return self._driver.render(width, height) if isinstance(self._driver, Renders) else None

    def close(self) -> None:
        """Hold, stop ticking and disconnect; safe to call twice."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        with self._changed:
            if self._info.health is not Health.ABSENT:
                self._set_health(Health.ABSENT)
                self._driver.close()

    def __enter__(self) -> "Device":
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> Frame:
        if self._info.health is Health.LOST:
            raise DeviceLostError(f"{self._info.id} is lost: {self._info.reason}")
        if self._open is None:
            raise EmbodiedError(f"{self._info.id} is not open: call open() first")
        return self._open

    def _fenced(self, chunk: Chunk) -> str | None:
        if self._info.health is Health.HALTED:
            return f"halted: {self._halt_reason}"
        if chunk.lease_token != self._token:
            return f"lease token {chunk.lease_token} is not the holder's"
        if (chunk.epoch, chunk.seq) <= self._order:
            return f"(epoch, seq) {(chunk.epoch, chunk.seq)} does not follow {self._order}"
        return None

    def _run(self) -> None:
        while not self._closing and self._info.health is not Health.LOST:
            self._clock.sleep_until(self._next_ns + self._period_ns)
            with self._changed:
                try:
                    self._tick()
                except DeviceLostError:
                    self._changed.notify_all()
                    return

    def _tick(self) -> None:
        """Execute the open tick's action, close its frame, sense the next one."""
        frame = self._opened()
        queued = self._queue.pop(frame.tick, None)
        action = None if queued is None else self._limits.slew(queued, self._previous_D)
        try:
            if action is None:
                self._driver.hold()
            else:
                self._driver.drive(action)
            if isinstance(self._driver, SimulatedDriver):
                self._driver.step_time()
            self._next_ns += self._period_ns
            if not self._realtime:
                self._clock.sleep_until(self._next_ns)
            elif self._clock.now_ns() > self._next_ns + self._period_ns:
                self._overruns += 1
                self._next_ns = self._clock.now_ns()
            following = self._sense(frame.tick + 1)
        except Exception as error:
            raise self._lost("tick", error) from error
        if action is not None:
            self._previous_D = action
        if len(self._closed) == self._closed.maxlen:
            self._evicted_tick = self._closed[0].tick
        self._closed.append(replace(frame, action=action, held=action is None))
        self._open = following
        self._rate.count()
        self._changed.notify_all()

    def _sense(self, tick: int) -> Frame:
        observation: Observation = self._driver.sense()
        self.spec.check(observation)
        now_ns = self._clock.now_ns()
        signals = self._driver.signals() if isinstance(self._driver, SimulatedDriver) else {}
        return Frame(tick, observation, dict.fromkeys(observation, now_ns), signals=signals)

    def _lost(self, where: str, error: Exception) -> DeviceLostError:
        reason = f"{where}: {type(error).__name__}: {error}"
        self._set_health(Health.LOST, reason)
        return DeviceLostError(f"{self._info.id} is lost: {reason}")

    def _set_health(self, health: Health, reason: str = "") -> None:
        self._info = replace(self._info, health=health, reason=reason)


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

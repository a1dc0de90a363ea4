"""One class around any driver: clock, command queue, limits, motion, latch, health."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from embodied.core.clock import Clock, RealClock, VirtualClock
from embodied.core.errors import DeviceLostError, EmbodiedError
from embodied.core.frames import Chunk, Frame, Observation, RejectionCode, Ticket
from embodied.core.protocols import Camera, Driver, SimulatedDriver
from hal.cameras import Cameras
from hal.control.commands import Commands
from hal.control.execution import make_execution
from hal.control.history import History
from hal.control.pace import Pace
from hal.control.senses import Senses
from hal.health import DeviceInfo, Monitor
from hal.pictures import draw
from hal.safety.config import SIMULATED, Bounds, Envelope, SafetyConfig, Workspace, check_fit
from hal.safety.guard import Guard
from hal.safety.limits import Limits
from hal.safety.violations import Violations

_REOPEN_S = 1.0
_POLL_S = 0.01


class Device:
    """A robot, simulated or real, as a stream of frames and a queue of actions by absolute tick.

    Ticks count from 0 and never restart. With a VirtualClock time passes only in `advance`; with a
    RealClock a thread ticks at spec.tick_hz whether commands come or not. In a tick without a
    command a position-controlled device (spec.motion) decelerates and stands still; another holds.

    safety: what the host allows. latches: folder of the halts that survive a restart, None for
    memory only. cameras: read by threads at their own rates; the newest picture joins each frame.
    frame_capacity: how many closed frames are kept for `frames`; asking for one that is
    older is an error, never a silent gap. on_step: called after every servo step, if set.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        info: DeviceInfo,
        clock: Clock | None = None,
        safety: SafetyConfig = SIMULATED,
        latches: Path | None = None,
        cameras: Mapping[str, Camera] | None = None,
        frame_capacity: int = 4096,
    ) -> None:
        self.driver = driver
        self._cameras = Cameras(cameras or {})
        self.spec = self._cameras.extend(driver.spec)
        self.safety = safety
        self._clock = clock or VirtualClock()
        self._realtime = isinstance(self._clock, RealClock)
        self._senses = Senses(driver, self._cameras, self.spec, self._clock, safety.lost_after)
        self._host_limits = Envelope.of(self.spec).tightened(safety.bounds, "safety.bounds")
        self._envelope = self._host_limits
        check_fit(self.spec, safety)
        joints = self.spec.action.size
        workspace = None if safety.workspace is None else Workspace(safety.workspace, joints)
        limits = Limits(self.spec, safety, workspace)
        self._commands = Commands(self.spec, limits)
        if safety.heartbeat_s is not None:
            self._commands.held = "nobody holds a lease"
        self._violations = Violations(self.spec, safety)
        self._execution = make_execution(
            driver, self.spec, limits, self._violations, self._envelope, workspace
        )
        self._pace = Pace(
            self._clock, self.spec.tick_hz, self._execution.steps, realtime=self._realtime
        )
        self._taken = False
        self._info = replace(info, tick_hz=self.spec.tick_hz)
        self._monitor = Monitor()
        self._guard = Guard(safety, latches, info.id)
        self._history = History(frame_capacity, info.id)
        self._open: Frame | None = None
        self._own_ns, self._breaks, self._late_s = 0, 0, 0.0
        self._changed = threading.Condition(threading.RLock())
        self._io = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.on_step: Callable[[], None] | None = None

    @property
    def info(self) -> DeviceInfo:
        """Identity, health, rates, counts and latencies."""
        return self._monitor.info(self._info)

    @property
    def realtime(self) -> bool:
        """Whether its time passes by itself."""
        return self._realtime

    @property
    def resettable(self) -> bool:
        """Whether it is simulated, so that `reset` can set its state."""
        return isinstance(self.driver, SimulatedDriver)

    @property
    def token(self) -> int:
        """The newest lease's token; 0 before the first."""
        return self._commands.token

    @property
    def tick(self) -> int:
        """The tick that is open now."""
        return self._opened().tick

    def open(self) -> "Device":
        """Connect, sense the first frame and, with a real clock, start ticking."""
        try:
            self._cameras.open()
            self._connect(0)
        except Exception as error:
            self._cameras.close()
            lost = self._lost("open", error)
            raise (error if isinstance(error, EmbodiedError) else lost) from error
        if self._realtime:
            self._thread = threading.Thread(target=self._run, name=self._info.id, daemon=True)
            self._thread.start()
        return self

    def reset(self, seed: int) -> int:
        """Bring a simulated device to the start state of `seed`; return the new frame's tick."""
        with self._io, self._changed:
            tick = self._opened().tick
            if not isinstance(self.driver, SimulatedDriver):
                raise EmbodiedError(f"{self._info.id} is no simulator: a task must move it")
            self._commands.clear()
            try:
                self.driver.reset(seed)
                observation = self._senses.begin()
            except Exception as error:
                raise self._lost("reset", error) from error
            self._begin(tick + 1, observation)
            return tick + 1

    def submit(self, chunk: Chunk) -> Ticket:
        """Queue a chunk. It replaces everything queued from its first tick on."""
        with self._changed:
            tick = self._opened().tick + self._taken
            if chunk.lease_token == self._commands.token:
                self._guard.heard(self._clock.now_ns())
            places = self._execution.places(self._opened().observation)
            ticket = self._commands.submit(chunk, tick, self._envelope, places)
            for rejection in ticket.rejections:
                self._monitor.count(f"rejected {rejection.code}", degrades=rejection.code != "late")
            self._monitor.count("clipped", ticket.clipped)
            return ticket

    def grant(self, token: int, holder: str) -> None:
        """Take a new lease holder, under the host's limits. Raises LeaseError for an old token."""
        with self._changed:
            self._commands.grant(token, holder)
            self._envelope = self._host_limits
            self._execution.limit(self._envelope, strict=False)
            self._guard.heard(self._clock.now_ns())
            self._monitor.holder = holder
            self._stop_if_halted()

    def tighten(self, bounds: Bounds) -> None:
        """Narrow the limits for as long as the lease lasts. Raises ConfigError for wider ones, and
        for some that leave out where the robot comes to rest."""
        with self._changed:
            envelope = self._envelope.tightened(bounds, "bounds")
            self._execution.limit(envelope, strict=True)
            self._envelope = envelope

    def lease(self, holder: str = "this process") -> int:
        """A fencing token for a new holder in this process: chunks without it are refused."""
        with self._changed:
            token = self._commands.next_token()
            self.grant(token, holder)
            return token

    def revoke(self, reason: str, code: RejectionCode = "held") -> None:
        """End the lease: finish what is committed, decelerate, hold until the next one."""
        with self._changed:
            if self._open is not None and not self._commands.held:
                self._monitor.count("leases ended")
                end_tick = self._open.tick + self.safety.committed_ticks
                self._commands.revoke(code, reason, end_tick)
                self._monitor.holder = ""

    def pulse(self, token: int) -> str:
        """A heartbeat of the lease holder; "" or why it is not (any more) the holder."""
        with self._changed:
            if token != self._commands.token:
                return f"lease {token} has ended; {self._commands.token} is the newest"
            if not self._commands.held:
                self._guard.heard(self._clock.now_ns())
            return self._commands.held

    def advance(self, until_tick: int, timeout_s: float = 60.0) -> None:
        """Return once `until_tick` is open: steps a virtual clock, waits for the real one."""
        if not self._realtime:
            while self._opened().tick < until_tick:
                self._servo_step()
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._opened().tick >= until_tick, timeout_s):
                raise DeviceLostError(f"{self._info.id}: no tick {until_tick} in {timeout_s} s")

    def latest(self) -> Frame:
        """The open frame: newest observation and signals."""
        with self._changed:
            return self._opened()

    def frames(self, since_tick: int) -> list[Frame]:
        """Frames from `since_tick` to the open one, without those that were open at a reset."""
        with self._changed:
            return self._history.since(since_tick, self._opened())

    def halt(self, reason: str) -> None:
        """Decelerate, hold and latch, until a person clears it. Idempotent, from any thread."""
        with self._changed:
            self._guard.halt(reason)
            self._stop_if_halted()
            self._changed.notify_all()

    def clear(self) -> None:
        """Leave the halted state; for a person on the host. Commands need a new lease."""
        with self._changed:
            self._guard.clear()
            self._violations.clear()
            self._stop_if_halted()

    def render(self, width: int, height: int) -> np.ndarray | None:
        """A picture for a video, if the driver can draw itself; ConfigError if it is too large."""
        return draw(self.driver, self._io, width, height, meanwhile=self._realtime)

    def close(self) -> None:
        """Come to a stop, hold and disconnect; safe to call twice."""
        if self._thread is not None:
            self.revoke("closing")
            rounds = int((self._execution.stopping_s + 0.5) / _POLL_S)
            while rounds and (not self._execution.still or len(self._commands)):
                rounds -= 1
                time.sleep(_POLL_S)
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._monitor.opened:
            self._monitor.opened = False
            self.driver.close()
            self._cameras.close()

    def __enter__(self) -> "Device":
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> Frame:
        if self._monitor.lost:
            raise DeviceLostError(f"{self._info.id} is lost: {self._monitor.lost}")
        if self._open is None:
            raise DeviceLostError(f"{self._info.id} is not open: call open() first")
        return self._open

    def _connect(self, tick: int) -> None:
        with self._io:
            try:
                self.driver.open()
                observation = self._senses.begin()
                with self._changed:
                    self._begin(tick, observation)
                    self._monitor.opened, self._monitor.lost = True, ""
                    self._stop_if_halted()
            except BaseException:
                self.driver.close()
                raise

    def _begin(self, tick: int, observation: Observation) -> None:
        """Open a frame after a break in time: opened, reset, found again."""
        self._breaks += 1
        self._pace.begin()
        self._taken = False
        self._open = self._senses.frame(tick, observation)
        self._execution.start(observation)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._servo_step()
            except DeviceLostError:
                with self._changed:
                    self._changed.notify_all()
                self._find_again()

    def _find_again(self) -> None:
        """Open a lost device again and again until it answers; its lease is gone by then."""
        tick = self._open.tick if self._open is not None else 0
        while not self._closing:
            time.sleep(_REOPEN_S)
            try:
                self._connect(tick + 1)
            except Exception as error:  # noqa: BLE001 - whatever a third party's driver raises
                self._monitor.lost = f"open: {type(error).__name__}: {error}"
            else:
                return

    def _servo_step(self) -> None:
        """Drive one set point in time; a tick's first plans its motion, its last turns the tick."""
        self._late_s = max(self._late_s, late_s := self._pace.wait())
        self._monitor.count("overruns", int(late_s > 0), degrades=True)
        started_ns = time.monotonic_ns()
        with self._changed:
            last, breaks = self._pace.last, self._breaks
            if self._pace.first:
                self._watch(self._late_s)
                self._late_s = 0.0
        with self._io:
            try:
                if self._pace.first:
                    self._plan()
                planned_ns = time.monotonic_ns()
                self._execution.drive()
                driven_ns = time.monotonic_ns()
                observation = self._senses.read() if last else None
            except Exception as error:
                raise self._lost("tick", error) from error
        if self.on_step is not None:
            self.on_step()
        with self._changed:
            if breaks != self._breaks:
                return
            self._pace.stepped()
            self._own_ns += planned_ns - started_ns
            if observation is not None:
                sensed_ns = time.monotonic_ns()
                self._turn(observation)
                self._monitor.hops.add("sense", sensed_ns - driven_ns)
                self._monitor.hops.add("own", self._own_ns + time.monotonic_ns() - sensed_ns)
                self._own_ns = 0
        self._monitor.hops.add("drive", driven_ns - planned_ns)

    def _plan(self) -> None:
        """Take the open tick's command out of the queue and plan its execution."""
        with self._changed:
            tick, self._taken, stopping = self._opened().tick, True, bool(self._monitor.halted)
            command = None if stopping else self._commands.pop(tick)
            event = self._execution.plan(command, self._commands.coming(tick + 1, 2))
            if event and not (stopping or self._commands.held):
                self._monitor.count(event, degrades=True)

    def _watch(self, late_s: float) -> None:
        """Latch and heartbeat, looked at every tick."""
        self._stop_if_halted()
        silence = self._guard.silence(self._clock.now_ns(), late_s)
        if silence and not self._commands.held:
            self._monitor.count("heartbeats lost", degrades=True)
            self.revoke(silence)

    def _stop_if_halted(self) -> None:
        self._guard.look()
        self._monitor.halted = self._guard.halted
        if self._monitor.halted:
            self._commands.clear()
            if not self._commands.held:
                self.revoke(f"halted: {self._monitor.halted}", "halted")

    def _turn(self, observation: Observation) -> None:
        """Close the open frame and open the next one."""
        frame = self._opened()
        if fault := self._guard.tick(late=self._pace.turn()):
            self.halt(fault)
        if self._senses.failed:
            self._monitor.count("failed reads", degrades=True, why=self._senses.error)
        elif fault := self._execution.violation(observation):
            self.halt(fault)
            self._execution.start(observation)
        if (condition := self._senses.condition()) is not None:
            self._monitor.condition_is(condition)
            if condition.fault:
                self.halt(f"the robot reports {condition.fault}")
        try:
            following = self._senses.frame(frame.tick + 1, observation)
        except EmbodiedError as error:
            raise self._lost("tick", error) from error
        self._history.append(self._execution.close(frame))
        self._open = following
        self._taken = False
        self._monitor.rate.count()
        self._changed.notify_all()

    def _lost(self, where: str, error: Exception) -> DeviceLostError:
        reason = f"{where}: {type(error).__name__}: {error}"
        self.revoke(f"lost: {reason}")
        self._monitor.lost = reason
        self.driver.close()
        return DeviceLostError(f"{self._info.id} is lost: {reason}")

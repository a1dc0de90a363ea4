"""From the command of a tick to what the motors get: two kinds of devices, one interface."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from embodied.core.frames import Frame, Observation
from embodied.core.protocols import Driver, SimulatedDriver
from embodied.core.specs import DeviceSpec
from hal.control.commands import Command
from hal.control.motion import Motion, check_envelope
from hal.safety.config import Envelope, Workspace
from hal.safety.limits import Limits
from hal.safety.violations import Violations


class Execution(Protocol):
    """Executes one device's commands. steps: servo steps in a tick."""

    steps: int

    def start(self, observation: Observation) -> None:
        """The device is where it was just sensed to be, at rest."""
        ...

    def limit(self, envelope: Envelope, *, strict: bool) -> None:
        """Use these limits; strict: ConfigError if they leave out where the robot is."""
        ...

    def places(self, observation: Observation) -> tuple[np.ndarray, ...]:
        """Where the device is, measured and commanded, for the start check; () for none."""
        ...

    def plan(self, command: Command | None, coming: Sequence[np.ndarray]) -> str:
        """Prepare a tick, given its command and the actions after it; "guarded" or
        "underruns" if that is what happens."""
        ...

    def drive(self) -> None:
        """Make one servo step; a simulator's time passes with it."""
        ...

    def close(self, frame: Frame) -> Frame:
        """The frame of the tick that was executed, with what was."""
        ...

    def violation(self, observation: Observation) -> str:
        """What in the measured motion is out of bounds, once it has lasted."""
        ...

    @property
    def still(self) -> bool:
        """Whether nothing is commanded to move."""
        ...

    @property
    def stopping_s(self) -> float:
        """Longest time until it is."""
        ...


class DirectExecution:
    """The device gets each action as it is, limited in its change (spec.max_step)."""

    steps = 1
    still = True
    stopping_s = 0.0

    def __init__(self, driver: Driver, limits: Limits) -> None:
        self._driver = driver
        self._step_time = _step_time(driver)
        self._limits = limits
        self._command: Command | None = None
        self._previous_D: np.ndarray | None = None

    def start(self, observation: Observation) -> None:
        """Nothing is known of the last action any more."""
        self._command = self._previous_D = None

    def limit(self, envelope: Envelope, *, strict: bool) -> None:
        """Commands are clipped before they come here."""

    def places(self, observation: Observation) -> tuple[np.ndarray, ...]:
        """Unknown."""
        return ()

    def plan(self, command: Command | None, coming: Sequence[np.ndarray]) -> str:
        """Take the tick's command."""
        if command is not None:
            action_D = self._limits.slew(command.action_D, self._previous_D)
            command = Command(action_D, command.seq)
            self._previous_D = action_D
        self._command = command
        return ""

    def drive(self) -> None:
        """Drive, or hold for want of a command."""
        if self._command is None:
            self._driver.hold()
        else:
            self._driver.drive(self._command.action_D)
        self._step_time()

    def close(self, frame: Frame) -> Frame:
        """With the action that was driven."""
        if self._command is None:
            return _closed(frame, None, -1)
        return _closed(frame, self._command.action_D, self._command.seq)

    def violation(self, observation: Observation) -> str:
        """Its motion is not known."""
        return ""


class MotionExecution:
    """A position-controlled device follows its targets with limited jerk, or stops."""

    def __init__(
        self,
        driver: Driver,
        spec: DeviceSpec,
        violations: Violations,
        envelope: Envelope,
        workspace: Workspace | None,
    ) -> None:
        assert spec.motion is not None
        self._driver = driver
        self._step_time = _step_time(driver)
        self._dtype = spec.action.dtype
        self._measured = spec.motion.measured
        self._motion = Motion(spec, envelope, workspace)
        self._violations = violations
        self._envelope = envelope
        self._coming: Envelope | None = None
        self._seq: int | None = None
        self._planned_D = self._motion.position_D
        self.steps = self._motion.steps

    def start(self, observation: Observation) -> None:
        """Stand still where it was measured."""
        self._seq = None
        self._motion.start(observation[self._measured])
        self._violations.begin(observation[self._measured], self._envelope)

    def limit(self, envelope: Envelope, *, strict: bool) -> None:
        """Limit position, velocity, acceleration and jerk, once the robot stands: until then it
        brakes under the limits that its stop was proven with."""
        if strict:
            check_envelope(envelope, self._motion.rest_D, "bounds")
        self._coming = None if envelope == self._envelope else envelope

    def places(self, observation: Observation) -> tuple[np.ndarray, ...]:
        """Measured and commanded position."""
        return observation[self._measured], self._motion.position_D

    def plan(self, command: Command | None, coming: Sequence[np.ndarray]) -> str:
        """Plan a trajectory to the command, or the stop."""
        if self._coming is not None and self._motion.still:
            self._envelope, self._coming = self._coming, None
            self._motion.limit(self._envelope)
        if self._coming is not None:
            command = None
        self._seq = None if command is None else command.seq
        if command is None:
            moving = not self._motion.still
            self._motion.brake()
            return "underruns" if moving else ""
        self._planned_D = self._motion.follow(command.action_D, coming)
        return "guarded" if self._motion.guarded else ""

    def drive(self) -> None:
        """Command the next set point."""
        self._driver.drive(self._motion.step())
        self._step_time()

    def close(self, frame: Frame) -> Frame:
        """With the set point at the tick's end."""
        if self._seq is None:
            return _closed(frame, None, -1)
        return _closed(frame, self._planned_D.astype(self._dtype), self._seq)

    def violation(self, observation: Observation) -> str:
        """Compare measured with commanded motion and limits."""
        measured_D = observation[self._measured]
        return self._violations.check(measured_D, self._motion.position_D, self._envelope)

    @property
    def still(self) -> bool:
        """Whether the set points do not move."""
        return self._motion.still

    @property
    def stopping_s(self) -> float:
        """Longest time from any state to standstill."""
        return self._motion.stopping_s


def make_execution(
    driver: Driver,
    spec: DeviceSpec,
    limits: Limits,
    violations: Violations,
    envelope: Envelope,
    workspace: Workspace | None,
) -> Execution:
    """The kind that the device's spec asks for."""
    if spec.motion is None:
        return DirectExecution(driver, limits)
    return MotionExecution(driver, spec, violations, envelope, workspace)


def _closed(frame: Frame, action: np.ndarray | None, seq: int) -> Frame:
    held = action is None
    return Frame(frame.tick, frame.observation, frame.t_ns, action, held, frame.signals, seq)


def _step_time(driver: Driver) -> Callable[[], None]:
    return driver.step_time if isinstance(driver, SimulatedDriver) else _nothing


def _nothing() -> None:
    """A real robot's time passes by itself."""

"""Arms behind servos: a follower with physics, and a leader that a script moves."""

from typing import Protocol

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.seeds import make_rng
from hal.drivers.so101_arm import HIGH_RAD, JOINTS, LOW_RAD, SERVO_IDS
from sim.so101.arm import MAX_SPEED_RAD_S, QUANTUM_S, Arm, ArmState, Motors, N, Peaks
from sim.so101.servo import MAX_SPEED_TICKS, TICKS_PER_TURN, Servo, ServoFault

TICKS_PER_RAD = TICKS_PER_TURN / (2 * np.pi)
MIDDLE = 2047
_NOMINAL_P, _NOMINAL_D = 16, 32
_RAD_PER_S_PER_TICK = MAX_SPEED_RAD_S / MAX_SPEED_TICKS
_SENSE_S = 0.02
_SETTLE_QUANTA = 750
_LONGEST_PAUSE_S = 0.25
_LEADER_SPEED_RAD_S = 2.0


def calibration(seed: int) -> dict[str, dict[str, int]]:
    """LeRobot's calibration of the virtual arm of this seed, as its servos have it.

    Angle zero is at MIDDLE; the ranges are the joints' limits.
    """
    offsets = make_rng(seed, "so101", "homing").integers(-800, 800, N)
    found: dict[str, dict[str, int]] = {}
    for joint, offset, low, high in zip(JOINTS, offsets, LOW_RAD, HIGH_RAD, strict=True):
        found[joint] = {
            "id": SERVO_IDS[joint],
            "drive_mode": 0,
            "homing_offset": int(offset),
            "range_min": MIDDLE + int(np.floor(low * TICKS_PER_RAD)),
            "range_max": MIDDLE + int(np.ceil(high * TICKS_PER_RAD)),
        }
    return found


def joint_index(joint: str) -> int:
    """Number of a joint; raises ConfigError that lists them if there is none of that name."""
    if joint not in JOINTS:
        raise ConfigError(f"unknown joint '{joint}'; the arm has {', '.join(JOINTS)}")
    return JOINTS.index(joint)


class Robot(Protocol):
    """What a bus and a control channel need of an arm."""

    servos: list[Servo]
    powered: bool

    def advance_to(self, now_s: float) -> None:
        """Let time pass up to now_s, of any monotonic clock; a pause of the host is skipped."""
        ...

    def refresh(self) -> None:
        """Bring the servos' measurements up to date."""
        ...

    def state(self) -> ArmState:
        """True state."""
        ...

    def clear_peaks(self) -> None:
        """Take extremes from now on."""
        ...

    def power(self, on: bool) -> None:
        """Take the supply away or give it back."""
        ...

    def fault(self, joint: str, kind: ServoFault, on: bool) -> None:
        """Bring about a fault or end it."""
        ...


class _Bank:
    """Six servos, each with its encoder mounted anyhow."""

    def __init__(self, seed: int) -> None:
        rows = calibration(seed).values()
        self.servos = [
            Servo(
                row["id"],
                homing_offset=row["homing_offset"],
                low=row["range_min"],
                high=row["range_max"],
            )
            for row in rows
        ]
        self.encoder_zero = [MIDDLE + row["homing_offset"] for row in rows]
        self.powered = True
        self._clock: tuple[float, int] | None = None
        self._sensed_s = 0.0

    def boot(self, state: ArmState) -> None:
        """Power has come: the servos measure, then start."""
        self.sense(state)
        for servo in self.servos:
            servo.restart()

    def sense(self, state: ArmState) -> None:
        """Have the servos measure `state`."""
        elapsed_s, self._sensed_s = state.t_s - self._sensed_s, state.t_s
        turned = (state.q_rad * TICKS_PER_RAD).tolist()
        speed = (state.dq_rad_s * TICKS_PER_RAD).tolist()
        load = state.load.tolist()
        for i, servo in enumerate(self.servos):
            position = servo.position_of(turned[i], self.encoder_zero[i])
            servo.sense(position, speed[i], load[i], elapsed_s)

    def force(self, index: int, kind: ServoFault, on: bool) -> None:
        """Have a servo show a fault from its next measurement on, or show it no longer."""
        forced = self.servos[index].forced
        (forced.add if on else forced.discard)(kind)

    def due_quanta(self, now_s: float) -> int:
        """How many quanta are due since the last call."""
        if self._clock is None or now_s - self._clock[0] - self._clock[1] * QUANTUM_S > (
            _LONGEST_PAUSE_S
        ):
            self._clock = (now_s, 0)
            return 0
        started_s, passed = self._clock
        due = int((now_s - started_s) / QUANTUM_S)
        self._clock = (started_s, due)
        return due - passed


class Follower(_Bank):
    """The arm with physics: goals in the servos' registers move it, loads come back.

    It starts folded, without torque and settled. Time passes by `advance`, or by `advance_to`.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.arm = Arm()
        self.arm.drive(self.arm.goal_rad, self._motors())
        self.arm.advance(_SETTLE_QUANTA)
        self.boot(self.arm.state())
        self._apply()
        self.clear_peaks()

    def advance(self, quanta: int) -> None:
        """Let `quanta` times QUANTUM_S pass."""
        while quanta > 0:
            if any(servo.changed for servo in self.servos):
                self._apply()
            batch = min(quanta, round(_SENSE_S / QUANTUM_S))
            self.arm.advance(batch)
            quanta -= batch
            if self.arm.data.time - self._sensed_s >= _SENSE_S:
                self.refresh()

    def advance_to(self, now_s: float) -> None:
        """Let time pass up to now_s, of any monotonic clock; a pause of the host is skipped."""
        self.advance(self.due_quanta(now_s))

    def refresh(self) -> None:
        """Bring the servos' measurements up to date."""
        if self.powered and self.arm.data.time > self._sensed_s:
            self.sense(self.arm.state())

    def state(self) -> ArmState:
        """True state, with what was written last already in force."""
        self._apply()
        return self.arm.state()

    def clear_peaks(self) -> None:
        """Take extremes from now on."""
        self.arm.clear_peaks()

    def power(self, on: bool) -> None:
        """Take the supply away (the arm falls, the bus is silent) or give it back."""
        if on and not self.powered:
            self.boot(self.arm.state())
        self.powered = on
        self._apply()

    def fault(self, joint: str, kind: ServoFault, on: bool) -> None:
        """Bring about a fault or end it; a stall blocks the joint, the rest is the servo's own."""
        index = joint_index(joint)
        if kind == "stall":
            self.arm.brake(index, on)
        self.force(index, kind, on)
        if self.powered:
            self.sense(self.arm.state())

    def _motors(self) -> Motors:
        servos = self.servos
        return Motors(
            share=np.array([servo.torque_share * self.powered for servo in servos]),
            stiffness=np.array([servo.get("p_gain") / _NOMINAL_P for servo in servos]),
            damping=np.array([servo.get("d_gain") / _NOMINAL_D for servo in servos]),
            speed_rad_s=np.array([servo.speed_ticks * _RAD_PER_S_PER_TICK for servo in servos]),
        )

    def _apply(self) -> None:
        turned = (self.arm.data.qpos[:N] * TICKS_PER_RAD).tolist()
        goal = [
            servo.goal_turned(turned[i], self.encoder_zero[i])
            for i, servo in enumerate(self.servos)
        ]
        self.arm.drive(np.array(goal) / TICKS_PER_RAD, self._motors())
        for servo in self.servos:
            servo.changed = False


class Leader(_Bank):
    """An arm that a hand moves: a seeded sum of sines, or a pose; what is written has no effect.

    pose_rad: pose to go to, and centre of the motion. amplitude_rad: greatest excursion, 0 for
    none. Speed stays below 2 rad/s.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        rng = make_rng(seed, "so101", "leader")
        self._hz_NK = rng.uniform(0.05, 0.35, (N, 3))
        self._phase_NK = rng.uniform(0, 2 * np.pi, (N, 3))
        self.pose_rad = np.zeros(N)
        self.amplitude_rad = 0.4
        self._t_s = 0.0
        self._q_rad, self._dq_rad_s = self._target(0.0), np.zeros(N)
        self.clear_peaks()
        self.boot(self.state())

    def advance_to(self, now_s: float) -> None:
        """Let time pass up to now_s, of any monotonic clock; a pause of the host is skipped."""
        step_s = self.due_quanta(now_s) * QUANTUM_S
        if not step_s:
            return
        self._t_s += step_s
        reach = _LEADER_SPEED_RAD_S * step_s
        move = np.clip(self._target(self._t_s) - self._q_rad, -reach, reach)
        self._q_rad = self._q_rad + move
        self._dq_rad_s = move / step_s
        self._peaks.take(self._q_rad, self._dq_rad_s)

    def _target(self, t_s: float) -> np.ndarray:
        sines = np.sin(2 * np.pi * self._hz_NK * t_s + self._phase_NK).mean(axis=1)
        return np.clip(self.pose_rad + self.amplitude_rad * sines, LOW_RAD, HIGH_RAD)

    def refresh(self) -> None:
        """Bring the servos' measurements up to date."""
        if self.powered and self._t_s > self._sensed_s:
            self.sense(self.state())

    def state(self) -> ArmState:
        """Where the hand holds it; goals are where it is."""
        q, dq = self._q_rad.copy(), self._dq_rad_s.copy()
        off = np.zeros(N, bool)
        return ArmState(self._t_s, q, dq, q.copy(), np.zeros(N), off, self._peaks.copy())

    def clear_peaks(self) -> None:
        """Take extremes from now on."""
        self._peaks = Peaks.start(self._q_rad, self._dq_rad_s)

    def power(self, on: bool) -> None:
        """Take the supply away (the bus is silent) or give it back."""
        if on and not self.powered:
            self.boot(self.state())
        self.powered = on

    def fault(self, joint: str, kind: ServoFault, on: bool) -> None:
        """Bring about a fault or end it; a hand is not stopped by a stall."""
        self.force(joint_index(joint), kind, on)
        if self.powered:
            self.sense(self.state())

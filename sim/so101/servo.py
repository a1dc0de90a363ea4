"""One STS3215 servo as its host sees it: a table of registers, status bits and protections.

Modelled: position mode, limits, homing offset, P and D gain, torque limits, overload and overheat
protection, EEPROM lock. Not modelled: other operating modes, acceleration, overcurrent, alarms.

Two habits matter to safety. When torque comes on the servo goes to whatever stands in
goal_position, however old; after power-up that is where it then was. A latched overload leaves
only protective torque until torque is switched off.
"""

import math
from typing import Literal

TICKS_PER_TURN = 4096
MAX_SPEED_TICKS = 3073
"""Free speed at 12 V, steps per s (about 45 turns a minute)."""

ServoFault = Literal["stall", "overload", "overheat", "undervoltage"]

VOLTAGE, ANGLE, OVERHEAT, OVERCURRENT, OVERLOAD = 1, 2, 4, 8, 32
"""Bits of the status byte."""

REGISTERS: dict[str, tuple[int, int, int]] = {
    "firmware_major": (0, 1, 3),
    "firmware_minor": (1, 1, 10),
    "model_number": (3, 2, 777),
    "id": (5, 1, 1),
    "baud_rate": (6, 1, 0),
    "return_delay": (7, 1, 0),
    "response_level": (8, 1, 1),
    "min_position": (9, 2, 0),
    "max_position": (11, 2, 4095),
    "max_temperature": (13, 1, 70),
    "max_voltage": (14, 1, 140),
    "min_voltage": (15, 1, 40),
    "max_torque": (16, 2, 1000),
    "phase": (18, 1, 12),
    "unloading_condition": (19, 1, 44),
    "led_alarm": (20, 1, 47),
    "p_gain": (21, 1, 32),
    "d_gain": (22, 1, 32),
    "i_gain": (23, 1, 0),
    "startup_force": (24, 2, 16),
    "cw_dead_zone": (26, 1, 1),
    "ccw_dead_zone": (27, 1, 1),
    "protection_current": (28, 2, 500),
    "angular_resolution": (30, 1, 1),
    "homing_offset": (31, 2, 0),
    "operating_mode": (33, 1, 0),
    "protective_torque": (34, 1, 20),
    "protection_time": (35, 1, 200),
    "overload_torque": (36, 1, 80),
    "velocity_p_gain": (37, 1, 10),
    "overcurrent_time": (38, 1, 200),
    "velocity_i_gain": (39, 1, 200),
    "torque_enable": (40, 1, 0),
    "acceleration": (41, 1, 0),
    "goal_position": (42, 2, 0),
    "goal_time": (44, 2, 0),
    "goal_velocity": (46, 2, 0),
    "torque_limit": (48, 2, 1000),
    "lock": (55, 1, 1),
    "present_position": (56, 2, 0),
    "present_velocity": (58, 2, 0),
    "present_load": (60, 2, 0),
    "present_voltage": (62, 1, 120),
    "present_temperature": (63, 1, 30),
    "status": (65, 1, 0),
    "moving": (66, 1, 0),
    "present_current": (69, 2, 0),
    "maximum_acceleration": (85, 1, 0),
}
"""Name → address, bytes, value as delivered. Units as in the maker's table: positions and speeds
in steps (per s), torques in 0.1 % of stall (protections: 1 %), 0.1 V, °C, 10 ms, 6.5 mA."""

SIGN_BITS = {
    "homing_offset": 11,
    "goal_position": 15,
    "goal_velocity": 15,
    "present_position": 15,
    "present_velocity": 15,
    "present_load": 10,
}
"""Registers that hold sign and magnitude, and the bit that is the sign."""

TABLE_BYTES = 256
EEPROM_BYTES = 40
_READ_ONLY = frozenset((*range(5), *range(56, 71)))
_AMBIENT_C = 30.0
_STALL_HEATING_C = 60.0
_THERMAL_S = 90.0
_STALL_CURRENT = 415


class Servo:
    """Registers of one servo. `changed` tells the arm that a write may concern its motor."""

    def __init__(self, servo_id: int, *, homing_offset: int, low: int, high: int) -> None:
        self._table = bytearray(TABLE_BYTES)
        self._eeprom = bytearray(EEPROM_BYTES)
        for name, (_, _, value) in REGISTERS.items():
            self.put(name, value)
        for name, value in (
            ("id", servo_id),
            ("homing_offset", homing_offset),
            ("min_position", low),
            ("max_position", high),
        ):
            self.put(name, value)
        self._eeprom[:] = self._table[:EEPROM_BYTES]
        self.changed = True
        self.forced: set[ServoFault] = set()
        self.registered: tuple[int, bytes] | None = None
        self._temperature_c = _AMBIENT_C
        self._overloaded = False
        self._loaded_s = 0.0

    def get(self, name: str) -> int:
        """A register's value, its sign decoded."""
        address, size, _ = REGISTERS[name]
        value = int.from_bytes(self._table[address : address + size], "little")
        bit = SIGN_BITS.get(name)
        if bit is None:
            return value
        magnitude = value & ((1 << bit) - 1)
        return -magnitude if value >> bit & 1 else magnitude

    def put(self, name: str, value: int) -> None:
        """Set a register as the servo itself does; too great a magnitude is clipped."""
        address, size, _ = REGISTERS[name]
        bit = SIGN_BITS.get(name, 8 * size)
        code = min(abs(value), (1 << bit) - 1) | (1 << bit if value < 0 else 0)
        self._table[address : address + size] = code.to_bytes(size, "little")

    def read(self, address: int, count: int) -> bytes | None:
        """Bytes of the table; None where it ends before."""
        if count < 1 or address + count > TABLE_BYTES:
            return None
        return bytes(self._table[address : address + count])

    def write(self, address: int, data: bytes) -> bool:
        """Write by the host; False if the table ends before. What is read-only stays as it is.

        EEPROM registers change at once, but outlive a loss of power only if lock was 0.
        """
        if not data or address + len(data) > TABLE_BYTES:
            return False
        torque_was_on = self.torque_on
        for place, byte in enumerate(data, address):
            if place in _READ_ONLY:
                continue
            self._table[place] = byte
            if place < EEPROM_BYTES and not self._table[55]:
                self._eeprom[place] = byte
        if torque_was_on and not self.torque_on:
            self._overloaded = False
        self.changed = True
        return True

    def restart(self) -> None:
        """Power has come back: RAM as delivered, EEPROM as last saved, goal where the arm is."""
        position = self.get("present_position")
        for name, (_, _, value) in REGISTERS.items():
            self.put(name, value)
        self._table[:EEPROM_BYTES] = self._eeprom
        self.put("torque_limit", self.get("max_torque"))
        self.put("present_position", position)
        self.put("goal_position", position)
        self.registered = None
        self._overloaded = False
        self._loaded_s = 0.0
        self.changed = True

    @property
    def id(self) -> int:
        """Its number on the bus."""
        return self._table[5]

    @property
    def torque_on(self) -> bool:
        """Whether the host wants the motor to hold its goal."""
        return self._table[40] == 1

    @property
    def status(self) -> int:
        """Status byte, as it stands in every answer."""
        return self._table[65]

    @property
    def torque_share(self) -> float:
        """Torque that the motor may use, as a share of stall: limits and protections applied."""
        if not self.torque_on or self.status & self.get("unloading_condition") & OVERHEAT:
            return 0.0
        share = min(1.0, self.get("torque_limit") / 1000)
        if self.status & OVERLOAD:
            share = min(share, self.get("protective_torque") / 100)
        return share

    @property
    def speed_ticks(self) -> int:
        """Greatest speed towards the goal, steps per s."""
        speed = abs(self.get("goal_velocity"))
        return min(speed, MAX_SPEED_TICKS) if speed else MAX_SPEED_TICKS

    def goal_turned(self, turned: float, encoder_zero: int) -> float:
        """Steps from the joint's zero to the goal, limited as the servo limits it.

        turned: steps from the joint's zero to where it is; encoder_zero: encoder at that zero.
        """
        low, high = self.get("min_position"), self.get("max_position")
        goal = self.get("goal_position")
        if low < high:
            goal = min(max(goal, low), high)
        zero = encoder_zero - self.get("homing_offset")
        turns = math.floor((zero + turned) / TICKS_PER_TURN)
        return goal + turns * TICKS_PER_TURN - zero

    def position_of(self, turned: float, encoder_zero: int) -> int:
        """Present position at `turned` steps from the joint's zero: encoder less homing offset."""
        return round(encoder_zero - self.get("homing_offset") + turned) % TICKS_PER_TURN

    def sense(self, position: int, speed_ticks: float, load: float, elapsed_s: float) -> None:
        """Take new measurements, `elapsed_s` after the last ones; load: signed share of stall."""
        self.put("present_position", position)
        self.put("present_velocity", round(speed_ticks))
        self.put("present_load", round(1000 * load))
        self.put("present_current", round(_STALL_CURRENT * abs(load)))
        self.put("present_voltage", 30 if "undervoltage" in self.forced else 120)
        self.put("moving", int(abs(speed_ticks) > 20))
        settled_c = _AMBIENT_C + _STALL_HEATING_C * load * load
        share = min(1.0, elapsed_s / _THERMAL_S)
        self._temperature_c += (settled_c - self._temperature_c) * share
        hot_c = self.get("max_temperature") + 5
        shown_c = hot_c if "overheat" in self.forced else round(self._temperature_c)
        self.put("present_temperature", shown_c)
        self._protect(abs(load), elapsed_s)

    def _protect(self, load: float, elapsed_s: float) -> None:
        heavy = self.torque_on and load > self.get("overload_torque") / 100
        self._loaded_s = self._loaded_s + elapsed_s if heavy else 0.0
        if self._loaded_s > self.get("protection_time") / 100:
            self._overloaded = True
        status = 0
        volts = self.get("present_voltage")
        if not self.get("min_voltage") <= volts <= self.get("max_voltage"):
            status |= VOLTAGE
        if self.get("present_temperature") > self.get("max_temperature"):
            status |= OVERHEAT
        if self._overloaded or "overload" in self.forced:
            status |= OVERLOAD
        if status != self.status:
            self.put("status", status)
            self.changed = True

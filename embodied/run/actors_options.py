"""Options of a run's actors: their robots, and who may take over from the policy on them."""

from typing import Any

import msgspec

from embodied.core.config import options_of
from embodied.core.errors import ConfigError
from embodied.core.protocols import Operator
from hal.pool import selectors
from hal.teleop.keyboard import Keyboard, KeyboardConfig
from hal.teleop.session import check_speed


class ActorsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Robots that act for the run.

    devices: null for simulated robots of the task in the actors' own processes; else which of the
    host's devices each actor leases, such as "so101@bench" or "arm[camera.wrist]": they act in
    real time, and one that is lost is replaced or awaited.
    count: actor processes. rows: robots in each. speed: simulated seconds per real second at
    most, 0 for no limit; 1 makes a simulated robot as slow as a real one.
    ticks_per_round: lockstep only, ticks acted per row between two learning rounds.
    teleoperator: a registered one and its options, by which a person takes over on leased devices;
    null for nobody. align_speed: share of the velocity limits at which a robot is then led to the
    teleoperator's pose.
    """

    count: int
    rows: int
    speed: float
    ticks_per_round: int
    devices: str | None
    teleoperator: dict[str, Any] | None = None
    align_speed: float = 0.4

    @property
    def terminal(self) -> str:
        """Role that is given the terminal for the person; "" for none."""
        return "" if self.teleoperator is None else "actor0"

    @property
    def operator(self) -> Operator | None:
        """Stands for the person where a configuration is checked; null for nobody."""
        return None if self.teleoperator is None else Keyboard(KeyboardConfig())

    def check(self, mode: str) -> None:
        """Raise ConfigError for robots that cannot be had, or that a person cannot move."""
        if self.devices is not None:
            self._check_devices(self.devices, mode)
        if self.teleoperator is None:
            return
        options = options_of("teleoperators", self.teleoperator, "actors.teleoperator")
        check_speed(self.align_speed, "actors.align_speed")
        if self.devices is None:
            raise ConfigError(
                "actors.teleoperator needs actors.devices: the simulated robots of actors are in "
                "virtual time, which a person cannot keep up with. An agent's robot is in real "
                "time, a simulated one too (embodied agent +robot@robots.sim=simulated)"
            )
        if isinstance(options, KeyboardConfig) and self.count > 1:
            raise ConfigError(
                f"actors.teleoperator is the keyboard and actors.count={self.count}: a terminal "
                "has one, for one actor; set actors.count=1, or take a gamepad or a leader arm"
            )

    def _check_devices(self, devices: str, mode: str) -> None:
        wanted = selectors.parse(devices)
        if sum(selector.count for selector in wanted) != 1 or self.rows != 1:
            raise ConfigError(
                f"actors.devices is '{devices}' with actors.rows={self.rows}: each actor "
                "leases one device; set actors.count for more"
            )
        if mode == "lockstep":
            raise ConfigError("run.mode=lockstep repeats bit for bit; leased devices do not")

"""Tasks of the SO-101 that are the same on the simulated arm and on the real one."""

from collections.abc import Mapping

import numpy as np

from embodied.core.protocols import Operator, SimulatedDriver
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Expert, Task
from hal.drivers.so101_arm import MODEL, SPEC
from hal.tasks import TaskConfig, make_task
from sim.family import SimConfig
from sim.so101.driver import SPREAD_RAD, START_RAD, SimulatedSO101

_HORIZON_S = 6.0
_REACHED_RAD = (0.5, -0.7, 0.7, 0.4, 0.0, 0.3)
"""A pose in which the tool is at the target."""

_TARGET_M = (0.1981, 0.1139, 0.1443)
_RADIUS_M = 0.02
_EXPERT_STEP_RAD = 0.04

REACH = TaskConfig(
    name="so101/reach",
    instruction="bring the tool to the point in front of the arm",
    horizon_s=_HORIZON_S,
    reset={"name": "motion", "pose": START_RAD.tolist(), "spread": SPREAD_RAD},
    reward={
        "name": "reach",
        "model": str(MODEL),
        "target": _TARGET_M,
        "radius_m": _RADIUS_M,
    },
)


class SO101Family:
    """The one task "so101/reach": success within 2 cm of a fixed point, from a varying pose."""

    def names(self) -> tuple[str, ...]:
        return (REACH.name,)

    def make_task(self, task: str, config: SimConfig, operator: Operator | None = None) -> Task:
        made = make_task(REACH, SPEC, operator)
        made.horizon = config.horizon or made.horizon
        return made

    def make_driver(self, task: str, config: SimConfig) -> SimulatedDriver:
        return SimulatedSO101(config)

    def make_expert(self, task: str, spec: DeviceSpec) -> Expert:
        return ReachExpert()


class ReachExpert:
    """Joint by joint towards a pose that reaches the target."""

    def reset(self) -> None:
        """It has no state."""

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        at_rad = observation["observation.state"]
        step_rad = np.clip(_REACHED_RAD - at_rad, -_EXPERT_STEP_RAD, _EXPERT_STEP_RAD)
        return (at_rad + step_rad).astype(np.float32)

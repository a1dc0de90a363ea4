"""One example of each registered driver, on virtual hardware where it drives a robot.

The conformance suite runs over them. A context manager gets a folder of its own and gives a
RobotConfig that can be opened, and how to unplug and plug it if that is possible.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.robot import RobotConfig
from hal.safety.config import SafetyConfig
from sim.so101.virtual import VirtualArm


@dataclass(frozen=True)
class Specimen:
    """A robot to test with. unplug, plug: its cable; None for one that has none."""

    robot: RobotConfig
    unplug: Callable[[], None] | None = None
    plug: Callable[[], None] | None = None


@contextmanager
def so101(folder: Path) -> Iterator[Specimen]:
    """The native driver on a virtual arm."""
    with VirtualArm(folder, seed=11) as arm:
        calibration = folder / "arm.json"
        arm.write_calibration(calibration)
        driver = {
            "name": "so101",
            "port": arm.port,
            "calibration": str(calibration),
            "answer_ms": 20.0,
        }
        yield _virtual(arm, "so101", driver)


@contextmanager
def lerobot(folder: Path) -> Iterator[Specimen]:
    """LeRobot's own SO-101 driver, in degrees, on a virtual arm."""
    with VirtualArm(folder, seed=12) as arm:
        arm.write_calibration(folder / "arm.json")
        config: dict[str, Any] = {
            "port": arm.port,
            "id": "arm",
            "calibration_dir": str(folder),
            "disable_torque_on_disconnect": False,
        }
        driver: dict[str, Any] = {
            "name": "lerobot",
            "type": "so101_follower",
            "config": config,
            "tick_hz": 30.0,
            "low": (-111.0, -102.0, -98.0, -96.0, -161.0, -1.0),
            "high": (111.0, 102.0, 98.0, 96.0, 161.0, 101.0),
            "velocity": (120.0,),
            "acceleration": (1000.0,),
            "jerk": (20000.0,),
            "servo_hz": 60.0,
        }
        yield _virtual(arm, "lerobot", driver, tracking_error=None, start_tolerance=2.0,
                       position_margin=6.0)  # fmt: skip


@contextmanager
def gymnasium(folder: Path) -> Iterator[Specimen]:
    """An environment that comes with Gymnasium."""
    yield Specimen(
        RobotConfig(
            kind="pendulum", driver={"name": "gymnasium", "id": "Pendulum-v1"}, safety=_SIMULATED
        )
    )


@contextmanager
def simulated(folder: Path) -> Iterator[Specimen]:
    """The smallest simulated task."""
    driver = {"name": "simulated", "task": "pointmass"}
    yield Specimen(RobotConfig(kind="pointmass", driver=driver, safety=_SIMULATED))


_SIMULATED = SafetyConfig(start_tolerance=None, tracking_error=None, overruns=0, lost_after=1)


def _virtual(arm: VirtualArm, kind: str, driver: dict[str, Any], **safety: Any) -> Specimen:
    config = SafetyConfig(overruns=0, **safety)
    robot = RobotConfig(kind=kind, classes=("robot", "arm"), driver=driver, safety=config)
    return Specimen(robot, arm.unplug, arm.plug)

"""A robot as configuration: its driver, cameras, protections and what it is good for."""

import os
from pathlib import Path
from typing import Any

import msgspec

from embodied.core.clock import RealClock
from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.protocols import Camera, Driver
from hal.device import Device
from hal.health import DeviceInfo
from hal.safety.config import Envelope, SafetyConfig, Workspace, check_fit

_LEAST_FRAMES, _MOST_FRAMES, _FRAME_BYTES = 64, 4096, 256 << 20


class RobotConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One robot of a host.

    kind, classes: what it is ("so101"; "robot", "arm"). driver: a registered driver's name and
    options. cameras: by name, a registered camera's name and options. capabilities: more that a
    request may ask for; every camera is one, "camera.<name>". labels: anything, e.g. where it is.
    stall_s: silence of the servo process after which the watchdog kills it and holds the robot.
    estop_inputs: files that read "1" while an emergency stop is pressed (a GPIO's value file).
    """

    driver: dict[str, Any]
    kind: str
    classes: tuple[str, ...] = ("robot",)
    cameras: dict[str, dict[str, Any]] = {}
    safety: SafetyConfig = SafetyConfig()
    capabilities: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    stall_s: float = 0.3
    estop_inputs: tuple[str, ...] = ()

    @property
    def offers(self) -> tuple[str, ...]:
        """All capabilities."""
        return (*self.capabilities, *(f"camera.{name}" for name in self.cameras))


class ServoConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the processes of one robot need. sockets, latches: folders on the robot's host."""

    id: str
    host: str
    robot: RobotConfig
    sockets: str
    latches: str

    @property
    def data_address(self) -> str:
        """Where lease holders reach the device."""
        return f"ipc://{self.sockets}/{socket_name(self.id)}.data"

    @property
    def picture_address(self) -> str:
        """Where anybody gets pictures of the device."""
        return f"ipc://{self.sockets}/{socket_name(self.id)}.pictures"

    @property
    def control_address(self) -> str:
        """Where the agent reaches the device."""
        return f"ipc://{self.sockets}/{socket_name(self.id)}.control"


def socket_name(device_id: str) -> str:
    """A device's id as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in device_id)


def check_robot(robot: RobotConfig, where: str) -> None:
    """Raise ConfigError for names or options that do not exist; nothing is opened."""
    cls, _ = component("drivers", robot.driver, f"{where}.driver")
    if not getattr(cls, "SLOW_TO_MAKE", False):
        spec = make_driver(robot).spec
        check_fit(spec, robot.safety)
        Envelope.of(spec).tightened(robot.safety.bounds, f"{where}.safety.bounds")
        if robot.safety.workspace is not None:
            Workspace(robot.safety.workspace, spec.action.size)
    for name in robot.estop_inputs:
        if not os.access(name, os.R_OK):
            raise ConfigError(f"{where}.estop_inputs: {name} cannot be read")
    for name, camera in robot.cameras.items():
        component("cameras", camera, f"{where}.cameras.{name}")


def make_driver(robot: RobotConfig) -> Driver:
    """The robot's driver, not open."""
    cls, options = component("drivers", robot.driver, "driver")
    return cls(options)


def make_device(config: ServoConfig) -> Device:
    """The robot as a device in real time, not open."""
    cameras: dict[str, Camera] = {}
    for name, camera in config.robot.cameras.items():
        cls, options = component("cameras", camera, f"cameras.{name}")
        cameras[name] = cls(options)
    driver = make_driver(config.robot)
    pictures = sum(camera.spec.size for camera in cameras.values())
    return Device(
        driver,
        info=DeviceInfo(config.id, config.robot.kind, config.host),
        clock=RealClock(),
        safety=config.robot.safety,
        latches=Path(config.latches),
        cameras=cameras,
        frame_capacity=max(_LEAST_FRAMES, min(_MOST_FRAMES, _FRAME_BYTES // max(1, pictures))),
    )

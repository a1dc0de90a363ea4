"""The loop of a virtual arm: physics, bus, port and control channel in one thread."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.comms.channels import RequestServer
from embodied.core.errors import ConfigError
from sim.so101 import messages
from sim.so101.bus import FeetechBus
from sim.so101.messages import State
from sim.so101.port import Port
from sim.so101.robots import Leader, Robot

_IDLE_S = 0.004


class VirtualHardware:
    """An arm on a serial port, in real time for as long as `run` runs.

    control: address at which `messages.Request`s are answered, or None.
    """

    def __init__(self, robot: Robot, link: Path, *, control: str | None, seed: int) -> None:
        self.robot = robot
        self.camera_port: int | None = None
        self._bus = FeetechBus(robot, seed=seed)
        self._port = Port(link)
        self._server = (
            None if control is None else RequestServer(control, messages.Request, self._handle)
        )

    def run(self, stopping: Callable[[], bool]) -> None:
        """Serve until `stopping`; then the port is gone."""
        self._port.plug()
        try:
            while not stopping():
                self._turn()
        finally:
            self._port.unplug()
            if self._server is not None:
                self._server.close()

    def _turn(self) -> None:
        bus, port = self._bus, self._port
        now_s = time.monotonic()
        due_s = bus.next_s()
        wait_s = _IDLE_S if due_s is None else min(_IDLE_S, due_s - now_s)
        data = port.read(wait_s)
        now_s = time.monotonic()
        self.robot.advance_to(now_s)
        if data:
            bus.receive(data, now_s)
        for reply in bus.ready(now_s):
            port.write(reply)
        if self._server is not None:
            self._server.poll(0.0)

    def _handle(
        self, request: Any, arrays: dict[str, np.ndarray]
    ) -> tuple[msgspec.Struct, dict[str, np.ndarray]]:
        match request:
            case messages.SetFaults(faults=faults):
                self._bus.faults = faults
            case messages.SetPlug(on=True):
                self._port.plug()
            case messages.SetPlug(on=False):
                self._bus.silence()
                self._port.unplug()
            case messages.SetPower(on=on):
                self._bus.silence()
                self.robot.power(on)
            case messages.SetServoFault(joint=joint, kind=kind, on=on):
                self.robot.fault(joint, kind, on)
            case messages.Lead(pose_rad=pose_rad, amplitude_rad=amplitude_rad):
                if not isinstance(self.robot, Leader):
                    raise ConfigError("this virtual arm is a follower; start it with --leader")
                self.robot.pose_rad = np.array(pose_rad)
                self.robot.amplitude_rad = amplitude_rad
            case messages.ClearPeaks():
                self.robot.clear_peaks()
            case _:
                pass
        state = self.robot.state()
        header = State(
            t_s=state.t_s,
            plugged=self._port.plugged,
            powered=self.robot.powered,
            executed=self._bus.num_executed,
            bad=self._bus.num_bad,
            camera_port=self.camera_port,
        )
        return header, messages.to_arrays(state)

"""A virtual SO-101 as a process of its own: `python -m sim.so101.virtual --link PATH`."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from embodied.comms.channels import RequestClient
from embodied.core.errors import ConfigError, EmbodiedError, LinkError
from embodied.core.processes import die_with_parent
from sim.so101 import messages
from sim.so101.arm import ArmState
from sim.so101.bus import Faults
from sim.so101.camera import start_cameras
from sim.so101.process import VirtualHardware
from sim.so101.robots import Follower, Leader, calibration
from sim.so101.servo import ServoFault

__all__ = ["Faults", "VirtualArm", "main"]

_START_S = 30.0
_ANSWER_S = 5.0
_END_S = 5.0


class VirtualArm:
    """Starts a virtual arm, waits until it answers, brings about its faults, ends it.

    directory: where the port's link is made. seed: of homing offsets, faults and a leader's
    motion. leader: an arm moved by a scripted hand. cameras: serve pictures over HTTP too.
    The process dies with the thread that made this object, at the latest.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        seed: int = 0,
        leader: bool = False,
        cameras: bool = False,
        name: str = "",
    ) -> None:
        self.port = str(Path(directory).resolve() / (name or ("leader" if leader else "so101")))
        self.calibration = calibration(seed)
        # Unix sockets allow a path of 107 bytes only: not in the caller's directory.
        self._private = Path(tempfile.mkdtemp(prefix="so101-"))
        control = f"ipc://{self._private}/control"
        command = [sys.executable, "-m", "sim.so101.virtual", "--link", self.port]
        command += ["--control", control, "--seed", str(seed), "--parent", str(os.getpid())]
        command += ["--leader"] * leader + ["--camera", "0"] * cameras
        self._log = (self._private / "log").open("w+")
        self._process = subprocess.Popen(command, stderr=self._log, stdin=subprocess.DEVNULL)
        self._client = RequestClient(control, messages.State)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                self.info = self._ask(messages.ReadState(), timeout_s=0.2)[0]
                return
            except LinkError:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    self._log.seek(0)
                    raise LinkError(
                        f"the virtual arm did not start: {self._log.read()[-2000:].strip()}"
                    ) from None

    def _ask(
        self, request: messages.Request, timeout_s: float = _ANSWER_S
    ) -> tuple[messages.State, ArmState]:
        header, arrays = self._client.request(request, {}, timeout_s)
        return header, messages.from_arrays(header.t_s, arrays)

    def state(self) -> ArmState:
        """True state, and the extremes since the last `clear_peaks`."""
        self.info, state = self._ask(messages.ReadState())
        return state

    def clear_peaks(self) -> None:
        """Take extremes from now on."""
        self._ask(messages.ClearPeaks())

    def faults(self, faults: Faults) -> None:
        """Make the bus this unreliable; `Faults()` makes it perfect."""
        self._ask(messages.SetFaults(faults))

    def unplug(self) -> None:
        """Pull the USB plug: open handles fail, the port's file is gone; the arm goes on."""
        self._ask(messages.SetPlug(False))

    def plug(self) -> None:
        """Plug it in again: a new port under the same name."""
        self._ask(messages.SetPlug(True))

    def power_off(self) -> None:
        """Take the servos' supply away: the arm falls, the bus is silent."""
        self._ask(messages.SetPower(False))

    def power_on(self) -> None:
        """Give it back: registers in RAM as delivered, torque off."""
        self._ask(messages.SetPower(True))

    def servo_fault(self, joint: str, kind: ServoFault, on: bool = True) -> None:
        """Bring about a fault of one servo or end it; raises ConfigError for an unknown joint."""
        self._ask(messages.SetServoFault(joint, kind, on))

    def stall(self, joint: str, on: bool = True) -> None:
        """Block a joint; with torque on and a goal elsewhere its load rises to the limit."""
        self.servo_fault(joint, "stall", on)

    def overload(self, joint: str, on: bool = True) -> None:
        """Servo reports overload and keeps only its protective torque."""
        self.servo_fault(joint, "overload", on)

    def overheat(self, joint: str, on: bool = True) -> None:
        """Servo reports 5 °C more than it allows, and switches its motor off."""
        self.servo_fault(joint, "overheat", on)

    def lead(self, pose_rad: Sequence[float] | np.ndarray, amplitude_rad: float = 0.0) -> None:
        """A leader's hand goes to a pose (6 angles) and moves about it by up to amplitude_rad."""
        pose = tuple(float(angle) for angle in pose_rad)
        self._ask(messages.Lead(pose, amplitude_rad))

    def camera_url(self, camera: str) -> str:
        """Where the MJPEG stream of "front" or "wrist" is; ConfigError without cameras."""
        if self.info.camera_port is None:
            raise ConfigError("this virtual arm has no cameras; make it with cameras=True")
        return f"http://127.0.0.1:{self.info.camera_port}/{camera}.mjpg"

    def write_calibration(self, path: Path | str) -> None:
        """Write the servos' calibration as LeRobot's JSON file."""
        _write_calibration(self.calibration, Path(path))

    @property
    def pid(self) -> int:
        """Number of the arm's process."""
        return self._process.pid

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._client.close()
        self._log.close()
        if Path(self.port).is_symlink() and not Path(self.port).exists():
            Path(self.port).unlink()
        shutil.rmtree(self._private, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _write_calibration(table: dict[str, dict[str, int]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=4))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sim.so101.virtual", description=__doc__)
    parser.add_argument("--link", type=Path, required=True, help="path of the serial port to make")
    parser.add_argument("--control", help="address of the control channel, ipc:///path")
    parser.add_argument("--leader", action="store_true", help="an arm moved by a scripted hand")
    parser.add_argument("--camera", type=int, help="HTTP port of the pictures, 0 for any")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=Path, help="file to write its calibration to")
    parser.add_argument("--parent", type=int, help="end when this process, the parent, dies")
    arguments = parser.parse_args()
    if arguments.camera is not None and arguments.control is None:
        parser.error("--camera needs --control: the cameras ask it for the arm's pose")
    return arguments


def main() -> int:
    """Run a virtual arm until SIGTERM, SIGINT, or the death of --parent."""
    arguments = _arguments()
    parent: int | None = arguments.parent
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    if parent is not None:
        die_with_parent(parent)
    cameras: subprocess.Popen[bytes] | None = None
    try:
        robot = Leader(arguments.seed) if arguments.leader else Follower(arguments.seed)
        hardware = VirtualHardware(
            robot, arguments.link, control=arguments.control, seed=arguments.seed
        )
        if arguments.calibration is not None:
            _write_calibration(calibration(arguments.seed), arguments.calibration)
        if arguments.camera is not None:
            cameras, hardware.camera_port = start_cameras(arguments.camera, arguments.control)
        hardware.run(lambda: bool(stopped) or (parent is not None and os.getppid() != parent))
    except EmbodiedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        if cameras is not None:
            cameras.terminate()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Real robots and cameras of this machine, found without opening what another process uses."""

import fcntl
import glob
import importlib
import importlib.util
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from embodied.core.errors import EmbodiedError
from hal.drivers.feetech import STS3215, FeetechBus
from hal.drivers.so101_arm import SERVO_IDS

PORTS_VARIABLE = "EMBODIED_SERIAL_PORTS"
"""Environment variable with further ports to look at, separated by colons."""

_PATTERNS = ("/dev/serial/by-id/*", "/dev/ttyACM*", "/dev/ttyUSB*")
_IDS = range(1, 10)
_ANSWER_MS = 8.0
_VOLTAGE, _QUERYCAP, _CAPTURE, _MANY_PLANES, _PER_NODE = 62, 0x80685600, 1, 0x1000, 0x80000000

Row = dict[str, Any]


def serial_robots() -> list[Row]:
    """Servo buses on serial ports, as rows {"id", "kind", "detail" or "fault"}.

    Ports are those of USB adapters and of EMBODIED_SERIAL_PORTS. A port that another process
    has open is listed as busy and not written to; one where no servo answers is left out.
    """
    ports = _ports()
    if not ports:
        return []
    users = _users(ports)
    with ThreadPoolExecutor(len(ports)) as pool:
        rows = pool.map(_robot, ports, [users.get(os.path.realpath(port), []) for port in ports])
        return [row for row in rows if row is not None]


def cameras() -> list[Row]:
    """Cameras that can be captured from: V4L2 nodes, and RealSense if pyrealsense2 is there."""
    return [*_v4l2(Path("/dev"), Path("/sys/class/video4linux")), *_realsense()]


def _ports() -> list[str]:
    """Every port once, under the name that stays the same when it is plugged in again."""
    found = [path for pattern in _PATTERNS for path in sorted(glob.glob(pattern))]
    found += [path for path in os.environ.get(PORTS_VARIABLE, "").split(":") if path]
    by_device: dict[str, str] = {}
    for path in found:
        by_device.setdefault(os.path.realpath(path), path)
    return list(by_device.values())


def _users(ports: Iterable[str]) -> dict[str, list[str]]:
    """Names of the processes that have a port open, by device; what we may not see is left out."""
    # Both ends of a pseudo-terminal are open in the process that provides it: only locks tell.
    devices = {os.path.realpath(port) for port in ports}
    devices = {device for device in devices if not device.startswith("/dev/pts/")}
    users: dict[str, list[str]] = {}
    for handle in glob.iglob("/proc/[0-9]*/fd/*") if devices else ():
        try:
            device = os.readlink(handle)
            if device in devices:
                pid = handle.split("/")[2]
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                users.setdefault(device, []).append(f"{name}, pid {pid}")
        except OSError:
            continue
    return users


def _robot(port: str, users: list[str]) -> Row | None:
    row: Row = {"id": f"serial:{port}", "kind": "robot (serial)"}
    if users:
        return row | {"fault": f"in use by {users[0]}"}
    if not os.path.exists(port):
        return row | {"fault": f"{port} does not exist"}
    if _locked(port):
        return row | {"fault": "in use by another process"}
    try:
        bus = FeetechBus(port, retries=0, answer_ms=_ANSWER_MS)
        bus.open()
        try:
            models = {servo: model for servo in _IDS if (model := bus.ping(servo)) is not None}
            volts = bus.read(min(models), _VOLTAGE, 1) / 10 if models else 0.0
        finally:
            bus.close()
    except (EmbodiedError, OSError) as error:
        return row | {"fault": str(error)}
    if not models:
        return None
    ids = ", ".join(map(str, models))
    detail = f"servos {ids}, {volts:.1f} V"
    if models == dict.fromkeys(SERVO_IDS.values(), STS3215):
        return row | {"id": f"so101:{port}", "kind": "robot (SO-101)", "detail": detail}
    known = {STS3215: "STS3215"}
    kinds = ", ".join(sorted({known.get(model, f"model {model}") for model in models.values()}))
    return row | {"kind": "robot (Feetech bus)", "detail": f"{detail}, {kinds}"}


def _locked(port: str) -> bool:
    """Whether another process holds the lock that our buses, and pyserial's, take."""
    try:
        handle = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _v4l2(devices: Path, classes: Path) -> list[Row]:
    rows: list[Row] = []
    for node in sorted(classes.glob("video*"), key=lambda path: (len(path.name), path.name)):
        device = devices / node.name
        row: Row = {"id": f"camera:{device}", "kind": "camera (V4L2)"}
        try:
            if not _captures(device):
                continue
            rows.append(row | {"detail": (node / "name").read_text().strip()})
        except OSError as error:
            rows.append(row | {"fault": f"{device}: {error.strerror}"})
    return rows


def _captures(device: Path) -> bool:
    """Whether a video node gives pictures; others of the same camera give metadata."""
    handle = os.open(device, os.O_RDWR | os.O_NONBLOCK)
    try:
        answer = fcntl.ioctl(handle, _QUERYCAP, bytes(104))
    finally:
        os.close(handle)
    whole, node = struct.unpack_from("<II", answer, 84)
    return bool((node if whole & _PER_NODE else whole) & (_CAPTURE | _MANY_PLANES))


def _realsense() -> list[Row]:
    if importlib.util.find_spec("pyrealsense2") is None:
        return []
    rs: Any = importlib.import_module("pyrealsense2")
    rows: list[Row] = []
    try:
        for device in rs.context().query_devices():
            number = device.get_info(rs.camera_info.serial_number)
            name = device.get_info(rs.camera_info.name)
            rows.append({"id": f"realsense:{number}", "kind": "camera (RealSense)", "detail": name})
    except RuntimeError as error:
        rows.append({"id": "realsense", "kind": "camera (RealSense)", "fault": str(error)})
    return rows

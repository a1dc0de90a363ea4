"""Checks of this host, each with its remedy: software, disk, clock, devices, identity, gateway."""

import ctypes
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from deploy.findings import Finding, failure, ok, warning
from deploy.packages import check_gpu, check_packages
from embodied.comms.identity.binding import check_dial
from embodied.comms.identity.credentials import load_bundle
from embodied.core.errors import EmbodiedError
from embodied.core.processes import run_urgently
from hal.drivers.discovery import Row, cameras, serial_robots
from hal.pool.state import check_local, state_dir
from sim.rendering import choose_backend

_CONNECT_S = 5.0
_LITTLE_GIB, _TOO_LITTLE_GIB = 5.0, 0.5
_SOON_DAYS = 3.0
_TIME_ERROR = 5
_TIMEX_BYTES = 1024


def examine(identity: Path | None, gateway: str | None) -> list[Finding]:
    """All checks, in the order in which one would put things right."""
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [check_python(sys.version_info[:2])],
        check_packages,
        lambda: [check_state(), check_disk(), check_clock(), check_realtime(), check_opengl()],
        lambda: check_devices("serial ports", serial_robots(), "dialout"),
        lambda: check_devices("cameras", cameras(), "video"),
        lambda: [check_gpu()],
    ]
    if identity is not None:
        checks.append(lambda: [check_identity(identity)])
    if gateway is not None:
        checks.append(lambda: [check_gateway(gateway, identity is not None)])
    return [finding for check in checks for finding in check()]


def check_python(version: tuple[int, int]) -> Finding:
    """Whether this Python is one that the project is made for."""
    text = f"{version[0]}.{version[1]}, {sys.executable}"
    if (3, 11) <= version < (3, 13):
        return ok("Python", text)
    return failure("Python", text, "make the virtual environment with Python 3.11 or 3.12")


def check_state() -> Finding:
    """Whether the host's state can be kept, on a disk of its own."""
    try:
        folder = state_dir()
        check_local(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except (EmbodiedError, OSError) as error:
        return failure(
            "state directory", str(error), "name a local one, writable by you, in EMBODIED_STATE"
        )
    return ok("state directory", str(folder))


def check_disk(little_gib: float = _LITTLE_GIB) -> Finding:
    """Free space where the state lies."""
    folder = Path(os.environ.get("EMBODIED_STATE") or Path.home())
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 2**30
    text = f"{free_gib:.1f} GiB free in {folder}"
    fix = "free some; a spool takes up to spool.max_gib (20 GiB unless set)"
    if free_gib < _TOO_LITTLE_GIB:
        return failure("disk", text, fix)
    return warning("disk", text, fix) if free_gib < little_gib else ok("disk", text)


def check_clock() -> Finding:
    """Whether the kernel's clock is held by a time service (adjtimex(2))."""
    library = ctypes.CDLL(None, use_errno=True)
    state = library.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if 0 <= state < _TIME_ERROR:
        return ok("clock", "synchronised")
    return warning(
        "clock",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, which no time service keeps right; "
        "certificates go by it",
        "sudo timedatectl set-ntp true",
    )


def check_realtime() -> Finding:
    """Whether servo processes may have real-time priority; tried in a thread of its own."""
    allowed: list[bool] = []
    thread = threading.Thread(target=lambda: allowed.append(run_urgently()))
    thread.start()
    thread.join()
    if allowed == [True]:
        return ok("real-time priority", "allowed")
    return warning(
        "real-time priority",
        "not allowed: other work can make robots miss their deadlines",
        "a line '<user> - rtprio 10' in /etc/security/limits.conf, then log in anew; system units "
        "(--system) have it without",
    )


def check_opengl() -> Finding:
    """Whether pictures of simulators can be drawn."""
    backend = choose_backend()
    if backend != "disable":
        return ok("OpenGL", backend)
    return warning(
        "OpenGL",
        "missing: only simulated cameras and films need it",
        "sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri",
    )


def check_devices(name: str, rows: list[Row], group: str) -> list[Finding]:
    """Each device that was found, and why it cannot be used."""
    if not rows:
        return [ok(name, "none")]
    found: list[Finding] = []
    for row in rows:
        text, fault = f"{row['id']} {row.get('detail', '')}".rstrip(), str(row.get("fault", ""))
        if not fault:
            found.append(ok(name, text))
        elif "in use" in fault:
            found.append(ok(name, f"{row['id']}: {fault}"))
        else:
            fix = f"check cable and power; sudo usermod -aG {group} $USER where you may not open it"
            found.append(warning(name, f"{row['id']}: {fault}", fix))
    return found


def check_identity(folder: Path) -> Finding:
    """The certificate: whole, of its authority, valid, and for how long."""
    try:
        bundle = load_bundle(folder)
    except EmbodiedError as error:
        return failure("identity", str(error), "issue and copy it again: docs/security.md")
    left_days = (bundle.expires - datetime.now(UTC)).total_seconds() / 86400
    text = f"{bundle.peer}, valid until {bundle.expires:%Y-%m-%d %H:%M} UTC"
    if left_days < _SOON_DAYS:
        fix = "renew it: embodied pki issue with the same --output, and copy it again"
        return warning("identity", text, fix)
    return ok("identity", text)


def check_gateway(address: str, has_identity: bool) -> Finding:
    """Whether a TCP connection to the gateway comes about; nothing is said over it."""
    try:
        check_dial(address, has_identity)
    except EmbodiedError as error:
        return failure("gateway", str(error), "give HOST:PORT, and --identity for another host")
    host, _, port = address.rpartition(":")
    begun_s = time.monotonic()
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            taken_ms = 1e3 * (time.monotonic() - begun_s)
    except OSError as error:
        return failure(
            "gateway",
            f"{address} cannot be reached: {error.strerror or error}",
            "see that the learner runs with gateway.listen, and that firewalls let this host out "
            "to that port",
        )
    return ok("gateway", f"{address} answers in {taken_ms:.0f} ms")

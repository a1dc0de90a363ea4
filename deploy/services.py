"""Puts the units of this host into systemd, starts them, and looks whether they work."""

import getpass
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from deploy.findings import Finding, failure, ok, warning
from deploy.units import AGENT, IDENTITY, SITE, Services, render
from embodied.comms.identity.credentials import load_bundle
from embodied.core.errors import ConfigError, EmbodiedError, MissingDependencyError
from embodied.core.files import write_atomic
from hal.discovery import own_devices

_STAMP = "started"
_COMMAND_S = 120.0
_HEALTHY_S = 60.0
_POLL_S = 0.2
_LOGS = "journalctl {}-u {} -n 50"


def deployment_root() -> Path:
    """What a deployment owns of a user's files."""
    return Path.home() / ".local" / "share" / "embodied"


class Manager:
    """systemd: the user's own instance, or the system's by sudo."""

    def __init__(self, system: bool) -> None:
        self.system = system
        self._sudo = ["sudo", "-n"] if system and os.geteuid() else []
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        self.folder = Path("/etc/systemd/system") if system else Path(config) / "systemd" / "user"

    def install(self, name: str, text: str) -> None:
        """Write a unit's file."""
        if self.system:
            command = [*self._sudo, "install", "-m", "644", "/dev/stdin", str(self.folder / name)]
            _done(command, text)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / name, text.encode())

    def run(self, *arguments: str) -> str:
        """systemctl; EmbodiedError if it fails."""
        return _done(self._systemctl(*arguments))

    def state(self, name: str) -> str:
        """active, activating, failed, …"""
        return _run(self._systemctl("is-active", name)).stdout.strip()

    def linger(self) -> Finding:
        """Have the user's units run without a login."""
        if self.system:
            return ok("start at boot", "system units")
        user = getpass.getuser()
        done = _run(["loginctl", "enable-linger", user])
        if done.returncode:
            return failure(
                "start at boot",
                f"{user} may not have units that run without a login: {done.stderr.strip()[-200:]}",
                f"sudo loginctl enable-linger {user}",
            )
        return ok("start at boot", f"lingering of {user} is on")

    def logs(self, name: str) -> str:
        """The command that shows them."""
        return _LOGS.format("" if self.system else "--user ", name)

    def _systemctl(self, *arguments: str) -> list[str]:
        own = [] if self.system else ["--user"]
        return [*self._sudo, "systemctl", *own, *arguments]


def start(services: Services, root: Path, manager: Manager) -> list[Finding]:
    """Write the units, enable them, start them anew if anything changed; wait until they work.

    root: where `identity`, if there is one, `current` (the software) and the site's runs lie.
    """
    bundle = root / IDENTITY
    services.check(bundle.is_dir())
    if bundle.is_dir():
        load_bundle(bundle).require("robot")
    program = root / "current" / "bin" / "embodied"
    if not program.is_file():
        raise ConfigError(
            f"{program} is missing: make a virtual environment {root / 'current'} and install the "
            "wheel into it"
        )
    root.mkdir(parents=True, exist_ok=True)
    units = render(services, program, root)
    for name, text in units.items():
        manager.install(name, text)
    manager.run("daemon-reload")
    manager.run("enable", *units)
    findings = [manager.linger()]
    if SITE not in units and (manager.folder / SITE).exists():
        manager.run("disable", "--now", SITE)
    digest = hashlib.sha256("\0".join([str(program.resolve()), *units.values()]).encode())
    stamp = root / _STAMP
    same = stamp.is_file() and stamp.read_text() == digest.hexdigest()
    manager.run("start" if same else "restart", *units)
    write_atomic(stamp, digest.hexdigest().encode())
    return findings + _healthy(services.robots(), list(units), manager)


def _healthy(robots: list[str], units: list[str], manager: Manager) -> list[Finding]:
    """Wait, for a bounded time, until units are active and robots are there."""
    deadline_s = time.monotonic() + _HEALTHY_S
    while True:
        states = {name: manager.state(name) for name in units}
        found = [_unit(name, state, manager) for name, state in states.items()]
        found += _robots(robots, manager)
        if all(f.state != "failure" for f in found) or time.monotonic() > deadline_s:
            return found
        time.sleep(_POLL_S)


def _unit(name: str, state: str, manager: Manager) -> Finding:
    if state == "active":
        return ok(name, "active")
    return failure(name, f"is {state or 'unknown'}", f"on the host: {manager.logs(name)}")


def _robots(names: list[str], manager: Manager) -> list[Finding]:
    rows = {row.id: row for row in own_devices()}
    found: list[Finding] = []
    for name in names:
        row, label = rows.get(name), f"robot {name}"
        if row is None:
            why = manager.logs(AGENT)
            found.append(failure(label, "the agent does not offer it", f"on the host: {why}"))
        elif row.health in ("ready", "leased"):
            found.append(ok(label, row.health))
        elif row.health in ("degraded", "halted"):
            fix = "embodied devices --watch; a halt is cleared there with: embodied estop --clear"
            found.append(warning(label, f"{row.health}: {row.reason}", f"on the host: {fix}"))
        else:
            fix = "see to cable, power, driver.port and calibration"
            found.append(failure(label, f"{row.health}: {row.reason}", fix))
    return found


def _done(command: list[str], data: str | None = None) -> str:
    done = _run(command, data)
    if done.returncode:
        raise EmbodiedError(
            f"`{' '.join(command)}` failed with status {done.returncode}: "
            f"{done.stderr.strip()[-300:] or 'it says nothing'}"
        )
    return done.stdout


def _run(command: list[str], data: str | None = None) -> subprocess.CompletedProcess[str]:
    """With the way to the user's systemd, which a session of ssh need not have."""
    environment = os.environ | {
        "XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    }
    try:
        return subprocess.run(
            command,
            input=data,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise MissingDependencyError(
            f"there is no `{command[0]}` on this host. Units need systemd (and system units sudo); "
            f"without it, run `{Path(sys.argv[0]).name} agent` and `… site` under what starts "
            "services here"
        ) from None
    except subprocess.TimeoutExpired:
        raise EmbodiedError(f"`{' '.join(command)}` did not end in {_COMMAND_S:.0f} s") from None

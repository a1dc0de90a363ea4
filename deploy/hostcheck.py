"""Whether a host can become a robot's host: asked over ssh before anything is put there."""

import re
import shlex
import time
from dataclasses import dataclass

from deploy.findings import Finding, failure, ok, warning
from deploy.remote import Remote
from embodied.core.errors import EmbodiedError

_PROBE_S = 60.0
_MACHINES = ("x86_64", "aarch64", "arm64")
_PYTHONS = ("python3.12", "python3.11", "python3")
_NEEDED_GIB, _NEEDED_TORCH_GIB = 1.0, 10.0
_SKEW_S, _WRONG_S = 2.0, 60.0

_PROBE = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
say system "$(uname -s)"
say machine "$(uname -m)"
say home "$HOME"
say user "$(id -un)"
say uid "$(id -u)"
say groups "$(id -Gn)"
say free_kib "$(df -Pk "$HOME" | awk 'NR==2 {print $4}')"
for name in PYTHONS; do
    python=$(command -v "$name") || continue
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    case "$version" in
        3.11|3.12) ;;
        *) say other "$name $version"; continue ;;
    esac
    say python "$python"
    say version "$version"
    "$python" -c 'import ensurepip, venv' 2>/dev/null && say venv yes
    break
done
say systemd "$(systemctl --version 2>/dev/null | head -n 1)"
[ -n "$XDG_RUNTIME_DIR" ] || export XDG_RUNTIME_DIR="/run/user/$(id -u)"
MANAGER >/dev/null 2>&1 && say manager yes
for port in /dev/ttyACM* /dev/ttyUSB*; do
    [ -e "$port" ] && [ ! -w "$port" ] && say denied "$port"
done
[ -d "$HOME/.local/share/embodied/identity" ] && say identity yes
say time "$(date +%s)"
"""


@dataclass(frozen=True)
class Needs:
    """What is to be deployed. python: a program on the host, None for any. serial: whether a robot
    is driven through a serial port. torch: whether policies act there. system: system units."""

    python: str | None
    serial: bool
    torch: bool
    system: bool


@dataclass(frozen=True)
class Facts:
    """What a host says of itself. skew_s: its clock less ours; uncertain_s: by so much at most."""

    said: dict[str, str]
    skew_s: float
    uncertain_s: float

    def __getitem__(self, key: str) -> str:
        return self.said.get(key, "")

    @property
    def home(self) -> str:
        """The user's home directory there."""
        if not re.fullmatch(r"/[^\x00-\x1f]+", self["home"]):
            raise EmbodiedError("the host's user has no home directory, in which to deploy")
        return self["home"].rstrip("/")


def probe(remote: Remote, needs: Needs) -> Facts:
    """Ask the host. LinkError if it cannot be reached."""
    pythons = [needs.python] if needs.python else _PYTHONS
    manager = "sudo -n true" if needs.system else "systemctl --user show-environment"
    script = _PROBE.replace("PYTHONS", " ".join(map(shlex.quote, pythons)))
    before_s = time.time()
    result = remote.run(script.replace("MANAGER", manager), _PROBE_S)
    after_s = time.time()
    pairs = (line.partition("=") for line in result.out.splitlines())
    said = {key: value.strip() for key, mark, value in pairs if mark}
    theirs = said.get("time", "")
    if not theirs.isdecimal():
        raise EmbodiedError(
            f"{remote.target} does not answer as a Unix shell does: {result.err.strip()[-200:]}"
        )
    middle_s = float(theirs) + 0.5  # it tells whole seconds
    skew_s = middle_s - (before_s + after_s) / 2
    return Facts(said, skew_s, 0.5 + (after_s - before_s) / 2)


def check(facts: Facts, needs: Needs) -> list[Finding]:
    """What is as it should be and what is not, with the remedy."""
    return [
        _system(facts),
        _python(facts, needs),
        _disk(facts, needs),
        _serial(facts, needs),
        _clock(facts),
        _systemd(facts, needs),
    ]


def _system(facts: Facts) -> Finding:
    text = f"{facts['system']} on {facts['machine']}"
    if facts["system"] == "Linux" and facts["machine"] in _MACHINES:
        return ok("system", text)
    return failure("system", text, "Linux on x86-64 or 64-bit ARM is needed")


def _python(facts: Facts, needs: Needs) -> Finding:
    if not facts["python"]:
        there = f"; {facts['other']} is there" if facts["other"] else ""
        wanted = needs.python or "Python 3.11 or 3.12"
        return failure(
            "Python",
            f"{wanted} is not found{there}",
            "install Python 3.11 or 3.12 (apt-get install python3 python3-venv), or name one "
            "with --python PATH",
        )
    if facts["venv"] != "yes":
        return failure(
            "Python",
            f"{facts['python']} cannot make virtual environments",
            f"sudo apt-get install -y python{facts['version']}-venv",
        )
    return ok("Python", f"{facts['version']}, {facts['python']}")


def _disk(facts: Facts, needs: Needs) -> Finding:
    needed_gib = _NEEDED_TORCH_GIB if needs.torch else _NEEDED_GIB
    if not facts["free_kib"].isdecimal():
        return warning(
            "disk", "free space cannot be told", f"see that there are {needed_gib:g} GiB"
        )
    free_gib = int(facts["free_kib"]) / 2**20
    text = f"{free_gib:.1f} GiB free in {facts['home']}"
    if free_gib < needed_gib:
        return failure("disk", text, f"free some: {needed_gib:g} GiB are needed to install")
    return ok("disk", text)


def _serial(facts: Facts, needs: Needs) -> Finding:
    if facts["uid"] == "0" or "dialout" in facts["groups"].split():
        return ok("serial ports", f"{facts['user']} may use them")
    text = f"{facts['user']} is not in the group dialout"
    fix = f"sudo usermod -aG dialout {facts['user']}, then log in anew (for lingering: reboot)"
    if needs.serial or facts["denied"]:
        refused = f" and may not open {facts['denied']}" if facts["denied"] else ""
        return (failure if needs.serial else warning)("serial ports", text + refused, fix)
    return ok("serial ports", f"{text}, and none is needed")


def _clock(facts: Facts) -> Finding:
    off_s = max(0.0, abs(facts.skew_s) - facts.uncertain_s)
    text = f"within {abs(facts.skew_s) + facts.uncertain_s:.1f} s of this host's"
    fix = "set it, and keep it: sudo timedatectl set-ntp true"
    if off_s > _WRONG_S:
        way = "ahead of" if facts.skew_s > 0 else "behind"
        return failure("clock", f"{off_s:.0f} s {way} this host's; certificates go by it", fix)
    if off_s > _SKEW_S:
        return warning("clock", f"off by {off_s:.0f} s against this host's", fix)
    return ok("clock", text)


def _systemd(facts: Facts, needs: Needs) -> Finding:
    if not facts["systemd"]:
        return failure(
            "systemd",
            "it does not run here",
            "install by hand (docs/deploy.md) and run `embodied agent` and `embodied site` under "
            "what starts services there",
        )
    if facts["manager"] == "yes":
        return ok("systemd", facts["systemd"])
    if needs.system:
        return failure(
            "systemd",
            f"sudo asks {facts['user']} for a password",
            "allow it without one for the time being, or leave --system out",
        )
    return failure(
        "systemd",
        f"{facts['user']} has no systemd of its own in this session",
        f"sudo loginctl enable-linger {facts['user']} (and apt-get install libpam-systemd "
        "dbus-user-session), or deploy with --system",
    )

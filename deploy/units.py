"""The systemd units of a robot's host: the agent, and the site where there is a gateway."""

import getpass
import importlib.resources
import re
import shlex
import string
from dataclasses import dataclass
from pathlib import Path

from deploy.agent import AgentConfig
from embodied.comms.identity.binding import check_dial
from embodied.core import config as core_config
from embodied.core.errors import ConfigError

AGENT, SITE = "embodied-agent.service", "embodied-site.service"
IDENTITY = "identity"
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f]*")
_OURS = ("gateway", "identity", "root")


@dataclass(frozen=True)
class Services:
    """What runs on a host. agent, site: overrides, as one line of a shell. gateway: HOST:PORT, None
    for an agent alone. system: units of the system, which run as this user, not the user's own."""

    agent: str
    site: str = ""
    gateway: str | None = None
    system: bool = False

    def robots(self) -> list[str]:
        """Names of the robots. Raises ConfigError for overrides that the agent refuses."""
        composed = core_config.compose("agent", words(self.agent, "--agent"))
        found = list(core_config.convert(composed, AgentConfig).robots)
        if not found:
            raise ConfigError(
                "--agent names no robot: give at least one, such as --agent "
                "'+robot@robots.left=so101 robots.left.driver.port=/dev/ttyACM0 "
                "robots.left.driver.calibration=/home/me/left.json'"
            )
        return found

    def check(self, has_identity: bool) -> None:
        """Raise ConfigError for what the two commands would refuse."""
        self.robots()
        site = words(self.site, "--site")
        if self.gateway is None:
            if site:
                raise ConfigError("--site needs --gateway HOST:PORT, the run to act for")
            return
        check_dial(self.gateway, has_identity)
        if "\n" in self.gateway or self.gateway.startswith("unix:"):
            raise ConfigError(f"--gateway {self.gateway!r} is not HOST:PORT")
        for word in site:
            if (key := word.split("=")[0]) in _OURS:
                raise ConfigError(f"--site {word}: {key} is set by the deployment; leave it out")
        core_config.compose("site", [f"gateway='{self.gateway}'", *site])


def render(services: Services, program: Path, root: Path) -> dict[str, str]:
    """The units' texts by file name. program: the `embodied` command. root: what the deployment
    owns on the host, as `embodied deploy` lays it out."""
    agent = [str(program), "agent", *words(services.agent, "--agent")]
    units = {AGENT: _fill(AGENT, agent, services, root)}
    if services.gateway is not None:
        site = [
            str(program),
            "site",
            f"gateway='{services.gateway}'",
            f"root={_value(root / 'runs')}",
        ]
        if (root / IDENTITY).is_dir():
            site.append(f"identity={_value(root / IDENTITY)}")
        site += words(services.site, "--site")
        units[SITE] = _fill(SITE, site, services, root)
    return units


def words(line: str, option: str) -> list[str]:
    """A line of overrides as arguments; ConfigError if its quotes do not close."""
    try:
        found = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{option} {line!r}: {error}") from error
    for word in found:
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"{option}: '{word}' is not key=value")
    return found


def quote(word: str, program: bool = False) -> str:
    """A word of a unit's command line, as systemd.service(5) has it: nothing in it is expanded.

    program: it is the first, in which systemd looks for no variables.
    """
    if not _PRINTABLE.fullmatch(word):
        raise ConfigError(f"{word!r} holds control characters, which no unit may")
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(special, escaped)
    if not program:
        word = word.replace("$", "$$")
    return f'"{word}"'


def _value(path: Path) -> str:
    """A path as the value of an override."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _fill(name: str, command: list[str], services: Services, root: Path) -> str:
    template = importlib.resources.files("deploy").joinpath("units", f"{name}.in").read_text()
    path = str(root)
    if not _PRINTABLE.fullmatch(path) or path != path.strip():
        raise ConfigError(f"{path!r} cannot be a folder of units: it holds control characters")
    return string.Template(template).substitute(
        command=" ".join([quote(command[0], program=True), *map(quote, command[1:])]),
        root=path.replace("%", "%%"),
        service=f"User={getpass.getuser()}\nProtectSystem=full" if services.system else "",
        network=" network-online.target\nWants=network-online.target" if services.system else "",
        target="multi-user.target" if services.system else "default.target",
    )

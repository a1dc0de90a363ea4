"""A host over the system's `ssh`: commands of its shell, files through `tar`.

Keys, known hosts and configuration are those of the user's own ssh. It asks nothing (BatchMode) and
trusts no host that the user's ssh does not trust.
"""

import contextlib
import io
import ipaddress
import re
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from embodied.core.errors import ConfigError, LinkError, MissingDependencyError

_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")
_OPTION = re.compile(r"[A-Za-z0-9]+=[^\n\0]+")
_CONNECT_S = 15
_SSH_FAILED = 255

Content = Path | bytes
"""A file or folder of this host, or what a file there is to contain."""


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str


class Remote:
    """A host that is reached by ssh."""

    def __init__(
        self, target: str, options: Sequence[str] = (), config: Path | None = None
    ) -> None:
        """target: [USER@]HOST. options: KEY=VALUE as in ssh_config. config: in place of
        ~/.ssh/config. Raises ConfigError for names that are none."""
        self.target = check_target(target)
        self._ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}"]
        self._ssh += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        if config is not None:
            if not config.is_file():
                raise ConfigError(f"--ssh-config {config} is not a file")
            self._ssh += ["-F", str(config)]
        for option in options:
            if not _OPTION.fullmatch(option):
                raise ConfigError(
                    f"--ssh-option '{option}' is not KEY=VALUE as in ssh_config, such as Port=2222 "
                    "or IdentityFile=/home/me/.ssh/robots"
                )
            self._ssh += ["-o", option]

    def command(self, script: str) -> list[str]:
        """The local command that runs a script in the host's `sh`."""
        return [*self._ssh, "--", self.target, f"sh -c {shlex.quote(script)}"]

    def run(self, script: str, timeout_s: float) -> Result:
        """Run a script in the host's `sh`, without input; LinkError if it cannot be run."""
        return self._finish(self._start(script, subprocess.DEVNULL), script, timeout_s)

    def put(self, folder: str, files: Mapping[str, Content], timeout_s: float) -> None:
        """Make a folder on the host, readable by its user only, with these files and folders, by
        name; permissions of files travel. LinkError if that fails."""
        place = shlex.quote(folder)
        script = f"umask 077 && rm -rf {place} && mkdir -p {place} && tar -xpf - -C {place}"
        process = self._start(script, subprocess.PIPE)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # the end tells why
            _pack(files, pipe)
        process.stdin = None
        result = self._finish(process, script, timeout_s)
        if result.status:
            raise LinkError(
                f"{self.target}: files cannot be written to {folder}: {_last(result.err)}"
            )

    def _start(self, script: str, stdin: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.command(script), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            raise MissingDependencyError(
                "there is no `ssh` on this host. Install it with: apt-get install -y openssh-client"
            ) from None

    def _finish(self, process: subprocess.Popen[bytes], script: str, timeout_s: float) -> Result:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LinkError(
                f"{self.target} did not finish in {timeout_s:.0f} s: {_last(script)}"
            ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said = err.decode(errors="replace")
        if process.returncode == _SSH_FAILED:
            raise LinkError(
                f"{self.target} cannot be reached by ssh: {_last(said)}. Deployment asks for no "
                f"passwords and accepts no new host keys: `ssh {self.target} true` must work by "
                "itself (ssh-copy-id installs a key; --ssh-option gives a port or key)"
            )
        return Result(process.returncode, out.decode(errors="replace"), said)


def check_target(text: str) -> str:
    """[USER@]HOST as ssh takes it, where HOST is a name or an address; ConfigError if it is not."""
    user, at, host = text.rpartition("@")
    if (at and not _USER.fullmatch(user)) or not (_NAME.fullmatch(host) or _is_ipv6(host)):
        raise ConfigError(
            f"'{text}' is not [USER@]HOST, where HOST is a name or an IP address; a port is given "
            "by --ssh-option Port=2222"
        )
    return text


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _pack(files: Mapping[str, Content], pipe: IO[bytes]) -> None:
    with tarfile.open(fileobj=pipe, mode="w|", dereference=True) as archive:
        for name, content in files.items():
            if isinstance(content, Path):
                archive.add(content, name, filter=_nobodys)
            else:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it says nothing"

"""A robot's host behind Debian's sshd on loopback: a home of its own, and a systemd that starts
the agent's unit and writes down what it is told."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SSHD = Path("/usr/sbin/sshd")

# Starts what a unit says, as systemd would: words, %% and $$ as in systemd.service(5).
_SYSTEMCTL = """#!{python}
import os, pathlib, shlex, signal, subprocess, sys, time
home = pathlib.Path(os.environ["HOME"])
words = [w for w in sys.argv[1:] if w not in ("--user", "--now")]
name = pathlib.Path(sys.argv[0]).name
with open(home / "calls", "a") as calls:
    calls.write(" ".join([name, *sys.argv[1:]]) + "\\n")
pid = home / "agent.pid"
def running():
    try:
        number = int(pid.read_text())
        state = pathlib.Path(f"/proc/{{number}}/stat").read_text().rpartition(")")[2].split()[0]
        return number if state != "Z" else None
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
if words[0] == "--version":
    print("systemd 252 (252.38)")
elif words[0] == "is-active":
    own = words[1] == "embodied-agent.service"
    print("active" if not own or running() else "inactive")
elif words[0] in ("start", "restart") and "embodied-agent.service" in words:
    if words[0] == "restart" and running():
        os.kill(running(), signal.SIGTERM)
        while running():
            time.sleep(0.05)
    unit = (home / ".config/systemd/user/embodied-agent.service").read_text()
    [line] = [l for l in unit.splitlines() if l.startswith("ExecStart=")]
    command = shlex.split(line.removeprefix("ExecStart="))
    command = [w.replace("%%", "%").replace("$$", "$") for w in command]
    if not running():
        to = dict(stdin=subprocess.DEVNULL, stdout=open(home / "agent.log", "ab"), stderr=-2)
        started = subprocess.Popen(command, **to, start_new_session=True)
        pid.write_text(str(started.pid))
"""


def fake_systemd(folder: Path) -> Path:
    """A folder for PATH with `systemctl` and `loginctl`; they write to $HOME/calls."""
    folder.mkdir()
    for name in ("systemctl", "loginctl"):
        (folder / name).write_text(_SYSTEMCTL.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def end_agent(home: Path) -> None:
    """End the agent that this systemd started."""
    pid = home / "agent.pid"
    if pid.exists() and _lives(number := int(pid.read_text())):
        os.kill(number, signal.SIGTERM)
        deadline_s = time.monotonic() + 30
        while _lives(number) and time.monotonic() < deadline_s:
            time.sleep(0.05)


def need_sshd() -> None:
    """Skip where there is no sshd; in CI that is a failure."""
    if not SSHD.exists() or shutil.which("ssh-keygen") is None:
        why = "needs Debian's openssh-server and openssh-client"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)


class SshHost:
    """A host that answers to `robot` by the ssh configuration in `config`."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home of a robot"
        self.home.mkdir()
        self.config = folder / "ssh_config"
        self._log = (folder / "sshd.log").open("w+b")
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, timeout=120)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(folder),
            "EMBODIED_STATE": str(folder / "state"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{fake_systemd(folder / 'bin')}:/usr/bin:/bin",
            "PYTHONPATH": str(_packages(folder / "packages")),
        }
        values = " ".join(f'"{key}={value}"' for key, value in environment.items())
        server = f"""
            Port {self.port}
            ListenAddress 127.0.0.1
            HostKey {folder}/host_key
            AuthorizedKeysFile {folder}/user_key.pub
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin yes
            SetEnv {values}
        """
        (folder / "sshd_config").write_text(server)
        kind, key = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        self.config.write_text(f"""
            Host robot
                HostName 127.0.0.1
                Port {self.port}
                IdentityFile {folder}/user_key
                IdentitiesOnly yes
                UserKnownHostsFile {folder}/known_hosts
        """)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")]
        self._server = subprocess.Popen(command, stderr=self._log)
        self._wait()

    @property
    def root(self) -> Path:
        """What a deployment owns there."""
        return self.home / ".local" / "share" / "embodied"

    def calls(self) -> list[str]:
        """What systemd was told."""
        return (self.home / "calls").read_text().splitlines()

    def ssh(self, *command: str) -> str:
        """The output of a command on the host."""
        done = subprocess.run(
            ["ssh", "-F", str(self.config), "robot", shlex.join(command)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    def close(self) -> None:
        """End the agent and the server."""
        end_agent(self.home)
        self._server.terminate()
        self._server.wait(timeout=120)
        self._log.close()

    def _wait(self) -> None:
        deadline_s = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                self._log.seek(0)
                gone = self._server.poll() is not None or time.monotonic() > deadline_s
                assert not gone, self._log.read().decode()
                time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _packages(folder: Path) -> Path:
    """This environment's packages but our own, as a host has them that needs no package index."""
    folder.mkdir()
    site = Path(pytest.__file__).parents[1]
    for entry in site.iterdir():
        if "embodied" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder

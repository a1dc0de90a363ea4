"""A learner's site, a robot's host, a virtual arm and the network between: all real processes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from embodied.comms.identity.authority import Authority
from embodied.comms.identity.peer import Peer
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.processes import alive
from embodied.core.rundir import RunDir
from embodied.run.site.status import HostStatus, read_status
from hal.pool.leases import DeviceStatus
from hal.pool.pool import Pool
from hal.safety.latch import latch_file, latch_reason
from sim.links import profile_named
from sim.network import Relay
from sim.so101.virtual import VirtualArm

HOST = "arm-1"
ROBOT = "left"
TASK = "task=so101/reach"
TRAINING = (
    TASK,
    "actors.count=0",
    "demonstrations.source=dataset",
    "policy.n_obs_steps=1",
    "policy.horizon=16",
    "policy.n_action_steps=8",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=32",
    "learner.steps=100000000",
    "learner.samples_per_insert=32",
    "learner.publish_every=100",
    "learner.governor.max_share=0.5",
    "learner.governor.min_interval_s=1",
    "learner.checkpoint_every=100",
    "learner.warmup_steps=10",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
    "evaluation.videos=0",
)
DATA = "demonstrations.dataset={name: recorded, path: %s}"
_STEP_S = 0.02
_BEGIN_S = 120.0
_STOP_S = 60.0
_PRIORITY = 20

T = TypeVar("T")


class StuckError(EmbodiedError):
    """Something did not come back by itself in time."""


class Lab:
    """Everything that can be killed. `with` starts it, and ends what it started.

    folder: for runs, state and logs; made anew. seed: of the arm and the network.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; choose another folder")
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.learner = RunDir(self.folder / "run")
        self._seed = seed
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            # Sockets need short paths.
            self._temporary = tempfile.mkdtemp(prefix="kills-")
            stack.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            stack.callback(self._end)
            self.arm = stack.enter_context(VirtualArm(self.folder, seed=self._seed))
            _hurry(self.arm.pid)
            self.arm.write_calibration(self.folder / "arm.json")
            hub, edge = self._identities()
            demonstrations = self._demonstrations()
            port = _free_port()
            target, profile = ("127.0.0.1", port), profile_named("lan")
            self.relay = stack.enter_context(Relay(target, profile, self._seed))
            listen = [f"gateway.listen=127.0.0.1:{port}", f"gateway.identity={hub}"]
            where = f"run.dir={self.learner.path}"
            self._commands = {
                "agent": ["agent", "gpus=false", *self._robot()],
                "train": ["train", *TRAINING, DATA % demonstrations, *listen, where],
                "site": [
                    "site",
                    f"gateway=127.0.0.1:{self.relay.address[1]}",
                    f"identity={edge}",
                    f"root={self.folder / 'root'}",
                    "actors.devices=arm",
                ],
            }
            for name in self._commands:
                self.start(name)
            self._commands["train"].append("run.resume=true")  # from the second time on
            root = self.folder / "root"
            joined = lambda: list(root.glob("*/config.json"))  # noqa: E731
            [found] = self.until(joined, _BEGIN_S, lambda: "the host has not joined the run")
            self.host = RunDir(found.parent)
            self.pool = stack.enter_context(Pool(self.folder / "state-site" / "pool.sqlite"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        """Start "train", "site" or "agent" by the command that is always used for it."""
        self._processes[name] = self._spawn(name, self._commands[name])

    def kill(self, name: str) -> None:
        """SIGKILL of a process that `start` started; of that one alone."""
        self._processes[name].kill()
        self._processes[name].wait()

    def stop(self, name: str) -> None:
        """Ask it to end, and wait."""
        self._processes[name].terminate()
        try:
            self._processes.pop(name).wait(_STOP_S)
        except subprocess.TimeoutExpired as error:
            raise StuckError(f"{name} does not end: {self.said(name)}") from error

    def role_pid(self, run: RunDir, role: str) -> int:
        """The process of a role, once it lives."""
        return self.until(lambda: self._role(run, role), _BEGIN_S, lambda: f"{role} is not there")

    def robot_pid(self, module: str) -> int:
        """The process of the robot that runs a module of hal.process, once it lives."""
        agent = self._processes["agent"].pid
        return self.until(
            lambda: self._below(agent, module), _BEGIN_S, lambda: f"{module} is not there"
        )

    def device(self) -> DeviceStatus | None:
        """The robot as the host's pool has it."""
        return next((row for row in self.pool.devices() if row.id == ROBOT), None)

    def link(self) -> tuple[HostStatus | None, HostStatus | None]:
        """The link as the host and the gateway told last; None for who has told nothing of it."""
        found: list[HostStatus | None] = []
        for run in (self.host, self.learner):
            try:
                told = read_status(run.path).hosts
            except EmbodiedError:
                told = ()
            found.append(next((host for host in told if host.name == HOST), None))
        return found[0], found[1]

    def clear_halt(self) -> str:
        """Clear a latched halt of the robot, as a person would; its reason, "" if there is none.

        A servo that is overloaded stays so until its power has been off.
        """
        file = latch_file(self.folder / "state-site" / "latches", ROBOT)
        if reason := latch_reason(file):
            if "overload" in reason:
                self.arm.power_off()
                self.arm.power_on()
            file.unlink(missing_ok=True)
        return reason

    def until(
        self, condition: Callable[[], T | None], timeout_s: float, what: Callable[[], str]
    ) -> T:
        """What the condition returns once it is true. Raises StuckError, which says what is not."""
        until_s = time.monotonic() + timeout_s
        while not (found := condition()):
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise StuckError(f"{name} ended by itself: {self.said(name)}")
            if time.monotonic() > until_s:
                said = "\n".join(f"{name}: {self.said(name)}" for name in self._processes)
                raise StuckError(f"in {timeout_s:g} s {what()}\n{said}")
            time.sleep(_STEP_S)
        return found

    def said(self, name: str) -> str:
        """The end of a process's output."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]

    def _spawn(self, name: str, arguments: list[str]) -> "subprocess.Popen[bytes]":
        """Robots have a state directory of their own, as they would on another host."""
        state = self.folder / ("state-site" if name in ("site", "agent") else "state-train")
        state.mkdir(exist_ok=True)
        environment = {**os.environ, "EMBODIED_STATE": str(state), "TMPDIR": self._temporary}
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "embodied.cli.main", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _identities(self) -> tuple[Path, Path]:
        folder = self.folder / "pki"
        authority = Authority.create(folder / "authority", "chaos")
        authority.issue(Peer("gateway", "hub"), folder / "hub", ip=("127.0.0.1",))
        authority.issue(Peer("robot", HOST, ("run",)), folder / HOST)
        return folder / "hub", folder / HOST

    def _demonstrations(self) -> Path:
        """Episodes of the task's scripted expert, to begin to learn from."""
        made = self.folder / "demonstrations"
        arguments = ["collect", TASK, "demonstrations.episodes=8", f"output={made}"]
        self._spawn("collect", arguments).wait()
        if not made.is_dir():
            raise StuckError(f"there are no demonstrations: {self.said('collect')}")
        return made

    def _robot(self) -> list[str]:
        """Missed deadlines do not halt it: a busy machine has them, and has no servos."""
        return [
            f"+robot@robots.{ROBOT}=so101",
            f"robots.{ROBOT}.driver.port={self.arm.port}",
            f"robots.{ROBOT}.driver.calibration={self.folder / 'arm.json'}",
            f"+robots.{ROBOT}.driver.answer_ms=20",
            f"+robots.{ROBOT}.safety.overruns=0",
        ]

    @staticmethod
    def _role(run: RunDir, role: str) -> int | None:
        started = [e for e in run.events() if e["event"] == "role started" and e["role"] == role]
        pid = int(started[-1]["pid"]) if started else 0
        return pid if pid and alive(pid) else None

    @staticmethod
    def _below(pid: int, module: str) -> int | None:
        """The one process below another that runs a module."""
        todo = [pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    todo += map(int, (thread / "children").read_text().split())
                if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    return pid
        return None

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _hurry(pid: int) -> None:
    """Give a process real-time priority where that is allowed: servos have processors of their
    own, and a late answer of theirs would be a robot's missed deadline."""
    with contextlib.suppress(PermissionError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(_PRIORITY))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

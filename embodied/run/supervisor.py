"""Processes of a run on one host, under a supervisor that starts them again when they die."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from embodied.comms.channels import PullChannel
from embodied.core.errors import EmbodiedError, StorageFullError
from embodied.core.files import full_disk_named
from embodied.core.rundir import RunDir
from embodied.run.context import FAILED, STOPPED, kind_of
from embodied.run.telemetry import Beat, address
from hal.teleop.keyboard import mode_kept

_RESTARTS = 5
_RESTART_WINDOW_S = 120.0
_SILENCE_S = 120.0
_WATCH_S = 0.1
_STOP_S = 15.0


class RoleFailedError(EmbodiedError):
    """A role ended with an error that a restart cannot mend, or kept ending."""


@dataclass
class Role:
    """A child process and what it last told. asked: it was told to end."""

    name: str
    process: subprocess.Popen[bytes]
    beat_s: float
    values: dict[str, Any] = field(default_factory=dict)
    restarts: deque[float] = field(default_factory=deque)
    finished: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Crew:
    """The roles that a run has on this host.

    roles: in the order in which they start; they end in the opposite order, so that the last
    steps of actors still reach the buffer. last: the run is over here once these have finished.
    threads: of the CPU, for each role. environment: added to a role's, by name. terminal: the role
    that reads this process's standard input, in its process group; "" for none.
    """

    roles: tuple[str, ...]
    last: tuple[str, ...]
    threads: Callable[[str], int]
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    terminal: str = ""


class Supervisor:
    """Starts a crew, restarts roles that die, ends all when the last ones are done.

    notify(values) is called several times a second with {role: its latest numbers}. A role that
    tells that the run is "over" has the actors ended before the rest. One that tells that a person
    "stopped" it ends the run. sockets: the folder of the roles' channels.
    """

    def __init__(
        self,
        run: RunDir,
        crew: Crew,
        notify: Callable[[dict[str, dict[str, Any]]], None],
        keep_going: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run = run
        self._crew = crew
        self._notify = notify
        self._keep_going = keep_going
        # A Unix socket's path may have 107 bytes; a run directory's can be longer.
        self.sockets = tempfile.mkdtemp(prefix="embodied-")
        self._roles: dict[str, Role] = {}
        self._telemetry: PullChannel | None = None

    def run(self) -> None:
        """Run until the crew's last roles have finished, or it shall not go on."""
        with mode_kept() if self._crew.terminal else contextlib.nullcontext():
            try:
                self._telemetry = PullChannel(address(self.sockets, "telemetry"), (Beat,))
                for name in self._crew.roles:
                    self._roles[name] = Role(name, self._start(name), time.monotonic())
                while self._keep_going() and not self._done and not self.stopped:
                    self._watch()
            finally:
                self._end()

    @property
    def stopped(self) -> bool:
        """Whether a person at a robot stopped the run."""
        return any(role.values.get("stopped") for role in self._roles.values())

    @property
    def _done(self) -> bool:
        return all(self._roles[name].finished for name in self._crew.last)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        threads = str(self._crew.threads(name))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= self._crew.environment.get(name, {})
        command = [sys.executable, "-m", "embodied.run.roles", name]
        command += [str(self._run.path), self.sockets, str(os.getpid())]
        path = self._run.path / "logs" / f"{name}.log"
        at_terminal = name == self._crew.terminal
        with full_disk_named(path), open(path, "ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=None if at_terminal else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=not at_terminal,  # else its keys are none of the terminal's
            )
        self._run.event("role started", role=name, pid=process.pid)
        return process

    def _watch(self) -> None:
        assert self._telemetry is not None
        time.sleep(_WATCH_S)
        for beat, _ in self._telemetry.receive_ready():
            role = self._roles.get(beat.role)
            if role is not None and role.process.pid == beat.pid:
                role.beat_s = time.monotonic()
                role.values.update(beat.values)
        if any(role.values.get("over") for role in self._roles.values()):
            for role in self._roles.values():
                if kind_of(role.name) == "actor" and not role.asked:
                    role.asked = True
                    role.process.terminate()
        for role in self._roles.values():
            if not role.finished:
                self._check(role)
        self._notify({name: role.values for name, role in self._roles.items()})

    def _check(self, role: Role) -> None:
        status = role.process.poll()
        if status is None:
            if time.monotonic() - role.beat_s > _SILENCE_S:
                self._run.event("role silent", role=role.name, seconds=_SILENCE_S)
                role.process.kill()
            return
        if status == 0 or (role.asked and status == STOPPED):
            role.finished = True
            self._run.event("role finished", role=role.name)
            return
        self._run.event("role ended", role=role.name, status=status)
        if status == FAILED:
            raise RoleFailedError(f"{role.name} failed: {self._last_words(role.name)}")
        now_s = time.monotonic()
        role.restarts.append(now_s)
        while role.restarts[0] < now_s - _RESTART_WINDOW_S:
            role.restarts.popleft()
        if len(role.restarts) > _RESTARTS:
            raise RoleFailedError(
                f"{role.name} ended {len(role.restarts)} times within {_RESTART_WINDOW_S:.0f} s; "
                f"the last time with: {self._last_words(role.name)}"
            )
        role.process, role.asked = self._start(role.name), False
        role.beat_s = now_s

    def _last_words(self, name: str) -> str:
        log = self._run.path / "logs" / f"{name}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} (log: {log})"

    def _end(self) -> None:
        """End all roles, those of one kind together."""
        names = [name for name in reversed(self._crew.roles) if name in self._roles]
        for _, kind in groupby(names, kind_of):
            self._end_together([self._roles[name] for name in kind])
        if self._telemetry is not None:
            self._telemetry.close()
        shutil.rmtree(Path(self.sockets), ignore_errors=True)

    def _end_together(self, roles: list[Role]) -> None:
        for role in roles:
            if role.process.poll() is None:
                role.process.terminate()
        deadline_s = time.monotonic() + _STOP_S
        for role in roles:
            try:
                role.process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                role.process.kill()
                role.process.wait()
                with contextlib.suppress(StorageFullError):
                    self._run.event("role killed", role=role.name)

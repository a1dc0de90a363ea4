"""The asynchronous engine on one machine: role processes under a supervisor."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embodied.comms.channels import PullChannel
from embodied.core.errors import EmbodiedError, LeaseError, StorageFullError
from embodied.core.files import full_disk_named
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.config import TrainConfig
from embodied.run.robots import printable
from embodied.run.roles import FAILED
from embodied.run.telemetry import Beat, address
from hal.gpus import LeasedGpu

_RESTARTS = 5
_RESTART_WINDOW_S = 120.0
_SILENCE_S = 120.0
_WATCH_S = 0.1
_STOP_S = 15.0


class RoleFailedError(EmbodiedError):
    """A role ended with an error that a restart cannot mend, or kept ending."""


@dataclass
class Role:
    """A child process and what it last told."""

    name: str
    process: subprocess.Popen[bytes]
    beat_s: float
    values: dict[str, Any] = field(default_factory=dict)
    restarts: deque[float] = field(default_factory=deque)
    finished: bool = False


def learner_gpu(run: RunDir, config: TrainConfig) -> LeasedGpu | None:
    """The GPU that the run's learner needs, leased; None for one that computes on the CPU."""
    learner = config.learner
    if learner.device != "cuda":
        return None
    holder = printable(f"{run.path.name}/learner")
    gpu = LeasedGpu(holder, learner.gpu, learner.gpu_wait_s).open()
    run.event("gpu leased", gpu=gpu.id)
    return gpu


class Supervisor:
    """Starts the roles, restarts those that die, ends them when learner and evaluator are done.

    notify(values) is called several times a second with {role: its latest numbers}.
    """

    def __init__(
        self, run: RunDir, config: TrainConfig, notify: Callable[[dict[str, dict[str, Any]]], None]
    ) -> None:
        self._run = run
        self._config = config
        self._notify = notify
        # A Unix socket's path may have 107 bytes; a run directory's can be longer.
        self._sockets = tempfile.mkdtemp(prefix="embodied-")
        self._roles: dict[str, Role] = {}
        self._telemetry: PullChannel | None = None
        self._gpu: LeasedGpu | None = None

    def run(self) -> None:
        """Run to the end of the learner's budget and the last evaluation."""
        try:
            self._gpu = learner_gpu(self._run, self._config)
            with build.make_local_buffer(self._run, self._config) as sink:
                build.import_demonstrations(sink, self._config.demonstrations, self._config.task)
            self._telemetry = PullChannel(address(self._sockets, "telemetry"), (Beat,))
            names = ["buffer", "learner", "evaluator"]
            names += [f"actor{i}" for i in range(self._actors())]
            for name in names:
                self._roles[name] = Role(name, self._start(name), time.monotonic())
            while not (self._roles["learner"].finished and self._roles["evaluator"].finished):
                self._watch()
        finally:
            self._end()

    def _actors(self) -> int:
        """No actors for a run that neither demonstrates nor collects."""
        needed = build.make_algorithm(self._config).collects or self._wants_expert()
        return self._config.actors.count if needed else 0

    def _wants_expert(self) -> bool:
        return self._config.demonstrations.source == "expert"

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        threads = str(self._config.learner.threads if name == "learner" else 1)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if name == "learner" and self._gpu is not None:
            environment |= self._gpu.environment
        command = [sys.executable, "-m", "embodied.run.roles", name]
        command += [str(self._run.path), self._sockets, str(os.getpid())]
        path = self._run.path / "logs" / f"{name}.log"
        with full_disk_named(path), open(path, "ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
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
        for role in self._roles.values():
            if not role.finished:
                self._check(role)
        if self._gpu is not None and (lost := self._gpu.lost):
            raise LeaseError(
                f"the learner's {self._gpu.id} is lost: {lost}. Continue with run.resume=true"
            )
        self._notify({name: role.values for name, role in self._roles.items()})

    def _check(self, role: Role) -> None:
        status = role.process.poll()
        if status is None:
            if time.monotonic() - role.beat_s > _SILENCE_S:
                self._run.event("role silent", role=role.name, seconds=_SILENCE_S)
                role.process.kill()
            return
        if status == 0:
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
        role.process = self._start(role.name)
        role.beat_s = now_s

    def _last_words(self, name: str) -> str:
        log = self._run.path / "logs" / f"{name}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} (log: {log})"

    def _end(self) -> None:
        """End all roles: actors first, so that their last steps still reach the buffer."""
        for prefix in ("actor", "evaluator", "learner", "buffer"):
            ending = [r for r in self._roles.values() if r.name.startswith(prefix)]
            for role in ending:
                if role.process.poll() is None:
                    role.process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + _STOP_S
            for role in ending:
                try:
                    role.process.wait(max(0.1, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    role.process.kill()
                    role.process.wait()
                    with contextlib.suppress(StorageFullError):
                        self._run.event("role killed", role=role.name)
        if self._telemetry is not None:
            self._telemetry.close()
        if self._gpu is not None:
            self._gpu.close()
        shutil.rmtree(Path(self._sockets), ignore_errors=True)

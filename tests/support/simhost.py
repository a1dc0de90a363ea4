"""A host with one simulated robot: an agent as a process of its own, and its pool."""

import os
import subprocess
import sys
import time
from pathlib import Path

from hal.pool.pool import Pool

EMBODIED = [sys.executable, "-m", "embodied.cli.main"]


class SimulatedHost:
    """Runs `embodied agent` with one robot, "sim". folder: for its state."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.env = {**os.environ, "EMBODIED_STATE": str(folder)}
        self._log = (folder / "agent.log").open("w+")
        robot = ["+robot@robots.sim=simulated", "gpus=false", *overrides]
        self.agent = subprocess.Popen(
            [*EMBODIED, "agent", *robot], env=self.env, stdout=self._log, stderr=self._log
        )
        self.pool = Pool(folder / "pool.sqlite")
        self.wait("ready")

    @property
    def robot(self):
        """The robot's row in the pool, None while it is not there."""
        return next((row for row in self.pool.devices() if row.id == "sim"), None)

    def wait(self, *healths: str, timeout_s: float = 60.0) -> None:
        """Return when nobody holds the robot and it is in one of these states."""
        until_s = time.monotonic() + timeout_s
        while (row := self.robot) is None or row.holder or row.health not in (*healths, "degraded"):
            if time.monotonic() > until_s or self.agent.poll() is not None:
                self._log.seek(0)
                raise AssertionError(f"{row}; agent: {self._log.read()[-2000:]}")
            time.sleep(0.02)

    def start(self, *arguments: str) -> subprocess.Popen:
        """A command without a terminal."""
        return subprocess.Popen(
            [*EMBODIED, *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        """What a command without a terminal says; it must succeed."""
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return said

    def servo_pid(self) -> int:
        """The process that drives the robot now: child of the watchdog, child of the agent."""
        return _only_child(_only_child(self.agent.pid))

    def close(self) -> None:
        self.agent.terminate()
        try:
            self.agent.wait(20)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            self.agent.wait()
        self.pool.close()
        self._log.close()


def _only_child(pid: int) -> int:
    children = [
        child
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    assert len(children) == 1, children
    return int(children[0])

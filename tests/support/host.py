"""A robot host for tests: a virtual SO-101, its agent, and a process that moves it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hardware import punctual

from hal.pool.pool import Pool
from hal.pool.state import pool_path
from sim.so101.virtual import VirtualArm

MOVER = """
import sys, time
import numpy as np
from hal.commander import Commander
from hal.pool.holding import Holding
from hal.pool.pool import Pool
from hal.remote import RemoteDevice
from hal.pool.state import pool_path

ahead = int(sys.argv[2])
with Holding(Pool(pool_path()), "mover", sys.argv[1], timeout_s=30) as held:
    with RemoteDevice(held.devices[0].address, held.devices[0].token) as device:
        commander = Commander(device)
        centre = np.array([0.0, -1.0, 0.8, 0.2, 0.0, 0.4])
        commander.move_to(centre)
        start = device.tick
        sys.stdout.write("moving\\n"); sys.stdout.flush()
        while True:
            tick = device.tick
            t = (np.arange(tick + 1, tick + 1 + ahead) - start)[:, None] / 50.0
            path = centre + np.array([0.6, 0.3, 0.3, 0.3, 0.6, 0.2]) * np.sin(2 * np.pi * 0.4 * t)
            commander.send(path.astype(np.float32), obs_tick=tick, start_tick=tick + 1)
            device.advance(tick + 2)
"""


class Host:
    """Processes of one robot host; `close` ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self.pool = Pool(pool_path())
        self.log = (folder / "host.log").open("ab")
        self.agent_process: subprocess.Popen | None = None
        self.arm: VirtualArm | None = None

    def virtual_arm(self, **options) -> VirtualArm:
        self.arm = VirtualArm(self.folder, **options)
        punctual(self.arm.__enter__())
        self.arm.write_calibration(self.folder / "arm.json")
        return self.arm

    def agent(self, *overrides: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).parent / "embodied"), "agent", "gpus=false", *overrides]
        self.agent_process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.processes.append(self.agent_process)
        return self.agent_process

    def arm_agent(self, name: str = "left", *overrides: str) -> subprocess.Popen:
        """Missed deadlines halt no robot here: a busy machine has them, and they have tests of
        their own on a fake clock."""
        assert self.arm is not None
        return self.agent(
            f"+robot@robots.{name}=so101",
            f"robots.{name}.driver.port={self.arm.port}",
            f"robots.{name}.driver.calibration={self.folder / 'arm.json'}",
            f"+robots.{name}.driver.answer_ms=20",
            f"+robots.{name}.safety.overruns=0",
            *overrides,
        )

    def mover(self, selector: str = "so101", ahead: int = 10) -> subprocess.Popen:
        command = [sys.executable, "-c", MOVER, selector, str(ahead)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "moving", self.text()
        return process

    def health(self, name: str = "left") -> tuple[str, str]:
        found = {row.id: row for row in self.pool.devices()}
        row = found.get(name)
        return ("", "") if row is None else (row.health, row.reason)

    def wait(self, *healths: str, name: str = "left", timeout_s: float = 20.0) -> str:
        deadline_s = time.monotonic() + timeout_s
        while (now := self.health(name))[0] not in healths:
            assert time.monotonic() < deadline_s, (now, self.text())
            time.sleep(0.02)
        return now[1]

    def children(self, process: subprocess.Popen, module: str) -> list[int]:
        """Pids below a process that run a module."""
        found, todo = [], [process.pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    found.append(pid)
        return found

    def servo_pid(self) -> int:
        assert self.agent_process is not None
        [pid] = self.children(self.agent_process, "hal.process.servo")
        return pid

    def watchdog_pid(self) -> int:
        assert self.agent_process is not None
        [pid] = self.children(self.agent_process, "hal.process.watchdog")
        return pid

    def standstill_s(self, timeout_s: float = 8.0, still_rad_s: float = 0.02) -> float:
        """Time until the true joints have begun to rest for 0.3 s; fails after timeout_s."""
        assert self.arm is not None
        begun_s = time.monotonic()
        rested_s = None
        while (now_s := time.monotonic()) - begun_s < timeout_s:
            moving = np.abs(self.arm.state().dq_rad_s).max() > still_rad_s
            rested_s = None if moving else rested_s or now_s
            if rested_s is not None and now_s - rested_s > 0.3:
                return rested_s - begun_s
            time.sleep(0.005)
        raise AssertionError(f"the arm still moves after {timeout_s} s: {self.text()}")

    def text(self) -> str:
        """The logs, for messages."""
        self.log.flush()
        parts = [(self.folder / "host.log").read_text()[-2000:]]
        for line in parts[0].splitlines():
            if "logs in " in line:
                logs = Path(line.rsplit("logs in ", 1)[1])
                parts += [file.read_text()[-1500:] for file in logs.glob("*.log")]
        return json.dumps(parts, indent=1)

    def close(self) -> None:
        for process in reversed(self.processes):
            for number in (signal.SIGCONT, signal.SIGTERM):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        for process in reversed(self.processes):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.arm is not None:
            self.arm.close()
        self.pool.close()
        self.log.close()

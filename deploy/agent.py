"""The robot host's agent: runs its robots' processes and offers them in the host's pool.

One watchdog and one servo process for each robot; the agent tells the servo process who holds the
lease by the pool, ten times a second, and tells the pool how the robot is. If the agent falls
silent the robots finish what is committed, decelerate and hold.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from embodied.comms.channels import RequestClient
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.files import write_atomic
from hal.discovery import gpu_records
from hal.pool.leases import DeviceRecord, DeviceStatus
from hal.pool.pool import Pool
from hal.pool.state import pool_path, state_dir
from hal.process import messages as m
from hal.robot import RobotConfig, ServoConfig, check_robot, socket_name

_SUPERVISE_S = 0.1
_REPORT_S = 0.5
_GPUS_S = 5.0
_ANSWER_S = 1.0
_STOP_S = 15.0
_RESTART_S = 1.0


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """host: name under which the devices are listed, None for this machine's. robots: by id."""

    robots: dict[str, RobotConfig]
    host: str | None = None
    gpus: bool = True


class Robot:
    """The agent's side of one robot: its processes and what they last said."""

    def __init__(self, config: ServoConfig, folder: Path) -> None:
        self.config = config
        self._file = folder / f"{socket_name(config.id)}.json"
        write_atomic(self._file, msgspec.json.encode(config))
        self._log = folder / f"{socket_name(config.id)}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._client = RequestClient(config.control_address, m.CONTROL_REPLIES)
        self._asked: int | None = None
        self._asked_s = 0.0
        self._heard_s = time.monotonic()
        self.status: m.Status | None = None

    def start(self) -> None:
        """Start the watchdog, which starts the servo process; again if it has died."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started_s < _RESTART_S:
            return
        self._started_s = time.monotonic()
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "hal.process.watchdog", str(self._file)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def supervise(self, token: int, holder: str) -> None:
        """Send the heartbeat with the lease that stands; take the answer to the last one."""
        for reply in self._client.receive_ready():
            if isinstance(reply.header, m.Status):
                self.status = reply.header
                self._heard_s = time.monotonic()
            if reply.id == self._asked:
                self._asked = None
        if self._asked is not None:
            if time.monotonic() - self._asked_s < _ANSWER_S:
                return
            self._client.forget(self._asked)
        self._asked = self._client.send(m.Supervise(token, holder), {})
        self._asked_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Time since the servo process answered."""
        return time.monotonic() - self._heard_s

    def record(self) -> DeviceRecord:
        """What the pool offers."""
        robot = self.config.robot
        return DeviceRecord(
            id=self.config.id,
            kind=robot.kind,
            classes=robot.classes,
            host=self.config.host,
            capabilities=robot.offers,
            labels=robot.labels,
            address=self.config.data_address,
            owner_pid=os.getpid(),
        )

    def report(self, pool: Pool) -> None:
        """Tell the pool how the robot is."""
        status = self.status
        if status is None or self.silent_s > _ANSWER_S:
            health = "absent" if status is None else "lost"
            pool.update(
                self.config.id,
                health=health,
                reason=f"its servo process is silent for {self.silent_s:.0f} s; see {self._log}",
            )
            return
        late = status.counts.get("overruns", 0)
        pool.update(
            self.config.id,
            health="ready" if status.health == "leased" else status.health,
            reason="" if status.health == "leased" else status.reason,
            rate_hz=status.rate_hz,
            tick_hz=status.tick_hz,
            load=status.load,
            temperature_c=status.temperature_c,
            detail=f"{late} deadlines missed" if late else "",
        )

    def stop(self) -> None:
        """Ask for a gentle stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline_s: float) -> None:
        """Wait for the processes' end; kill what does not end in time."""
        self._client.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Agent:
    """Owns the robots of one host."""

    def __init__(self, config: AgentConfig) -> None:
        if not config.robots:
            raise ConfigError(
                "no robots: name at least one, such as +robot@robots.left=so101 "
                "robots.left.driver.port=/dev/ttyACM0"
            )
        for name, robot in config.robots.items():
            check_robot(robot, f"robots.{name}")
        self._config = config
        host = config.host or socket.gethostname()
        latches = state_dir() / "latches"
        latches.mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="embodied-agent-"))
        self.pool = Pool(pool_path())
        self.robots = {
            name: Robot(
                ServoConfig(
                    id=name,
                    host=host,
                    robot=robot,
                    sockets=str(self.folder),
                    latches=str(latches),
                ),
                self.folder,
            )
            for name, robot in config.robots.items()
        }
        self.host = host

    def run(self, keep_going: Callable[[], bool], on_round: Callable[[], None]) -> None:
        """Serve until asked to stop. on_round: called about ten times a second."""
        reported_s = gpus_s = -1e9
        try:
            for robot in self.robots.values():
                robot.start()
                self.pool.register(robot.record(), health="absent", reason="starting")
            while keep_going():
                started_s = time.monotonic()
                rows = {row.id: row for row in self.pool.devices()}
                for robot in self.robots.values():
                    robot.start()
                    robot.supervise(*_lease(rows.get(robot.config.id)))
                if started_s - reported_s >= _REPORT_S:
                    reported_s = started_s
                    for robot in self.robots.values():
                        robot.report(self.pool)
                if self._config.gpus and started_s - gpus_s >= _GPUS_S:
                    gpus_s = started_s
                    self._report_gpus()
                on_round()
                time.sleep(max(0.0, _SUPERVISE_S - (time.monotonic() - started_s)))
        finally:
            self._close()

    def _report_gpus(self) -> None:
        for record, gpu in gpu_records(self.host):
            self.pool.register(record)
            self.pool.update(
                record.id,
                health="ready",
                load=gpu.load,
                temperature_c=gpu.temperature_c,
                detail=gpu.detail,
            )

    def _close(self) -> None:
        for robot in self.robots.values():
            robot.stop()
        deadline_s = time.monotonic() + _STOP_S
        for robot in self.robots.values():
            robot.wait(deadline_s)
            with contextlib.suppress(EmbodiedError):
                self.pool.remove(robot.config.id)
        self.pool.close()


def _lease(row: DeviceStatus | None) -> tuple[int, str]:
    """Token and holder of the lease that stands; (0, "") if there is none."""
    return (0, "") if row is None or not row.holder else (row.token, row.holder)


def stop_signals() -> Callable[[], bool]:
    """Take SIGINT and SIGTERM; the returned function says whether neither has come."""
    stopped: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return lambda: not stopped

"""The robot host's agent: runs its robots' processes and offers them in the host's pool.

One watchdog and one servo process for each robot; the agent tells the servo process who holds the
lease by the pool, ten times a second, and tells the pool how the robot is. If the agent falls
silent the robots finish what is committed, decelerate and hold.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from embodied.comms.channels import RequestClient
from embodied.core.errors import ConfigError, EmbodiedError, StorageFullError
from embodied.core.files import write_atomic
from hal.gpus import offer_gpus
from hal.pool.leases import DeviceRecord, DeviceStatus
from hal.pool.pool import Pool, PoolBusyError
from hal.pool.state import pool_path, state_dir
from hal.process import messages as m
from hal.process.orphan import find_orphan
from hal.process.watchdog import Watchdog
from hal.robot import RobotConfig, ServoConfig, check_robot, socket_name
from hal.safety.latch import HOST_STOP

_SUPERVISE_S = 0.1
_REPORT_S = 0.5
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

    def __init__(self, config: ServoConfig, folder: Path, logs: Path) -> None:
        self.config = config
        self._file = folder / f"{socket_name(config.id)}.json"
        write_atomic(self._file, msgspec.json.encode(config))
        self._log = logs / f"{socket_name(config.id)}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._client = RequestClient(config.control_address, m.CONTROL_REPLIES)
        self._asked: int | None = None
        self._asked_s = 0.0
        self._heard_s = time.monotonic()
        self._asked_token = 0
        self._incarnation = 0
        self._told = self._barred = 0
        self._lease: tuple[int, str, float] = (0, "", 0.0)
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
            command.append(str(os.getpid()))
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def leased(self, row: DeviceStatus | None) -> None:
        """What the pool says of the lease: it stands until its time is up, heard of or not."""
        if row is None or not row.holder:
            self._lease = (0, "", 0.0)
        else:
            self._lease = (row.token, row.holder, time.monotonic() + row.lease_remaining_s)

    def bar(self) -> None:
        """The present lease is over: it was another agent's."""
        self._barred = max(self._barred, self._lease[0])

    def supervise(self) -> None:
        """Send the heartbeat with the lease that stands; take the answer to the last one.

        A lease that another servo process may have heard of is over: this one waits for a new one.
        """
        for reply in self._client.receive_ready():
            same = False
            if isinstance(reply.header, m.Status):
                self.status = reply.header
                self._heard_s = time.monotonic()
                same = reply.header.incarnation == self._incarnation
                if not same:
                    self._barred = max(self._barred, self._told)
                self._incarnation = reply.header.incarnation
            if reply.id == self._asked:
                self._asked = None
                if same:
                    self._told = max(self._told, self._asked_token)
        if self._asked is not None:
            if time.monotonic() - self._asked_s < _ANSWER_S:
                return
            self._client.forget(self._asked)
            self._told = max(self._told, self._asked_token)
        token, holder, until_s = self._lease
        if token <= self._barred or time.monotonic() > until_s:
            token, holder = 0, ""
        self._asked = self._client.send(m.Supervise(token, holder, self._incarnation), {})
        self._asked_s, self._asked_token = time.monotonic(), token

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
        hops = [f"{hop} {p50:.1f}/{p99:.1f} ms" for hop, (p50, p99) in status.hops_ms.items()]
        if late:
            hops.append(f"{late} deadlines missed")
        pool.update(
            self.config.id,
            health="ready" if status.health == "leased" else status.health,
            reason="" if status.health == "leased" else status.reason,
            rate_hz=status.rate_hz,
            tick_hz=status.tick_hz,
            load=status.load,
            temperature_c=status.temperature_c,
            detail=", ".join(hops),
        )

    def stop(self) -> None:
        """Ask for a gentle stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline_s: float) -> None:
        """Wait for the processes' end; kill what does not end in time.

        Where the watchdog has left a servo process behind, its work is done here.
        """
        self._client.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if find_orphan(Path(self.config.latches), self.config.id) is not None:
            Watchdog(self._file).inherit()


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
        names = {socket_name(name) for name in config.robots}
        if len(names) < len(config.robots) or HOST_STOP in config.robots:
            raise ConfigError(
                f"robots are named {', '.join(config.robots)}: names must differ in letters and "
                f"digits, and '{HOST_STOP}' is the host's emergency stop"
            )
        self._registered: list[str] = []
        self._closing = threading.Event()
        self.logs = state_dir() / "logs"
        self.logs.mkdir(exist_ok=True)
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
                self.logs,
            )
            for name, robot in config.robots.items()
        }
        self.host = host

    def run(self, keep_going: Callable[[], bool], on_round: Callable[[], None]) -> None:
        """Serve until asked to stop. on_round: called about twice a second.

        The heartbeat has a thread of its own: neither the pool's disk nor a slow nvidia-smi may
        end the leases.
        """
        heartbeat = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        gpus = threading.Thread(
            target=offer_gpus, args=(self.pool, self._closing), name="gpus", daemon=True
        )
        try:
            for robot in self.robots.values():
                self.pool.register(robot.record(), health="absent", reason="starting")
                self._registered.append(robot.config.id)
            self._exchange()
            for robot in self.robots.values():
                robot.bar()
                robot.start()
            heartbeat.start()
            if self._config.gpus:
                gpus.start()
            reported_s = 0.0
            while keep_going():
                started_s = time.monotonic()
                for robot in self.robots.values():
                    robot.start()
                with contextlib.suppress(PoolBusyError, StorageFullError):
                    self._exchange()
                    if started_s - reported_s >= _REPORT_S:
                        reported_s = started_s
                        for robot in self.robots.values():
                            robot.report(self.pool)
                on_round()
                time.sleep(max(0.0, _SUPERVISE_S - (time.monotonic() - started_s)))
        finally:
            self._closing.set()
            for thread in (heartbeat, gpus):
                if thread.ident is not None:
                    thread.join(timeout=2.0)
            self._close()

    def _exchange(self) -> None:
        rows = {row.id: row for row in self.pool.devices()}
        for robot in self.robots.values():
            robot.leased(rows.get(robot.config.id))

    def _heartbeat(self) -> None:
        while not self._closing.wait(_SUPERVISE_S):
            for robot in self.robots.values():
                robot.supervise()

    def _close(self) -> None:
        for robot in self.robots.values():
            robot.stop()
        deadline_s = time.monotonic() + _STOP_S
        for robot in self.robots.values():
            robot.wait(deadline_s)
        for name in self._registered:
            with contextlib.suppress(EmbodiedError):
                self.pool.remove(name)
        self.pool.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def stop_signals() -> Callable[[], bool]:
    """Take SIGINT and SIGTERM; the returned function says whether neither has come."""
    stopped: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return lambda: not stopped

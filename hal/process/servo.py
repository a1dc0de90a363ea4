"""The servo process: owns one robot's bus, keeps its promises, serves its lease holder."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.comms.channels import RequestServer
from embodied.comms.direct import DirectServer
from embodied.core.errors import EmbodiedError, LeaseError
from embodied.core.processes import die_with_parent, run_urgently
from embodied.core.protocols import Renders, SimulatedDriver
from hal.health import Health
from hal.pictures import check_size
from hal.process import messages as m
from hal.process.orphan import remove_record, write_record
from hal.robot import ServoConfig, make_device

STEP, IDLE = b"s", b"i"
"""What the watchdog hears: a servo step was made; there is no robot to command."""

PRESSED = b"e"
"""What the watchdog says when an emergency stop input is pressed."""

AGENT_SILENT_S = 0.5
_POLL_S = 0.02
_RETRY_S = 1.0
_SWITCH_S = 0.0005


class Servo:
    """Serves one device: data for the lease holder, control for the agent."""

    def __init__(self, config: ServoConfig, link: socket.socket, stopping: threading.Event) -> None:
        self._config = config
        self._link = link
        self._device = make_device(config)
        self._device.on_step = self._beat
        self._incarnation = time.time_ns()
        self._agent_ns = 0
        self._watchdog_ns = time.monotonic_ns()
        self._stopping = stopping
        self._data = DirectServer(config.data_address, m.DATA_REQUESTS, self._answer)
        self._pictures: RequestServer | None = None
        if isinstance(self._device.driver, Renders):
            address = config.picture_address
            self._pictures = RequestServer(address, m.PICTURE_REQUESTS, self._drawn)
        self._control = RequestServer(config.control_address, m.CONTROL_REQUESTS, self._supervised)

    def run(self) -> None:
        """Serve until asked to stop or orphaned; then come to a stop, hold, and close."""
        if not isinstance(self._device.driver, SimulatedDriver):
            run_urgently()
        serving = threading.Thread(target=self._serve, name="data", daemon=True)
        serving.start()
        threading.Thread(target=self._draw, name="pictures", daemon=True).start()
        opening = threading.Thread(target=self._open, name="open", daemon=True)
        opening.start()
        while not self._stopping.is_set():
            self._control.poll(_POLL_S)
            self._check_agent()
            self._check_watchdog()
            if self._device.info.health in (Health.ABSENT, Health.LOST):
                self._beat(IDLE)
        opening.join(timeout=5.0)
        self._device.close()
        serving.join(timeout=1.0)

    def _open(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(EmbodiedError):
                self._device.open()
                return
            time.sleep(_RETRY_S)

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                self._data.poll(0.1)
        finally:
            self._stopping.set()

    def _draw(self) -> None:
        """Pictures have a thread of their own: a large one takes many servo steps."""
        while self._pictures is not None and not self._stopping.is_set():
            self._pictures.poll(0.1)

    def _beat(self, what: bytes = STEP) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._link.send(what)

    def _check_agent(self) -> None:
        if time.monotonic_ns() - self._agent_ns > AGENT_SILENT_S * 1e9:
            self._device.revoke("the agent is silent")

    def _check_watchdog(self) -> None:
        now_ns = time.monotonic_ns()
        try:
            while True:
                heard = self._link.recv(16)
                if heard == PRESSED:
                    self._device.halt("emergency stop input")
                if not heard:
                    self._device.revoke("the watchdog is gone")
                    self._stopping.set()
                    return
                self._watchdog_ns = now_ns
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._stopping.set()
        if now_ns - self._watchdog_ns > AGENT_SILENT_S * 1e9:
            self._device.revoke("the watchdog is silent")

    def _supervised(
        self, header: m.Supervise, arrays: Mapping[str, np.ndarray]
    ) -> tuple[m.Status, dict[str, np.ndarray]]:
        self._agent_ns = time.monotonic_ns()
        device = self._device
        ours = header.incarnation == self._incarnation
        if header.lease_token == 0:
            device.revoke("its lease has ended")
        elif ours and header.lease_token > device.token and self._opened():
            with contextlib.suppress(LeaseError):
                device.grant(header.lease_token, header.holder)
        info = device.info
        condition = info.condition
        status = m.Status(
            health=info.health.value,
            reason=info.reason,
            rate_hz=info.rate_hz,
            tick_hz=info.tick_hz,
            temperature_c=condition.temperature_c,
            load=condition.load,
            voltage_v=condition.voltage_v,
            counts=dict(info.counts),
            hops_ms=dict(info.hops_ms),
            incarnation=self._incarnation,
        )
        return status, {}

    def _opened(self) -> bool:
        return self._device.info.health is not Health.ABSENT

    def _answer(
        self, header: Any, arrays: Mapping[str, np.ndarray]
    ) -> tuple[msgspec.Struct, Mapping[str, np.ndarray]]:
        device = self._device
        match header:
            case m.Submit():
                return m.submitted_of(device.submit(m.chunk_of(header, arrays)))
            case m.GetFrames():
                self._check_holder(header.lease_token)
                newest = header.since_tick == m.NEWEST
                since_tick = device.tick if newest else header.since_tick
                return m.frames_message(device.frames(since_tick), device.spec)
            case m.Pulse():
                reason = device.pulse(header.lease_token)
                return m.Alive(not reason, reason), {}
            case m.Describe():
                return self._describe(), {}
            case m.Reset():
                self._check_holder(header.lease_token or -1)
                return m.AtTick(device.reset(header.seed)), {}
            case m.Tighten():
                self._check_holder(header.lease_token or -1)
                device.tighten(header.bounds)
                return m.Done(), {}
            case m.Halt():
                device.halt(header.reason)
                return m.Done(), {}
            case _:
                raise EmbodiedError(f"no answer to {type(header).__name__}")

    def _drawn(
        self, header: m.Render, arrays: Mapping[str, np.ndarray]
    ) -> tuple[m.Done, dict[str, np.ndarray]]:
        check_size(header.width, header.height)
        try:
            picture = self._device.render(header.width, header.height)
        except EmbodiedError:
            raise
        except Exception as error:
            raise EmbodiedError(
                f"{self._config.id} cannot be drawn: {type(error).__name__}: {error}"
            ) from error
        return m.Done(), {} if picture is None else {"picture": picture}

    def _check_holder(self, token: int) -> None:
        """Raise LeaseError unless the token is 0 (an observer's) or the holder's."""
        if token and (reason := self._device.pulse(token)):
            raise LeaseError(f"{self._config.id}: {reason}")

    def _describe(self) -> m.Description:
        config = self._config
        return m.Description(
            id=config.id,
            kind=config.robot.kind,
            host=config.host,
            spec=self._device.spec,
            heartbeat_s=config.robot.safety.heartbeat_s,
            incarnation=self._incarnation,
            resettable=isinstance(self._device.driver, SimulatedDriver),
            pictures="" if self._pictures is None else self._pictures.address,
        )


def main() -> int:
    """Entry: file of the ServoConfig, the watchdog's number, file descriptor of its link."""
    watchdog = int(sys.argv[2])
    die_with_parent(watchdog)
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ServoConfig)
    link = socket.socket(fileno=int(sys.argv[3]))
    link.setblocking(False)
    write_record(Path(config.latches), config.id, watchdog)
    sys.setswitchinterval(_SWITCH_S)
    stopping = threading.Event()

    def stop(signum: int, frame: object) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    servo = Servo(config, link, stopping)
    gc.freeze()
    servo.run()
    remove_record(Path(config.latches), config.id)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's software renderer
    raise SystemExit(main())

"""A bus of Feetech STS servos: their registers, over feetech-servo-sdk."""

import contextlib
import errno
import fcntl
import importlib
import os
import select
import termios
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embodied.core.errors import ConfigError, DeviceLostError, MissingDependencyError

if TYPE_CHECKING:
    from serial import Serial

STS3215 = 777
"""Model number of the servos of an SO-101."""

_OK = 0
_FRAME_BYTES = 6
_PATIENCE_S = 0.1
_SETTLE_S = 0.001
_FAULTS = {1: "voltage", 2: "position sensor", 4: "over-temperature", 8: "current", 32: "overload"}
OVERLOAD = 32
"""Status bit of a servo that has been stopped by its load."""


def faults(status: int) -> tuple[str, ...]:
    """Names of the faults that a status byte reports."""
    known = tuple(name for bit, name in _FAULTS.items() if status & bit)
    return known or ((f"status {status:#x}",) if status else ())


def decode_sign(value: int, bit: int) -> int:
    """Number of a sign-magnitude register whose sign is `bit`."""
    magnitude = value & ((1 << bit) - 1)
    return -magnitude if value >> bit & 1 else magnitude


def encode_sign(value: int, bit: int) -> int:
    """Register of a number, sign in `bit`; ValueError if its magnitude needs more bits."""
    if abs(value) >= 1 << bit:
        raise ValueError(f"{value} does not fit: its magnitude must be below {1 << bit}")
    return abs(value) | (1 << bit if value < 0 else 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a servo answered: its status byte (see `faults`) and the bytes asked for."""

    status: int
    data: bytes


class FeetechBus:
    """One half-duplex bus, owned by this process and used by one thread.

    port: path of the serial port. retries: how often a request is repeated when an answer is
    missing or damaged. answer_ms: how long to wait for an answer beyond the time its bytes take;
    no request takes longer than (retries + 1) * (answer_ms + 2) ms. names: what to call the
    servos in errors, by id. Every request raises DeviceLostError, naming the port and the servos,
    if it cannot be completed.
    """

    def __init__(
        self,
        port: str,
        *,
        baudrate: int = 1_000_000,
        retries: int = 2,
        answer_ms: float = 4.0,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.port = port
        self.retries = retries
        self.answer_ms = answer_ms
        self.repeated = 0
        """How many requests have been repeated since `open`."""
        self._baudrate = baudrate
        self._names = dict(names or {})
        self._line: _Line | None = None
        try:
            self._packets: Any = importlib.import_module("scservo_sdk").PacketHandler(0)
            self._serial: Any = importlib.import_module("serial").Serial
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"{port}: Feetech servos need the package 'feetech-servo-sdk'; "
                "pip install 'embodied-stack[so101]' brings it"
            ) from error

    @property
    def is_open(self) -> bool:
        """Whether the port is open."""
        return self._line is not None

    def open(self) -> None:
        """Take the port for this process alone; waits 0.1 s for a dying owner to let go."""
        if self._line is not None:
            return
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                line: Serial = self._serial(self.port, self._baudrate, timeout=0, exclusive=True)
                break
            except ValueError as error:
                raise ConfigError(f"{self.port}: baudrate {self._baudrate}: {error}") from error
            except OSError as error:
                busy = error.errno in (errno.EAGAIN, errno.EBUSY)
                if not busy or time.monotonic() > deadline_s:
                    raise DeviceLostError(_why_not_open(self.port, error)) from error
                time.sleep(0.002)
        with contextlib.suppress(ValueError, OSError):
            line.set_low_latency_mode(True)
        # Keeps out programs that do not look at locks. A pseudo-terminal would stay closed to
        # everyone after our death, because its other end keeps it alive.
        if not os.path.realpath(self.port).startswith("/dev/pts/"):
            fcntl.ioctl(line.fileno(), termios.TIOCEXCL)
        self._line = _Line(line, self.port, self.answer_ms)
        self.repeated = 0

    def close(self) -> None:
        """Let the port go; safe to call twice."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def ping(self, servo: int) -> int | None:
        """Model number of a servo, asked once; None if it does not answer."""
        answers, _ = self._exchange(lambda sdk, line: sdk.readTx(line, servo, 3, 2), [servo], 2)
        return int.from_bytes(answers[servo].data, "little") if answers else None

    def read(self, servo: int, address: int, size: int) -> int:
        """One register of one servo, `size` bytes, as an unsigned number."""
        answers = self._request(
            f"read {size} B at {address}",
            lambda sdk, line: sdk.readTx(line, servo, address, size),
            [servo],
            size,
        )
        return int.from_bytes(answers[servo].data, "little")

    def write(self, servo: int, address: int, size: int, value: int) -> None:
        """Set one register of one servo and wait for the acknowledgement."""
        data = list(value.to_bytes(size, "little"))
        self._request(
            f"write {size} B at {address}",
            lambda sdk, line: _write(sdk, line, servo, address, data),
            [servo],
            0,
        )

    def sync_read(self, servos: Sequence[int], address: int, size: int) -> dict[int, Answer]:
        """The same `size` bytes of every servo, in one request."""
        ids = list(servos)
        return self._request(
            f"read {size} B at {address}",
            lambda sdk, line: sdk.syncReadTx(line, address, size, ids, len(ids)),
            ids,
            size,
        )

    def sync_write(self, address: int, size: int, values: Mapping[int, int]) -> None:
        """Set the same register of several servos at once. Servos do not acknowledge this."""
        data = [b for servo, v in values.items() for b in (servo, *v.to_bytes(size, "little"))]
        line = self._opened()
        result = self._packets.syncWriteTxOnly(line, address, size, data, len(data))
        line.is_using = False
        if result != _OK:
            raise DeviceLostError(f"{self.port}: cannot send; is the adapter still connected?")

    def _opened(self) -> "_Line":
        if self._line is None:
            raise DeviceLostError(f"{self.port} is not open: call open() first")
        return self._line

    def _request(
        self, what: str, send: Callable[[Any, "_Line"], int], servos: Collection[int], size: int
    ) -> dict[int, Answer]:
        silent = set(servos)
        missing: Collection[int] = servos
        damaged = False
        for attempt in range(self.retries + 1):
            if attempt:
                self.repeated += 1
                self._opened().settle()
            answers, damaged = self._exchange(send, servos, size)
            missing = [servo for servo in servos if servo not in answers]
            if not missing:
                return answers
            silent -= answers.keys()
        missing = [servo for servo in missing if servo in silent] or missing
        labels = ", ".join(f"{servo} ({self._names.get(servo, '?')})" for servo in missing)
        manner = "answered with damaged bytes" if damaged else "did not answer"
        raise DeviceLostError(
            f"{self.port}: servo {labels} {manner} in {self.retries + 1} attempts ({what}); "
            "check the power supply and the cable to the first of them"
        )

    def _exchange(
        self, send: Callable[[Any, "_Line"], int], servos: Collection[int], size: int
    ) -> tuple[dict[int, Answer], bool]:
        """One attempt: the answers that came, by servo, and whether one came damaged."""
        line = self._opened()
        line.answer_ms = self.answer_ms
        answers: dict[int, Answer] = {}
        sent: int = send(self._packets, line)
        if sent != _OK:
            line.is_using = False
            return answers, False
        line.expect(len(servos) * (_FRAME_BYTES + size))
        while len(answers) < len(servos):
            packet, result = self._packets.rxPacket(line)
            if result != _OK:
                return answers, len(packet) > 0
            if packet[2] in servos and len(packet) == _FRAME_BYTES + size:
                answers[packet[2]] = Answer(packet[4], bytes(packet[5:-1]))
        return answers, False


class _Line:
    """The port as the SDK's packet handler needs it.

    The SDK's own handler spins while it waits, waits 34 ms for a silent servo, and before a
    request leaves in the buffer what came too late for the one before.
    """

    def __init__(self, line: "Serial", port: str, answer_ms: float) -> None:
        self.is_using = False
        self.answer_ms = answer_ms
        self._serial = line
        self._port = port
        self._fd = line.fileno()
        self._byte_s = 10 / line.baudrate
        self._deadline_s = 0.0
        self._bytes_left = 0
        self._byte_count = 0
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def close(self) -> None:
        with contextlib.suppress(OSError, termios.error):
            self._serial.close()

    def clearPort(self) -> None:
        try:
            self._serial.reset_input_buffer()
        except (OSError, termios.error) as error:
            raise self._gone(error) from error

    def writePort(self, packet: Sequence[int]) -> int:
        self._byte_count = len(packet)
        try:
            return os.write(self._fd, bytes(packet))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._gone(error) from error

    def expect(self, length: int) -> None:
        """Wait from now on for `length` bytes of answers. Twice as many are too many: noise."""
        wait_s = (length + self._byte_count) * self._byte_s + self.answer_ms / 1000
        self._deadline_s = time.monotonic() + wait_s
        self._bytes_left = 2 * length + 64

    def setPacketTimeout(self, packet_length: int) -> None:
        self.expect(packet_length)

    def isPacketTimeout(self) -> bool:
        return self._bytes_left <= 0 or time.monotonic() >= self._deadline_s

    def readPort(self, length: int) -> bytes:
        """Up to `length` bytes. What has come is read even if it is looked at too late."""
        wait_s = max(0.0, self._deadline_s - time.monotonic())
        length = min(length, self._bytes_left)
        if length <= 0 or not self._poll.poll(wait_s * 1000):
            return b""
        try:
            data = os.read(self._fd, length)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self._gone(error) from error
        if not data:
            raise self._gone(None)
        self._bytes_left -= len(data)
        return data

    def settle(self) -> None:
        """Let an answer that comes late pass, so that it is not taken for the next one."""
        until_s = time.monotonic() + 2 * _SETTLE_S
        while time.monotonic() < until_s and self._poll.poll(_SETTLE_S * 1000):
            self.clearPort()

    def _gone(self, error: Exception | None) -> DeviceLostError:
        reason = f" ({error})" if error else ""
        return DeviceLostError(f"{self._port} has gone{reason}; is it still plugged in?")


def _write(sdk: Any, line: _Line, servo: int, address: int, data: list[int]) -> int:
    return sdk.writeTxOnly(line, servo, address, len(data), data)


def _why_not_open(port: str, error: OSError) -> str:
    if error.errno in (errno.EAGAIN, errno.EBUSY):
        return f"{port} is in use by another process; stop that first"
    if error.errno == errno.ENOENT:
        return f"{port} does not exist; is the robot plugged in? `embodied devices` lists ports"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{port}: no permission; add your user to the group of the port (often 'dialout')"
    return f"{port} cannot be opened: {error}"

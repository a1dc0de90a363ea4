"""A Feetech bus: packets in, status packets out, as slow and as unreliable as is asked for."""

import heapq
from typing import Annotated

import msgspec
import numpy as np

from embodied.core.seeds import make_rng
from sim.so101.robots import Robot
from sim.so101.servo import Servo

Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

BROADCAST = 0xFE
PING, READ, WRITE, REG_WRITE, ACTION, SYNC_READ, SYNC_WRITE = 1, 2, 3, 4, 5, 0x82, 0x83
MAX_LENGTH = 250
_HEADER = b"\xff\xff"
_STALE_S = 0.02
_ONE_RETURN_DELAY_S = 2e-6
_MAX_PENDING = 256


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How unreliable a bus is.

    drop: probability that a packet is lost, each way. corrupt: that a packet has a wrong bit,
    each way. late: that a status packet comes late_s seconds late, after younger ones perhaps.
    """

    drop: Probability = 0.0
    corrupt: Probability = 0.0
    late: Probability = 0.0
    late_s: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)] = 0.02


def packet(head: int, code: int, body: bytes = b"") -> bytes:
    """FF FF, head (an id), length, code (instruction or status), body, checksum."""
    content = bytes([head, len(body) + 2, code]) + body
    return _HEADER + content + bytes([~sum(content) & 0xFF])


class Parser:
    """Finds instruction packets in a stream; bounded, and never confused by garbage for long.

    num_bad: places where a packet began but its length or checksum was wrong.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fed_s = 0.0
        self.num_bad = 0

    def feed(self, data: bytes, now_s: float) -> list[tuple[int, int, bytes]]:
        """Packets (id, instruction, parameters) that are complete now, oldest first.

        The rest of a packet must follow within 20 ms of the last byte.
        """
        found = self._scan(flush=now_s - self._fed_s > _STALE_S)
        self._fed_s = now_s
        for start in range(0, len(data), MAX_LENGTH):
            self._buffer += data[start : start + MAX_LENGTH]
            found += self._scan(flush=False)
        return found

    def _scan(self, flush: bool) -> list[tuple[int, int, bytes]]:
        found: list[tuple[int, int, bytes]] = []
        buffer = self._buffer
        while True:
            start = buffer.find(_HEADER)
            if start < 0:
                del buffer[: max(0, len(buffer) - 1) if buffer[-1:] == b"\xff" else len(buffer)]
                return found
            del buffer[:start]
            if len(buffer) > 2 and buffer[2] == 0xFF:
                del buffer[0]
                continue
            if len(buffer) > 3 and not 2 <= buffer[3] <= MAX_LENGTH:
                self._skip()
                continue
            size = buffer[3] + 4 if len(buffer) > 3 else 6
            if len(buffer) < size:
                if not flush:
                    return found
                self._skip()
                continue
            if ~sum(buffer[2 : size - 1]) & 0xFF != buffer[size - 1]:
                self._skip()
                continue
            found.append((buffer[2], buffer[4], bytes(buffer[5 : size - 1])))
            del buffer[:size]

    def _skip(self) -> None:
        self.num_bad += 1
        del self._buffer[:2]


class FeetechBus:
    """Servos on one wire. Feed it what the host sends, and send what is `ready`.

    Answers come after the time that request and answers take on the wire at `baud`.
    num_executed: instructions carried out.
    """

    def __init__(self, robot: Robot, *, seed: int = 0, baud: int = 1_000_000) -> None:
        self.faults = Faults()
        self.num_executed = 0
        self._robot = robot
        self._parser = Parser()
        self._rng: np.random.Generator = make_rng(seed, "so101", "bus")
        self._byte_s = 10 / baud
        self._free_s = 0.0
        self._pending: list[tuple[float, int, bytes]] = []
        self._sent = 0

    @property
    def num_bad(self) -> int:
        """Packets that were wrong as they came from the host."""
        return self._parser.num_bad

    def receive(self, data: bytes, now_s: float) -> None:
        """Carry out what the host has sent by now_s; without power nothing happens."""
        packets = self._parser.feed(data, now_s)
        if not self._robot.powered:
            return
        for number, instruction, body in packets:
            self._free_s = max(self._free_s, now_s) + (len(body) + 6) * self._byte_s
            if self._happens(self.faults.drop) or self._happens(self.faults.corrupt):
                continue
            self.num_executed += 1
            for servo, answer in self._execute(number, instruction, body):
                self._answer(servo, answer)

    def ready(self, now_s: float) -> list[bytes]:
        """Status packets that have crossed the wire by now_s, oldest first."""
        out: list[bytes] = []
        while self._pending and self._pending[0][0] <= now_s:
            out.append(heapq.heappop(self._pending)[2])
        return out

    def next_s(self) -> float | None:
        """When the next status packet will be ready; None if there is none."""
        return self._pending[0][0] if self._pending else None

    def silence(self) -> None:
        """Forget what is on its way."""
        self._pending.clear()

    def _execute(self, number: int, instruction: int, body: bytes) -> list[tuple[Servo, bytes]]:
        everyone = number == BROADCAST
        addressed = [s for s in self._robot.servos if everyone or s.id == number]
        if instruction == PING:
            self._robot.refresh()
            return [(servo, b"") for servo in addressed]
        if instruction == READ and len(body) == 2 and not everyone:
            return self._read(addressed, body[0], body[1])
        if instruction == SYNC_READ and len(body) > 2 and everyone:
            by_id = {servo.id: servo for servo in self._robot.servos}
            listed = [by_id[i] for i in body[2:] if i in by_id]
            return self._read(listed, body[0], body[1])
        if instruction == SYNC_WRITE and len(body) > 2 and everyone:
            self._sync_write(body[0], body[1], body[2:])
            return []
        done: list[Servo] = []
        if instruction == WRITE and len(body) > 1:
            done = [servo for servo in addressed if servo.write(body[0], body[1:])]
        elif instruction == REG_WRITE and len(body) > 1:
            done = addressed
            for servo in addressed:
                servo.registered = (body[0], body[1:])
        elif instruction == ACTION:
            done = addressed
            for servo in addressed:
                if servo.registered is not None:
                    servo.write(*servo.registered)
                    servo.registered = None
        self._robot.refresh()
        return [] if everyone else [(servo, b"") for servo in done if servo.get("response_level")]

    def _read(self, servos: list[Servo], address: int, count: int) -> list[tuple[Servo, bytes]]:
        self._robot.refresh()
        found = ((servo, servo.read(address, count)) for servo in servos)
        return [(servo, data) for servo, data in found if data is not None]

    def _sync_write(self, address: int, count: int, rows: bytes) -> None:
        by_id = {servo.id: servo for servo in self._robot.servos}
        if not count or len(rows) % (count + 1):
            return
        for start in range(0, len(rows), count + 1):
            servo = by_id.get(rows[start])
            if servo is not None:
                servo.write(address, rows[start + 1 : start + 1 + count])

    def _answer(self, servo: Servo, data: bytes) -> None:
        reply = packet(servo.id, servo.status, data)
        self._free_s += servo.get("return_delay") * _ONE_RETURN_DELAY_S
        self._free_s += len(reply) * self._byte_s
        if self._happens(self.faults.drop) or len(self._pending) >= _MAX_PENDING:
            return
        if self._happens(self.faults.corrupt):
            place, bit = self._rng.integers(len(reply)), self._rng.integers(8)
            changed = bytearray(reply)
            changed[place] ^= 1 << int(bit)
            reply = bytes(changed)
        late_s = self.faults.late_s if self._happens(self.faults.late) else 0.0
        self._sent += 1
        heapq.heappush(self._pending, (self._free_s + late_s, self._sent, reply))

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

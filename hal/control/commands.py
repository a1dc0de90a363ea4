"""Who may command a device, and what is queued: leases, order, and actions by absolute tick."""

import itertools
from typing import NamedTuple

import numpy as np

from embodied.core.errors import LeaseError
from embodied.core.frames import Chunk, Rejection, RejectionCode, Ticket
from embodied.core.specs import DeviceSpec
from hal.safety.config import Envelope
from hal.safety.limits import Limits, end_tick


class Command(NamedTuple):
    """The action queued for one tick, and the chunk's number."""

    action_D: np.ndarray
    seq: int


class Commands:
    """The queue of one device. Tokens grow: an earlier holder's late chunk is refused.

    held: why commands are refused until the next lease; "" if they are not.
    """

    def __init__(self, spec: DeviceSpec, limits: Limits) -> None:
        self._spec = spec
        self._limits = limits
        self._queue: dict[int, tuple[np.ndarray, int]] = {}
        self._order = (-1, -1)
        self._newest_token = 0
        self.token = 0
        self.holder = ""
        self.held = ""
        self._held_code: RejectionCode = "held"
        self._started = False

    def grant(self, token: int, holder: str) -> None:
        """Take a new holder. Raises LeaseError unless the token is newer than all before."""
        if token <= self._newest_token:
            raise LeaseError(f"lease token {token} is not newer than {self._newest_token}")
        self.token = self._newest_token = token
        self.holder = holder
        self.held = ""
        self._order = (-1, -1)
        self._started = False
        self._queue.clear()

    def next_token(self) -> int:
        """A token newer than all before, for holders in this process."""
        return self._newest_token + 1

    def revoke(self, code: RejectionCode, reason: str, end_tick: int) -> None:
        """Refuse commands until the next lease; what is queued before end_tick is executed."""
        if self.held:
            return
        self.held, self._held_code = reason, code
        self.holder = ""
        self.cut(end_tick)

    def cut(self, first_tick: int) -> None:
        """Forget everything queued from a tick on."""
        for queued in [tick for tick in self._queue if tick >= first_tick]:
            del self._queue[queued]

    def submit(
        self, chunk: Chunk, tick: int, envelope: Envelope, places: tuple[np.ndarray, ...]
    ) -> Ticket:
        """Queue a chunk. It replaces everything queued from its first tick on.

        places: where the robot is, measured and commanded, for the start check.
        """
        fault = self._fault(chunk)
        if fault is not None:
            return self._refused(chunk, tick, *fault)
        checked = self._limits.check(chunk, tick, envelope, places)
        rows = checked.actions_HD
        if len(rows) and places and not self._started:
            first_D = chunk.actions_HD[checked.first_tick - chunk.start_tick]
            far = self._limits.start_fault(first_D, *places)
            if far:
                return self._refused(chunk, tick, "start", far)
        self._order = (chunk.epoch, chunk.seq)
        if len(rows):
            self._started = True
            self.cut(checked.first_tick)
        ticks = range(checked.first_tick, checked.first_tick + len(rows))
        self._queue.update(zip(ticks, zip(rows, itertools.repeat(chunk.seq)), strict=True))
        return Ticket(
            chunk.seq,
            checked.first_tick,
            rows,
            checked.clipped,
            checked.late_ticks,
            checked.rejections,
        )

    def pop(self, tick: int) -> Command | None:
        """The command for a tick, taken out of the queue."""
        found = self._queue.pop(tick, None)
        return None if found is None else Command(*found)

    def coming(self, tick: int, count: int) -> list[np.ndarray]:
        """Actions [D] queued from a tick on without a gap, at most `count`."""
        found: list[np.ndarray] = []
        while len(found) < count and (command := self._queue.get(tick + len(found))):
            found.append(command[0])
        return found

    def clear(self) -> None:
        """Forget everything queued."""
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def _fault(self, chunk: Chunk) -> tuple[RejectionCode, str] | None:
        if chunk.lease_token != self.token:
            return "token", f"lease token {chunk.lease_token} is not the holder's"
        if self.held:
            return self._held_code, f"held until a new lease: {self.held}"
        order = (chunk.epoch, chunk.seq)
        if order <= self._order:
            return "order", f"(epoch, seq) {order} does not follow {self._order}"
        return None

    def _refused(self, chunk: Chunk, tick: int, code: RejectionCode, reason: str) -> Ticket:
        rejection = Rejection(chunk.start_tick, end_tick(chunk), code, reason)
        nothing = np.zeros((0, *self._spec.action.shape), self._spec.action.dtype)
        return Ticket(chunk.seq, tick, nothing, rejections=(rejection,))

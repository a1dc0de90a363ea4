"""One robot of this host's pool, leased for a person: asked for, lost, got back, given back."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from embodied.core.errors import ConfigError, DeviceLostError, EmbodiedError, LeaseError
from hal.pool.holding import Holding
from hal.pool.leases import Allocation, DeviceStatus
from hal.pool.pool import Pool
from hal.pool.selectors import Selector, parse
from hal.pool.state import pool_path, state_dir
from hal.remote import RemoteDevice
from hal.safety.latch import HOST_STOP, latch_file, latch_reason, set_latch
from hal.teleop.asking import PersonStopped

_TTL_S = 3.0
_ASK_S = 0.25
_STATUS_S = 0.5
_PAUSE_S = 0.02
_ESTOP = "emergency stop by the person at the robot"


class LeasedRobot:
    """The device that a selector such as "so101@bench", or an id such as "left", names.

    One thread uses it; any may halt. purpose: what the pool shows, with user and process, as its
    holder.
    """

    def __init__(self, selector: str, purpose: str) -> None:
        user = os.environ.get("USER", "") or f"user {os.getuid()}"
        self._holder = f"{purpose} by {user} ({os.getpid()})"
        self._pool = Pool(pool_path())
        if any(row.id == selector for row in self._pool.devices()):
            self._selectors = (Selector(id=selector),)
        else:
            self._selectors = parse(selector)
        if sum(wanted.count for wanted in self._selectors) != 1:
            raise ConfigError(f"device is '{selector}': ask for one device, such as so101@bench")
        self._request: int | None = None
        self._holding: Holding | None = None
        self._device: RemoteDevice | None = None
        self._status: DeviceStatus | None = None
        self._asked_s = self._looked_s = -1e9
        self._halting = threading.Lock()
        self.id = ""
        self.waiting_for = ""
        """Why `poll` has nothing yet."""

    def acquire(self, timeout_s: float) -> RemoteDevice:
        """Lease and connect within timeout_s. Raises LeaseError or DeviceLostError, which say
        who holds the device or what is wrong with it."""
        allocation = self._pool.acquire(self._holder, self._selectors, _TTL_S, timeout_s)
        return self._connect(allocation)

    def poll(self) -> RemoteDevice | None:
        """The device once it can be had, without waiting; at least every few seconds."""
        now_s = time.monotonic()
        if now_s - self._asked_s < _ASK_S:
            return None
        self._asked_s = now_s
        if halted := halted_by(self.id):
            self.waiting_for = halted
            return None
        try:
            if self._request is None:
                self._request = self._pool.request(self._holder, self._selectors, _TTL_S)
            allocation = self._pool.poll(self._request)
            if allocation is None:
                waiting = self._pool.waiting(self._request)
                status = self.status()
                state = "" if status is None or status.free else status.state()
                queued = f"number {waiting.position} in the queue"
                self.waiting_for = waiting.reason or state or queued
                return None
            self._request = None
            return self._connect(allocation)
        except (LeaseError, DeviceLostError) as error:
            self._request = None
            self.waiting_for = str(error)
            return None

    def keep(
        self,
        device: RemoteDevice,
        use: Callable[[RemoteDevice], None],
        *,
        waiting: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """Use a device until that returns or the person stops; lost or halted, it is got back.

        device: as leased. waiting: called again and again while there is none. lost: called once
        when it was given back.
        """
        held: RemoteDevice | None = device
        while True:
            try:
                if held is not None:
                    use(held)
                    return
                waiting()
            except (LeaseError, DeviceLostError) as error:
                self._lose(str(error), lost)
            except PersonStopped as stopped:
                if stopped.event == "stop":
                    return
                self.halt()
                self._lose(str(stopped), lost)
            time.sleep(_PAUSE_S)
            held = self.poll()

    def status(self) -> DeviceStatus | None:
        """The pool's word on the device, at most half a second old; None if it has none."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _STATUS_S:
            self._looked_s = now_s
            with suppress(LeaseError):
                rows = {row.id: row for row in self._pool.devices()}
                self._status = rows.get(self.id)
        return self._status

    def release(self) -> None:
        """Give it back; nothing if it is not held."""
        device, self._device = self._device, None
        holding, self._holding = self._holding, None
        if device is not None:
            device.close()
        if holding is not None:
            with suppress(EmbodiedError):
                holding.close()

    def halt(self, reason: str = _ESTOP) -> None:
        """Latch a halt of the device without asking anybody, until a person clears it."""
        with self._halting:
            if self.id:
                halt(self.id, reason)

    def close(self) -> None:
        """Give it back and leave the pool; safe to call twice."""
        self.release()
        if self._request is not None:
            with suppress(LeaseError):
                self._pool.cancel(self._request)
            self._request = None
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, allocation: Allocation) -> RemoteDevice:
        leased = allocation.devices[0]
        self._holding, self.id = Holding.of(self._pool, allocation), leased.id
        try:
            if not leased.address:
                raise LeaseError(f"{leased.id} is driven by no agent: it cannot be commanded")
            self._device = RemoteDevice(leased.address, leased.token).open()
        except BaseException:
            self.release()
            raise
        self.waiting_for = ""
        return self._device

    def _lose(self, why: str, lost: Callable[[], None]) -> None:
        self.release()
        self.waiting_for = why
        lost()


def halt(device_id: str, reason: str = _ESTOP) -> None:
    """Latch a halt of a device of this host without asking anybody, until a person clears it."""
    set_latch(latch_file(state_dir() / "latches", device_id), reason)


def halted_by(device_id: str) -> str:
    """Why a device stands still until a person clears it, before the pool has heard of it; "" if it
    does not. device_id: "" for any, which only a halt of the whole host holds."""
    folder = state_dir() / "latches"
    for name, command in ((device_id, f"--clear {device_id}"), (HOST_STOP, "--clear")):
        if name and (reason := latch_reason(latch_file(folder, name))):
            return f"halted: {reason}; look first, then `embodied estop {command}`"
    return ""

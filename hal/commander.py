"""One holder's hands on one device: numbers its chunks, keeps its token, moves it to a pose."""

from typing import Protocol, runtime_checkable

import numpy as np

from embodied.core.errors import DeviceLostError, EmbodiedError, LeaseError
from embodied.core.frames import Chunk, Frame, Ticket
from embodied.core.specs import DeviceSpec
from hal.health import DeviceInfo

_AHEAD_TICKS = 10
_SETTLE_S = 2.0


class Leasable(Protocol):
    """What a Device and a RemoteDevice have in common."""

    @property
    def spec(self) -> DeviceSpec:
        """What it senses and accepts."""
        ...

    @property
    def info(self) -> DeviceInfo:
        """Identity and state."""
        ...

    @property
    def realtime(self) -> bool:
        """Whether its time passes by itself."""
        ...

    @property
    def resettable(self) -> bool:
        """Whether `reset` can set its state."""
        ...

    def lease(self, holder: str = ...) -> int:
        """The fencing token of this holder."""
        ...

    def submit(self, chunk: Chunk) -> Ticket:
        """Queue a chunk."""
        ...

    def advance(self, until_tick: int, timeout_s: float = ...) -> None:
        """Return once `until_tick` is open."""
        ...

    def latest(self) -> Frame:
        """The open frame."""
        ...

    def frames(self, since_tick: int) -> list[Frame]:
        """Frames from a tick on."""
        ...

    def reset(self, seed: int) -> int:
        """Set a simulated device's state."""
        ...

    def render(self, width: int, height: int) -> np.ndarray | None:
        """A picture."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class Refreshes(Protocol):
    """A device in another process, whose newest known frame may be from long ago."""

    def refresh(self) -> Frame:
        """Fetch the open frame."""
        ...


class Commander:
    """Commands one device under one lease. Also what a Task resets."""

    def __init__(self, device: Leasable) -> None:
        self.device = device
        self.spec = device.spec
        self._token = device.lease()
        self._seq = 0

    @property
    def resettable(self) -> bool:
        """Whether `reset` can set its state; else a task moves it there."""
        return self.device.resettable

    def fresh(self) -> Frame:
        """The open frame as of now, also after a pause."""
        return self.device.refresh() if isinstance(self.device, Refreshes) else self.device.latest()

    def reset(self, seed: int) -> int:
        """Bring a simulated device to the start state of `seed`; the tick of its first frame."""
        return self.device.reset(seed)

    def send(
        self, actions_HD: np.ndarray, *, obs_tick: int, start_tick: int, policy_version: int = -1
    ) -> Ticket:
        """Submit actions for start_tick on, computed from the observation of obs_tick.

        Raises LeaseError when the lease is over; other rejections are in the ticket.
        """
        self._seq += 1
        chunk = Chunk(
            start_tick=start_tick,
            actions_HD=actions_HD,
            obs_tick=obs_tick,
            valid_until_tick=start_tick + len(actions_HD) - 1,
            seq=self._seq,
            lease_token=self._token,
            policy_version=policy_version,
        )
        ticket = self.device.submit(chunk)
        for rejection in ticket.rejections:
            if rejection.code in ("token", "held", "halted"):
                raise LeaseError(f"{self.device.info.id}: {rejection.reason}")
        return ticket

    def move_to(self, pose_D: np.ndarray, speed: float = 0.4, tolerance: float = 0.05) -> int:
        """Move a position-controlled device smoothly to a pose [D]; the tick of its arrival.

        speed: share of the velocity limits. The path is a straight line in joint space with a
        minimum-jerk profile (Flash and Hogan, 1985). Raises DeviceLostError if the measured
        pose does not come within `tolerance` in time.
        """
        motion = self.spec.motion
        if motion is None:
            raise EmbodiedError(f"{self.device.info.id} is not position-controlled: cannot move it")
        frame = self.fresh()
        start_D = frame.observation[motion.measured].astype(np.float64)
        distance = np.abs(pose_D - start_D) / (speed * np.asarray(motion.velocity))
        ticks = max(2, int(np.ceil(1.875 * distance.max() * self.spec.tick_hz)))
        s = np.linspace(0.0, 1.0, ticks + 1)[1:, None]
        path_HD = start_D + (pose_D - start_D) * (10 * s**3 - 15 * s**4 + 6 * s**5)
        hold_HD = np.repeat(pose_D[None], int(_SETTLE_S * self.spec.tick_hz), axis=0)
        path_HD = np.concatenate([start_D[None], path_HD, hold_HD])
        done = 0
        while done < len(path_HD):
            frame = self.device.latest()
            at_D = frame.observation[motion.measured]
            if done > ticks and np.abs(at_D - pose_D).max() <= tolerance:
                break
            rows = path_HD[done : done + 3 * _AHEAD_TICKS].astype(self.spec.action.dtype)
            lead = 1 if self.device.realtime else 0
            first = frame.tick + lead
            ticket = self.send(rows, obs_tick=frame.tick, start_tick=first)
            for rejection in ticket.rejections:
                if rejection.code in ("start", "workspace", "nonfinite", "shape"):
                    raise EmbodiedError(f"{self.device.info.id}: {rejection.reason}")
            self.device.advance(first + _AHEAD_TICKS)
            done += self.device.latest().tick + lead - first
        else:
            off = float(np.abs(self.device.latest().observation[motion.measured] - pose_D).max())
            raise DeviceLostError(
                f"{self.device.info.id} did not reach its pose: {off:.3f} away, "
                f"{tolerance:g} is allowed. Is it blocked?"
            )
        return self.device.latest().tick

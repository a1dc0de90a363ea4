"""What passes between a servo process and those who watch and command its device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from embodied.core.errors import CorruptDataError
from embodied.core.frames import Chunk, Frame, Rejection, RejectionCode, Ticket
from embodied.core.specs import DeviceSpec
from hal.safety.config import Bounds

_Int = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
_Text = Annotated[str, msgspec.Meta(max_length=1000)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Describe(_Message, frozen=True, tag="describe"):
    """Asks for a Description."""


class Description(_Message, frozen=True, tag="description"):
    """What the device is. incarnation: differs after every restart of the servo process.

    pictures: address at which pictures can be asked for, "" if the device cannot draw itself.
    """

    id: str
    kind: str
    host: str
    spec: DeviceSpec
    heartbeat_s: float | None
    incarnation: int
    resettable: bool
    pictures: str


class Submit(_Message, frozen=True, tag="submit"):
    """A chunk; its actions [H, D] come as array "actions"."""

    start_tick: _Int
    obs_tick: _Int
    valid_until_tick: _Int
    seq: _Int
    epoch: _Int
    lease_token: _Int
    policy_version: _Int


class Submitted(_Message, frozen=True, tag="submitted"):
    """The ticket; the accepted actions come as array "accepted"."""

    seq: int
    first_tick: int
    clipped: int
    late_ticks: int
    rejections: list[tuple[int, int, RejectionCode, str]]


NEWEST = -1
"""As since_tick: the open frame only."""


class GetFrames(_Message, frozen=True, tag="get_frames"):
    """Asks for the frames from a tick on; also a heartbeat of the token's holder."""

    since_tick: _Int
    lease_token: _Int


class Frames(_Message, frozen=True, tag="frames"):
    """Frames in order of tick; their contents come as arrays."""

    count: int
    signals: list[str]


class Pulse(_Message, frozen=True, tag="pulse"):
    """A heartbeat of the lease holder."""

    lease_token: _Int


class Alive(_Message, frozen=True, tag="alive"):
    """Whether the sender of the pulse holds the device. reason: why not."""

    held: bool
    reason: str = ""


class Reset(_Message, frozen=True, tag="reset"):
    """Brings a simulated device to the start state of a seed; for the lease holder."""

    seed: _Int
    lease_token: _Int


class AtTick(_Message, frozen=True, tag="at_tick"):
    """The tick of the frame that is open."""

    tick: int


class Tighten(_Message, frozen=True, tag="tighten"):
    """Narrows the limits for as long as the holder's lease lasts."""

    bounds: Bounds
    lease_token: _Int


class Halt(_Message, frozen=True, tag="halt"):
    """Latches a halt; anybody on the host may."""

    reason: _Text


class Render(_Message, frozen=True, tag="render"):
    """Asks for a picture, which comes as array "picture"."""

    width: _Int
    height: _Int


class Done(_Message, frozen=True, tag="done"):
    """It has been done."""


class Supervise(_Message, frozen=True, tag="supervise"):
    """The agent's heartbeat, and who holds the lease by the pool: token 0 for nobody.

    incarnation: of the process that the lease is for; another one takes no lease from it.
    """

    lease_token: _Int
    holder: _Text
    incarnation: _Int


class Status(_Message, frozen=True, tag="status"):
    """How the device is: the fields of DeviceInfo."""

    health: str
    reason: str
    rate_hz: float
    tick_hz: float
    temperature_c: float | None
    load: float | None
    voltage_v: float | None
    counts: dict[str, int]
    hops_ms: dict[str, tuple[float, float]]
    incarnation: int


DATA_REQUESTS = Describe | Submit | GetFrames | Pulse | Reset | Tighten | Halt
DATA_REPLIES = Description | Submitted | Frames | Alive | AtTick | Done
PICTURE_REQUESTS = Render
PICTURE_REPLIES = Done
CONTROL_REQUESTS = Supervise
CONTROL_REPLIES = Status


def submit_of(chunk: Chunk) -> tuple[Submit, dict[str, np.ndarray]]:
    """A chunk as message."""
    header = Submit(
        chunk.start_tick,
        chunk.obs_tick,
        chunk.valid_until_tick,
        chunk.seq,
        chunk.epoch,
        chunk.lease_token,
        chunk.policy_version,
    )
    return header, {"actions": np.asarray(chunk.actions_HD)}


def chunk_of(header: Submit, arrays: Mapping[str, np.ndarray]) -> Chunk:
    """The chunk in a message. Raises CorruptDataError without its actions."""
    if set(arrays) != {"actions"}:
        raise CorruptDataError(f"submit brings arrays {sorted(arrays)}; ['actions'] is right")
    return Chunk(
        start_tick=header.start_tick,
        actions_HD=arrays["actions"],
        obs_tick=header.obs_tick,
        valid_until_tick=header.valid_until_tick,
        seq=header.seq,
        epoch=header.epoch,
        lease_token=header.lease_token,
        policy_version=header.policy_version,
    )


def submitted_of(ticket: Ticket) -> tuple[Submitted, dict[str, np.ndarray]]:
    """A ticket as message."""
    rejections: list[tuple[int, int, RejectionCode, str]] = [
        (r.first_tick, r.end_tick, r.code, r.reason) for r in ticket.rejections
    ]
    header = Submitted(ticket.seq, ticket.first_tick, ticket.clipped, ticket.late_ticks, rejections)
    return header, {"accepted": ticket.accepted_HD}


def ticket_of(header: Submitted, arrays: Mapping[str, np.ndarray]) -> Ticket:
    """The ticket in a message."""
    return Ticket(
        header.seq,
        header.first_tick,
        arrays["accepted"],
        header.clipped,
        header.late_ticks,
        tuple(Rejection(*rejection) for rejection in header.rejections),
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Names of the arrays of a Frames message."""

    tick: str = "tick"
    action: str = "action"
    executed: str = "executed"
    held: str = "held"
    seq: str = "seq"
    signals: str = "signals"
    times: str = "t_ns/"
    observation: str = "observation/"


_AT = _Columns()


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """What np.stack gives; for few and small ones that takes several times as long."""
    stacked = np.empty((len(rows), *rows[0].shape), rows[0].dtype)
    for k, row in enumerate(rows):
        stacked[k] = row
    return stacked


def frames_message(
    frames: Sequence[Frame], spec: DeviceSpec
) -> tuple[Frames, dict[str, np.ndarray]]:
    """Frames as message: one array [n, …] for each of their parts."""
    if not frames:
        return Frames(0, []), {}
    nothing = np.zeros(spec.action.shape, spec.action.dtype)
    names = list(frames[0].signals)
    arrays: dict[str, np.ndarray] = {
        _AT.tick: np.array([f.tick for f in frames], np.int64),
        _AT.action: _stacked([nothing if f.action is None else f.action for f in frames]),
        _AT.executed: np.array([f.action is not None for f in frames]),
        _AT.held: np.array([f.held for f in frames]),
        _AT.seq: np.array([f.seq for f in frames], np.int64),
    }
    if names:
        rows = [[f.signals[name] for name in names] for f in frames]
        arrays[_AT.signals] = np.array(rows, np.float64)
    for key in frames[0].observation:
        arrays[_AT.observation + key] = _stacked([f.observation[key] for f in frames])
        arrays[_AT.times + key] = np.array([f.t_ns[key] for f in frames], np.int64)
    return Frames(len(frames), names), arrays


def frames_of(header: Frames, arrays: Mapping[str, np.ndarray], spec: DeviceSpec) -> list[Frame]:
    """The frames in a message. Raises CorruptDataError where they do not fit the spec."""
    if header.count == 0:
        return []
    try:
        ticks, executed, held, seqs = (
            arrays[name].tolist() for name in (_AT.tick, _AT.executed, _AT.held, _AT.seq)
        )
        actions = arrays[_AT.action]
        signals = arrays[_AT.signals].tolist() if header.signals else [()] * len(ticks)
        contents = {key: arrays[_AT.observation + key] for key in spec.observation}
        times_ns = {key: arrays[_AT.times + key].tolist() for key in spec.observation}
        frames = [
            Frame(
                tick=ticks[k],
                observation={key: rows[k] for key, rows in contents.items()},
                t_ns={key: rows[k] for key, rows in times_ns.items()},
                action=actions[k] if executed[k] else None,
                held=held[k],
                signals=dict(zip(header.signals, signals[k], strict=True)),
                seq=seqs[k],
            )
            for k in range(header.count)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptDataError(f"frames lack {error}") from error
    return frames

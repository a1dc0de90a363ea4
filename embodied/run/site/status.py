"""The state of links as plain data: a file of the run, which `embodied status` and metrics read."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.files import write_atomic
from embodied.weights.deliveries import Delivery
from embodied.weights.progress import TrialProgress

FILE = "links.json"
STALE_S = 5.0


class KindStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Messages of one kind since the link was made. depth: messages that wait to be sent."""

    sent: int
    sent_bytes: int
    received: int
    received_bytes: int
    dropped: int
    depth: int


class HostStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One robot host. since_s: Unix time of the last (dis)connection. heard_s: since its last
    report. version: of the weights that are there. Spool: what is not durable at the learner's.
    delivery: of weights, where they are sent from. confirmed_ns: when the learner last confirmed
    that the host has the newest weights meant for it, by the monotonic clock of the host whose file
    this is; None for not yet. waits: why no episode begins there, "" if any may."""

    name: str
    connected: bool
    since_s: float
    heard_s: float
    rtt_ms: float | None
    traffic: dict[str, KindStatus]
    version: int | None
    episodes: int
    spool_steps: int
    spool_bytes: int
    oldest_s: float
    reconnects: int = 0
    reason: str = ""
    delivery: Delivery | None = None
    confirmed_ns: int | None = None
    waits: str = ""

    @property
    def weights_age_s(self) -> float | None:
        """Since the learner last confirmed the host's weights."""
        if self.confirmed_ns is None:
            return None
        return max(0.0, (time.monotonic_ns() - self.confirmed_ns) / 1e9)


class LinksStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All links of a run as one end sees them. site: "gateway", or a host's name. address: of the
    gateway. version: newest weights there. trial: of weights, at the gateway. t_s: Unix time."""

    run: str
    site: str
    address: str
    version: int | None
    over: bool
    hosts: tuple[HostStatus, ...]
    trial: TrialProgress | None = None
    t_s: float = msgspec.field(default_factory=time.time)


def traffic_of(traffic: Mapping[str, Any], depths: Mapping[str, int]) -> dict[str, KindStatus]:
    """A link's counters, by kind."""
    return {
        kind: KindStatus(
            counts.sent,
            counts.sent_bytes,
            counts.received,
            counts.received_bytes,
            counts.dropped,
            depths.get(kind, 0),
        )
        for kind, counts in traffic.items()
    }


def write_status(folder: Path, status: LinksStatus) -> None:
    """Replace the run's file."""
    write_atomic(folder / FILE, msgspec.json.encode(status))


def read_status(folder: Path) -> LinksStatus:
    """What the run's gateway or host told last; ConfigError if there is none."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=LinksStatus)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no links: it is no run with gateway.listen, and no host's run"
        ) from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise CorruptDataError(f"{path} is damaged: {error}; it is written anew") from error

"""The kinds of messages that cross a link, declared once: bounds, order, and what gives way."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from embodied.core.errors import ConfigError
from embodied.core.registry import unknown

Policy = Literal["block", "drop_oldest", "latest"]
"""What happens to a message for which a full queue has no room: it is refused (`block`: the
sender waits and tries again), or it takes the place of the oldest (`drop_oldest`). `latest`: it
always takes the place of one with the same key that has not begun to be sent."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bound:
    """Room in one direction, for what waits to be sent and again for what was received but not
    yet handled: number of messages, their bytes, and bytes of the largest."""

    messages: int
    total_bytes: int
    message_bytes: int

    def __post_init__(self) -> None:
        if not (self.messages >= 1 and 1 <= self.message_bytes <= self.total_bytes):
            raise ConfigError(
                f"{self}: at least one message, and of its bytes no more than there is room for"
            )


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of message.

    id: on the wire. priority: the smallest is sent first. urgent: does not wait for the
    bandwidth cap, though it counts, nor for what is under way. share: of the bandwidth among
    the kinds of the same priority. up: from the robot host to the gateway; down: back.
    """

    id: int
    name: str
    priority: int
    policy: Policy
    up: Bound
    down: Bound
    urgent: bool = False
    share: float = 1.0


CONTROL = Kind(
    id=1,
    name="control",
    priority=0,
    policy="block",
    up=Bound(64, 4 * MIB, MIB),
    down=Bound(64, 4 * MIB, MIB),
    urgent=True,
)
INFERENCE = Kind(
    id=2,
    name="inference",
    priority=1,
    policy="block",
    up=Bound(16, 32 * MIB, 16 * MIB),
    down=Bound(16, 32 * MIB, 16 * MIB),
    urgent=True,
)
EXPERIENCE = Kind(
    id=3,
    name="experience",
    priority=2,
    policy="block",
    up=Bound(64, 48 * MIB, 32 * MIB),
    down=Bound(64, 4 * MIB, MIB),
    share=0.6,
)
WEIGHTS = Kind(
    id=4,
    name="weights",
    priority=2,
    policy="latest",
    up=Bound(16, 4 * MIB, MIB),
    down=Bound(16, 1024 * MIB, 1024 * MIB),
    share=0.3,
)
TELEMETRY = Kind(
    id=5,
    name="telemetry",
    priority=2,
    policy="drop_oldest",
    up=Bound(256, 4 * MIB, MIB),
    down=Bound(64, 4 * MIB, MIB),
    share=0.1,
)

KINDS = (CONTROL, INFERENCE, EXPERIENCE, WEIGHTS, TELEMETRY)


def by_name(kinds: Iterable[Kind]) -> dict[str, Kind]:
    """Kinds by name; ConfigError if two share a name or an id."""
    listed = tuple(kinds)
    found = {kind.name: kind for kind in listed}
    if len(found) < len(listed) or len({kind.id for kind in listed}) < len(listed):
        raise ConfigError(f"kinds {', '.join(kind.name for kind in listed)} share a name or an id")
    return found


def find(kinds: dict[str, Kind], name: str) -> Kind:
    """The kind of this name; ConfigError with the nearest one if there is none."""
    if name not in kinds:
        raise unknown("kind of message", name, kinds)
    return kinds[name]

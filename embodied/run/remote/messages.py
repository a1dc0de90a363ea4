"""What a robot asks of a policy server. Shapes: B rows, To history, H chunk, D action.

Arrays are named "obs/KEY" [B, To, …], "carry/KEY" [B, …], "prefix" [B, d, D] float32, "seed" [B]
int64, and in the answer "actions" [B, H, D] float32. Every request may be answered by an ErrorReply
too: of kind LinkError if it may be repeated, of another kind if it is wrong.
"""

from typing import Annotated

import msgspec

from embodied.core.specs import PolicySpec

MAX_TIME_LEFT_MS = 600_000


class Describe(msgspec.Struct, frozen=True, tag="describe", forbid_unknown_fields=True):
    """What is served?"""


class Described(msgspec.Struct, frozen=True, tag="described", forbid_unknown_fields=True):
    """The policy that is served, with "carry/KEY": what one row remembers before its first
    decision. fingerprint: of both. rows: of a batch, and the most of one request. p50_ms, p99_ms:
    time of a batch in the warm-up and since."""

    spec: PolicySpec
    fingerprint: str
    version: int
    rows: int
    p50_ms: float
    p99_ms: float


class Act(msgspec.Struct, frozen=True, tag="act", forbid_unknown_fields=True):
    """Decide, with "obs/…", "seed", if there are committed actions "prefix", and "carry/…" if the
    policy remembers. fingerprint: what Described said. time_left_ms: from when this is sent; an
    answer that would be later is not computed."""

    fingerprint: Annotated[str, msgspec.Meta(max_length=64)]
    time_left_ms: Annotated[int, msgspec.Meta(ge=1, le=MAX_TIME_LEFT_MS)]


class Acted(msgspec.Struct, frozen=True, tag="acted", forbid_unknown_fields=True):
    """ "actions" and "carry/…" for the next decision. version: of the weights that decided."""

    version: int


class Check(msgspec.Struct, frozen=True, tag="check", forbid_unknown_fields=True):
    """How is the server?"""


class Health(msgspec.Struct, frozen=True, tag="health", forbid_unknown_fields=True):
    """ready: warmed up and deciding. queued: requests that wait. batch_rows: of the batches so
    far, how many had 1, 2, … rows of robots. decided, dropped, refused: requests so far that were
    answered, were too late or too many, and were wrong. p50_ms, p99_ms: from a request's arrival
    to its decision, of the last thousand. fault: why newer weights were passed over, "" if not."""

    ready: bool
    version: int
    queued: int
    batch_rows: tuple[int, ...]
    decided: int
    dropped: int
    refused: int
    p50_ms: float
    p99_ms: float
    fault: str


REQUESTS = (Describe, Act, Check)
REPLIES = (Described, Acted, Health)

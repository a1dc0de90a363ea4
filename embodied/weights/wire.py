"""What a robot host and a learner say to each other about weights.

The host asks (WantWeights), the learner's side answers with one of the others. Arrays that go
along, all uint8 [n]: with a WeightsOffer `manifest` (an UpdateManifest as JSON) and `piece`, the
patch's first bytes; with a WeightsPiece `piece`, its bytes from `offset`.

A host that has nothing in transfer asks without `patch_sha256` and gets an offer, or Unchanged if
it has what it should have. A host in the middle of a transfer names the patch and the offset, after
a lost link or a restart as well, and gets the next piece, or an offer of something newer.
"""

from typing import Annotated

import msgspec
import numpy as np

from embodied.core.errors import CorruptDataError, EmbodiedError
from embodied.weights.manifests import Digest, Version

MAX_PIECE_BYTES = 4 << 20
PIECE_BYTES = 1 << 20

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class WeightsRefusedError(EmbodiedError):
    """Weights are another run's, unsigned, older than what acts, or of another base."""


class WantWeights(
    msgspec.Struct, frozen=True, tag="weights.want", forbid_unknown_fields=True, kw_only=True
):
    """A host asks for weights.

    base_version, base_sha256: acting form that it has; None: it has none, or wants a whole one.
    version, patch_sha256, offset: of the patch in transfer, None and 0 without one.
    """

    run_id: _Name
    host: _Name
    base_version: Version | None = None
    base_sha256: Digest | None = None
    version: Version | None = None
    patch_sha256: Digest | None = None
    offset: _Offset = 0
    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECE_BYTES)] = PIECE_BYTES


class WeightsUnchanged(
    msgspec.Struct, frozen=True, tag="weights.unchanged", forbid_unknown_fields=True
):
    """Nothing newer is for this host. version, sha256: what it should have; None: nothing yet."""

    version: Version | None
    sha256: Digest | None


class WeightsOffer(msgspec.Struct, frozen=True, tag="weights.offer", forbid_unknown_fields=True):
    """An update begins. signature: Ed25519 over manifests.to_sign(manifest); b"": unsigned."""

    signature: Annotated[bytes, msgspec.Meta(max_length=512)]


class WeightsPiece(msgspec.Struct, frozen=True, tag="weights.piece", forbid_unknown_fields=True):
    """An update goes on. newest: the newest version for this host."""

    version: Version
    patch_sha256: Digest
    offset: _Offset
    newest: Version


Reply = WeightsUnchanged | WeightsOffer | WeightsPiece
REQUESTS = (WantWeights,)
REPLIES = (WeightsUnchanged, WeightsOffer, WeightsPiece)


def taken(arrays: dict[str, np.ndarray], *names: str) -> list[bytes]:
    """Bytes of exactly these arrays. Raises CorruptDataError for others, or another dtype."""
    if arrays.keys() != set(names):
        raise CorruptDataError(
            f"a message about weights brings the arrays {sorted(arrays)}; {sorted(names)} are right"
        )
    for name in names:
        if arrays[name].dtype != np.uint8 or arrays[name].ndim != 1:
            raise CorruptDataError(f"array '{name}' of a message about weights is not uint8 [n]")
    return [arrays[name].tobytes() for name in names]

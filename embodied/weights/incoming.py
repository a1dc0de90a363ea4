"""An update on its way, kept in files so that a restart goes on where it was cut."""

import os
from pathlib import Path
from typing import Annotated

import msgspec

from embodied.core.files import full_disk_named, write_atomic
from embodied.weights.manifests import MAX_MANIFEST_BYTES


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an offer said; signature as in WeightsOffer."""

    manifest: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(max_length=512)]


class Incoming:
    """At most one update under `folder`: offer.msgpack and patch.part.

    The part is not synced to disk: after a loss of power it may be short or damaged, which costs
    its transfer and nothing else, since the whole is checked against its digest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offer = folder / "offer.msgpack"
        self._part = folder / "patch.part"

    def begin(self, begun: Begun) -> None:
        """Forget what was on its way and begin anew."""
        self.clear()
        with full_disk_named(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._part.touch()
        write_atomic(self._offer, msgspec.msgpack.encode(begun))

    def begun(self) -> Begun | None:
        """What was begun, also by an earlier process; None if nothing that can be read."""
        try:
            return msgspec.msgpack.decode(self._offer.read_bytes(), type=Begun)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def size(self) -> int:
        """Bytes that have come."""
        return self._part.stat().st_size if self._part.exists() else 0

    def append(self, piece: bytes) -> None:
        """Keep the next piece; if the disk is full, none of it. Raises StorageFullError."""
        size = self.size()
        with full_disk_named(self._part), open(self._part, "ab") as file:
            try:
                file.write(piece)
                file.flush()
            except OSError:
                file.truncate(size)
                raise

    def shorten(self, num_bytes: int) -> None:
        """Keep at most so many bytes."""
        if self.size() > num_bytes:
            os.truncate(self._part, num_bytes)

    def read(self) -> bytes:
        """All that has come."""
        return self._part.read_bytes()

    def clear(self) -> None:
        """Forget it."""
        self._offer.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

"""What a replay deletes when it grows beyond its bytes: whole segments, the oldest first."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from embodied.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SegmentUse:
    """A sealed segment: its size on disk and the streams that have steps in it."""

    number: int
    nbytes: int
    streams: frozenset[str]


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """max_bytes: most that sealed segments take up on disk. pinned: streams that are never
    deleted, by name or by a beginning followed by "*" (demonstrations). acknowledged_only: delete
    only what another site has acknowledged (a spool), and when the disk is full, below max_bytes
    as well."""

    max_bytes: int
    pinned: tuple[str, ...] = ()
    acknowledged_only: bool = False

    def __post_init__(self) -> None:
        if self.max_bytes <= 0:
            raise ConfigError(f"retention.max_bytes is {self.max_bytes}; it must be positive")

    def is_pinned(self, stream: str) -> bool:
        """Whether a stream is kept whatever its size."""
        return any(
            stream == name or (name.endswith("*") and stream.startswith(name[:-1]))
            for name in self.pinned
        )

    def expired(
        self, segments: Iterable[SegmentUse], newest: int, acknowledged: Collection[int] = ()
    ) -> Iterator[int]:
        """Numbers to delete, oldest first, until the rest fits; never `newest` or pinned ones, and
        with acknowledged_only none but `acknowledged`.

        Asked lazily: one is deleted before the next is named.
        """
        uses = sorted(segments, key=lambda use: use.number)
        total = sum(use.nbytes for use in uses)
        for use in uses:
            if total <= self.max_bytes:
                return
            held = self.acknowledged_only and use.number not in acknowledged
            if use.number != newest and not held and not any(map(self.is_pinned, use.streams)):
                total -= use.nbytes
                yield use.number

"""Where actors put their steps: one interface, in this process or in the buffer's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

from embodied.buffer.log.append import SEGMENT_BYTES
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import Counts, ReplayWriter
from embodied.core.episodes import Step


class StepSink(Protocol):
    """Takes steps; what flush has returned for survives any crash."""

    def add(self, step: Step) -> None:
        """Take a step; one that is already there is dropped."""
        ...

    def flush(self, timeout_s: float = 10.0) -> None:
        """Return when every step taken is durable. Raises LinkError after timeout_s."""
        ...

    def next_episode(self, stream: str | None = None) -> int:
        """Smallest number above all episodes of the stream (None: the sink's own)."""
        ...


class LocalBuffer:
    """A replay written by this process itself: the deterministic single-process mode."""

    def __init__(
        self,
        path: Path,
        stream: str = "local",
        segment_bytes: int = SEGMENT_BYTES,
        codecs: Mapping[str, str] | None = None,
        retention: Retention | None = None,
    ) -> None:
        self._stream = stream
        self._writer = ReplayWriter(path, segment_bytes, codecs=codecs, retention=retention)

    def add(self, step: Step) -> None:
        """Append a step; errors as ReplayWriter.append."""
        self._writer.append(step)

    def flush(self, timeout_s: float = 10.0) -> None:
        """Make every step durable; the timeout is not needed here."""
        self._writer.flush()

    def next_episode(self, stream: str | None = None) -> int:
        """Smallest number above all episodes of the stream (None: the buffer's own)."""
        return self._writer.next_episode(self._stream if stream is None else stream)

    def counts(self) -> Counts:
        """What the replay holds."""
        return self._writer.counts()

    def close(self) -> None:
        """Flush and give the directory up; safe to call twice."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Recorded episodes as a data set: a buffer folder read back step by step."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from embodied.buffer.read.replay import ReplayReader
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError


class RecordedEpisodes:
    """The finished episodes of a folder that `embodied collect` or a run has recorded."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: the buffer folder. ram_mib: most memory that its steps may take."""

        path: str
        ram_mib: int = 4096

    def __init__(self, config: Config) -> None:
        self._path = Path(config.path)
        if not self._path.is_dir():
            raise ConfigError(f"demonstrations.dataset.path: no buffer folder {self._path}")
        self._reader = ReplayReader(self._path, ram_bytes=config.ram_mib << 20)
        self._reader.refresh()
        self.tasks = frozenset(episode.task for episode in self._reader.finished())
        if not self.tasks:
            raise ConfigError(f"{self._path} holds no finished episode")

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """Finished episodes in the order in which they ended."""
        name = self._path.resolve().name
        for episode in self._reader.finished()[:limit]:
            steps = self._reader.steps(episode)
            yield [replace(step, stream=f"{name}/{step.stream}") for step in steps]

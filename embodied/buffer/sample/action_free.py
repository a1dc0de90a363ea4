"""Recorded steps as observations alone: what was done in them counts for nothing."""

from collections.abc import Mapping, Sequence

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.read.gather import target_array
from embodied.buffer.sample.batches import Arrays, StepReader
from embodied.buffer.steps.schema import Feature

_ACTION, _HELD = "action", "held"


class ActionFreeReader:
    """A StepReader of the same steps, whose actions are zeros like those of another reader's, and
    no label: every step counts as held."""

    def __init__(self, source: StepReader, labelled: StepReader) -> None:
        """source: whose steps these are. labelled: of whose actions dtype and shape are taken."""
        self._source = source
        self._labelled = labelled

    def feature(self, name: str) -> Feature:
        """See StepReader."""
        return (self._labelled if name == _ACTION else self._source).feature(name)

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """See StepReader."""
        return self.gather((name,), rows)[name]

    def gather(
        self, names: Sequence[str], rows: np.ndarray, out: Mapping[str, np.ndarray] | None = None
    ) -> Arrays:
        """See StepReader."""
        found = self._source.gather([n for n in names if n not in (_ACTION, _HELD)], rows, out)
        for name in (_ACTION, _HELD):
            if name in names:
                found[name] = target_array(name, self.feature(name), rows, out)
                found[name][...] = name == _HELD
        return found

    def prefetch(self, names: Sequence[str], rows: np.ndarray) -> None:
        """See StepReader."""
        self._source.prefetch(names, rows)

    def closed_episodes(self, since: int = 0) -> list[EpisodeInfo]:
        """See StepReader."""
        return self._source.closed_episodes(since)

    def removed_episodes(self, since: int = 0) -> list[tuple[str, int]]:
        """See StepReader."""
        return self._source.removed_episodes(since)

"""Episodes of a replay, put together from the rows of their steps as these arrive."""

from dataclasses import dataclass, field

import numpy as np

from embodied.buffer.steps.blocks import EpisodeKey
from embodied.buffer.steps.schema import FLAGS

_FINAL = 1 << FLAGS.index("final")
_SUCCESS = 1 << FLAGS.index("success")
_INTERVENTION = FLAGS.index("intervention")


@dataclass(frozen=True, slots=True)
class EpisodeInfo:
    """One episode. rows: row id of each step, in order of index (-1 where it is missing); the
    final observation's is final_row (-1 until it is there), not among them.
    closed: complete, final observation included. policy_versions: lowest and highest."""

    stream: str
    episode: int
    task: str
    seed: int
    rows: np.ndarray
    final_row: int
    closed: bool
    success: bool
    interventions: int
    policy_versions: tuple[int, int]

    @property
    def key(self) -> tuple[str, int]:
        """Stream and number."""
        return self.stream, self.episode


@dataclass(slots=True)
class OpenEpisode:
    """An episode that is being put together. owner: its number in the reader."""

    key: EpisodeKey
    owner: int
    pieces: list[tuple[int, np.ndarray]] = field(default_factory=list)
    next_index: int = 0
    missing: set[int] = field(default_factory=set)
    final_row: int = -1
    success: bool = False
    interventions: int = 0
    versions: tuple[int, int] | None = None
    info: EpisodeInfo | None = None

    @property
    def closed(self) -> bool:
        """Whether it is complete."""
        return self.final_row >= 0 and not self.missing

    def add(
        self, index: np.ndarray, ids: np.ndarray, flags: np.ndarray, versions: np.ndarray
    ) -> np.ndarray:
        """Note rows in order of index, all [n]; returns which of them do not belong [n]."""
        bad = np.zeros(len(index), np.bool_)
        cuts = np.flatnonzero(np.diff(index) != 1) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(index)], strict=True):
            part = slice(first, last)
            bad[part] = self._add(int(index[first]), ids[part], flags[part], versions[part])
        self.info = None
        return bad

    def _add(self, first: int, ids: np.ndarray, flags: np.ndarray, versions: np.ndarray) -> bool:
        end = first + len(ids)
        final = int(ids[-1]) if flags[-1] & _FINAL else -1
        steps = len(ids) - (final >= 0)
        if (flags[:steps] & _FINAL).any() or (final >= 0 and self.final_row >= 0):
            return True
        last = first + steps
        if first < self.next_index:
            # Steps that fill a gap; a final observation is never before another step.
            if final >= 0 or not self.missing.issuperset(range(first, end)):
                return True
            self.missing.difference_update(range(first, end))
        else:
            if self.final_row >= 0:
                return True
            self.missing.update(range(self.next_index, first))
            self.next_index = last
        self.final_row = max(self.final_row, final)
        if steps:
            self._note(first, ids[:steps], flags[:steps], versions[:steps])
        return False

    def _note(self, first: int, ids: np.ndarray, flags: np.ndarray, versions: np.ndarray) -> None:
        self.pieces.append((first, ids))
        self.success |= bool((flags & _SUCCESS).any())
        self.interventions += int((flags >> _INTERVENTION & 1).sum())
        low, high = int(versions.min()), int(versions.max())
        if self.versions is not None:
            low, high = min(low, self.versions[0]), max(high, self.versions[1])
        self.versions = low, high

    @property
    def ids(self) -> np.ndarray:
        """Row ids of all that is there, the final observation included."""
        parts = [np.empty(0, np.int64), *(ids for _, ids in self.pieces)]
        final = [np.array([self.final_row])] if self.final_row >= 0 else []
        return np.concatenate([*parts, *final])

    def make_info(self) -> EpisodeInfo:
        """What is known of it now."""
        if self.info is None:
            rows = np.full(self.next_index, -1, np.int64)
            for first, ids in self.pieces:
                rows[first : first + len(ids)] = ids
            rows.flags.writeable = False
            self.info = EpisodeInfo(
                *self.key,
                rows,
                self.final_row,
                self.closed,
                self.success,
                self.interventions,
                self.versions or (-1, -1),
            )
        return self.info

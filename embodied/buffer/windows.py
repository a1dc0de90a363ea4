"""Windows of history and future actions around a step, and the flat index behind them.

Legend: B batch, To history, H horizon, D action.
"""

import msgspec
import numpy as np

from embodied.core.errors import ConfigError


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sample consists of. n_obs_steps: To. horizon: H. observation_keys: which to take."""

    n_obs_steps: int
    horizon: int
    observation_keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.n_obs_steps < 1 or self.horizon < 1:
            raise ConfigError(
                f"n_obs_steps is {self.n_obs_steps} and horizon {self.horizon}; both must be at "
                "least 1"
            )


class GrowingArray:
    """A one-dimensional array that grows at its end."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data = np.empty(1024, dtype)
        self._size = 0

    def extend(self, values: np.ndarray) -> None:
        """Append the values."""
        end = self._size + len(values)
        if end > len(self._data):
            grown = np.empty(max(end, 2 * len(self._data)), self._data.dtype)
            grown[: self._size] = self._data[: self._size]
            self._data = grown
        self._data[self._size : end] = values
        self._size = end

    @property
    def view(self) -> np.ndarray:
        """What it holds now."""
        return self._data[: self._size]

    def __len__(self) -> int:
        return self._size


class WindowIndex:
    """The steps of complete episodes, one episode after the other, though streams interleave.

    A position counts steps in that order. order[p]: row of the step in the reader's columns.
    starts[p], ends[p]: first position of its episode, and the one behind its last. selected[p]:
    whether it was selected. candidates: positions of selected steps.
    """

    def __init__(self) -> None:
        self._order = GrowingArray(np.int64)
        self._starts = GrowingArray(np.int64)
        self._ends = GrowingArray(np.int64)
        self._selected = GrowingArray(np.bool_)
        self._candidates = GrowingArray(np.int64)

    def add(self, rows: np.ndarray, selected: np.ndarray) -> None:
        """Add an episode: its rows in order of index, and which of them are selected."""
        start, length = len(self._order), len(rows)
        self._order.extend(rows)
        self._starts.extend(np.full(length, start))
        self._ends.extend(np.full(length, start + length))
        self._selected.extend(selected)
        self._candidates.extend(start + np.flatnonzero(selected))

    @property
    def candidates(self) -> np.ndarray:
        """Positions of selected steps: int64 [n]."""
        return self._candidates.view

    @property
    def rows(self) -> np.ndarray:
        """Rows of selected steps: int64 [n]."""
        return self._order.view[self.candidates]

    def history(self, positions: np.ndarray, n_steps: int) -> np.ndarray:
        """Rows [B, To] up to and with each position; the episode's first one is repeated."""
        at = positions[:, None] + np.arange(1 - n_steps, 1)
        return self._order.view[np.maximum(at, self._starts.view[positions][:, None])]

    def future(
        self, positions: np.ndarray, horizon: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [B, H] from each position on, the episode's last one being repeated; whether each
        is behind the end [B, H]; whether each is selected [B, H]."""
        at = positions[:, None] + np.arange(horizon)
        ends = self._ends.view[positions][:, None]
        beyond = at >= ends
        at = np.minimum(at, ends - 1)
        return self._order.view[at], beyond, self._selected.view[at]

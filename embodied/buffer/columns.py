"""Steps in RAM as growing contiguous columns, one row per record in order of arrival."""

from collections.abc import Mapping

import numpy as np

from embodied.buffer.records import FLAGS, Schema, StepHeader, layout_of
from embodied.core.errors import ConfigError

_FIRST_ROWS = 1024


class Columns:
    """One array per observation key, action, reward, flag, and place in the log.

    ram_bytes bounds what all columns occupy together (while one grows, its old copy is extra).
    """

    def __init__(self, schema: Schema, ram_bytes: int) -> None:
        self._layout = layout_of(schema)
        kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            name: (dtype, shape) for name, dtype, shape, _, _ in self._layout.parts
        }
        kinds["reward"] = (np.dtype(np.float32), ())
        kinds["policy_version"] = (np.dtype(np.int64), ())
        kinds |= {name: (np.dtype(np.bool_), ()) for name in FLAGS}
        self._arrays = {
            name: np.empty((0, *shape), dtype) for name, (dtype, shape) in kinds.items()
        }
        # Where each row lies in the log, so that large features can be read from there instead.
        self._places = np.empty((0, 2), np.int64)
        self._ram_bytes = ram_bytes
        self._capacity = 0
        self.row_bytes = self._places.itemsize * 2 + sum(
            array.itemsize * int(np.prod(array.shape[1:])) for array in self._arrays.values()
        )
        self.num_rows = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the columns occupy, unused capacity included."""
        return self._capacity * self.row_bytes

    def append(
        self,
        header: StepHeader,
        observation: Mapping[str, np.ndarray],
        action: np.ndarray,
        place: tuple[int, int],
    ) -> int:
        """Add a row; place: segment and offset. Returns the row; ConfigError beyond ram_bytes."""
        if self.num_rows == self._capacity:
            self._grow()
        row = self.num_rows
        arrays = self._arrays
        for name, value in observation.items():
            arrays[name][row] = value
        arrays["action"][row] = action
        arrays["reward"][row] = header.reward
        arrays["policy_version"][row] = header.policy_version
        for bit, name in enumerate(FLAGS):
            arrays[name][row] = header.flags >> bit & 1
        self._places[row] = place
        self.num_rows += 1
        return row

    def _grow(self) -> None:
        capacity = min(max(_FIRST_ROWS, 2 * self._capacity), self._ram_bytes // self.row_bytes)
        if capacity <= self._capacity:
            raise ConfigError(
                f"the replay's steps need more than ram_bytes={self._ram_bytes} bytes of RAM: "
                f"{self._capacity} steps of {self.row_bytes} bytes fit; raise ram_bytes or store "
                "smaller observations"
            )
        for name, array in self._arrays.items():
            self._arrays[name] = _grown(array, capacity, self.num_rows)
        self._places = _grown(self._places, capacity, self.num_rows)
        self._capacity = capacity

    def __getitem__(self, name: str) -> np.ndarray:
        """Read-only view [num_rows, ...] of a column; it does not follow later rows."""
        view = self._arrays[name][: self.num_rows]
        view.flags.writeable = False
        return view

    @property
    def places(self) -> np.ndarray:
        """Segment and offset of each row's record: int64 [num_rows, 2]."""
        return self._places[: self.num_rows]


def _grown(array: np.ndarray, capacity: int, used: int) -> np.ndarray:
    grown = np.empty((capacity, *array.shape[1:]), array.dtype)
    grown[:used] = array[:used]
    return grown

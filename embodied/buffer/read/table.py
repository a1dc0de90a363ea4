"""All steps of one schema in memory: their rows, growing, with places that are used again."""

import numpy as np

from embodied.buffer.steps.blocks import row_dtype
from embodied.buffer.steps.schema import FLAGS, Schema, layout_of
from embodied.core.errors import ConfigError

TABLE_BITS = 40
SLOT_MASK = (1 << TABLE_BITS) - 1

_FIRST_ROWS = 1024


class Table:
    """Rows by slot. A row id is table number << 40 | slot.

    rows: bytes [n, row]. segment, owner [n]: where the record lies, and whose step it is (a number
    of the reader's). verified [n]: whether the record's checksum was. asked [n]: when its large
    features were asked for last (the cache's tick; negative: not read since; 0: never).
    """

    def __init__(self, schema: Schema, number: int) -> None:
        self.schema = schema
        self.layout = layout_of(schema)
        self.large_names = frozenset(f.name for f in (*self.layout.large, *self.layout.encoded))
        self.base = number << TABLE_BITS
        self.dtype = row_dtype(schema)
        self.rows = np.zeros((0, self.dtype.itemsize), np.uint8)
        self.segment = np.zeros(0, np.int32)
        self.owner = np.zeros(0, np.int32)
        self.verified = np.zeros(0, np.bool_)
        self.asked = np.zeros(0, np.int64)
        self._used = 0
        self._free: list[np.ndarray] = []
        self._refresh_view()

    def _refresh_view(self) -> None:
        self.view = self.rows.view(self.dtype)[:, 0] if len(self.rows) else self._empty()
        self.columns = {name: self.view[name] for name in self.dtype.names or ()}

    def _empty(self) -> np.ndarray:
        return np.zeros(0, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of memory a step takes up."""
        return self.dtype.itemsize + 17

    @property
    def nbytes(self) -> int:
        """Bytes that the table occupies, unused capacity included."""
        return len(self.rows) * self.row_bytes

    def allocate(self, n: int) -> np.ndarray:
        """Slots for n rows: int64 [n]; freed ones first."""
        parts: list[np.ndarray] = []
        while n and self._free:
            part = self._free.pop()
            if len(part) > n:
                self._free.append(part[n:])
                part = part[:n]
            parts.append(part)
            n -= len(part)
        if n:
            self._reserve(self._used + n)
            parts.append(np.arange(self._used, self._used + n))
            self._used += n
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def _reserve(self, wanted: int) -> None:
        capacity = len(self.rows)
        if wanted <= capacity:
            return
        capacity = max(wanted + wanted // 16, _FIRST_ROWS, capacity + capacity // 2)
        for name in ("rows", "segment", "owner", "verified", "asked"):
            old = getattr(self, name)
            grown = np.zeros((capacity, *old.shape[1:]), old.dtype)
            grown[: self._used] = old[: self._used]
            setattr(self, name, grown)
        self._refresh_view()

    def put(self, slots: np.ndarray, rows: np.ndarray, segment: int, *, read: bool) -> None:
        """Write rows, bytes [n, row], to slots. read: their records have been, and are whole."""
        where: np.ndarray | slice = slots
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            where = slice(int(slots[0]), int(slots[-1]) + 1)
        self.rows[where] = rows
        self.segment[where] = segment
        self.verified[where] = read
        self.asked[where] = read

    def release(self, slots: np.ndarray) -> None:
        """Let slots be used again."""
        self.owner[slots] = -1
        self._free.append(slots)

    @property
    def owners(self) -> list[int]:
        """Whose steps there are."""
        owner = self.owner[: self._used]
        return np.unique(owner[owner >= 0]).tolist()

    def slots_of(self, segment: int) -> np.ndarray:
        """Used slots whose records lie in a segment."""
        used = slice(0, self._used)
        return np.flatnonzero((self.segment[used] == segment) & (self.owner[used] >= 0))

    def take(self, name: str, slots: np.ndarray) -> np.ndarray:
        """A column's values [n, ...]. Raises ConfigError if there is no such small column."""
        if name in FLAGS:
            return (self.columns[".flags"][slots] >> FLAGS.index(name) & 1).astype(np.bool_)
        column = self.columns.get(name)
        if column is None:
            raise ConfigError(f"no column '{name}'")
        return column[slots]

    def ends(self, slots: np.ndarray) -> np.ndarray:
        """Where the record of each slot ends: int64 [n]."""
        ends = self.columns[".offset"][slots].astype(np.int64) + self.layout.nbytes
        for feature in self.layout.encoded:
            size = self.columns[f".size/{feature.name}"][slots].astype(np.int64)
            ends += size + -size % 8
        return ends

    def stretches(self, slots: np.ndarray, names: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        """What must be read of each slot's record for large features: starts, ends, int64 [n].

        All of the record, unless its checksum was verified before.
        """
        offset = self.columns[".offset"][slots].astype(np.int64)
        parts = [part for part in self.layout.large if part.name in names]
        first = min((part.start for part in parts), default=self.layout.nbytes)
        if any(feature.name in names for feature in self.layout.encoded):
            stops = self.ends(slots)
        else:
            stops = offset + max(part.start + part.nbytes for part in parts)
        starts = offset + first
        new = ~self.verified[slots]
        if new.any():
            starts = np.where(new, self.columns[".record"][slots], starts)
            stops = np.where(new, self.ends(slots), stops)
        return starts, stops

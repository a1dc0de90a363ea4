"""From rows to arrays: small features out of tables, large ones out of the segments' records."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embodied.buffer.log.segments import RECORD_HEADER, parse
from embodied.buffer.read.cache import SegmentCache
from embodied.buffer.read.table import SLOT_MASK, TABLE_BITS, Table
from embodied.buffer.steps import codecs
from embodied.buffer.steps.schema import Feature
from embodied.comms.codec import DTYPES
from embodied.core.errors import ConfigError, CorruptDataError, SpecError

_PORTIONS = 8


class DamagedRowsError(CorruptDataError):
    """Records that were asked for are damaged. Their episodes are removed then: draw again.

    rows: their row ids.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


def by_table(
    tables: Sequence[Table], ids: np.ndarray
) -> Iterator[tuple[Table, np.ndarray | None, np.ndarray]]:
    """Each table that row ids [n] are in, which of them are (None: all), and their slots."""
    if not ids.size:
        return
    if ids.min() < 0:
        raise ConfigError("a row id is negative: the step is missing")
    numbers = ids >> TABLE_BITS
    first = int(numbers[0])
    if (numbers == first).all():
        yield tables[first], None, ids & SLOT_MASK
        return
    for number in np.unique(numbers).tolist():
        where = np.flatnonzero(numbers == number)
        yield tables[number], where, ids[where] & SLOT_MASK


def target_array(
    name: str, feature: Feature, rows: np.ndarray, out: Mapping[str, np.ndarray] | None
) -> np.ndarray:
    """Where a column goes: an array of `out` if it has one, which must fit, else a new one."""
    shape = (*rows.shape, *feature.shape)
    array = None if out is None else out.get(name)
    if array is None:
        return np.empty(shape, DTYPES[feature.dtype])
    if array.shape != shape or array.dtype != feature.dtype or not array.flags.c_contiguous:
        raise SpecError(
            f"out['{name}'] is {array.dtype} {array.shape}; {feature.dtype} {shape}, "
            "C-contiguous, is right"
        )
    return array


class RecordGather:
    """Fills arrays with features of steps; each record's checksum is verified when first read."""

    def __init__(self, cache: SegmentCache) -> None:
        self._cache = cache

    def fill(
        self,
        table: Table,
        slots: np.ndarray,
        where: np.ndarray | None,
        result: Mapping[str, np.ndarray],
    ) -> None:
        """Write the slots' features to the places `where` (None: in order) of each array.

        Arrays are [*rows, *feature shape] and C-contiguous; places count rows in C order. Raises
        DamagedRowsError.
        """
        large: dict[str, np.ndarray] = {}
        for name, array in result.items():
            if name in table.large_names:
                large[name] = array
                continue
            values = table.take(name, slots)
            if where is None:
                array[...] = values.reshape(array.shape)
            else:
                array.reshape(-1, *values.shape[1:])[where] = values
        if large:
            names = frozenset(large)
            places = range(len(slots)) if where is None else where.tolist()
            asked = table.asked[slots]
            if self._cache.settled(asked):
                self._cache.stats.hits += int(np.count_nonzero(asked > 0))
            else:
                self._ask(table, slots, names)
            self._cache.wait(table.asked[slots])
            with self._cache.watched():
                for part in self._portions(table, slots):
                    self._admit(table, slots[part], names)
                    self._verify(table, slots[part])
                    self._fill_large(table, slots[part], places[part], large)

    def _portions(self, table: Table, slots: np.ndarray) -> list[slice]:
        """The rows in portions, of which each fits into the budget several times."""
        if not self._cache.bounded:
            return [slice(0, len(slots))]
        record = int((table.ends(slots) - table.columns[".record"][slots]).max(initial=1))
        step = max(1, self._cache.budget_bytes // _PORTIONS // record)
        return [slice(first, first + step) for first in range(0, len(slots), step)]

    def request(self, table: Table, slots: np.ndarray, names: frozenset[str]) -> None:
        """Begin to read these large features where they are not in memory."""
        if names and not self._cache.settled(table.asked[slots]):
            self._ask(table, slots, names)

    def _ask(self, table: Table, slots: np.ndarray, names: frozenset[str]) -> None:
        starts, stops = table.stretches(slots, names)
        table.asked[slots] = self._cache.request(
            table.segment[slots], starts, stops, table.asked[slots]
        )

    def _admit(self, table: Table, slots: np.ndarray, names: frozenset[str]) -> None:
        asked = table.asked[slots]
        if self._cache.bounded:
            starts, stops = table.stretches(slots, names)
            asked = self._cache.admit(table.segment[slots], starts, stops, asked)
        table.asked[slots] = np.abs(asked)

    def _verify(self, table: Table, slots: np.ndarray) -> None:
        new = slots[~table.verified[slots]]
        if not len(new):
            return
        new = np.unique(new)
        bad: list[int] = []
        for slot, number, start, end in zip(
            new.tolist(),
            table.segment[new].tolist(),
            table.columns[".record"][new].tolist(),
            table.ends(new).tolist(),
            strict=True,
        ):
            record = parse(self._cache.view(number)[start:end], 0, number, start)
            if record is None or record.payload.nbytes != end - start - RECORD_HEADER.size:
                bad.append(slot)
        table.verified[new] = True
        if bad:
            numbers = sorted({f"{n:08d}.seg" for n in table.segment[bad].tolist()})
            raise DamagedRowsError(
                f"{len(bad)} records are damaged in {', '.join(numbers)}; their episodes are left "
                "out. `embodied buffer verify` names them",
                [table.base | slot for slot in bad],
            )

    def _fill_large(
        self,
        table: Table,
        slots: np.ndarray,
        places: Sequence[int],
        result: Mapping[str, np.ndarray],
    ) -> None:
        numbers = table.segment[slots]
        views = {number: self._cache.view(number) for number in np.unique(numbers).tolist()}
        sources = [views[number] for number in numbers.tolist()]
        offsets = table.columns[".offset"][slots].astype(np.int64)
        for part in table.layout.large:
            if part.name in result:
                n, target = part.nbytes, result[part.name].data.cast("B")
                begins = (offsets + part.start).tolist()
                for source, at, place in zip(sources, begins, places, strict=True):
                    target[place * n : place * n + n] = source[at : at + n]
        at = offsets + table.layout.nbytes
        for feature in table.layout.encoded:
            sizes = table.columns[f".size/{feature.name}"][slots].astype(np.int64)
            if feature.name in result:
                target = result[feature.name].reshape(-1, *feature.shape)
                dtype = DTYPES[feature.dtype]
                stretches = zip(
                    slots.tolist(), sources, at.tolist(), sizes.tolist(), places, strict=True
                )
                for slot, source, start, size, place in stretches:
                    blob = source[start : start + size]
                    try:
                        target[place] = codecs.decode(blob, feature.codec, dtype, feature.shape)
                    except CorruptDataError as error:
                        message = f"{feature.name} cannot be decoded: {error}"
                        raise DamagedRowsError(message, [table.base | slot]) from error
            at += sizes + -sizes % 8

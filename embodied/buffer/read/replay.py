"""A reader of a replay: follows the log, knows every step's row, reads pictures when asked to."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from embodied.buffer.log.segments import Record, SegmentFile, list_segments, segment_path
from embodied.buffer.log.tail import LogReader
from embodied.buffer.read.cache import CacheStats, SegmentCache
from embodied.buffer.read.episodes import EpisodeInfo, OpenEpisode
from embodied.buffer.read.gather import DamagedRowsError, RecordGather, by_table, target_array
from embodied.buffer.read.table import SLOT_MASK, TABLE_BITS, Table
from embodied.buffer.steps.blocks import Block, EpisodeKey, Rows, block_path
from embodied.buffer.steps.chunks import load_chunks
from embodied.buffer.steps.records import Control
from embodied.buffer.steps.schema import FLAGS, Feature, Schema
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError

__all__ = ["DamagedRowsError", "EpisodeInfo", "ReplayReader"]

RAM_BYTES = 2 << 30

_COLUMNS = {
    "reward": Feature("reward", "float32", ()),
    "policy_version": Feature("policy_version", "int64", ()),
    "t_ns": Feature("t_ns", "int64", ()),
    **{flag: Feature(flag, "bool", ()) for flag in FLAGS},
}


class ReplayReader:
    """Follows the log in `path`, which another process may be writing, or not have begun yet.

    Index and small features of all steps are in memory; large features are read from the segments
    and stay in memory while they fit. ram_bytes: budget of both together. schemas: of everything
    seen, in order. num_steps: there now; num_seen: ever, deleted ones included. damaged: records
    that could not be used, as (segment, offset); episodes that lost a step to them never close.
    Row ids are good until the episode is removed. Raises ConfigError, for good, if ram_bytes are
    not enough for index and small features.
    """

    def __init__(self, path: Path, ram_bytes: int = RAM_BYTES) -> None:
        self._path = Path(path)
        self._ram_bytes = ram_bytes
        self._log = LogReader(self._path, self._skip, self._resume)
        self._live: Block | None = None
        self._taken: dict[int, int] = {}
        self._tables: list[Table] = []
        self._table_of: dict[int, Table] = {}
        self._features: dict[tuple[str | int, ...], Feature] = {}
        self._cache = SegmentCache(self._path, ram_bytes)
        self._records = RecordGather(self._cache)
        self._segments: set[int] = set()
        self._episodes: dict[tuple[str, int], OpenEpisode] = {}
        self._owners: list[OpenEpisode] = []
        self._closed: list[EpisodeInfo] = []
        self._removed: list[tuple[str, int]] = []
        self._gone: set[tuple[str, int]] = set()
        self._bad: list[tuple[int, int]] = []
        self._failure: EmbodiedError | None = None
        self.num_steps = 0
        self.num_seen = 0

    def refresh(self) -> int:
        """Take over all records that have come; returns how many steps are new.

        Steps of deleted segments leave; so do episodes that lost a step with them.
        """
        if self._failure is not None:
            raise self._failure
        before = self.num_seen
        try:
            missing = self._segments.difference(list_segments(self._path))
            self._forget({number for number in missing if not self._exists(number)})
            for record in self._log.poll():
                self._take(record)
            self._flush_live()
            self._check_budget()
        except ConfigError as error:
            self._failure = error
            raise
        return self.num_seen - before

    def _exists(self, number: int) -> bool:
        """Whether a segment is there, though a listing may have missed it as it was renamed."""
        return any(segment_path(self._path, number, sealed=s).exists() for s in (False, True))

    def _skip(self, number: int) -> bool:
        """Take over a sealed segment from its block file, if that is whole."""
        path = block_path(self._path, number)
        try:
            size = segment_path(self._path, number, sealed=True).stat().st_size
            block = Block.load(path, number, size)
        except (CorruptDataError, OSError):
            return False
        self._flush_live()
        self._live = None
        self._bad += [(number, offset) for offset in block.damaged]
        try:
            self._take_block(block, sealed=True, read=False)
        except FileNotFoundError:  # deleted in this moment
            self._forget({number})
        return True

    def _resume(self, file: SegmentFile) -> tuple[int, int]:
        """Take over an open segment as far as its chunks go."""
        self._flush_live()
        (self._live, covered), self._taken = load_chunks(self._path, file), {}
        self._bad += [(file.number, offset) for offset in self._live.damaged]
        self._flush_live(read=False)
        return covered.end, covered.last_seq

    def _take(self, record: Record) -> None:
        if self._live is None or self._live.segment != record.segment:
            self._flush_live()
            self._live = Block(record.segment)
            self._taken = {}
        try:
            self._live.add(record)
        except CorruptDataError:
            self._bad.append((record.segment, record.offset))

    def _flush_live(self, *, read: bool = True) -> None:
        if self._live is not None:
            try:
                self._take_block(self._live, sealed=False, read=read)
            except FileNotFoundError:  # sealed and deleted since it was read
                self._forget({self._live.segment})

    def _take_block(self, block: Block, *, sealed: bool, read: bool) -> None:
        """Take over new rows and controls. read: whether the rows' records have just been."""
        self._segments.add(block.segment)
        taken = self._taken if block is self._live else {}
        for number, rows in block.rows.items():
            table = self._table(number, rows.schema)
            start = taken.get(number, 0)
            if len(rows) > start:
                if table.large_names and not self._cache.covers(block.segment):
                    self._cache.open(block.segment, sealed=sealed)
                self._ingest(block, table, rows, start, read=read)
                taken[number] = len(rows)
        for control in block.controls:
            self._obey(control)
        block.controls = []

    def _table(self, number: int, schema: Schema) -> Table:
        table = self._table_of.get(number)
        if table is None:
            table = self._table_of[number] = Table(schema, len(self._tables))
            self._tables.append(table)
        return table

    def _ingest(self, block: Block, table: Table, rows: Rows, start: int, *, read: bool) -> None:
        """Take over rows from `start` on. read: whether their records have just been."""
        view = rows.heads(start)
        ordinals, index = view[".episode"].astype(np.int64), view[".index"].astype(np.int64)
        flags, versions = view[".flags"].copy(), view["policy_version"].copy()
        slots = table.allocate(len(view))
        table.put(slots, rows.bytes[start:], block.segment, read=read)
        key = (ordinals << 32) | index
        if (np.diff(key) <= 0).any():
            order = np.argsort(key, kind="stable")
            ordinals, index, slots = ordinals[order], index[order], slots[order]
            flags, versions = flags[order], versions[order]
        ids = slots | table.base
        cuts = (np.flatnonzero(np.diff(ordinals)) + 1).tolist()
        for first, last in zip([0, *cuts], [*cuts, len(view)], strict=True):
            part = slice(first, last)
            episode = self._episode(block.episodes[int(ordinals[first])])
            if episode is None:
                table.release(slots[part])
                continue
            was_closed = episode.closed
            bad = episode.add(index[part], ids[part], flags[part], versions[part])
            table.owner[slots[part]] = episode.owner
            if bad.any():
                lost = slots[part][bad]
                self._bad += [(block.segment, int(o)) for o in table.columns[".record"][lost]]
                table.release(lost)
            finals = (flags[part] >> FLAGS.index("final") & 1).astype(np.bool_)
            new = int((~bad & ~finals).sum())
            self.num_steps += new
            self.num_seen += new
            if episode.closed and not was_closed:
                self._closed.append(episode.make_info())

    def _episode(self, key: EpisodeKey) -> OpenEpisode | None:
        name = key.stream, key.number
        if name in self._gone:
            return None
        episode = self._episodes.get(name)
        if episode is None:
            episode = self._episodes[name] = OpenEpisode(key, len(self._owners))
            self._owners.append(episode)
        return episode

    def _obey(self, control: Control) -> None:
        for key in control.deleted:
            self._remove(key)

    def _remove(self, key: tuple[str, int]) -> None:
        self._gone.add(key)
        episode = self._episodes.pop(key, None)
        if episode is None:
            return
        ids = episode.ids
        self.num_steps -= len(ids) - (episode.final_row >= 0)
        for table in self._tables:
            table.release(ids[ids >> TABLE_BITS == table.base >> TABLE_BITS] & SLOT_MASK)
        if episode.closed:
            self._removed.append(key)
        episode.pieces, episode.info = [], None

    def _forget(self, segments: set[int]) -> None:
        for number in segments:
            for table in self._tables:
                for owner in np.unique(table.owner[table.slots_of(number)]).tolist():
                    self._remove(self._owners[owner].make_info().key)
            self._cache.close(number)
            self._segments.discard(number)

    def _check_budget(self) -> None:
        used = sum(table.nbytes for table in self._tables)
        if used > self._ram_bytes:
            raise ConfigError(
                f"index and small features of the {self.num_steps} steps in {self._path} take "
                f"{used} bytes of RAM, more than ram_bytes={self._ram_bytes}; raise it "
                "(buffer.ram_mib), or keep less: features above 4 KiB are not counted here"
            )
        self._cache.budget_bytes = self._ram_bytes - used

    @property
    def schemas(self) -> list[Schema]:
        """Schemas of what was seen, in order of their appearance."""
        return [table.schema for table in self._tables]

    @property
    def schema(self) -> Schema | None:
        """The schema of all steps, None before the first. Raises SpecError if there are several."""
        for table in self._tables[1:]:
            self._tables[0].schema.check_same_arrays(
                table.schema, f"a recording in {self._path}", "another one"
            )
        return self._tables[0].schema if self._tables else None

    def feature(self, name: str) -> Feature:
        """Dtype and shape of a column, the same in all recordings.

        Raises ConfigError that says which recordings lack it, or differ.
        """
        return self._feature(name, self._tables)

    def _feature(self, name: str, tables: Sequence[Table]) -> Feature:
        """The feature, as it is in all of these tables."""
        if name in _COLUMNS:
            return _COLUMNS[name]
        key = name, *(table.base for table in tables)
        if key not in self._features:
            self._features[key] = self._common(name, tables)
        return self._features[key]

    def _common(self, name: str, tables: Sequence[Table]) -> Feature:
        found = [(table, table.schema.feature(name)) for table in tables]
        have = [(t, f) for t, f in found if f is not None]
        if not have:
            known = sorted({f.name for t in tables for f in t.schema.observation})
            raise ConfigError(
                f"'{name}' is not recorded in {self._path}; known: {', '.join(known) or 'nothing'}"
            )
        lacking = [t for t, f in found if f is None]
        if lacking:
            raise ConfigError(
                f"'{name}' is recorded by {self._streams(have[0][0])}, not by "
                f"{self._streams(lacking[0])}; learn from one of them, or without '{name}'"
            )
        first = have[0][1]
        for table, feature in have[1:]:
            if (feature.dtype, feature.shape) != (first.dtype, first.shape):
                raise ConfigError(
                    f"'{name}' is {first} in {self._streams(have[0][0])} and {feature} in "
                    f"{self._streams(table)}: these recordings cannot be mixed"
                )
        return first

    def _streams(self, table: Table) -> str:
        names = sorted({self._owners[owner].key.stream for owner in table.owners})
        return f"stream{'s' * (len(names) > 1)} {', '.join(names[:3])}{' …' * (len(names) > 3)}"

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column at row ids of any shape: [*rows.shape, *feature.shape]."""
        return self.gather((name,), rows)[name]

    def gather(
        self, names: Sequence[str], rows: np.ndarray, out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Columns at row ids of any shape, each [*rows.shape, *feature.shape].

        names: observation keys, action, reward, policy_version, t_ns, flags. out: arrays to fill,
        C-contiguous. Raises ConfigError for unknown names, DamagedRowsError for damaged records.
        """
        parts = list(by_table(self._tables, rows.reshape(-1)))
        tables = [table for table, _, _ in parts] or self._tables
        result = {n: target_array(n, self._feature(n, tables), rows, out) for n in names}
        try:
            for table, where, slots in parts:
                self._records.fill(table, slots, where, result)
        except DamagedRowsError as error:
            self._drop(error.rows)
            raise
        return result

    def prefetch(self, names: Sequence[str], rows: np.ndarray) -> None:
        """Begin to read what gather will want; returns at once."""
        for table, _, slots in by_table(self._tables, rows.reshape(-1)):
            self._records.request(table, slots, table.large_names.intersection(names))

    def _drop(self, rows: list[int]) -> None:
        """Remove the episodes of rows whose records are damaged."""
        for table, _, slots in by_table(self._tables, np.array(rows)):
            places = zip(table.segment[slots], table.columns[".record"][slots], strict=True)
            self._bad += [(int(segment), int(offset)) for segment, offset in places]
            for owner in np.unique(table.owner[slots]).tolist():
                self._remove(self._owners[owner].make_info().key)

    def steps(self, episode: EpisodeInfo) -> Iterator[Step]:
        """The steps of a closed episode, read back whole, the final observation included."""
        rows = np.append(episode.rows, episode.final_row)
        table = self._tables[int(rows[0]) >> TABLE_BITS]
        keys = [feature.name for feature in table.schema.observation]
        self.prefetch(keys, rows)
        for index, row in enumerate(rows):
            found = self.gather((*keys, "action", *_COLUMNS), row)
            yield Step(
                stream=episode.stream,
                episode=episode.episode,
                index=index,
                observation={key: found[key] for key in keys},
                action=found["action"],
                reward=float(found["reward"]),
                policy_version=int(found["policy_version"]),
                task=episode.task,
                seed=episode.seed,
                t_ns=int(found["t_ns"]),
                **{flag: bool(found[flag]) for flag in FLAGS},
            )

    @property
    def cache_stats(self) -> CacheStats:
        """Hits, misses and bytes of large features."""
        return self._cache.stats

    @property
    def damaged(self) -> list[tuple[int, int]]:
        """(segment, offset) of everything in the log that could not be used."""
        return sorted(self._log.damaged + self._bad)

    @property
    def num_episodes(self) -> int:
        """Episodes of which at least one step is there, open ones included."""
        return len(self._episodes)

    @property
    def num_closed(self) -> int:
        """Episodes that are complete."""
        return len(self._closed) - len(self._removed)

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """All episodes in order of their first step's arrival."""
        return [episode.make_info() for episode in self._episodes.values()]

    def finished(self) -> list[EpisodeInfo]:
        """Closed episodes that are there, in the order in which they closed."""
        removed = set(self._removed)
        return [episode for episode in self._closed if episode.key not in removed]

    def closed_episodes(self, since: int = 0) -> list[EpisodeInfo]:
        """All that ever closed, in the order in which they did, without the first `since`.

        Episodes that were removed since are among them: see removed_episodes.
        """
        return self._closed[since:]

    def removed_episodes(self, since: int = 0) -> list[tuple[str, int]]:
        """(stream, episode) of closed ones that were removed, without the first `since`."""
        return self._removed[since:]

    def close(self) -> None:
        """Stop following the log; safe to call twice."""
        self._log.close()
        self._cache.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

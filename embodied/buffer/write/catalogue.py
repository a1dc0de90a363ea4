"""The catalogue of a replay: an SQLite file to ask what is in its sealed segments.

It follows from the segments and is made again from them if it is lost or damaged; only the
consumers' cursors are its own, and a consumer without one begins from the start.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from embodied.buffer.steps.blocks import Block
from embodied.buffer.steps.schema import FLAGS
from embodied.core.errors import RunInUseError, StorageFullError

NAME = "catalogue.sqlite"
_FORMAT = 1
_BUSY_S = 0.5
_TABLES = """
CREATE TABLE segments (number INTEGER PRIMARY KEY, bytes INTEGER, next_seq INTEGER,
    damaged INTEGER);
CREATE TABLE parts (segment INTEGER, stream TEXT, number INTEGER, task TEXT, seed INTEGER,
    steps INTEGER, final INTEGER, success INTEGER, interventions INTEGER,
    low_version INTEGER, high_version INTEGER, PRIMARY KEY (segment, stream, number));
CREATE INDEX parts_of_episode ON parts (stream, number);
CREATE TABLE versions (segment INTEGER, version INTEGER, steps INTEGER,
    PRIMARY KEY (segment, version));
CREATE TABLE tombstones (stream TEXT, number INTEGER, PRIMARY KEY (stream, number));
CREATE TABLE cursors (consumer TEXT PRIMARY KEY, seq INTEGER);
CREATE VIEW episodes AS SELECT stream, number, task, seed, sum(steps) AS steps,
    max(final) AS closed, max(success) AS success, sum(interventions) AS interventions,
    min(low_version) AS low_version, max(high_version) AS high_version,
    min(segment) AS first_segment, max(segment) AS last_segment
    FROM parts WHERE NOT EXISTS (SELECT 1 FROM tombstones t
        WHERE t.stream = parts.stream AND t.number = parts.number)
    GROUP BY stream, number;
"""


_DEFINITIONS = "SELECT name, sql FROM sqlite_master ORDER BY name"
_NOT_THE_FILE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)
_NO_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


@cache
def _right_definitions() -> list[tuple[str, str | None]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_TABLES)
        return db.execute(_DEFINITIONS).fetchall()


class TaskCounts(NamedTuple):
    """What there is of one task, complete episodes and their steps."""

    task: str
    episodes: int
    steps: int
    successes: int


class Catalogue:
    """Opens, or makes, the catalogue in a replay's directory. For its one writer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        with _full_disk_named(self._path):
            try:
                self._db = self._open()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_THE_FILE:
                    raise
                self._discard()
                self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, _BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found != _FORMAT:
                if found or db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise sqlite3.DatabaseError(f"catalogue format {found}")
                db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={_FORMAT}; COMMIT;")
            elif db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("damaged")
            elif db.execute(_DEFINITIONS).fetchall() != _right_definitions():
                raise sqlite3.DatabaseError("damaged tables")
        except BaseException:
            db.close()
            raise
        return db

    def _discard(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(NAME + suffix).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _full_disk_named(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def note(self, block: Block, size: int) -> None:
        """Take over a sealed segment of this many bytes, in place of what was known of it."""
        with self._transaction() as db:
            self._drop(block.segment)
            row = (block.segment, size, block.next_seq, len(block.damaged))
            db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", row)
            db.executemany(
                "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                _parts(block),
            )
            db.executemany("INSERT INTO versions VALUES (?, ?, ?)", _versions(block))
            for control in block.controls:
                db.executemany("INSERT OR IGNORE INTO tombstones VALUES (?, ?)", control.deleted)

    def remove(self, segment: int) -> None:
        """Forget a deleted segment."""
        with self._transaction():
            self._drop(segment)

    def _drop(self, segment: int) -> None:
        self._db.execute("DELETE FROM segments WHERE number = ?", (segment,))
        for table in ("parts", "versions"):
            self._db.execute(f"DELETE FROM {table} WHERE segment = ?", (segment,))

    def segments(self) -> dict[int, int]:
        """Number → bytes of every segment that it knows."""
        return dict(self._db.execute("SELECT number, bytes FROM segments").fetchall())

    def tasks(self) -> list[TaskCounts]:
        """What there is of each task."""
        rows = self._db.execute(
            "SELECT task, count(*), sum(steps), sum(success) FROM episodes WHERE closed "
            "GROUP BY task ORDER BY task"
        )
        return [TaskCounts(*row) for row in rows]

    def versions(self) -> dict[int, int]:
        """Policy version → steps that it acted in."""
        query = "SELECT version, sum(steps) FROM versions GROUP BY version ORDER BY version"
        return dict(self._db.execute(query).fetchall())

    def cursor(self, consumer: str) -> int:
        """Sequence number up to which a consumer has read; -1 if it has not."""
        query = "SELECT seq FROM cursors WHERE consumer = ?"
        row = self._db.execute(query, (consumer,)).fetchone()
        return -1 if row is None else int(row[0])

    def advance(self, consumer: str, seq: int) -> None:
        """Note that a consumer has read up to and with a sequence number; it never goes back."""
        self._db.execute(
            "INSERT INTO cursors VALUES (?, ?) ON CONFLICT (consumer) "
            "DO UPDATE SET seq = max(seq, excluded.seq)",
            (consumer, seq),
        )

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise RunInUseError(f"{path} is locked by another program; close that") from error
        if error.sqlite_errorcode not in _NO_SPACE:
            raise
        raise StorageFullError(f"no space left for {path}; free some, then resume") from error


def _parts(block: Block) -> Iterator[tuple[object, ...]]:
    for rows in block.rows.values():
        view = rows.view
        order = np.argsort(view[".episode"], kind="stable")
        flags, versions = view[".flags"][order], view["policy_version"][order]
        ordinals = view[".episode"][order]
        cuts = (np.flatnonzero(np.diff(ordinals)) + 1).tolist()
        for first, last in zip([0, *cuts], [*cuts, len(view)], strict=True):
            if first == last:
                continue
            key, part = block.episodes[int(ordinals[first])], flags[first:last]
            final, success, intervention = (
                part >> FLAGS.index(name) & 1 for name in ("final", "success", "intervention")
            )
            acted = final == 0
            found = versions[first:last][acted]
            yield (
                block.segment,
                *key,
                int(acted.sum()),
                int(final.any()),
                int((success[acted]).any()),
                int(intervention[acted].sum()),
                int(found.min()) if len(found) else None,
                int(found.max()) if len(found) else None,
            )


def _versions(block: Block) -> Iterable[tuple[int, int, int]]:
    counts: dict[int, int] = {}
    for rows in block.rows.values():
        acted = rows.view[".flags"] >> FLAGS.index("final") & 1 == 0
        versions, steps = np.unique(rows.view["policy_version"][acted], return_counts=True)
        for version, number in zip(versions.tolist(), steps.tolist(), strict=True):
            counts[version] = counts.get(version, 0) + number
    return [(block.segment, version, steps) for version, steps in counts.items()]

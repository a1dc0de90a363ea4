"""The pool's SQLite file: one transaction at a time, time since boot, tokens that only grow."""

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

from embodied.core.clock import Clock
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, LeaseError
from embodied.core.files import fsync_directory, full_disk_named
from hal.pool.state import check_local

_APPLICATION = 0x456D6250
_VERSION = 1
_TOKEN_BLOCK = 4096
_TOKEN_ROOM = 512
_NO_SPACE_BYTES = 1 << 16
_LOCK_POLL_S = (0.0002, 0.005)

_SCHEMA = """
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL,
    token INTEGER NOT NULL, ceiling INTEGER NOT NULL);
CREATE TABLE devices (
    id TEXT PRIMARY KEY, record BLOB NOT NULL, report BLOB NOT NULL, owner_pid INTEGER NOT NULL,
    seen_ns INTEGER, used_ns INTEGER NOT NULL);
CREATE TABLE requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT, turn INTEGER NOT NULL, holder TEXT NOT NULL,
    selectors TEXT NOT NULL, devices INTEGER NOT NULL, ttl_ns INTEGER NOT NULL,
    asked_ns INTEGER NOT NULL, polled_ns INTEGER NOT NULL, granted_ns INTEGER, expires_ns INTEGER);
CREATE TABLE leases (
    device TEXT PRIMARY KEY, request INTEGER NOT NULL, place INTEGER NOT NULL,
    token INTEGER NOT NULL UNIQUE);
"""


class PoolBusyError(LeaseError):
    """Another process has kept the pool locked for too long; leases are as they were."""


class PoolClock(Clock, Protocol):
    """Time since the host was started, and which start that was."""

    @property
    def boot_id(self) -> str:
        """Another text after every start of the host."""
        ...


class BootClock:
    """The kernel's CLOCK_BOOTTIME: goes on in suspend, knows nothing of the wall clock."""

    def __init__(self) -> None:
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def now_ns(self) -> int:
        """Time since boot."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def sleep_until(self, t_ns: int) -> None:
        """Return at or after t_ns."""
        while (remaining_ns := t_ns - self.now_ns()) > 0:
            time.sleep(remaining_ns / 1e9)


class Transaction:
    """Statements of one operation and the time it takes place at."""

    def __init__(self, connection: sqlite3.Connection, now_ns: int) -> None:
        self._connection = connection
        self.now_ns = now_ns

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """Run one statement; all rows it yields."""
        return self._connection.execute(sql, values).fetchall()

    def next_token(self) -> int:
        """A token greater than every one given before; at most 512 in one transaction."""
        [[token, ceiling]] = self.rows("UPDATE meta SET token = token + 1 RETURNING token, ceiling")
        assert token <= ceiling, (token, ceiling)
        return token


class PoolFile:
    """A pool's file, opened by any number of processes and threads of one host.

    Every transaction runs under a lock file: waiting is bounded by busy_s, the kernel frees the
    lock of a killed process, and no two connections ever write or checkpoint at once (releases
    of SQLite before 3.51.3 could then damage the file: sqlite.org/wal.html#walresetbug).

    Commits are not synced: only a power cut can undo them, and that ends all leases anyway.
    Tokens outlast it since they are given from blocks whose end is synced beforehand. A new
    file's tokens begin at the present Unix time in ms, so that they are above those of a
    file that somebody deleted.
    """

    def __init__(self, path: str | Path, clock: PoolClock, busy_s: float) -> None:
        self.path = Path(path).absolute()
        self._clock = clock
        self._busy_s = busy_s
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._lock_handle = -1
        self._opened: os.stat_result | None = None
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        check_local(self.path.parent)
        with self._exclusive():
            self._connect()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with contextlib.suppress(EmbodiedError), self._exclusive():
            self._disconnect()
        self._disconnect()
        self._closed = True
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1

    @contextlib.contextmanager
    def transaction(self) -> Generator[Transaction]:
        """Everything inside happens as one, or not at all if it raises.

        PoolBusyError if the pool stays locked, CorruptDataError if the file is damaged,
        StorageFullError if the disk is full.
        """
        with self._exclusive():
            connection = self._connect()
            try:
                self._begin(connection)
                yield Transaction(connection, self._clock.now_ns())
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _exclusive(self) -> Generator[None]:
        """The only one in the pool: of this process's threads, then of the host's processes."""
        if self._pid != os.getpid():
            self._after_fork()
        deadline_s = time.monotonic() + self._busy_s
        if not self._mutex.acquire(timeout=self._busy_s):
            raise PoolBusyError(f"{self.path}: another thread has kept it for {self._busy_s} s")
        try:
            if self._closed:
                raise EmbodiedError(f"{self.path} is closed: open the pool again")
            self._lock(deadline_s)
            try:
                yield
            except sqlite3.Error as error:
                raise self._translated(error) from error
            finally:
                fcntl.flock(self._lock_handle, fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    def _lock(self, deadline_s: float) -> None:
        lock_path = self.path.with_name(self.path.name + ".lock")
        pause_s, longest_s = _LOCK_POLL_S
        while True:
            try:
                if self._lock_handle < 0:
                    with full_disk_named(lock_path):
                        self._lock_handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._lock_handle), os.stat(lock_path)):
                    return
            except BlockingIOError:
                if time.monotonic() < deadline_s:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
                    continue
                raise PoolBusyError(
                    f"{self.path} has been locked for {self._busy_s} s by "
                    f"{_lock_owner(self._lock_handle)}; is it stopped?"
                ) from None
            except FileNotFoundError as error:
                if self._lock_handle < 0:
                    raise self._unusable(error) from error
            except OSError as error:
                raise self._unusable(error) from error
            # The lock file was deleted or replaced: what counts is the one at the path.
            os.close(self._lock_handle)
            self._lock_handle = -1

    def _after_fork(self) -> None:
        """A child may not use SQLite connections of its parent, not even to close them."""
        if self._connection is not None:
            _ABANDONED.append(self._connection)
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
        self._connection, self._lock_handle = None, -1
        self._pid = os.getpid()
        self._mutex = threading.Lock()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self._opened, os.stat(self.path)):
                    return self._connection
            self._disconnect()  # somebody deleted or replaced the file
        connection = sqlite3.connect(
            self.path, timeout=self._busy_s, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
            self._opened = os.stat(self.path)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check that the file is ours and sound; an empty one becomes a pool."""
        [[application]] = connection.execute("PRAGMA application_id").fetchall()
        [[version]] = connection.execute("PRAGMA user_version").fetchall()
        [[tables]] = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        if application != _APPLICATION and (application or tables):
            raise ConfigError(
                f"{self.path} is an SQLite file of another program; give the pool a path of its own"
            )
        if tables and version != _VERSION:
            raise ConfigError(
                f"{self.path} has version {version} of the pool's format, this program knows "
                f"{_VERSION}; stop all of its users, move it away and start again"
            )
        [[verdict]] = connection.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise self._damaged(verdict)
        [[mode]] = connection.execute("PRAGMA journal_mode = WAL").fetchall()
        if mode != "wal":
            raise self._unusable(f"its file system has no shared memory (journal mode {mode})")
        connection.execute("PRAGMA synchronous = FULL")
        if not tables:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            token = time.time_ns() // 1_000_000
            row = (self._clock.boot_id, token, token)
            connection.execute("INSERT INTO meta VALUES (1, ?, ?, ?)", row)
            connection.execute("COMMIT")
            fsync_directory(self.path.parent)
        connection.execute("PRAGMA synchronous = NORMAL")

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        [[boot, room]] = connection.execute("SELECT boot, ceiling - token FROM meta").fetchall()
        if boot == self._clock.boot_id and room >= _TOKEN_ROOM:
            return
        connection.execute("ROLLBACK")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        if boot != self._clock.boot_id:
            # What was leased before the host started anew is void. The power may have been cut
            # after tokens were given that the file does not know of, but none above the ceiling.
            connection.execute("UPDATE meta SET boot = ?, token = ceiling", (self._clock.boot_id,))
            connection.execute("DELETE FROM leases")
            connection.execute("DELETE FROM requests")
            connection.execute("UPDATE devices SET seen_ns = NULL, used_ns = 0")
        connection.execute("UPDATE meta SET ceiling = token + ?", (_TOKEN_BLOCK,))
        connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")

    def _translated(self, error: sqlite3.Error) -> EmbodiedError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return PoolBusyError(f"{self.path} has been locked for {self._busy_s} s: {error}")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and self._no_space()):
            with full_disk_named(self.path):
                raise OSError(errno.ENOSPC, str(error)) from error
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return self._unusable(error)
        return EmbodiedError(f"{self.path}: {type(error).__name__}: {error}")

    def _no_space(self) -> bool:
        try:
            return shutil.disk_usage(self.path.parent).free < _NO_SPACE_BYTES
        except OSError:
            return False

    def _unusable(self, error: object) -> ConfigError:
        return ConfigError(
            f"the pool {self.path} cannot be used: {error}. Its directory must exist and be "
            "writable; EMBODIED_STATE chooses another one"
        )

    def _damaged(self, why: str) -> CorruptDataError:
        self._disconnect()
        return CorruptDataError(
            f"{self.path} is damaged: {why}. It holds only registrations and leases: stop the "
            "processes that use it, move it away together with its -wal and -shm, start them again"
        )


_ABANDONED: list[sqlite3.Connection] = []


def _lock_owner(handle: int) -> str:
    """Who holds a file lock, as far as the kernel tells."""
    inode = f":{os.fstat(handle).st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].endswith(inode):
                return f"process {fields[4]}"
    return "another process"

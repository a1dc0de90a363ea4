"""The directory of a run: configuration, versions, events, metrics, checkpoints, videos."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from embodied.core.errors import ConfigError, CorruptDataError, RunInUseError
from embodied.core.files import full_disk_named, write_atomic

_PACKAGES = ("embodied-stack", "numpy", "torch", "diffusers", "mujoco", "metaworld", "robosuite")
_ROLES_END_S = 60.0
_FOLDERS = ("metrics", "timings", "checkpoints", "videos", "logs")


class RunDir:
    """Paths and files of one run. Any process may attach; one at a time may `acquire` it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None
        self._files: dict[Path, int] = {}

    @property
    def buffer(self) -> Path:
        """The replay buffer's folder."""
        return self.path / "buffer"

    @property
    def weights(self) -> Path:
        """The weight store's folder."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> Path:
        """The folder of the learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / "config.json").exists()

    def acquire(self) -> None:
        """Make the folders and take the run for this process; RunInUseError if it is taken."""
        with full_disk_named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in _FOLDERS:
                (self.path / folder).mkdir(exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise RunInUseError(
                f"{self.path} is in use by process {holder or 'unknown'}. "
                "Wait for it, or choose another directory with run.dir=..."
            ) from None
        self._await_roles(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def attach(self) -> None:
        """Say that a process of the run lives: `acquire` waits for all of them to end."""
        handle = os.open(self.path / "roles.lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH)
        self._files[self.path / "roles.lock"] = handle

    def release(self) -> None:
        """Give the run back and close its files."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _await_roles(self, lock: int) -> None:
        """After a killed supervisor its roles end by themselves; wait for the last one."""
        roles = os.open(self.path / "roles.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline_s = time.monotonic() + _ROLES_END_S
            while True:
                try:
                    fcntl.flock(roles, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        os.close(lock)
                        raise RunInUseError(
                            f"{self.path}: processes of an earlier sitting are still running; "
                            "wait for them, or end them (their ids are in events.jsonl)"
                        ) from None
                    time.sleep(0.1)
        finally:
            os.close(roles)

    def id(self) -> str:
        """What tells this run from every other, wherever it lies: 32 hexadecimal digits, drawn by
        the first process that asks."""
        path = self.path / "id"
        if not path.exists():
            drawn = self.path / f".id.{os.getpid()}.tmp"
            write_atomic(drawn, secrets.token_hex(16).encode())
            with contextlib.suppress(FileExistsError):
                os.link(drawn, path)
            drawn.unlink()
        found = path.read_text()
        if not re.fullmatch("[0-9a-f]{32}", found):
            raise CorruptDataError(f"{path} is damaged: it holds {found[:40]!r}")
        return found

    def sitting(self) -> int:
        """How often the run has been started or resumed."""
        begun = ("run started", "run resumed")
        return sum(event["event"] in begun for event in self.events())

    def in_use(self) -> bool:
        """Whether a process holds the run now."""
        try:
            handle = os.open(self.path / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def write_config(self, config: msgspec.Struct) -> None:
        """Store the typed configuration and the versions of what runs it."""
        write_atomic(self.path / "config.json", _pretty(config))
        write_atomic(self.path / "versions.json", _pretty(_versions()))

    def read_config(self) -> dict[str, Any]:
        """The stored configuration as plain data."""
        path = self.path / "config.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path} holds no run: config.json is missing") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is damaged: {error}") from error

    def event(self, what: str, **details: Any) -> None:
        """Note something that happened, with the wall-clock time, in events.jsonl."""
        self._append(self.path / "events.jsonl", {"time": time.time(), "event": what, **details})

    def metrics(self, stream: str, row: dict[str, Any]) -> None:
        """Append a row to metrics/<stream>.jsonl; nothing in it may depend on timing."""
        self._append(self.path / "metrics" / f"{stream}.jsonl", row)

    def timings(self, stream: str, row: dict[str, Any]) -> None:
        """Append a row of rates and latencies to timings/<stream>.jsonl."""
        self._append(self.path / "timings" / f"{stream}.jsonl", row)

    def read(self, folder: str, stream: str) -> list[dict[str, Any]]:
        """All whole rows of a stream; a torn last line is left out."""
        return list(_rows(self.path / folder / f"{stream}.jsonl"))

    def streams(self, folder: str) -> list[str]:
        """Names of the streams in `metrics` or `timings`."""
        return sorted(path.stem for path in (self.path / folder).glob("*.jsonl"))

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return list(_rows(self.path / "events.jsonl"))

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        with full_disk_named(path):
            if path not in self._files:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                self._files[path] = handle = os.open(path, flags, 0o644)
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    os.write(handle, b"\n")  # ends a line that a killed process left torn
            os.write(self._files[path], msgspec.json.encode(row) + b"\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            continue


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""Versioned weights on a file system: content-addressed blobs, one manifest per version."""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError
from embodied.core.files import fsync_directory, full_disk_named, write_atomic
from embodied.weights.manifests import (
    MAX_MANIFEST_BYTES,
    ActingForm,
    UpdateManifest,
    WeightManifest,
    decode_manifest,
    encode_manifest,
    json_object,
    serialise,
    tensors,
)

__all__ = ["VersionGoneError", "WeightManifest", "WeightStore", "WeightWatcher"]

_MANIFEST_NAME = re.compile(r"(\d{8})\.json")
_BLOB_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


class VersionGoneError(EmbodiedError, FileNotFoundError):
    """The version was never published or has been pruned; a newer one may be there."""


class WeightStore:
    """Weights under `path`: blobs/<sha256>.safetensors, versions/<version>.json, pins/<version>.

    Versions begin with 1 and grow by one, also across restarts and with several publishers. What
    publish has returned is durable. Readers need no lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._blobs = self._path / "blobs"
        self._versions = self._path / "versions"
        self._pins = self._path / "pins"
        with full_disk_named(self._path):
            for directory in (self._blobs, self._versions, self._pins):
                directory.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with full_disk_named(self._path):
            fd = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _manifest_path(self, version: int) -> Path:
        return self._versions / f"{version:08d}.json"

    def _blob_path(self, sha256: str) -> Path:
        return self._blobs / f"{sha256}.safetensors"

    def publish(
        self,
        arrays: Mapping[str, np.ndarray],
        config: bytes | dict[str, Any],
        metadata: dict[str, Any] | None = None,
    ) -> WeightManifest:
        """Store a new version, durably, and return its manifest.

        config: a JSON object, as bytes or decoded. Raises ConfigError for a config or metadata
        that is no JSON object, SpecError for arrays that cannot be stored, StorageFullError.
        """
        blob = serialise(arrays)
        draft = WeightManifest(
            version=1,
            sha256=hashlib.sha256(blob).hexdigest(),
            num_bytes=len(blob),
            base=None,
            config=json_object(config, "config"),
            metadata=json_object(metadata or {}, "metadata"),
        )
        encode_manifest(draft)
        with self._locked():
            self._keep_blob(draft, blob)
            while True:
                version = (self.latest_version() or 0) + 1
                manifest = msgspec.structs.replace(draft, version=version)
                if _create(self._manifest_path(version), encode_manifest(manifest)):
                    return manifest

    def adopt(self, update: UpdateManifest, arrays: Mapping[str, np.ndarray]) -> WeightManifest:
        """Store a version that a learner published elsewhere, under its number, durably.

        update: what the learner said, its config filled in. arrays: its acting form as arrays.
        The same version may be adopted again, which heals its blob. Raises SpecError, and
        ConfigError if another version has that number, or a newer one is here.
        """
        assert update.config is not None
        blob = serialise(arrays)
        manifest = WeightManifest(
            version=update.version,
            sha256=hashlib.sha256(blob).hexdigest(),
            num_bytes=len(blob),
            base=None,
            config=update.config,
            metadata=update.metadata,
            acting=ActingForm(update.precision, update.sha256),
        )
        with self._locked():
            latest = self.latest_version() or 0
            if latest > update.version or (
                latest == update.version and self.manifest(latest) != manifest
            ):
                raise ConfigError(
                    f"weights version {update.version} cannot be adopted into {self._path}, which "
                    f"has a version {latest} of its own: give each run's weights their own folder"
                )
            self._keep_blob(manifest, blob)
            if latest < update.version:
                _create(self._manifest_path(update.version), encode_manifest(manifest))
        return manifest

    def _keep_blob(self, manifest: WeightManifest, blob: bytes) -> None:
        path = self._blob_path(manifest.sha256)
        if not _is_whole(path, manifest):
            write_atomic(path, blob)

    def versions(self) -> list[int]:
        """All versions that are there, ascending."""
        found = (_MANIFEST_NAME.fullmatch(name) for name in os.listdir(self._versions))
        return sorted(int(match[1]) for match in found if match)

    def latest_version(self) -> int | None:
        """The newest version, None before the first. One listing of a directory."""
        return max(self.versions(), default=None)

    def manifest(self, version: int) -> WeightManifest:
        """Manifest of a version. Raises VersionGoneError or CorruptDataError."""
        path = self._manifest_path(version)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise VersionGoneError(
                f"weights version {version} is not in {self._path}: it was pruned or never "
                f"published; the newest is {self.latest_version()}"
            ) from None
        return decode_manifest(data, version, path)

    def load(
        self, version: int, memory: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], WeightManifest]:
        """Arrays and manifest of a version, bit for bit what was published.

        memory: uint8, what to read into where it is large enough: the arrays are then views of it,
        which the next use of it overwrites. Raises VersionGoneError if it was pruned meanwhile,
        CorruptDataError that names the file.
        """
        manifest = self.manifest(version)
        path = self._blob_path(manifest.sha256)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != manifest.num_bytes:
                    raise CorruptDataError(
                        f"{path}, the blob of weights version {version}, has {size} bytes; "
                        f"{manifest.num_bytes} are right"
                    )
                if memory is None or len(memory) < size:
                    memory = np.empty(size, np.uint8)
                blob = memory[: file.readinto(memory[:size].data)]
        except FileNotFoundError:
            self.manifest(version)  # raises VersionGoneError if both were pruned
            raise CorruptDataError(
                f"{path}, the blob of weights version {version}, is missing"
            ) from None
        if hashlib.sha256(blob.data).hexdigest() != manifest.sha256:
            raise CorruptDataError(
                f"{path}, the blob of weights version {version}, does not have the SHA-256 in its "
                "name"
            )
        try:
            return tensors(blob), manifest
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{path}, the blob of weights version {version}, is {error}"
            ) from error

    def pin(self, version: int) -> None:
        """Keep a version from being pruned. Raises VersionGoneError if it is gone already."""
        with self._locked():
            self.manifest(version)
            write_atomic(self._pins / f"{version:08d}", b"")

    def unpin(self, version: int) -> None:
        """Allow a version to be pruned again."""
        with self._locked():
            (self._pins / f"{version:08d}").unlink(missing_ok=True)

    def pinned(self) -> list[int]:
        """Versions that are kept from being pruned, ascending."""
        return sorted(int(n) for n in os.listdir(self._pins) if re.fullmatch(r"\d{8}", n))

    def prune(self, keep: int) -> list[int]:
        """Delete all versions but the newest `keep` and the pinned; returns the deleted.

        Blobs and temporary files that no version needs go too.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep}; at least 1 version must stay")
        with self._locked():
            versions = self.versions()
            pinned = set(self.pinned())
            gone = [version for version in versions[:-keep] if version not in pinned]
            for version in gone:
                self._manifest_path(version).unlink(missing_ok=True)
            fsync_directory(self._versions)  # a manifest never outlives its blob
            self._sweep(set(versions) - set(gone))
            return gone

    def _sweep(self, versions: set[int]) -> None:
        try:
            needed = {self.manifest(version).sha256 for version in versions}
        except CorruptDataError:
            return  # which blob the damaged manifest needs is unknown: delete none
        for directory in (self._blobs, self._versions):
            for name in os.listdir(directory):
                match = _BLOB_NAME.fullmatch(name)
                if name.endswith(".tmp") or (match and match[1] not in needed):
                    (directory / name).unlink(missing_ok=True)


class WeightWatcher:
    """Follows a store for an actor: the latest version wins, versions in between are skipped.

    version: what was last returned. A newest version that is damaged is passed over: the old
    policy stays. last_error: why, until a newer one is whole; num_errors: how many were damaged.
    """

    def __init__(
        self,
        store: WeightStore,
        version: int | None = None,
        choose: Callable[[], int | None] | None = None,
    ) -> None:
        """choose: the version to follow instead of the latest; one that is older is passed over."""
        self._store = store
        self._choose = choose or store.latest_version
        self._seen = version or 0
        self._memory = np.empty(0, np.uint8)
        self.version = version
        self.last_error: EmbodiedError | None = None
        self.num_errors = 0

    def poll(self) -> tuple[dict[str, np.ndarray], WeightManifest] | None:
        """The newest version if it is newer than the last one returned; None if not. Its arrays
        are good until the next call, which uses their memory again."""
        while (latest := self._latest()) > self._seen:
            try:
                loaded = self._store.load(latest, self._room_for(latest))
            except VersionGoneError:
                if self._latest() == latest:
                    return None
                continue  # pruned between listing and reading, so a newer one is there
            except CorruptDataError as error:
                self._seen = latest
                self.last_error = error
                self.num_errors += 1
                return None
            self._seen = self.version = latest
            self.last_error = None
            return loaded
        return None

    def _room_for(self, version: int) -> np.ndarray:
        """The memory of the version before, or more."""
        size = self._store.manifest(version).num_bytes
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory

    def _latest(self) -> int:
        """The version to follow; none if that cannot be read."""
        try:
            return self._choose() or 0
        except CorruptDataError as error:
            self.last_error = error
            return 0


def _is_whole(path: Path, manifest: WeightManifest) -> bool:
    """Whether the blob is there undamaged; its size is compared first."""
    if not path.exists() or path.stat().st_size != manifest.num_bytes:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == manifest.sha256


def _create(path: Path, data: bytes) -> bool:
    """Create a file whole and durably; False if its name is taken."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new.tmp")
    write_atomic(temporary, data)
    try:
        with full_disk_named(path):
            os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True

"""The learner's side of weights that travel: it answers what hosts ask, and never pushes."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.weights.acting import Form, Precision, acting_form, digest, layout_of
from embodied.weights.deliveries import Deliveries
from embodied.weights.manifests import (
    MAX_MANIFEST_BYTES,
    UpdateManifest,
    WeightManifest,
    to_sign,
)
from embodied.weights.patches import encode_patch
from embodied.weights.store import VersionGoneError, WeightStore
from embodied.weights.wire import Reply, WantWeights, WeightsOffer, WeightsPiece, WeightsUnchanged

T = TypeVar("T")

_VERSIONS, _UPDATES = 8, 16
"""Kept at most. Hosts that keep up need the newest version, the one before and one update; older
ones are for hosts that are still at them."""


@dataclass(frozen=True)
class Version:
    """A version of the store in its acting form. sha256: the form's digest."""

    manifest: WeightManifest
    form: Form
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Update:
    """What brings a host from one version to another. manifest: as sent."""

    version: int
    manifest: bytes
    signature: bytes
    patch: bytes
    patch_sha256: str


class WeightFeed:
    """Answers hosts from a store; each host's thread may call it. An update is encoded once for
    all hosts that need it, and holds up none that does not.

    Latest wins: a host is always offered the newest version that is meant for it, and versions
    between are never sent. If a newer one appears while an older one is in transfer, the host is
    offered the newer one only if the older one's remaining bytes exceed the newer one's whole
    patch. Otherwise finishing is the sooner way to fresher weights; and as a patch that was begun
    never has more to go than when it was begun, a publisher faster than the link cannot starve it.

    choose: host → the version meant for it (Trial.offered); without it, the store's newest.
    cache_bytes: of patches and acting forms that are kept, each.
    """

    def __init__(
        self,
        store: WeightStore,
        run_id: str,
        precision: Precision,
        sign: Callable[[bytes], bytes] | None = None,
        *,
        choose: Callable[[str], int | None] | None = None,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._precision: Precision = precision
        self._sign = sign
        self._choose = choose or (lambda _: store.latest_version())
        self._versions: _Recent[Version] = _Recent(
            cache_bytes, _VERSIONS, lambda version: version.num_bytes, "weights load"
        )
        self._updates: _Recent[Update] = _Recent(
            cache_bytes, _UPDATES, lambda update: len(update.patch), "weights encode"
        )
        self.num_encoded = 0
        self.deliveries = Deliveries()

    def handle(
        self, header: WantWeights, arrays: dict[str, np.ndarray]
    ) -> tuple[Reply, dict[str, np.ndarray]]:
        """Answer one request: a handler for embodied.comms.channels.RequestServer.

        Raises ConfigError for another run's host, CorruptDataError if the store is damaged.
        """
        if header.run_id != self._run_id:
            raise ConfigError(
                f"host '{header.host}' asks for weights of run '{header.run_id}'; "
                f"here is run '{self._run_id}'"
            )
        self.deliveries.has(header.host, header.base_version)
        while True:
            version = self._choose(header.host)
            if version is None:
                return WeightsUnchanged(None, None), {}
            try:
                return self._answer(header, version)
            except VersionGoneError:
                if self._choose(header.host) == version:
                    raise

    def close(self) -> None:
        """End its threads; it answers no more."""
        self._updates.close()
        self._versions.close()

    def _answer(self, want: WantWeights, newest: int) -> tuple[Reply, dict[str, np.ndarray]]:
        if want.base_version is not None and want.base_version >= newest:
            return WeightsUnchanged(newest, self._version(newest).sha256), {}
        going_on = self._in_transfer(want, newest)
        if going_on is not None:
            piece = _piece(going_on.patch, want.offset, want.max_bytes)
            reply = WeightsPiece(going_on.version, going_on.patch_sha256, want.offset, newest)
            return reply, {"piece": piece}
        update = self._update(newest, want)
        self.deliveries.offered(want.host, update.version, len(update.patch))
        manifest = np.frombuffer(update.manifest, np.uint8)
        piece = _piece(update.patch, 0, want.max_bytes)
        return WeightsOffer(update.signature), {"manifest": manifest, "piece": piece}

    def _in_transfer(self, want: WantWeights, newest: int) -> Update | None:
        """The update that the host has begun, if it can and should be finished."""
        if want.version is None or want.patch_sha256 is None or want.version > newest:
            return None
        try:
            begun = self._update(want.version, want)
        except (VersionGoneError, CorruptDataError):
            return None
        if begun.patch_sha256 != want.patch_sha256 or want.offset >= len(begun.patch):
            return None
        if want.version == newest:
            return begun
        remaining = len(begun.patch) - want.offset
        return begun if remaining <= len(self._update(newest, want).patch) else None

    def _update(self, version: int, want: WantWeights) -> Update:
        """The update to a version from what the host has, or from nothing."""
        key = (version, want.base_version, want.base_sha256)
        update = self._updates.get(key)
        if update is not None:
            return update
        base = self._base(want)
        if base is None:  # the whole is the same for all who lack a base
            key = (version, None, None)
        return self._updates.get_or_make(key, lambda: self._encode(self._version(version), base))

    def _base(self, want: WantWeights) -> Version | None:
        """What the host has, if it is here bit for bit."""
        if want.base_version is None:
            return None
        try:
            base = self._version(want.base_version)
        except (VersionGoneError, CorruptDataError):
            return None
        return base if base.sha256 == want.base_sha256 else None

    def _version(self, version: int) -> Version:
        return self._versions.get_or_make(version, lambda: self._load(version))

    def _load(self, version: int) -> Version:
        arrays, manifest = self._store.load(version)
        form = acting_form(arrays, self._precision)
        num_bytes = sum(spec.num_bytes for spec in layout_of(form))
        return Version(manifest, form, digest(form), num_bytes)

    def _encode(self, new: Version, base: Version | None) -> Update:
        layout = layout_of(new.form)
        if base is not None and layout_of(base.form) != layout:
            base = None
        self.num_encoded += 1
        patch = encode_patch(new.form, None if base is None else base.form)
        same = base is not None and base.manifest.config == new.manifest.config
        manifest = msgspec.json.encode(
            UpdateManifest(
                run_id=self._run_id,
                version=new.manifest.version,
                base_version=None if base is None else base.manifest.version,
                base_sha256=None if base is None else base.sha256,
                sha256=new.sha256,
                num_bytes=new.num_bytes,
                precision=self._precision,
                patch_sha256=hashlib.sha256(patch).hexdigest(),
                patch_bytes=len(patch),
                layout=None if base is not None else layout,
                config=None if same else new.manifest.config,
                metadata=new.manifest.metadata,
            )
        )
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise SpecError(
                f"the manifest of weights version {new.manifest.version} takes {len(manifest)} "
                f"bytes; at most {MAX_MANIFEST_BYTES} are sent"
            )
        signature = b"" if self._sign is None else self._sign(to_sign(manifest))
        sha256 = hashlib.sha256(patch).hexdigest()
        return Update(new.manifest.version, manifest, signature, patch, sha256)


def _piece(patch: bytes, offset: int, max_bytes: int) -> np.ndarray:
    return np.frombuffer(patch, np.uint8)[offset : offset + max_bytes]


class _Recent(Generic[T]):
    """The values used last, at most max_count, of at most max_bytes in all; the last one whatever
    its size.

    Any thread may ask. Values are made one at a time on a thread of their own, each once for all
    who ask meanwhile; nobody who asks for another waits.
    """

    def __init__(self, max_bytes: int, max_count: int, size: Callable[[T], int], name: str) -> None:
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._size = size
        self._num_bytes = 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def get(self, key: Hashable) -> T | None:
        """The value if it is there, which counts as used."""
        with self._lock:
            return self._used(key)

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value, once it is there; raises what `make` raised."""
        with self._lock:
            found = self._used(key)
            if found is not None:
                return found
            making = self._making.get(key)
            if making is None:
                making = self._making[key] = self._maker.submit(self._make, key, make)
        return making.result()

    def close(self) -> None:
        """Make no more."""
        self._maker.shutdown(cancel_futures=True)

    def _used(self, key: Hashable) -> T | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def _make(self, key: Hashable, make: Callable[[], T]) -> T:
        try:
            value = make()
            with self._lock:
                self._values[key] = value
                self._num_bytes += self._size(value)
                while len(self._values) > (
                    self._max_count if self._num_bytes <= self._max_bytes else 1
                ):
                    _, gone = self._values.popitem(last=False)
                    self._num_bytes -= self._size(gone)
            return value
        finally:
            with self._lock:
                del self._making[key]

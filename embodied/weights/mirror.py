"""The robot host's side of weights that travel: it asks, checks, applies and adopts."""

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from embodied.core.errors import CorruptDataError, EmbodiedError
from embodied.weights.acting import (
    MAX_TENSORS,
    Form,
    acting_form,
    check_layout,
    digest,
    layout_of,
    to_arrays,
)
from embodied.weights.incoming import Begun, Incoming
from embodied.weights.manifests import UpdateManifest, WeightManifest, decode_update, to_sign
from embodied.weights.patches import apply_patch, max_patch_bytes
from embodied.weights.store import VersionGoneError, WeightStore
from embodied.weights.wire import (
    PIECE_BYTES,
    WantWeights,
    WeightsOffer,
    WeightsPiece,
    WeightsRefusedError,
    WeightsUnchanged,
    taken,
)


class WeightMirror:
    """Brings a store of this host up to a learner's, version by version, each whole or not at all.

    The store is this run's alone, and what acts follows it with a WeightWatcher. Nothing enters it
    before run, signature, base, sizes and digests are found right, and the whole is durable; until
    then, and whenever the link or this process breaks, the version before it acts.

    verify: (what was signed, signature) → nothing, or raises an EmbodiedError. host: this host's
    name at the learner. max_bytes: of the acting form of a policy. keep: versions that stay here.

    version: what is adopted. newest: what the learner last said is meant for this host.
    """

    def __init__(
        self,
        store: WeightStore,
        run_id: str,
        verify: Callable[[bytes, bytes], None] | None = None,
        *,
        host: str,
        max_bytes: int = 4 << 30,
        keep: int = 3,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._verify = verify
        self._host = host
        self._max_bytes = max_bytes
        self._keep = keep
        self._whole = False
        self._fresh_s: float | None = None
        self._incoming = Incoming(store.path / "incoming")
        self.version = store.latest_version()
        self.newest = self.version
        self._base = self._find_base()
        self._update = self._restored()

    def next_request(self, max_bytes: int = PIECE_BYTES) -> WantWeights:
        """What to ask now, for at most max_bytes of a patch. Asking again is always allowed."""
        base, update = self._base, self._update
        if base is None or self._whole or base.acting is None:
            version = sha256 = None
        else:
            version, sha256 = base.version, base.acting.sha256
        return WantWeights(
            run_id=self._run_id,
            host=self._host,
            base_version=version,
            base_sha256=sha256,
            version=None if update is None else update.version,
            patch_sha256=None if update is None else update.patch_sha256,
            offset=0 if update is None else self._incoming.size(),
            max_bytes=max_bytes,
        )

    @property
    def transferring(self) -> bool:
        """Whether an update is on its way, so that the next request should follow at once."""
        return self._update is not None

    def take(
        self, header: Any, arrays: dict[str, np.ndarray], now_s: float
    ) -> WeightManifest | None:
        """Take a reply; returns the version that it completed, which is adopted and durable.

        now_s: this host's monotonic time. Raises CorruptDataError or WeightsRefusedError (or what
        verify raises), and StorageFullError; the acting version is then what it was, and the next
        request asks for what can still be used: the rest of the patch, another one, or the whole.
        """
        if isinstance(header, WeightsUnchanged):
            taken(arrays)
            self._confirm(header, now_s)
            return None
        if isinstance(header, WeightsOffer):
            manifest, piece = taken(arrays, "manifest", "piece")
            update = self._check(Begun(manifest, header.signature))
            self._incoming.begin(Begun(manifest, header.signature))
            self._update, self.newest = update, update.version
        elif isinstance(header, WeightsPiece):
            [piece] = taken(arrays, "piece")
            update = self._continued(header)
            self.newest = header.newest
        else:
            raise CorruptDataError(f"{type(header).__name__} answers no request for weights")
        size = self._incoming.size() + len(piece)
        if not piece or size > update.patch_bytes:
            self._forget()
            raise CorruptDataError(
                f"piece of {len(piece)} bytes makes {size} of a patch of {update.patch_bytes}"
            )
        self._incoming.append(piece)
        return self._finish(update, now_s) if size == update.patch_bytes else None

    def staleness(self, now_s: float) -> tuple[float, int]:
        """(seconds, versions) by which what is here may be behind the learner.

        Seconds since the learner last said that this host has what it should have, by this host's
        clock alone; infinite if it never did in this process. Versions: numbers between this and
        the newest one that the learner spoke of.
        """
        fresh_s = self.confirmed_s
        age_s = float("inf") if fresh_s is None else max(0.0, now_s - fresh_s)
        return age_s, max(0, (self.newest or 0) - (self.version or 0))

    @property
    def confirmed_s(self) -> float | None:
        """When the learner last said that this host has what it should have; None if it never did
        in this process."""
        return self._fresh_s

    def _confirm(self, header: WeightsUnchanged, now_s: float) -> None:
        self.newest = header.version
        base = self._base
        mine = None if base is None or base.acting is None else (base.version, base.acting.sha256)
        if mine is not None and mine == (header.version, header.sha256):
            self._fresh_s = now_s

    def _find_base(self) -> WeightManifest | None:
        """The newest version here, if it came from a learner; what cannot be read is no base."""
        if self.version is None:
            return None
        try:
            manifest = self._store.manifest(self.version)
        except (CorruptDataError, VersionGoneError):
            return None
        return manifest if manifest.acting is not None else None

    def _restored(self) -> UpdateManifest | None:
        """The transfer that an earlier process began, if it is still of use."""
        begun = self._incoming.begun()
        if begun is None:
            return None
        try:
            update = self._check(begun)
        except EmbodiedError:  # of an earlier base or run, or damaged: asked for anew
            self._incoming.clear()
            return None
        finally:
            self._whole = False
        self._incoming.shorten(update.patch_bytes - 1)  # the piece that completes it comes again
        return update

    def _check(self, begun: Begun) -> UpdateManifest:
        """The manifest, if this host may begin to take it in."""
        if self._verify is not None:
            if not begun.signature:
                raise WeightsRefusedError("weights are not signed; this host takes signed ones")
            self._verify(to_sign(begun.manifest), begun.signature)
        update = decode_update(begun.manifest)
        if update.run_id != self._run_id:
            raise WeightsRefusedError(
                f"weights are of run '{update.run_id}'; this host acts for '{self._run_id}'"
            )
        if update.version <= (self.version or 0):
            raise WeightsRefusedError(
                f"weights version {update.version} is offered, but {self.version} acts: an old "
                "message was sent again, or the learner's weights were replaced by others"
            )
        if update.base_version is not None:
            self._check_base(update)
        if update.num_bytes > self._max_bytes:
            raise WeightsRefusedError(
                f"weights version {update.version} takes {update.num_bytes} bytes; this host "
                f"allows {self._max_bytes}"
            )
        most = MAX_TENSORS if update.layout is None else len(update.layout)
        if update.patch_bytes > max_patch_bytes(most, update.num_bytes):
            raise CorruptDataError(
                f"patch of {update.patch_bytes} bytes for weights of {update.num_bytes}"
            )
        return update

    def _check_base(self, update: UpdateManifest) -> None:
        base = self._base
        acting = None if base is None else base.acting
        mine = None if base is None or acting is None else (base.version, acting.sha256)
        if acting is None or mine != (update.base_version, update.base_sha256):
            self._whole = True
            raise WeightsRefusedError(
                f"weights version {update.version} come as a patch of version "
                f"{update.base_version}, which is not what acts here ({self.version}); "
                "asking for the whole"
            )
        if acting.precision != update.precision:
            raise WeightsRefusedError(
                f"weights version {update.version} come as {update.precision} for a base of "
                f"{acting.precision}"
            )

    def _continued(self, header: WeightsPiece) -> UpdateManifest:
        update, size = self._update, self._incoming.size()
        mine = None if update is None else (update.version, update.patch_sha256, size)
        if update is None or mine != (header.version, header.patch_sha256, header.offset):
            raise CorruptDataError(
                f"a piece of the patch to version {header.version} from byte {header.offset}; "
                f"{'none' if update is None else f'{update.version} from byte {size}'} is right"
            )
        return update

    def _finish(self, update: UpdateManifest, now_s: float) -> WeightManifest:
        patch = self._incoming.read()
        self._forget()
        if hashlib.sha256(patch).hexdigest() != update.patch_sha256:
            raise CorruptDataError(
                f"the patch to weights version {update.version} does not have its SHA-256"
            )
        self._whole = True  # what is asked for if anything below is not right
        config, base = update.config, None
        if update.base_version is not None:
            base, old = self._load_base(update)
            config = old.config if config is None else config
        layout = update.layout or layout_of(base or {})
        check_layout(layout, update.num_bytes)
        form = apply_patch(patch, layout, base)
        if digest(form) != update.sha256:
            raise CorruptDataError(
                f"weights version {update.version} do not have their SHA-256 after the patch; "
                "asking for the whole"
            )
        arrays = to_arrays(form)
        self._whole = False
        adopted = self._store.adopt(msgspec.structs.replace(update, config=config), arrays)
        self._base, self.version = adopted, adopted.version
        if self.newest == adopted.version:
            self._fresh_s = now_s
        self._store.prune(self._keep)
        return adopted

    def _load_base(self, update: UpdateManifest) -> tuple[Form, WeightManifest]:
        assert update.base_version is not None
        arrays, manifest = self._store.load(update.base_version)
        return acting_form(arrays, update.precision), manifest

    def _forget(self) -> None:
        self._update = None
        self._incoming.clear()

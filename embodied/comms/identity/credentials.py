"""A host's own identity: the folder that `embodied pki issue` wrote, checked, as gRPC credentials.

TLS 1.3 with certificates of both ends. gRPC's Python interface takes no least version: the
`embodied` command leaves TLS 1.2 no cipher suite that works with these certificates, and
`peer.certificate_in` refuses a session of anything but 1.3.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embodied.comms.identity import keyfiles, signing
from embodied.comms.identity.peer import Peer, Revocations, Role, check_dates, peer_in
from embodied.core.errors import ConfigError, EmbodiedError, IdentityError

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class Bundle:
    """What a host holds. PEM: `*_pem`; weights_private_pem only at a gateway."""

    folder: Path
    peer: Peer
    expires: datetime
    authority_pem: bytes
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    weights_public_pem: bytes
    weights_private_pem: bytes | None = field(repr=False)

    def revocations(self) -> Revocations:
        """A gateway's list of revoked certificates. Raises ConfigError, IdentityError."""
        self.require("gateway")
        return Revocations(self.folder / keyfiles.REVOKED, self.authority_pem)

    def require(self, role: Role) -> None:
        """IdentityError unless this host has the role."""
        if self.peer.role != role:
            raise IdentityError(
                f"{self.folder} is the identity of {self.peer}; this needs a {role}'s: "
                f"embodied pki issue AUTHORITY {role} NAME --output FOLDER"
            )

    def check_current(self) -> None:
        """IdentityError once the certificate has ended, by this host's wall clock."""
        if datetime.now(UTC) > self.expires:
            raise IdentityError(
                f"the certificate of {self.peer} in {self.folder} expired on "
                f"{self.expires:%Y-%m-%d %H:%M} UTC; issue another with `embodied pki issue`"
            )


def load_bundle(folder: Path) -> Bundle:
    """Read and check a host's identity.

    Raises ConfigError if files are missing or a private key is open to others, IdentityError if
    they do not belong together, are of another authority, expired, or not yet valid.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder. Make a host's identity on the authority's host with "
            "`embodied pki issue AUTHORITY gateway|robot NAME --output FOLDER` and copy it here"
        )
    place = str(folder / keyfiles.CERTIFICATE)
    authority_pem = keyfiles.read(folder / keyfiles.AUTHORITY)
    certificate_pem = keyfiles.read(folder / keyfiles.CERTIFICATE)
    key_pem = keyfiles.read(folder / keyfiles.KEY, private=True)
    authority = keyfiles.certificate_of(authority_pem, str(folder / keyfiles.AUTHORITY))
    certificate = keyfiles.certificate_of(certificate_pem, place)
    keyfiles.check_key(certificate, keyfiles.key_of(key_pem, str(folder / keyfiles.KEY)), place)
    keyfiles.check_issuer(certificate, authority, place)
    check_dates(authority, f"the authority's certificate in {folder}")
    check_dates(certificate, place)
    peer = peer_in(certificate)
    public = keyfiles.read(folder / keyfiles.WEIGHTS_PUBLIC)
    signing.check_public(public)
    private = None
    if peer.role == "gateway":
        private = keyfiles.read(folder / keyfiles.WEIGHTS_PRIVATE, private=True)
        signing.check_pair(private, public, str(folder / keyfiles.WEIGHTS_PRIVATE))
    return Bundle(
        folder,
        peer,
        certificate.not_valid_after_utc,
        authority_pem,
        certificate_pem,
        key_pem,
        public,
        private,
    )


class NewestBundle:
    """A folder's bundle, read again when its certificate or key has changed.

    One that is half written, wrong, or of another authority or role leaves the one before in its
    place, which serves until it ends. refused: told why, once for each change.
    """

    def __init__(self, folder: Path, refused: Callable[[EmbodiedError], None]) -> None:
        """Raises what load_bundle raises."""
        self._folder = folder
        self._refused = refused
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        self._bundle = load_bundle(folder)

    def __call__(self) -> Bundle:
        """The newest whole bundle. Any thread may call it."""
        with self._lock:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._bundle = self._renewed()
                except EmbodiedError as error:
                    self._refused(error)
            return self._bundle

    def _renewed(self) -> Bundle:
        found = load_bundle(self._folder)
        found.require(self._bundle.peer.role)
        if found.authority_pem != self._bundle.authority_pem:
            raise IdentityError(
                f"{self._folder} is now of another authority; restart to change to that"
            )
        return found

    def _stamps(self) -> tuple[tuple[int, int, int], ...]:
        stamps: list[tuple[int, int, int]] = []
        for name in (keyfiles.CERTIFICATE, keyfiles.KEY):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self._folder / name)
                stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
        return tuple(stamps)


def server_credentials(identity: Callable[[], Bundle]) -> grpc.ServerCredentials:
    """A gateway's credentials: clients without a certificate of the same authority are refused.

    identity: asked at each handshake. Whether the client may open the session is for
    `peer.check_peer` to say, for each one.
    """
    import grpc

    def configuration(bundle: Bundle) -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(bundle.key_pem, bundle.certificate_pem)], bundle.authority_pem
        )

    first = identity()
    first.require("gateway")
    return grpc.dynamic_ssl_server_credentials(
        configuration(first), lambda: configuration(identity()), require_client_authentication=True
    )


def channel_credentials(bundle: Bundle) -> grpc.ChannelCredentials:
    """A robot host's credentials: only a gateway of the same authority that is issued for the
    dialled name or address is talked to."""
    import grpc

    bundle.require("robot")
    return grpc.ssl_channel_credentials(
        bundle.authority_pem, bundle.key_pem, bundle.certificate_pem
    )

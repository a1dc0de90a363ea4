"""Who is at the other end: the role, name and permitted runs in a certificate.

A certificate names its holder by URIs: `embodied://gateway/NAME`, or `embodied://robot/NAME` and
one `embodied://run/PATTERN` for each pattern of runs that it may take part in.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from embodied.comms.identity import keyfiles
from embodied.core.errors import ConfigError, IdentityError

Role = Literal["gateway", "robot"]

USAGE: dict[str, ObjectIdentifier] = {
    "gateway": ExtendedKeyUsageOID.SERVER_AUTH,
    "robot": ExtendedKeyUsageOID.CLIENT_AUTH,
}
TLS_VERSION = b"TLSv1.3"

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_RUNS = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._-]{0,126}\*?")
_URI = re.compile(r"embodied://(gateway|robot|run)/([^/]{1,128})")
_MAX_RUNS = 64
_DAMAGED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)


class Peer(msgspec.Struct, frozen=True):
    """A host. runs: names of runs that a robot may take part in; a final `*` matches any rest."""

    role: Role
    name: str
    runs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"'{self.name}' cannot be a host's name; 1 to 64 of a-z, 0-9 and - are right, "
                "beginning and ending with a letter or digit"
            )
        if self.role == "gateway" and self.runs:
            raise ConfigError("runs are permitted to robots; a gateway's certificate names none")
        if self.role == "robot" and not 1 <= len(self.runs) <= _MAX_RUNS:
            raise ConfigError(
                f"robot '{self.name}' has {len(self.runs)} patterns of permitted runs; 1 to "
                f"{_MAX_RUNS} are right, '*' alone permits all"
            )
        for pattern in self.runs:
            if not _RUNS.fullmatch(pattern):
                raise ConfigError(
                    f"'{pattern}' is no pattern of runs; a run's name (letters, digits, '.', '_', "
                    "'-') is right, or the beginning of one and '*', or '*' for all"
                )

    def __str__(self) -> str:
        return f"{self.role} '{self.name}'"

    def check_run(self, run: str) -> None:
        """IdentityError unless this host may take part in the run."""
        if any(
            run.startswith(pattern[:-1]) if pattern.endswith("*") else run == pattern
            for pattern in self.runs
        ):
            return
        raise IdentityError(
            f"{self} may not take part in run '{run}'; its certificate permits "
            f"{', '.join(self.runs) or 'none'}. `embodied pki issue … --runs` makes another"
        )

    def uris(self) -> list[str]:
        """The names that a certificate of this host bears."""
        return [
            f"embodied://{self.role}/{self.name}",
            *(f"embodied://run/{run}" for run in self.runs),
        ]


def peer_of(pem: bytes) -> Peer:
    """The host that a certificate names. This alone proves nothing: see `check_peer`.

    Raises IdentityError if it is not one that `embodied pki issue` could have made.
    """
    return peer_in(keyfiles.certificate_of(pem, "the peer's certificate"))


def peer_in(certificate: x509.Certificate) -> Peer:
    """`peer_of` of a certificate that is decoded already."""
    try:
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        usages = list(usage)
    except _DAMAGED as error:
        raise IdentityError(
            f"the certificate does not say whose it is ({error}); `embodied pki issue` makes one "
            "that does"
        ) from error
    found = [_URI.fullmatch(uri) for uri in uris[: _MAX_RUNS + 2]]
    words = [(match[1], match[2]) for match in found if match]
    roles = [word for word in words if word[0] != "run"]
    if len(words) < len(uris) or len(roles) != 1:
        raise IdentityError(
            "the certificate's names are not those of one gateway or robot: "
            f"{', '.join(map(repr, uris[:4])) or 'none'}"
        )
    role, name = cast(tuple[Role, str], roles[0])
    if usages != [USAGE[role]]:
        raise IdentityError(
            f"the certificate of {role} {name!r} is not made for a {role}: its extended key usage "
            f"is {', '.join(oid.dotted_string for oid in usages[:4])}, not "
            f"{USAGE[role].dotted_string}"
        )
    try:
        return Peer(role, name, tuple(text for kind, text in words if kind == "run"))
    except ConfigError as error:
        raise IdentityError(f"the certificate's names are wrong: {error}") from error


class Revocations:
    """The authority's list of revoked certificates, read anew whenever its file changes.

    path: the list (`revoked.crl`). authority_pem: the authority's certificate (`ca.pem`). A list
    that is missing or damaged is an error at each use, as it may hide a revocation.
    """

    def __init__(self, path: Path, authority_pem: bytes) -> None:
        self._path = path
        self.authority = keyfiles.certificate_of(authority_pem, "the authority's certificate")
        self._read: tuple[tuple[int, int, int], x509.CertificateRevocationList] | None = None
        self._list()

    def check(self, certificate: x509.Certificate, peer: Peer) -> None:
        """IdentityError if the certificate is revoked or the list cannot be read."""
        if self._list().get_revoked_certificate_by_serial_number(certificate.serial_number):
            raise IdentityError(
                f"the certificate {certificate.serial_number:x} of {peer} is revoked; if that is "
                "a mistake, issue another with `embodied pki issue`"
            )

    def _list(self) -> x509.CertificateRevocationList:
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self._read is not None and self._read[0] == stamp:
                return self._read[1]
            pem = keyfiles.read(self._path, keyfiles.MAX_REVOKED_BYTES)
        except (OSError, ConfigError) as error:
            raise IdentityError(
                f"nobody is admitted without the authority's list of revoked certificates; copy "
                f"{keyfiles.REVOKED} from its folder: {error}"
            ) from error
        revoked = keyfiles.revoked_of(pem, self.authority, str(self._path))
        self._read = (stamp, revoked)
        return revoked


def check_dates(certificate: x509.Certificate, what: str) -> None:
    """IdentityError unless the certificate is valid now, by this host's wall clock."""
    now = datetime.now(UTC)
    try:
        starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except _DAMAGED as error:
        raise IdentityError(f"{what} has dates that cannot be read: {error}") from error
    if now > ends:
        raise IdentityError(
            f"{what} expired on {ends:%Y-%m-%d %H:%M} UTC; issue another with `embodied pki issue`"
        )
    if now < starts:
        raise IdentityError(
            f"{what} is valid from {starts:%Y-%m-%d %H:%M} UTC and it is {now:%Y-%m-%d %H:%M} UTC "
            "here; set this host's clock"
        )


def check_robot(peer_certificate_pem: bytes, revocations: Revocations) -> Peer:
    """The robot host whose verified client certificate this is.

    Raises IdentityError if another authority issued it, it is expired, revoked or not a robot's.
    """
    certificate = keyfiles.certificate_of(peer_certificate_pem, "the peer's certificate")
    keyfiles.check_issuer(certificate, revocations.authority, "the peer's certificate")
    peer = peer_in(certificate)
    check_dates(revocations.authority, "the authority's certificate")
    check_dates(certificate, f"the certificate of {peer}")
    revocations.check(certificate, peer)
    if peer.role != "robot":
        raise IdentityError(
            f"{peer} opened a session; only robots' hosts do, with a certificate "
            "from `embodied pki issue … robot`"
        )
    return peer


def check_peer(peer_certificate_pem: bytes, revocations: Revocations, run: str) -> Peer:
    """`check_robot`, and IdentityError unless it may take part in the run."""
    peer = check_robot(peer_certificate_pem, revocations)
    peer.check_run(run)
    return peer


def certificate_in(auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
    """The client certificate (PEM) of a gRPC session, from `context.auth_context()`.

    Raises IdentityError for a session without one, or of a TLS older than 1.3: gRPC's Python
    interface cannot be told a least version, so it is looked at here.
    """
    version = _one(auth_context, "ssl_tls_version")
    if version != TLS_VERSION:
        raise IdentityError(
            f"the session's encryption is {version.decode(errors='replace') or 'none'}; TLS 1.3 "
            "with a client certificate is needed"
        )
    pem = _one(auth_context, "x509_pem_cert")
    if not pem:
        raise IdentityError("the session brought no client certificate")
    return pem


def _one(auth_context: Mapping[str, Iterable[bytes]], key: str) -> bytes:
    values: Sequence[bytes] = list(auth_context.get(key, ()))
    return values[0] if len(values) == 1 else b""

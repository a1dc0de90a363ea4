"""A private certificate authority in a folder.

`ca.pem` and `ca.key` sign, `issued.json` lists what was issued, `revoked.crl` what was revoked (an
X.509 list, signed), `weights.pub` and `weights.key` are the pair for weight manifests. Keys are
ECDSA on P-256, as gRPC's TLS accepts no Ed25519 certificates.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from embodied.comms.identity import keyfiles, signing
from embodied.comms.identity.peer import USAGE, Peer, peer_in
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.files import fsync_directory, full_disk_named, write_atomic
from embodied.core.registry import unknown

LIFETIME = timedelta(days=30)
AUTHORITY_LIFETIME = timedelta(days=3650)

_CLOCKS_DIFFER = timedelta(minutes=5)
_REGISTER = "issued.json"
_MAX_REGISTER_BYTES = 64 << 20
_DNS = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_PRIVATE = {keyfiles.KEY, keyfiles.AUTHORITY_KEY, keyfiles.WEIGHTS_PRIVATE}


class Issued(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate in the register. serial: hexadecimal. Times are UTC."""

    serial: str
    role: str
    name: str
    runs: tuple[str, ...]
    starts: datetime
    expires: datetime
    revoked: datetime | None = None


class Authority:
    """An authority that exists: issues and revokes. Processes may do so at the same time."""

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, name: str) -> Self:
        """Make an authority, valid for ten years, in a folder that does not exist or is empty.

        name: as a host's. Raises ConfigError; what is there is never overwritten.
        """
        Peer("gateway", name)
        if not _is_free(folder):
            what = "an authority" if (folder / keyfiles.AUTHORITY).exists() else "other files"
            raise ConfigError(
                f"{folder} already holds {what}, which is never overwritten; choose another folder"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, subject, key.public_key(), now, now + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(key, SHA256())
        )
        private, public = signing.generate()
        _write_folder(
            folder,
            {
                keyfiles.AUTHORITY: _pem(certificate),
                keyfiles.AUTHORITY_KEY: keyfiles.private_pem(key),
                keyfiles.WEIGHTS_PUBLIC: public,
                keyfiles.WEIGHTS_PRIVATE: private,
                keyfiles.REVOKED: _revocation_list([], certificate, key),
                _REGISTER: msgspec.json.encode([]),
            },
        )
        return cls(folder, certificate, key)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The authority in a folder; ConfigError or IdentityError if there is none that works."""
        path, key_path = folder / keyfiles.AUTHORITY, folder / keyfiles.AUTHORITY_KEY
        certificate = keyfiles.certificate_of(keyfiles.read(path), str(path))
        key = keyfiles.key_of(keyfiles.read(key_path, private=True), str(key_path))
        keyfiles.check_key(certificate, key, str(path))
        return cls(folder, certificate, key)

    @property
    def name(self) -> str:
        """Its name."""
        [attribute] = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(attribute.value)

    def issue(
        self,
        peer: Peer,
        output: Path,
        *,
        dns: Sequence[str] = (),
        ip: Sequence[str] = (),
        lifetime: timedelta = LIFETIME,
        starts: datetime | None = None,
    ) -> Issued:
        """Make a key and a certificate for a host, and write the folder that the host needs.

        output: a folder that does not exist or is empty, or the same host's old one, to be renewed.
        dns, ip: names and addresses under which a gateway is dialled; robots have none. starts:
        when it becomes valid, default now. Raises ConfigError.
        """
        names = _names(peer, dns, ip)
        starts = starts or datetime.now(UTC)
        expires = starts + lifetime
        if lifetime <= timedelta(0) or expires > self.certificate.not_valid_after_utc:
            raise ConfigError(
                f"a certificate until {expires:%Y-%m-%d} cannot be issued: it must end after it "
                f"starts and before its authority does, "
                f"{self.certificate.not_valid_after_utc:%Y-%m-%d}"
            )
        _check_output(output, peer)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer.name)])
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), starts, expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([USAGE[peer.role]]), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, SHA256())
        )
        serial = f"{certificate.serial_number:x}"
        issued = Issued(serial, peer.role, peer.name, peer.runs, starts, expires)
        with self._locked():  # listed before it exists anywhere, so that it can be revoked
            self._write_register([*self.issued(), issued])
            files = {
                keyfiles.KEY: keyfiles.private_pem(key),
                keyfiles.CERTIFICATE: _pem(certificate),
                keyfiles.AUTHORITY: self._file(keyfiles.AUTHORITY),
                keyfiles.WEIGHTS_PUBLIC: self._file(keyfiles.WEIGHTS_PUBLIC),
            }
            if peer.role == "gateway":
                files[keyfiles.WEIGHTS_PRIVATE] = self._file(keyfiles.WEIGHTS_PRIVATE)
                files[keyfiles.REVOKED] = self._file(keyfiles.REVOKED)
            _write_folder(output, files)
        return issued

    def revoke(self, which: str) -> list[Issued]:
        """Revoke one serial number, or every certificate of a name; returns those newly revoked.

        Gateways refuse them once they have the new `revoked.crl`. Raises ConfigError if nothing of
        that name or number was issued.
        """
        with self._locked():
            register = self.issued()
            meant = [entry for entry in register if which in (entry.serial, entry.name)]
            if not meant:
                raise unknown("certificate", which, {entry.name for entry in register})
            now = datetime.now(UTC)
            new = [
                msgspec.structs.replace(entry, revoked=now)
                for entry in meant
                if entry.revoked is None
            ]
            changed = {entry.serial: entry for entry in new}
            register = [changed.get(entry.serial, entry) for entry in register]
            revoked = [entry for entry in register if entry.revoked is not None]
            self._write_register(register)  # first, as the list is made anew from it each time
            pem = _revocation_list(revoked, self.certificate, self._key)
            write_atomic(self.folder / keyfiles.REVOKED, pem)
        return new

    def issued(self) -> list[Issued]:
        """The register, oldest first. Raises CorruptDataError if it is damaged."""
        path = self.folder / _REGISTER
        try:
            return msgspec.json.decode(
                keyfiles.read(path, _MAX_REGISTER_BYTES), type=list[Issued], strict=True
            )
        except (msgspec.DecodeError, RecursionError) as error:
            raise CorruptDataError(f"{path} is damaged: {error}; restore it from a copy") from error

    def _file(self, name: str) -> bytes:
        return keyfiles.read(
            self.folder / name, keyfiles.MAX_REVOKED_BYTES, private=name in _PRIVATE
        )

    def _write_register(self, register: Sequence[Issued]) -> None:
        write_atomic(self.folder / _REGISTER, msgspec.json.encode(register))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _names(peer: Peer, dns: Sequence[str], ip: Sequence[str]) -> list[x509.GeneralName]:
    if (peer.role == "gateway") != bool(dns or ip):
        raise ConfigError(
            f"{peer} needs the names (--dns) or addresses (--ip) under which it is dialled"
            if peer.role == "gateway"
            else f"{peer} is not dialled: --dns and --ip are for gateways"
        )
    for name in dns:
        if not _DNS.fullmatch(name) or len(name) > 253:
            raise ConfigError(f"'{name}' is not a DNS name in small letters")
    try:
        addresses = [x509.IPAddress(ip_address(text)) for text in ip]
    except ValueError as error:
        raise ConfigError(f"--ip: {error}") from error
    uris = [x509.UniformResourceIdentifier(uri) for uri in peer.uris()]
    return [*uris, *(x509.DNSName(name) for name in dns), *addresses]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    starts: datetime,
    expires: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts - _CLOCKS_DIFFER)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _revocation_list(
    revoked: Sequence[Issued], certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(datetime.now(UTC))
        .next_update(certificate.not_valid_after_utc)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(int(entry.serial, 16))
            .revocation_date(entry.revoked or entry.expires)
            .build()
        )
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _check_output(output: Path, peer: Peer) -> None:
    """ConfigError unless the folder is new, empty, or this host's."""
    if _is_free(output):
        return
    path = output / keyfiles.CERTIFICATE
    if path.is_file():
        old = peer_in(keyfiles.certificate_of(keyfiles.read(path), str(path)))
        if (old.role, old.name) == (peer.role, peer.name):
            return
        raise ConfigError(f"{output} holds the certificate of {old}; choose another folder")
    raise ConfigError(f"{output} is not empty and holds no certificate; choose another folder")


def _is_free(folder: Path) -> bool:
    """Whether it does not exist, or is an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder for its owner only: a new folder whole, an old one file by file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_free(folder):
        folder.chmod(0o700)
        _write_files(folder, files)
        return
    with full_disk_named(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write_files(temporary, files)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_directory(folder.parent)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        mode = keyfiles.PRIVATE_MODE if name in _PRIVATE else 0o644
        write_atomic(folder / name, data, mode)

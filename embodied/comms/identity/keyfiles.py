"""Certificates, keys and revocation lists as PEM files: names, permissions, clear errors."""

import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from embodied.core.errors import ConfigError, IdentityError

AUTHORITY = "ca.pem"
AUTHORITY_KEY = "ca.key"
CERTIFICATE = "certificate.pem"
KEY = "key.pem"
WEIGHTS_PUBLIC = "weights.pub"
WEIGHTS_PRIVATE = "weights.key"
REVOKED = "revoked.crl"
PRIVATE_MODE = 0o600
MAX_PEM_BYTES = 64 << 10
MAX_REVOKED_BYTES = 16 << 20

_DAMAGED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


def read(path: Path, most: int = MAX_PEM_BYTES, private: bool = False) -> bytes:
    """A file of at most `most` bytes; ConfigError if it is missing, longer or, where it has to be
    private, open to others than its owner."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist. `embodied pki init` makes an authority's files, "
            "`embodied pki issue` those of a host"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if private and mode & 0o077:
        raise ConfigError(
            f"{path} is a private key that others may read or change (mode {mode & 0o777:04o}); "
            f"run: chmod 600 {path}"
        )
    if len(data) > most:
        raise ConfigError(f"{path} has more than {most} bytes: that is no such file")
    return data


def certificate_of(pem: bytes, what: str) -> x509.Certificate:
    """The first certificate of a PEM; IdentityError, which names it by `what`, if there is none."""
    if len(pem) > MAX_PEM_BYTES:
        raise IdentityError(f"{what} has {len(pem)} bytes; a certificate has fewer than 65536")
    try:
        return x509.load_pem_x509_certificate(pem)
    except _DAMAGED as error:
        raise IdentityError(f"{what} is not a certificate in PEM form: {error}") from error


def key_of(pem: bytes, what: str) -> EllipticCurvePrivateKey:
    """The private key of a certificate; IdentityError unless it is an elliptic-curve key."""
    try:
        key = load_pem_private_key(pem, password=None)
    except _DAMAGED as error:
        raise IdentityError(f"{what} is not an unencrypted private key in PEM form") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise IdentityError(f"{what} is not an elliptic-curve key, as `embodied pki` makes them")
    return key


def check_issuer(certificate: x509.Certificate, authority: x509.Certificate, what: str) -> None:
    """IdentityError unless the authority signed the certificate and may sign."""
    try:
        limits = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(authority)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, InvalidSignature, *_DAMAGED) as error:
        raise IdentityError(
            f"{what} was not issued by this authority ({_subject(authority)}); use one that "
            "`embodied pki issue` made with the authority's folder"
        ) from error
    if not limits.ca:
        raise IdentityError(f"the certificate that issued {what} is not an authority's")


def check_key(certificate: x509.Certificate, key: EllipticCurvePrivateKey, what: str) -> None:
    """IdentityError unless the private key belongs to the certificate."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        same = certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
    except _DAMAGED as error:
        raise IdentityError(f"{what} holds a key of an unknown kind") from error
    if not same:
        raise IdentityError(
            f"{what} belongs to another private key than the one beside it; issue both again with "
            "`embodied pki issue`"
        )


def revoked_of(
    pem: bytes, authority: x509.Certificate, what: str
) -> x509.CertificateRevocationList:
    """A revocation list; IdentityError unless the authority signed it."""
    try:
        revoked = x509.load_pem_x509_crl(pem)
        signed = revoked.is_signature_valid(authority.public_key())  # pyright: ignore[reportArgumentType]
    except _DAMAGED as error:
        raise IdentityError(f"{what} is not a revocation list in PEM form: {error}") from error
    if not signed or revoked.issuer != authority.subject:
        raise IdentityError(
            f"{what} is not signed by this authority ({_subject(authority)}); copy {REVOKED} from "
            "the authority's folder"
        )
    return revoked


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    """The key as PKCS #8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _subject(certificate: x509.Certificate) -> str:
    try:
        return certificate.subject.rfc4514_string()
    except _DAMAGED:
        return "its name cannot be read"

"""Ed25519 signatures of weight manifests: made at the gateway, checked on robots' hosts."""

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from embodied.core.errors import IdentityError

SIGNATURE_BYTES = 64

_DAMAGED = (ValueError, TypeError, UnsupportedAlgorithm)


def generate() -> tuple[bytes, bytes]:
    """A new key pair as PEM: private, public."""
    key = Ed25519PrivateKey.generate()
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        _public_pem(key.public_key()),
    )


def sign(private_key_pem: bytes, data: bytes) -> bytes:
    """The signature of `data`, 64 bytes. Raises IdentityError if the key is not Ed25519."""
    return _private(private_key_pem).sign(data)


def verify(public_key_pem: bytes, data: bytes, signature: bytes) -> None:
    """IdentityError unless the holder of the private key signed exactly `data`."""
    try:
        _public(public_key_pem).verify(signature, data)
    except InvalidSignature:
        raise IdentityError(
            "the signature does not fit the data: they were changed on the way, or signed by "
            "another gateway than this authority's"
        ) from None


def check_pair(private_key_pem: bytes, public_key_pem: bytes, what: str) -> None:
    """IdentityError unless both are of one pair."""
    if _public_pem(_private(private_key_pem).public_key()) != _public_pem(_public(public_key_pem)):
        raise IdentityError(f"{what} belongs to another public key than the one beside it")


def check_public(public_key_pem: bytes) -> None:
    """IdentityError unless this is an Ed25519 public key."""
    _public(public_key_pem)


def _private(pem: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except _DAMAGED as error:
        raise IdentityError("the key for signing is not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError("the key for signing is not an Ed25519 key, as weights.key is")
    return key


def _public(pem: bytes) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except _DAMAGED as error:
        raise IdentityError("the key for checking is not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("the key for checking is not an Ed25519 key, as weights.pub is")
    return key


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

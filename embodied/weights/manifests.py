"""Bytes of the weight store: arrays as safetensors, manifests as JSON with a checksum."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from embodied.core.errors import ConfigError, CorruptDataError, SpecError

MAX_BYTES = 16 << 30
MAX_MANIFEST_BYTES = 4 << 20

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
_Version = Annotated[int, msgspec.Meta(ge=1, le=99_999_999)]


class WeightManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a version consists of. sha256, num_bytes: of the safetensors blob. base: version that
    the blob is a difference to; None: it is whole. config: how to
    build the policy. metadata: anything else that is JSON."""

    version: _Version
    sha256: _Digest
    num_bytes: _Size
    base: _Version | None
    config: dict[str, Any]
    metadata: dict[str, Any]


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    sha256: _Digest


def serialise(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as safetensors, the same bytes for the same arrays. Raises SpecError."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in sorted(arrays.items()):
        if not array.dtype.isnative or array.dtype.hasobject:
            raise SpecError(f"weights '{name}' have dtype {array.dtype.str}; use a native one")
        # safetensors writes the memory of an array as it lies, whatever its strides.
        tensors[name] = array if array.flags.c_contiguous else array.copy(order="C")
    if sum(array.nbytes for array in tensors.values()) > MAX_BYTES - MAX_MANIFEST_BYTES:
        raise SpecError(f"weights are larger than {MAX_BYTES} bytes")
    try:
        return safetensors.numpy.save(tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SpecError(f"weights cannot be stored as safetensors: {error}") from error


def json_object(value: bytes | dict[str, Any], what: str) -> dict[str, Any]:
    """A JSON object, decoded or not, as it will be read back. Raises ConfigError."""
    try:
        data = value if isinstance(value, bytes) else msgspec.json.encode(value)
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} of the weights is no JSON object: {error}") from error


def encode_manifest(manifest: WeightManifest) -> bytes:
    """The manifest's file: itself and its checksum. Raises ConfigError if it is too large."""
    raw = msgspec.json.encode(manifest)
    data = msgspec.json.encode(_Envelope(msgspec.Raw(raw), hashlib.sha256(raw).hexdigest()))
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"config and metadata of the weights take {len(data)} bytes; at most "
            f"{MAX_MANIFEST_BYTES} are stored"
        )
    return data


def decode_manifest(data: bytes, version: int, path: Path) -> WeightManifest:
    """Inverse of encode_manifest. Raises CorruptDataError that names the file and version."""
    where = f"{path}, manifest of weights version {version},"
    try:
        envelope = msgspec.json.decode(data[:MAX_MANIFEST_BYTES], type=_Envelope)
        manifest = msgspec.json.decode(envelope.manifest, type=WeightManifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptDataError(f"{where} cannot be decoded: {error}") from error
    digest = hashlib.sha256(envelope.manifest).hexdigest()
    if digest != envelope.sha256 or manifest.version != version:
        raise CorruptDataError(
            f"{where} was altered: it has the checksum {digest}, where {envelope.sha256} is right"
        )
    return manifest

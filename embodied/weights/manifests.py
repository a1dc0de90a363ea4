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
from embodied.weights.acting import Layout, Precision, check_layout

MAX_BYTES = 16 << 30
MAX_MANIFEST_BYTES = 4 << 20

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]
Version = Annotated[int, msgspec.Meta(ge=1, le=99_999_999)]


class ActingForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The acting form that a learner sent. sha256: its canonical digest (weights.acting)."""

    precision: Precision
    sha256: Digest


class WeightManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a version consists of. sha256, num_bytes: of the safetensors blob. base: version that
    the blob is a difference to; None: it is whole. config: how to
    build the policy. metadata: anything else that is JSON. acting: what it was made of, if it
    came from another host."""

    version: Version
    sha256: Digest
    num_bytes: _Size
    base: Version | None
    config: dict[str, Any]
    metadata: dict[str, Any]
    acting: ActingForm | None = None


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    manifest: msgspec.Raw
    sha256: Digest


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of a safetensors header."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_DTYPES = {
    "BOOL": np.bool_,
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}


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


def tensors(blob: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a safetensors blob (uint8), as views of it. Raises CorruptDataError.

    safetensors' own reader copies them, and holds Python's lock for as long: 2 ms for 10 MB, in
    which a control loop of the same process would stand still.
    """
    try:
        begin = 8 + int.from_bytes(blob[:8].tobytes(), "little")
        header = msgspec.json.decode(blob[8:begin].tobytes(), type=dict[str, _Tensor])
        found: dict[str, np.ndarray] = {}
        for name, tensor in header.items():
            first, stop = tensor.data_offsets
            values = blob[begin + first : begin + stop].view(_DTYPES[tensor.dtype])
            found[name] = values.reshape(tensor.shape)
    except (msgspec.MsgspecError, RecursionError, KeyError, ValueError) as error:
        raise CorruptDataError(f"no safetensors: {error}") from error
    return found


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


class UpdateManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version as a learner sends it: what the patch is, of what, and what must come out.

    base_version, base_sha256: acting form that the patch changes; None: the patch is whole.
    sha256, num_bytes, precision: of the acting form that comes out (embodied.weights.acting).
    patch_sha256, patch_bytes: of the patch. layout, config: None: the base's.
    """

    run_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    version: Version
    base_version: Version | None
    base_sha256: Digest | None
    sha256: Digest
    num_bytes: _Size
    precision: Precision
    patch_sha256: Digest
    patch_bytes: Annotated[int, msgspec.Meta(ge=1, le=2 * MAX_BYTES)]
    layout: Layout | None
    config: dict[str, Any] | None
    metadata: dict[str, Any]


_SIGNED = b"embodied weights update 1\n"


def to_sign(manifest: bytes) -> bytes:
    """What is signed of an encoded UpdateManifest: no signature of anything else fits it."""
    return _SIGNED + manifest


def decode_update(data: bytes) -> UpdateManifest:
    """An UpdateManifest of its JSON. Raises CorruptDataError, also for fields that disagree."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise CorruptDataError(
            f"manifest of {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are right"
        )
    try:
        update = msgspec.json.decode(data, type=UpdateManifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptDataError(f"manifest of an update cannot be decoded: {error}") from error
    whole = update.base_version is None
    if whole != (update.base_sha256 is None) or (
        whole and (update.layout is None or update.config is None)
    ):
        raise CorruptDataError(
            "manifest of an update must name its base by version and SHA-256, or else bring the "
            "layout and the config"
        )
    if update.layout is not None:
        check_layout(update.layout, update.num_bytes)
    return update

"""A policy's folder as far as it can be read without torch: its configuration and its spec."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.specs import PolicySpec

CONFIG, MODEL = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_ELEMENTS = 1 << 22


def find_folder(path: Path, where: str) -> Path:
    """The policy's folder at `path`, or that of the run there; ConfigError if it is neither."""
    folder = path if (path / MODEL).exists() else path / "policy"
    if not (folder / MODEL).exists():
        raise ConfigError(
            f"{where}={path} is no policy's folder, nor a run's that has a policy yet"
        )
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """The content of a sealed config.json, "sha256" left out; CorruptDataError if it is damaged."""
    content = read_json(path)
    sealed = content.pop("sha256", None)
    if sealed != digest(content):
        raise CorruptDataError(f"{path.name} does not match its own hash: a byte was changed.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB; CorruptDataError if the file holds none."""
    try:
        content = json.loads(read_bytes(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path.name} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CorruptDataError(f"{path.name} is no JSON object.")
    return content


def read_bytes(path: Path, limit: int) -> bytes:
    """A file's content; CorruptDataError if it is missing or longer than `limit` bytes."""
    if not path.is_file():
        raise CorruptDataError(f"{path.name} is missing or no regular file.")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptDataError(f"{path.name} is larger than the {limit} bytes it may have.")
    return data


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON text."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def spec_data(spec: PolicySpec) -> dict[str, Any]:
    """A spec as plain JSON values."""
    return _finite(msgspec.to_builtins(spec))


def spec_from_data(data: Any, owner: str = "policy") -> PolicySpec:
    """Inverse of spec_data; CorruptDataError if it is none, ConfigError for one too large."""
    try:
        spec = msgspec.convert(_infinite(data), PolicySpec)
    except (msgspec.ValidationError, SpecError) as error:
        raise CorruptDataError(f"the {owner}'s spec cannot be read: {error}.") from error
    sizes = [spec.action.size * spec.horizon]
    sizes += [spec.n_obs_steps * array.size for array in spec.observation.values()]
    if max(sizes) > MAX_ELEMENTS:
        raise ConfigError(f"the {owner}'s spec has {max(sizes)} elements; that is too many.")
    return spec


def _finite(value: Any) -> Any:
    """Replace infinities, which JSON lacks, by "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _infinite(value: Any) -> Any:
    """Inverse of _finite; no text of a spec is otherwise "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {k: _infinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_infinite(v) for v in value]
    return float(value) if value in ("inf", "-inf") else value

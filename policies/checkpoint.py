"""Policies as data: a configuration and named arrays, in memory or in a directory.

A checkpoint directory holds config.json (format, registered name, PolicySpec, options, hashes) and
model.safetensors (network and normalisers). Of a composed policy, the options hold the members'
own configurations and the arrays are theirs too. Nothing in it is code; a name that is not
registered, an array that the named policy does not have, or a byte that changed is refused.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch.overrides import TorchFunctionMode

from embodied.core.config import component
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.files import fsync_directory, write_atomic
from embodied.core.registry import resolve
from embodied.core.specs import PolicySpec
from policies.folder import (
    CONFIG,
    MODEL,
    digest,
    read_bytes,
    read_config,
    spec_data,
    spec_from_data,
)

FORMAT = 1
HEADER_BYTES_PER_ARRAY = 512
REMEDY = "Restore the directory from a copy, or use another checkpoint."


class Storable(Protocol):
    """A registered policy that is a torch module."""

    name: ClassVar[str]
    spec: PolicySpec
    config: Any

    def state_dict(self) -> Any:
        """Its arrays."""
        ...


def policy_state(policy: Storable) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A policy as (configuration of plain JSON values, arrays by name, copied to memory).

    ConfigError if the policy's class is not the one registered under its name.
    """
    if resolve("policies", policy.name) is not type(policy):
        raise ConfigError(
            f"{type(policy).__qualname__} is not the policy registered as '{policy.name}'; "
            "register it, so that its checkpoints can be loaded"
        )
    config = {
        "format": FORMAT,
        "policy": policy.name,
        "spec": spec_data(policy.spec),
        "options": msgspec.json.decode(msgspec.json.encode(policy.config)),
    }
    arrays = {k: v.detach().cpu().numpy().copy() for k, v in policy.state_dict().items()}
    return config, arrays


def policy_from_state(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The policy that `policy_state` described.

    ConfigError: the configuration names something unknown or unusable. CorruptDataError: it has
    another format, or the arrays are not exactly the policy's in name, shape and dtype, or not
    finite. Shapes are compared before any memory is taken for the model.
    """
    return restored(lambda: construct(config), arrays)


def restored(
    make: Callable[[], Any], arrays: Mapping[str, np.ndarray], owner: str = "policy"
) -> Any:
    """The module that `make` makes, with these arrays in the place of untrained ones.

    CorruptDataError as of `policy_from_state`, before any memory is taken for the module.
    """
    _check_arrays(arrays, _expected_arrays(make), owner)
    with _WithoutInitialisation():
        module = make()
    load_arrays(module, arrays)
    return module


def load_arrays(policy: Storable, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace a policy's weights and normalisers in place: all of them, or none and an error.

    Faster than `policy_from_state` for new weights of the same configuration. CorruptDataError as
    there.
    """
    state = policy.state_dict()
    _check_arrays(arrays, _shapes(state))
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(torch.from_numpy(np.require(arrays[key], requirements="W")))


def save_policy(path: Path, policy: Storable) -> None:
    """Write a checkpoint directory; it appears whole, and replaces one of the same name."""
    config, arrays = policy_state(policy)
    model = safetensors.numpy.save(arrays)
    content = {**config, "model_sha256": hashlib.sha256(model).hexdigest()}
    sealed = {**content, "sha256": digest(content)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_atomic(temporary / MODEL, model)
        write_atomic(temporary / CONFIG, json.dumps(sealed, indent=2, allow_nan=False).encode())
        if path.exists():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_policy(path: Path) -> Any:
    """Read a checkpoint directory; ConfigError or CorruptDataError name what is wrong with it."""
    try:
        config = read_config(path / CONFIG)
        arrays = _read_model(path / MODEL, config)
        return policy_from_state(config, arrays)
    except RecursionError as error:
        raise CorruptDataError(f"checkpoint {path}: its members nest too deep. {REMEDY}") from error
    except (ConfigError, CorruptDataError) as error:
        raise type(error)(f"checkpoint {path}: {error} {REMEDY}") from error


def _read_model(path: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    data = read_model(path, lambda: construct(config))
    if hashlib.sha256(data).hexdigest() != config.get("model_sha256"):
        raise CorruptDataError(f"{MODEL} does not match its hash in {CONFIG}.")
    return arrays_of(data, MODEL)


def read_model(path: Path, make: Callable[[], Any]) -> bytes:
    """A safetensors file, which must not be larger than one of the module's that `make` makes."""
    expected = _expected_arrays(make)
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    return read_bytes(path, size + HEADER_BYTES_PER_ARRAY * (len(expected) + 1))


def arrays_of(data: bytes, name: str) -> dict[str, np.ndarray]:
    """What a safetensors file of this name holds; CorruptDataError if it cannot be read."""
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CorruptDataError(f"{name} cannot be read: {error}.") from error


Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class _WithoutInitialisation(TorchFunctionMode):
    """Skips random initialisation; on the meta device it would load torch's compiler (seconds)."""

    SKIPPED = frozenset({"uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.SKIPPED:
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def _expected_arrays(make: Callable[[], Any]) -> Shapes:
    """Names, shapes and dtypes of the module that `make` makes, without memory for its weights."""
    with torch.device("meta"), _WithoutInitialisation():
        return _shapes(make().state_dict())


def _shapes(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {
        key: (tuple(value.shape), np.dtype(str(value.dtype).removeprefix("torch.")))
        for key, value in state.items()
    }


def _check_arrays(
    arrays: Mapping[str, np.ndarray], expected: Shapes, owner: str = "policy"
) -> None:
    if arrays.keys() != expected.keys():
        odd = sorted(arrays.keys() ^ expected.keys())
        raise CorruptDataError(f"arrays missing or not the {owner}'s: {', '.join(odd[:4])}.")
    for key, (shape, dtype) in expected.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != dtype:
            raise CorruptDataError(
                f"{key} is {array.dtype} {array.shape}; the {owner} has {dtype} {shape}."
            )
        if not np.isfinite(array).all():
            raise CorruptDataError(f"{key} holds values that are not finite.")


def construct(config: Mapping[str, Any]) -> Any:
    """The described policy with untrained weights; errors as of `policy_from_state`."""
    fields = {"format", "policy", "spec", "options"}
    if not fields <= config.keys() or config["format"] != FORMAT:
        raise CorruptDataError(f"the configuration is not of format {FORMAT}.")
    if not isinstance(config["options"], Mapping):
        raise CorruptDataError("the configuration's options are no mapping.")
    cls, options = component("policies", {**config["options"], "name": config["policy"]}, "policy")
    spec = spec_from_data(config["spec"])
    with _WithoutInitialisation():
        return cls(spec, options)

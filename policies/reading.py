"""Arrays of a batch as tensors, checked against what a network reads. B batch, T history."""

from collections.abc import Mapping

import numpy as np
import torch

from embodied.core.errors import SpecError
from embodied.core.specs import PolicySpec

Array = np.ndarray | torch.Tensor


def read(
    source: Mapping[str, Array], key: str, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """The tensor at `key`; a batch size of −1 in `shape` stands for any."""
    if key not in source:
        raise SpecError(f"'{key}' is missing; got keys {sorted(source)}")
    value = source[key]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    expected = (value.shape[0] if value.ndim and shape[0] < 0 else shape[0], *shape[1:])
    if tuple(value.shape) != expected:
        wanted = ", ".join("B" if n < 0 else str(n) for n in shape)
        raise SpecError(f"{key} has shape {tuple(value.shape)}; [{wanted}] is right")
    return value.to(device, non_blocking=True)


def read_observations(
    source: Mapping[str, Array], spec: PolicySpec, device: torch.device
) -> dict[str, torch.Tensor]:
    """The spec's observations [B, T, …] out of what else there is.

    SpecError for a missing key, a wrong shape, or a value that is not finite.
    """
    found: dict[str, torch.Tensor] = {}
    batch = -1
    for key, array in spec.observation.items():
        value = read(source, key, (batch, spec.n_obs_steps, *array.shape), device)
        if array.dtype != "uint8":
            if not torch.isfinite(value).all():
                raise SpecError(f"{key} holds values that are not finite")
        elif value.dtype != torch.uint8:
            raise SpecError(f"{key} is {value.dtype}; uint8 is right")
        batch = value.shape[0]
        found[key] = value
    return found

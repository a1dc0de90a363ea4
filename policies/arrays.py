"""Bounds in single precision, and padded chunks. Shapes: B batch, n proposals,
H chunk, d of it committed, D action."""

import numpy as np
import torch

from embodied.core.errors import SpecError
from embodied.core.specs import ArraySpec


def float32_bounds(spec: ArraySpec) -> tuple[np.ndarray, np.ndarray]:
    """Bounds rounded inward, so that a float32 inside them is inside the float64 ones too."""
    low, high = spec.bounds()
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(np.inf)), low32)
    high32 = np.where(high32 > high, np.nextafter(high32, np.float32(-np.inf)), high32)
    return low32, high32


def without_padding(action_BHD: torch.Tensor, pad_BH: torch.Tensor) -> torch.Tensor:
    """Padded steps replaced by the nearest earlier valid action, else by the first valid one."""
    steps_H = torch.arange(pad_BH.shape[1], device=pad_BH.device)
    last_BH = torch.where(pad_BH, -1, steps_H).cummax(dim=1).values
    first_B1 = (~pad_BH).int().argmax(dim=1, keepdim=True)
    index_BH = torch.where(last_BH < 0, first_B1, last_BH)
    filled_BHD = action_BHD.gather(1, index_BH[..., None].expand_as(action_BHD))
    return filled_BHD.masked_fill(pad_BH.all(dim=1)[:, None, None], 0.0)


def put_prefix(actions_BHD: np.ndarray, prefix_BdD: np.ndarray) -> None:
    """Write committed actions over the head of the chunks; SpecError if they do not fit there."""
    batch, horizon, dim = actions_BHD.shape
    shape = actions_BHD[:, : prefix_BdD.shape[1]].shape if prefix_BdD.ndim == 3 else ()
    if prefix_BdD.shape != shape or not prefix_BdD.size:
        wanted = (batch, f"1..{horizon}", dim)
        raise SpecError(f"prefix has shape {prefix_BdD.shape}; {wanted} is right")
    actions_BHD[:, : prefix_BdD.shape[1]] = prefix_BdD


def with_prefix(pool_BnHD: torch.Tensor, prefix_BdD: np.ndarray) -> torch.Tensor:
    """Proposals with the committed actions at their head; SpecError if they do not fit."""
    rows = pool_BnHD.flatten(0, 1).cpu().numpy().copy()
    put_prefix(rows, np.repeat(prefix_BdD, pool_BnHD.shape[1], axis=0))
    return torch.from_numpy(rows).view_as(pool_BnHD).to(pool_BnHD)


def shifted(chunk_BHD: np.ndarray, executed: int) -> np.ndarray:
    """What a chunk says of the H ticks that begin s ticks later; its last action is repeated."""
    rest_BHD = np.repeat(chunk_BHD[:, -1:], executed, axis=1)
    return np.concatenate([chunk_BHD[:, executed:], rest_BHD], axis=1)

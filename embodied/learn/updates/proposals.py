"""Proposals of a policy that are used again, as long as they are not too old.

Shapes: B batch, M of it to be drawn, n proposals, H chunk, D action.
"""

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from embodied.learn.updates.base import Batch

_KEY_BYTES = 16

Draw = Callable[[Batch], torch.Tensor]
"""From M observations to proposals [M, n, H, D] for them."""


class ProposalCache:
    """What a policy proposed for an observation, by that observation's contents.

    Mark et al. 2024 (arXiv:2412.06685), section 5: policies that are dear to sample are not sampled
    at each gradient step. Proposals are drawn again once they are `age` gradient steps old, 0 for
    each time; once they need more than `most_bytes`, what was drawn longest ago makes room.
    """

    def __init__(self, age: int, most_bytes: int = 256 << 20) -> None:
        self._age = age
        self._most_bytes = most_bytes
        self._made: dict[bytes, tuple[int, torch.Tensor]] = {}

    def of(self, observation: Batch, step: int, draw: Draw) -> torch.Tensor:
        """Proposals [B, n, H, D] for observations [B, To, …], those that are missing or old drawn
        now."""
        if not self._age:
            return draw(observation)
        keys = _keys(observation)
        rows = {key: row for row, key in enumerate(keys) if not self._fresh(key, step)}
        if rows:
            chosen = torch.tensor(list(rows.values()))
            drawn = draw({key: x[chosen.to(x.device)] for key, x in observation.items()})
            for key, proposals in zip(rows, drawn, strict=True):
                self._made.pop(key, None)
                self._made[key] = (step, proposals.clone())
        found = torch.stack([self._made[key][1] for key in keys])
        most = self._most_bytes // found[0].nbytes
        while len(self._made) > most:
            del self._made[next(iter(self._made))]
        return found

    def _fresh(self, key: bytes, step: int) -> bool:
        made = self._made.get(key)
        return made is not None and step - made[0] < self._age

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, to continue with."""
        if not self._made:
            return {}
        keys = np.frombuffer(b"".join(self._made), np.uint8).reshape(-1, _KEY_BYTES)
        return {
            "keys": torch.from_numpy(keys.copy()),
            "steps": torch.tensor([step for step, _ in self._made.values()]),
            "chunks": torch.stack([chunks for _, chunks in self._made.values()]),
        }

    def load(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """What `tensors` returned."""
        self._made = {}
        if not tensors:
            return
        keys = [row.tobytes() for row in tensors["keys"].cpu().numpy()]
        chunks = tensors["chunks"].to(device)
        for key, step, proposals in zip(keys, tensors["steps"].tolist(), chunks, strict=True):
            self._made[key] = (step, proposals.clone())


def _keys(observation: Batch) -> list[bytes]:
    arrays = [observation[key].contiguous().cpu().numpy() for key in sorted(observation)]
    keys: list[bytes] = []
    for row in range(len(arrays[0])):
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for array in arrays:
            digest.update(array[row].tobytes())
        keys.append(digest.digest())
    return keys

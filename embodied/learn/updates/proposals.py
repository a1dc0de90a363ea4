"""Proposals of a policy that are used again, as long as they are not too old.

Shapes: B batch, M of it to be drawn, n proposals, H chunk, D action.
"""

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from embodied.learn.proposers import Proposers
from embodied.learn.updates.base import Batch

_KEY_BYTES = 16

Draw = Callable[[Batch], torch.Tensor]
"""From M observations to proposals [M, n, H, D] for them."""


class ProposalCache:
    """What a policy proposed for an observation, by that observation's contents.

    Mark et al. 2024 (arXiv:2412.06685), section 5: policies that are dear to sample are not sampled
    at each gradient step. Proposals are drawn again once they are `age` gradient steps old, 0 for
    each time; once they need more than `most_bytes`, what was drawn longest ago makes room.

    With proposers (an age is needed then) only missing ones are drawn here; old ones are asked for
    elsewhere and used until new ones come, whose age counts from when they were asked for.
    """

    def __init__(
        self, age: int, proposers: Proposers | None = None, most_bytes: int = 256 << 20
    ) -> None:
        self._age = age
        self._proposers = proposers
        self._most_bytes = most_bytes
        self._made: dict[bytes, tuple[int, torch.Tensor]] = {}
        self._ages: list[int] = []
        self._drawn = 0

    def of(self, observation: Batch, step: int, draw: Draw) -> torch.Tensor:
        """Proposals [B, n, H, D] for observations [B, To, …], those that are missing, and old ones
        unless there are proposers, drawn now."""
        if not self._age:
            return draw(observation)
        keys = _keys(observation)
        if self._proposers is not None:
            self._take(self._proposers, next(iter(observation.values())).device)
        rows = {key: row for row, key in enumerate(keys) if not self._fresh(key, step)}
        if self._proposers is not None:
            self._ask(self._proposers, observation, rows, step)
            rows = {key: row for key, row in rows.items() if key not in self._made}
            self._drawn += len(rows)
        if rows:
            drawn = draw(_chosen(observation, list(rows.values())))
            for key, proposals in zip(rows, drawn, strict=True):
                self._keep(key, step, proposals)
        if self._proposers is not None:
            self._ages += [step - self._made[key][0] for key in keys]
        found = torch.stack([self._made[key][1] for key in keys])
        most = self._most_bytes // found[0].nbytes
        while len(self._made) > most:
            del self._made[next(iter(self._made))]
        return found

    def metrics(self) -> dict[str, float]:
        """With proposers, since the last call: the mean age of what was used, in gradient steps,
        and how many observations were drawn for here."""
        if not self._ages:
            return {}
        found = {"proposals_age": float(np.mean(self._ages)), "proposals_drawn": float(self._drawn)}
        self._ages, self._drawn = [], 0
        return found

    def _fresh(self, key: bytes, step: int) -> bool:
        made = self._made.get(key)
        return made is not None and step - made[0] < self._age

    def _keep(self, key: bytes, step: int, proposals: torch.Tensor) -> None:
        self._made.pop(key, None)
        self._made[key] = (step, proposals.clone())

    def _take(self, proposers: Proposers, device: torch.device) -> None:
        for answer in proposers.take():
            chunks = torch.tensor(answer.chunks, device=device)
            for key, step, proposals in zip(answer.keys, answer.steps, chunks, strict=True):
                self._keep(key, step, proposals)

    def _ask(
        self, proposers: Proposers, observation: Batch, rows: Mapping[bytes, int], step: int
    ) -> None:
        made = {key: self._made[key][0] for key in rows if key in self._made}

        def observe(keys: list[bytes]) -> dict[str, np.ndarray]:
            found = _chosen(observation, [rows[key] for key in keys])
            return {name: x.cpu().numpy() for name, x in found.items()}

        proposers.ask(made, step, observe)

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


def _chosen(observation: Batch, rows: list[int]) -> dict[str, torch.Tensor]:
    index = torch.tensor(rows)
    return {key: x[index.to(x.device)] for key, x in observation.items()}


def _keys(observation: Batch) -> list[bytes]:
    arrays = [observation[key].contiguous().cpu().numpy() for key in sorted(observation)]
    keys: list[bytes] = []
    for row in range(len(arrays[0])):
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for array in arrays:
            digest.update(array[row].tobytes())
        keys.append(digest.digest())
    return keys

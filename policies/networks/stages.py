"""A network in two stages: what depends on time and conditioning alone, then what depends on x.

A solver knows its times before it starts, so the first stage is done for all steps at once.
Shapes: B batch, H chunk, D action, C conditioning, K steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from policies.conversions import Scalar

Context = tuple[torch.Tensor, ...]
"""The first stage's results; the first axis of each is the batch."""


@runtime_checkable
class Staged(Protocol):
    """What a network may offer beside forward(x, time, cond) = refine(x, prepare(time, cond))."""

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """Everything that does not depend on x, row by row."""
        ...

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """The prediction [B, H, D]."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """Conditioning, and the contexts of the times at which it will be needed."""

    cond_BC: torch.Tensor
    contexts: Mapping[float, Context]

    def __len__(self) -> int:
        """Rows."""
        return len(self.cond_BC)


Cond = torch.Tensor | Prepared


def prepare(network: nn.Module, cond_BC: torch.Tensor, times: Sequence[float]) -> Cond:
    """The conditioning with the contexts of all times; as it is for a network without stages."""
    if not isinstance(network, Staged):
        return cond_BC
    rows = len(cond_BC)
    time_N = cond_BC.new_tensor(times).repeat_interleave(rows)
    context = network.prepare(time_N, cond_BC.repeat(len(times), 1))
    by_time = zip(*(part.split(rows) for part in context), strict=True)
    return Prepared(cond_BC, dict(zip(times, by_time, strict=True)))


def evaluate(network: nn.Module, x_BHD: torch.Tensor, time: Scalar, cond: Cond) -> torch.Tensor:
    """The network's prediction [B, H, D], in x's precision, at times [B] or one of all rows."""
    if isinstance(cond, Prepared):
        if not isinstance(time, torch.Tensor) and (context := cond.contexts.get(time)) is not None:
            assert isinstance(network, Staged)
            return network.refine(x_BHD, context).to(x_BHD)
        cond = cond.cond_BC
    time_B = (
        time.to(x_BHD) if isinstance(time, torch.Tensor) else x_BHD.new_full((len(x_BHD),), time)
    )
    return network(x_BHD, time_B, cond).to(x_BHD)

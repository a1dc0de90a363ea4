"""What an algorithm does with a batch, and what the learner does for it."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from embodied.learn.config import LearnerConfig

Batch = Mapping[str, torch.Tensor]

OWN = "updates."
"""What the learner puts before the names of parameters that are the updates' own."""


@dataclass(frozen=True)
class Group:
    """Parameters with an optimiser of their own (AdamW).

    prefix: of their names in the policy; OWN for those that are the updates' own. weight_decay: of
    theirs. setting: what to lower if they diverge.
    """

    prefix: str
    weight_decay: float
    setting: str = "learner.learning_rate"


class Optimisers(Protocol):
    """What an update may ask of the learner."""

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        ...

    def descend(self, group: str, loss: torch.Tensor, learning_rate: float) -> float:
        """One step of a group's optimiser down the loss; returns the gradient's norm."""
        ...

    def weights(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Configuration and arrays of the policy with averaged parameters."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Meanwhile the averaged parameters stand in the policy, which must not be trained."""
        ...


class Updates(Protocol):
    """An algorithm's gradient steps on a policy, and the state that they need beside it."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """By name; together they hold every parameter that is trained."""
        ...

    @property
    def averaged(self) -> str:
        """What the names of the parameters begin with that are averaged, and act so."""
        ...

    def acts(self, step: int) -> bool:
        """Whether the weights after so many steps may act."""
        ...

    def step(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """The step after `step` others; its metrics, among them "loss"."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained beside the policy, by name; the values are among `tensors`."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """State to be kept in a checkpoint, by name."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` gave; KeyError for one that is missing."""
        ...


def warmed(step: int, warmup_steps: int) -> float:
    """The share of a learning rate in a linear warm-up."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def cosine(progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Cloning:
    """Every step goes down the policy's own loss; the rate falls along a cosine over the budget."""

    averaged = ""

    def __init__(self, policy: Any, options: LearnerConfig, seed: int) -> None:
        """options: the learner's. seed: unused, the noise is the policy's own."""
        self._policy = policy
        self._options = options
        self.groups = {"policy": Group("", options.weight_decay)}

    def acts(self, step: int) -> bool:
        """See Updates: always."""
        return True

    def step(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """See Updates."""
        warm = warmed(step, self._options.warmup_steps)
        rate = self._options.learning_rate * warm * cosine(optimisers.progress)
        loss, metrics = self._policy.loss(batch)
        norm = optimisers.descend("policy", loss, rate)
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See Updates: none."""
        return {}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See Updates: none."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Updates."""

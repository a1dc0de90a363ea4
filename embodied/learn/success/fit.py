"""Training a success classifier, and what it says of episodes. B batch, T history."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from embodied.core.seeds import derive_seed
from embodied.learn.adamw import AdamW
from embodied.learn.success.labels import Labelled
from embodied.learn.success.scores import Scored

Arrays = Mapping[str, np.ndarray]
Observe = Callable[[np.ndarray], Arrays]
"""Row ids [B, T] → observations [B, T, …]."""

_ROWS = 256
_WARMUP = 20


class Classifier(Protocol):
    """A torch module that tells success from observations [B, T, …]."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is learned."""
        ...

    def logits(self, obs: Arrays, rng: torch.Generator | None = None) -> torch.Tensor:
        """[B]; rng draws what pictures undergo in training."""
        ...

    def probabilities(self, obs: Arrays) -> np.ndarray:
        """[B]."""
        ...


def fit(
    classifier: Classifier,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    observe: Observe,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Learn by cross-entropy, the learning rate along a cosine; the mean loss of the last tenth.

    batches: rows [B, T] and labels [B], as of `balanced`.
    """
    rng = torch.Generator("cpu").manual_seed(derive_seed(seed, "augmentation") % 2**63)
    optimizer = AdamW(dict(classifier.named_parameters()), weight_decay=weight_decay)
    losses: list[float] = []
    for step in range(steps):
        rows_BT, labels_B = next(batches)
        loss = F.binary_cross_entropy_with_logits(
            classifier.logits(observe(rows_BT), rng), torch.from_numpy(labels_B)
        )
        optimizer.zero_grad()
        loss.backward()
        cosine = (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.step(learning_rate * cosine * min(1.0, (step + 1) / _WARMUP))
        losses.append(loss.item())
        on_step()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def score(
    classifier: Classifier, episodes: Sequence[Labelled], observe: Observe, n_obs_steps: int
) -> list[Scored]:
    """What the classifier says of every observation of these episodes."""
    scored: list[Scored] = []
    for episode in episodes:
        rows = episode.history(n_obs_steps)
        parts = [
            classifier.probabilities(observe(rows[first : first + _ROWS]))
            for first in range(0, len(rows), _ROWS)
        ]
        scored.append(Scored(episode.positive, np.concatenate(parts)))
    return scored

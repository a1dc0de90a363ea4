"""Noise that depends on a row's seed alone. Shapes: B batch, H chunk, D action, N numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from embodied.core.errors import CorruptDataError, SpecError

Generators = torch.Generator | list[torch.Generator] | None
"""Where noise is drawn from: one stream for all rows, one for each row, or torch's own."""


def check_seeds(seed: np.ndarray, batch: int) -> list[int]:
    """One non-negative integer per row; SpecError unless `seed` is an integer array [batch]."""
    seed = np.asarray(seed)
    if seed.shape != (batch,) or seed.dtype.kind not in "iu":
        raise SpecError(
            f"seed has shape {seed.shape} and dtype {seed.dtype}; "
            f"it must hold one integer for each of the {batch} rows"
        )
    return [int(value) % 2**64 for value in seed]


def start_noise(seeds: list[int], horizon: int, action_dim: int) -> torch.Tensor:
    """Standard normal [B, H, D] float32; row b comes from a Philox generator of seeds[b]."""
    noise_BHD = np.empty((len(seeds), horizon, action_dim), np.float32)
    for row_HD, seed in zip(noise_BHD, seeds, strict=True):
        _stream(seed).standard_normal(out=row_HD, dtype=np.float32)
    return torch.from_numpy(noise_BHD)


def uniform(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform on [0, 1), [B, *shape] float32; row b comes from a Philox generator of seeds[b]."""
    rows = [_stream(seed).random(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows) if rows else np.empty((0, *shape), np.float32))


def further_noise(seeds: list[int], size: int) -> torch.Tensor:
    """Standard normal [B, size] float32, independent of `start_noise` of the same seeds."""
    noise_BN = np.empty((len(seeds), size), np.float32)
    for row_N, seed in zip(noise_BN, seeds, strict=True):
        _stream([seed, 2]).standard_normal(out=row_N, dtype=np.float32)
    return torch.from_numpy(noise_BN)


def step_generators(seeds: list[int]) -> list[torch.Generator]:
    """One CPU generator per row, for the noise a stochastic sampler adds after the start."""
    return [
        torch.Generator("cpu").manual_seed(
            int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0]) >> 1
        )
        for seed in seeds
    ]


def normal_like(x_BHD: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Standard normal noise in the shape and dtype of x, drawn on the CPU."""
    shape, dtype = x_BHD.shape, x_BHD.dtype
    if isinstance(generators, list):
        rows = [torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators]
        return torch.cat(rows).to(x_BHD.device)
    return torch.randn(shape, generator=generators, dtype=dtype).to(x_BHD.device)


def _stream(entropy: int | list[int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


class TrainingNoise:
    """A stream of noise for the training of a policy, which a learner can keep and continue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Before the module that it is mixed into."""
        super().__init__(*args, **kwargs)
        self._training_rng = torch.Generator("cpu")

    def seed_training(self, seed: int) -> None:
        """Start the stream of noise that `loss` draws from."""
        self._training_rng.manual_seed(seed % 2**63)

    def training_rng_state(self) -> torch.Tensor:
        """State of that stream, uint8 [n]."""
        return self._training_rng.get_state()

    def set_training_rng_state(self, state: torch.Tensor) -> None:
        """Continue from `training_rng_state`; CorruptDataError if it is no such state."""
        try:
            self._training_rng.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise CorruptDataError(f"not a state of the training noise: {error}") from error


class LearnsAsItsPolicy:
    """Acts in another way than the policy in it, and learns by that policy's loss and noise."""

    policy: Any

    def loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy's."""
        return self.policy.loss(batch)

    def seed_training(self, seed: int) -> None:
        """Start the policy's stream of training noise."""
        self.policy.seed_training(seed)

    def training_rng_state(self) -> torch.Tensor:
        """State of the policy's stream of training noise."""
        return self.policy.training_rng_state()

    def set_training_rng_state(self, state: torch.Tensor) -> None:
        """Continue the policy's stream of training noise."""
        self.policy.set_training_rng_state(state)

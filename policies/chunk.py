"""What every policy shares that maps an observation history to a chunk of actions.

Shapes: B batch, T history, H chunk, D action, C conditioning.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import Carry
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import float32_bounds, without_padding
from policies.configs import ChunkConfig
from policies.encoders.observations import ObservationEncoder
from policies.normalizer import FeatureStats, LinearNormalizer
from policies.reading import Array, read, read_observations

C = TypeVar("C", bound=ChunkConfig)


class ChunkPolicy(noise.TrainingNoise, nn.Module, ABC, Generic[C]):
    """Observation histories → conditioning; labels and bounds of chunks; the training's noise."""

    name: ClassVar[str]
    """The name under which the class is registered; checkpoints carry it."""

    low_D: torch.Tensor
    high_D: torch.Tensor

    def __init__(self, spec: PolicySpec, config: C) -> None:
        """Identity observation normalisers until `set_statistics` or a checkpoint sets them."""
        super().__init__()
        if len(spec.action.shape) != 1:
            raise ConfigError(f"action has shape {spec.action.shape}; policies need one axis")
        if not spec.observation:
            raise ConfigError("a policy needs at least one observation key")
        self._bound(spec)
        self.config = config
        self.encoder = ObservationEncoder(spec, config.images, config.language)
        self._action = LinearNormalizer(spec.action.shape)
        if config.action_normalization == "spec":
            self._action.set_bounds(spec.action, "action")

    def _bound(self, spec: PolicySpec) -> None:
        """Take over the spec and its bounds."""
        self.spec = spec
        for name, bound in zip(("low_D", "high_D"), float32_bounds(spec.action), strict=True):
            self.register_buffer(name, torch.as_tensor(bound), persistent=False)

    @abstractmethod
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """Chunks [B, H, D] float32 in device units and within the action's bounds."""

    @abstractmethod
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """Draw n chunks for each row: [B, n, H, D] float32 in device units, within bounds."""

    @abstractmethod
    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cloning loss and metrics of a batch as WindowSampler.fetch makes it."""

    @property
    def normalized_keys(self) -> tuple[str, ...]:
        """Keys of which `set_statistics` needs the statistics; never pictures or text."""
        from_data = self.config.action_normalization != "spec"
        return (*self.encoder.states, *(("action",) if from_data else ()))

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """Fit the normalisers to a data set's statistics; ConfigError if a key lacks them."""
        self.encoder.set_statistics(stats, self.config.observation_normalization)
        if self.config.action_normalization != "spec":
            if "action" not in stats:
                raise unknown("statistics key", "action", stats)
            self._action.set_statistics(stats["action"], self.config.action_normalization, "action")

    def init(self, batch: int) -> Carry | None:
        """Nothing is carried from decision to decision, unless a subclass does."""
        return None

    def encode(self, obs: Mapping[str, Array]) -> torch.Tensor:
        """Conditioning [B, C] from observations [B, To, …] in device units.

        Raises SpecError for a missing or unknown key, a wrong shape, or a value that is not finite.
        """
        self._check_keys(obs)
        return self._condition(obs)

    @property
    def action_normalizer(self) -> LinearNormalizer:
        """From device units to the actions that the network knows."""
        return self._action

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.low_D.device

    def _check_keys(self, obs: Mapping[str, Array]) -> None:
        for key in obs:
            if key not in self.spec.observation:
                raise SpecError(str(unknown("observation key", key, self.spec.observation)))

    def _condition(
        self, source: Mapping[str, Array], rng: torch.Generator | None = None
    ) -> torch.Tensor:
        return self.encoder(read_observations(source, self.spec, self.device), rng)

    def _labels(self, batch: Mapping[str, Array], n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised actions [B, H, D], padding filled, and which steps are padding [B, H]."""
        shape = (n_rows, self.spec.horizon, self.spec.action.size)
        action_BHD = read(batch, "action", shape, self.device)
        pad_BH = read(batch, "action_is_pad", shape[:2], self.device).bool()
        return self._action.normalize(without_padding(action_BHD, pad_BH)), pad_BH

    def _actions(self, x_BHD: torch.Tensor) -> torch.Tensor:
        """Normalised actions in device units, float32 and within the bounds."""
        action_BHD = self._action.unnormalize(x_BHD).float()
        return action_BHD.clamp(self.low_D.float(), self.high_D.float())


def valid_mean(error_BHD: torch.Tensor, pad_BH: torch.Tensor) -> torch.Tensor:
    """Mean over all steps that are not padding; 0 if all are."""
    valid_BH1 = (~pad_BH)[..., None]
    n_valid = valid_BH1.sum().clamp(min=1) * error_BHD.shape[-1]
    return torch.where(valid_BH1, error_BHD, 0.0).sum() / n_valid

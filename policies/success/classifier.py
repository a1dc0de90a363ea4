"""The network of a success classifier. Shapes: B batch, T history, C conditioning, W width."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError
from embodied.core.specs import PolicySpec
from policies.checkpoint import restored
from policies.encoders.observations import ObservationEncoder
from policies.normalizer import FeatureStats
from policies.reading import Array, read_observations
from policies.success.configs import StoredClassifier, SuccessConfig


class SuccessClassifier(nn.Module):
    """From the last observations to one logit: an encoder and an MLP.

    As in Singh et al. 2019 (VICE-RAQ), without their queries: a binary classifier of states that
    stands in for a reward. Its probabilities are those of balanced classes.
    """

    name: ClassVar[str] = "success classifier"

    def __init__(self, spec: PolicySpec, config: SuccessConfig) -> None:
        """spec: its observations and their history; ConfigError if there are none."""
        super().__init__()
        if not spec.observation:
            raise ConfigError("a success classifier needs at least one observation key")
        self.spec = spec
        self.config = config
        self.encoder = ObservationEncoder(spec, config.images, None, "classifier")
        layers: list[nn.Module] = []
        size = self.encoder.dim
        for _ in range(config.depth):
            layers += [nn.Linear(size, config.width), nn.LayerNorm(config.width), nn.SiLU()]
            size = config.width
        self.network = nn.Sequential(*layers, nn.Linear(size, 1))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @property
    def normalized_keys(self) -> tuple[str, ...]:
        """Keys of which `set_statistics` needs the statistics; never pictures."""
        return self.encoder.states

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """Fit the normalisers to a data set's; ConfigError if a key lacks them."""
        self.encoder.set_statistics(stats, self.config.observation_normalization)

    def logits(self, obs: Mapping[str, Array], rng: torch.Generator | None = None) -> torch.Tensor:
        """[B] from observations [B, T, …] in device units.

        rng: draws what pictures undergo in training; None for inference. SpecError for a missing
        key, a wrong shape, or a value that is not finite.
        """
        cond_BC = self.encoder(read_observations(obs, self.spec, self.device), rng)
        return self.network(cond_BC).squeeze(-1)

    @torch.no_grad()
    def probabilities(self, obs: Mapping[str, Array]) -> np.ndarray:
        """Of success, float64 [B], for observations as of `logits`."""
        return self.logits(obs).double().sigmoid().cpu().numpy()


def build_classifier(
    spec: PolicySpec, config: SuccessConfig, stats: Mapping[str, FeatureStats], *, seed: int
) -> SuccessClassifier:
    """A fresh classifier, whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SuccessClassifier(spec, config)
    classifier.set_statistics(stats)
    return classifier


def restore_classifier(
    header: StoredClassifier, arrays: Mapping[str, np.ndarray]
) -> SuccessClassifier:
    """The stored classifier; CorruptDataError if the arrays are not those of its network."""

    def make() -> SuccessClassifier:
        return SuccessClassifier(header.spec, header.options)

    return restored(make, arrays, "success classifier").eval()


def arrays_of(classifier: SuccessClassifier) -> dict[str, np.ndarray]:
    """Weights and normalisers by name, copied to memory."""
    state = classifier.state_dict()
    return {key: value.detach().cpu().numpy().copy() for key, value in state.items()}

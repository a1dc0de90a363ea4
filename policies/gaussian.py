"""A Gaussian under a tanh. B batch, H chunk, D action, C conditioning, n samples per row."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.protocols import Carry
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import put_prefix
from policies.chunk import ChunkPolicy, valid_mean
from policies.configs import GaussianConfig
from policies.guidance import check_delay
from policies.reading import Array

LOG_STD = (-5.0, 2.0)
"""Between what the log standard deviation stays."""

EDGE = 1e-3
"""Distance from the bounds, of [−1, 1], that labels keep: on them the density is not finite."""


class GaussianPolicy(ChunkPolicy[GaussianConfig]):
    """Normalised chunks x = tanh(μ + σ ε) with ε ~ N(0, I); μ and σ come from an MLP.

    The policy of soft actor-critic (Haarnoja et al. 2018, appendix C), with layer normalisation
    and SiLU in its hidden layers. Given the observations, the steps of a chunk are independent.
    """

    name = "gaussian"
    Config = GaussianConfig

    def __init__(self, spec: PolicySpec, config: GaussianConfig) -> None:
        """See ChunkPolicy."""
        super().__init__(spec, config)
        layers: list[nn.Module] = []
        size = self.encoder.dim
        for _ in range(config.depth):
            layers += [nn.Linear(size, config.width), nn.LayerNorm(config.width), nn.SiLU()]
            size = config.width
        self.trunk = nn.Sequential(*layers)
        self.outlet = nn.Linear(size, 2 * spec.horizon * spec.action.size)

    @torch.no_grad()
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """See ChunkPolicy; drawn, not the mean. prefix heads the chunk as it is."""
        mean_BHD, log_std_BHD = self._distribution(self.encode(obs))
        seeds = noise.check_seeds(seed, len(mean_BHD))
        noise_BHD = noise.start_noise(seeds, *mean_BHD.shape[1:]).to(mean_BHD)
        actions_BHD = self._actions((mean_BHD + log_std_BHD.exp() * noise_BHD).tanh())
        chunks_BHD = actions_BHD.cpu().numpy()
        if prefix is not None:
            put_prefix(chunks_BHD, prefix)
            check_delay(self.spec.horizon, self.spec.n_action_steps, prefix.shape[1])
        return None, chunks_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """See ChunkPolicy."""
        mean_BHD, log_std_BHD = self._distribution(self.encode(obs))
        rng = torch.Generator("cpu").manual_seed(seed % 2**63)
        shape = (len(mean_BHD), n, *mean_BHD.shape[1:])
        noise_BnHD = torch.randn(shape, generator=rng).to(mean_BHD)
        u_BnHD = mean_BHD[:, None] + log_std_BHD.exp()[:, None] * noise_BnHD
        return self._actions(u_BnHD.tanh())

    def rsample(
        self, obs: Mapping[str, Array], rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One chunk a row [B, H, D] in device units, and the log-densities [B, H] of its normalised
        steps; both have gradients by the reparameterisation x = tanh(μ + σ ε).

        rng: draws ε, and what pictures undergo in training. Other keys of obs are left alone.
        """
        mean_BHD, log_std_BHD = self._distribution(self._condition(obs, rng))
        noise_BHD = noise.normal_like(mean_BHD, rng)
        u_BHD = mean_BHD + log_std_BHD.exp() * noise_BHD
        log_prob_BH = log_density(u_BHD, mean_BHD, log_std_BHD).sum(dim=2)
        return self._actions(u_BHD.tanh()), log_prob_BH

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """−log π of the labels, per element, over all steps that are not padding.

        See GenerativePolicy.loss for the batch. Labels nearer to their bounds than EDGE are moved
        to there. metrics: loss, and std, the mean σ.
        """
        cond_BC = self._condition(batch, self._training_rng)
        clean_BHD, pad_BH = self._labels(batch, len(cond_BC))
        mean_BHD, log_std_BHD = self._distribution(cond_BC)
        u_BHD = clean_BHD.clamp(EDGE - 1, 1 - EDGE).atanh()
        loss = valid_mean(-log_density(u_BHD, mean_BHD, log_std_BHD), pad_BH)
        return loss, {"loss": loss.item(), "std": log_std_BHD.detach().exp().mean().item()}

    def _distribution(self, cond_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and log σ [B, H, D] of what is under the tanh."""
        found = self.outlet(self.trunk(cond_BC)).to(self.low_D)
        shape = (2, self.spec.horizon, self.spec.action.size)
        mean_BHD, raw_BHD = found.unflatten(1, shape).unbind(dim=1)
        low, high = LOG_STD
        return mean_BHD, low + (high - low) * (raw_BHD.tanh() + 1) / 2


def log_density(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-density of tanh(u), element by element, where u ~ N(mean, exp(log_std)²).

    log N(u) − log(1 − tanh² u), the latter as 2 (log 2 − u − softplus(−2u)), finite for any u.
    """
    z = (u - mean) * (-log_std).exp()
    normal = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    return normal - 2 * (math.log(2) - u - F.softplus(-2 * u))

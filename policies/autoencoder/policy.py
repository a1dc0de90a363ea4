"""The autoencoder that a run trains. M pictures, h w height and width, Z latent channels."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError
from embodied.core.protocols import Carry
from embodied.core.specs import PolicySpec
from policies.autoencoder.configs import Sizes, VAEConfig
from policies.autoencoder.network import AutoencoderKL
from policies.noise import TrainingNoise
from policies.normalizer import FeatureStats
from policies.reading import Array, read_observations

_GROUPS = 8
_KEPT = 0.99
"""Of the latents' statistics, from one batch to the next."""


class VAE(TrainingNoise, nn.Module):
    """A KL autoencoder of the robot's pictures (Rombach et al. 2022, appendix G), all cameras' in
    one. It is trained, published and kept as policies are, and commands nothing.

    Unlike there, the error is that of pixels alone, without a perceptual or an adversarial part.
    """

    name: ClassVar[str] = "vae"
    Config = VAEConfig

    statistics_3: torch.Tensor
    """Of the latents in training: share of batches counted, mean and mean square times that."""

    def __init__(self, spec: PolicySpec, config: VAEConfig) -> None:
        """ConfigError for pictures that the latent cells do not fill."""
        super().__init__()
        for key, array in spec.observation.items():
            check_sides(f"'{key}'", array.shape[:2], config.stride, "policy.channels")
        self.spec, self.config = spec, config
        levels = (False,) * len(config.channels)
        self.network = AutoencoderKL(
            Sizes(
                channels=config.channels,
                latent_channels=config.latent_channels,
                blocks=config.blocks,
                groups=_GROUPS,
                fold=2,
                down=levels,
                up=levels,
                middle=False,
                quant=False,
                post_quant=False,
            )
        )
        self.register_buffer("statistics_3", torch.zeros(3))

    @property
    def scale(self) -> torch.Tensor:
        """By which latents are multiplied to have unit variance; 1 before training."""
        share, mean, square = self.statistics_3
        share = share.clamp(min=1e-6)
        variance = square / share - (mean / share) ** 2
        return torch.where(self.statistics_3[0] > 0, variance.clamp(min=1e-12).rsqrt(), 1.0)

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """It needs none."""

    def init(self, batch: int) -> Carry | None:
        """It decides nothing."""
        raise self._inert()

    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """ConfigError: it decides nothing."""
        raise self._inert()

    def sample(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """ConfigError: it decides nothing."""
        raise self._inert()

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean absolute error + kl_weight · KL, both per number of the pictures, in −1..1.

        batch: the spec's pictures [B, 1, h, w, 3], uint8; other keys are left alone. Metrics: loss,
        l1, kl (nats a picture), psnr (dB, see `psnr`), scale.
        """
        obs = read_observations(batch, self.spec, self.statistics_3.device)
        errors: list[torch.Tensor] = []
        latents: list[torch.Tensor] = []
        divergence = 0.0
        for uint8_B1hw3 in obs.values():
            x_M3hw = signed(uint8_B1hw3.flatten(0, 1))
            mean, log_var = self.network.encode(x_M3hw)
            noise = torch.randn(mean.shape, generator=self._training_rng).to(mean)
            latents.append(mean + (log_var / 2).exp() * noise)
            errors.append((self.network.decode(latents[-1]) - x_M3hw).flatten())
            divergence = divergence + kl(mean, log_var).sum()
        error = torch.cat(errors)
        rows = len(next(iter(obs.values()))) * len(obs)
        kl_mean = divergence / rows
        l1 = error.abs().mean()
        loss = l1 + self.config.kl_weight * kl_mean * rows / error.numel()
        if self.training:
            self._count(torch.cat([z.detach().flatten() for z in latents]))
        metrics = {"l1": l1, "kl": kl_mean, "psnr": psnr(error / 2), "scale": self.scale}
        return loss, {"loss": loss.item(), **{name: x.item() for name, x in metrics.items()}}

    @torch.no_grad()
    def _count(self, latents: torch.Tensor) -> None:
        found = torch.stack([torch.ones_like(latents[0]), latents.mean(), latents.square().mean()])
        self.statistics_3.lerp_(found.to(self.statistics_3), 1 - _KEPT)

    @torch.no_grad()
    def reconstruct(self, pictures_Mhw3: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [M, h, w, 3] by way of the mean of their latents, likewise."""
        back_M3hw = self.network.decode(self.network.encode(signed(pictures_Mhw3))[0])
        return (127.5 * (back_M3hw.clamp(-1, 1) + 1)).round().to(torch.uint8).movedim(1, -1)

    def _inert(self) -> ConfigError:
        return ConfigError(
            "policy=vae is an autoencoder of pictures and commands no robot; a policy that does is "
            "right here, and policy.latents={name: vae, path: …} is where this one belongs"
        )


def check_sides(what: str, sides: tuple[int, ...], step: int, setting: str) -> None:
    """Raise ConfigError unless both sides of a picture are multiples of `step` pixels."""
    if any(side % step for side in sides):
        raise ConfigError(
            f"{what} is seen as {sides[0]} × {sides[1]} pixels, which cells of {step} do not fill: "
            f"change {setting}, or the pictures' sides"
        )


def signed(pictures_Mhw3: torch.Tensor) -> torch.Tensor:
    """Pictures uint8 [M, h, w, 3] as [M, 3, h, w] in −1..1."""
    return (pictures_Mhw3.movedim(-1, 1).float() / 127.5) - 1


def kl(mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Divergence of Gaussians [M, …] from the unit normal, in nats, [M]."""
    return (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(dim=1) / 2


def psnr(error: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of errors of pictures in 0..1, over all of them at once."""
    return -10 * error.detach().square().mean().clamp(min=1e-10).log10()

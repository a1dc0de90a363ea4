"""Pictures as the latents of a frozen autoencoder.

M pictures, h w height and width, i j those of the latents, Z latent channels, L tokens, P numbers
of a token.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.errors import CorruptDataError
from policies.autoencoder.configs import (
    WHERE,
    AutoencoderConfig,
    DiffusersLatentsConfig,
    VAELatentsConfig,
)
from policies.autoencoder.policy import check_sides
from policies.autoencoder.stored import Stored, read_diffusers, read_run
from policies.world.latents import Latents


class AutoencoderLatents(Latents):
    """Latents of unit variance over `spread`, cut into square tokens (Zhu et al. 2025, Li et al.
    2025).

    Its state is empty: weights are neither published nor kept in checkpoints, but read from the
    autoencoder's folder, which must hash to what it did when training began.
    """

    scale: torch.Tensor

    def __init__(self, config: AutoencoderConfig, picture: tuple[int, int]) -> None:
        """ConfigError unless tokens fill the picture. CorruptDataError: the autoencoder is another
        than at first."""
        super().__init__()
        found = self.read(Path(config.path))
        if config.sha256 is not None and found.sha256 not in (None, config.sha256):
            raise CorruptDataError(
                f"{WHERE}={config.path} is another autoencoder than this policy was trained with: "
                f"its SHA-256 is {found.sha256}, that one's {config.sha256}; bring that one back"
            )
        self.config = msgspec.structs.replace(config, sha256=found.sha256 or config.sha256)
        self.network = found.network
        scale = found.scale if config.scale is None else torch.tensor(config.scale)
        self.register_buffer("scale", scale / config.spread)
        sizes = found.network.sizes
        step = sizes.stride * config.patch
        check_sides("policy.latents: a picture", picture, step, "patch or policy.images.crop")
        self._rows = picture[0] // step
        self.tokens = self._rows * (picture[1] // step)
        self.size = sizes.latent_channels * config.patch**2
        self.requires_grad_(False)
        self.register_state_dict_post_hook(_forget)

    @abstractmethod
    def read(self, folder: Path) -> Stored:
        """The autoencoder in this folder."""

    def encode(self, pictures_M3hw: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
        """See Latents; drawn from the posterior, or its mean."""
        mean, log_var = self.network.encode(pictures_M3hw)
        if rng is not None and self.config.posterior == "sample":
            noise = torch.randn(mean.shape, generator=rng).to(mean)
            mean = mean + (log_var / 2).exp() * noise
        tokens_MPij = F.pixel_unshuffle(self.scale * mean, self.config.patch)
        return tokens_MPij.flatten(2).transpose(1, 2)

    def decode(self, tokens_MLP: torch.Tensor) -> torch.Tensor:
        """See Latents."""
        grid = tokens_MLP.transpose(1, 2).unflatten(2, (self._rows, -1))
        return self.network.decode(F.pixel_shuffle(grid, self.config.patch) / self.scale)


class VAELatents(AutoencoderLatents):
    """Of an autoencoder that policy=vae trained."""

    Config = VAELatentsConfig

    def read(self, folder: Path) -> Stored:
        """See AutoencoderLatents."""
        return read_run(folder)


class DiffusersLatents(AutoencoderLatents):
    """Of diffusers' AutoencoderKL."""

    Config = DiffusersLatentsConfig

    def read(self, folder: Path) -> Stored:
        """See AutoencoderLatents."""
        return read_diffusers(folder)


def _forget(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the autoencoder out of the state."""
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]

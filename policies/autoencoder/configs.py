"""Options of autoencoders; reading them does not load torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from embodied.core.errors import ConfigError
from embodied.core.registry import unknown
from embodied.core.specs import DeviceSpec, PolicySpec
from policies.configs import Count
from policies.folder import CONFIG, find_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The weights' file in a folder of diffusers."""

WHERE = "policy.latents.path"

Width = Annotated[int, msgspec.Meta(ge=8, le=2048, multiple_of=8)]


class VAEConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the KL autoencoder (Rombach et al. 2022, arXiv:2112.10752, appendix G).

    channels: of each level; the first sees pictures folded to half their sides (pixel unshuffle),
    each further level halves them again: of three levels a latent cell stands for 8 × 8 pixels.
    latent_channels: numbers of a cell. blocks: residual blocks of a level; decoders have one more.
    kl_weight: of the divergence from the unit normal beside the mean absolute error, both per
    number of the picture.
    """

    channels: Annotated[tuple[Width, ...], msgspec.Meta(min_length=2, max_length=4)] = (16, 32, 64)
    latent_channels: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    blocks: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1
    kl_weight: Annotated[float, msgspec.Meta(ge=0)] = 1e-6

    has_density: ClassVar[bool] = False
    acts: ClassVar[bool] = False
    learns_without_actions: ClassVar[bool] = True

    @property
    def stride(self) -> int:
        """Sides of a latent cell, in pixels."""
        return 2 ** len(self.channels)

    @property
    def future(self) -> tuple[int, ...]:
        """It predicts nothing."""
        return ()

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """It predicts nothing."""
        return ()

    def parts(self) -> list[tuple[str, Any, str]]:
        """It names no components."""
        return []

    def policy_spec(self, device: DeviceSpec, observation_keys: Iterable[str]) -> PolicySpec:
        """It reads the pictures among the keys, one tick of each; ConfigError if there is none."""
        read = {}
        for key in observation_keys:
            if key not in device.observation:
                raise unknown("observation key", key, device.observation)
            array = device.observation[key]
            if array.dtype == "uint8" and len(array.shape) == 3:
                read[key] = array
        if not read:
            raise ConfigError(
                "policy=vae learns pictures, and no observation that it reads is one: name cameras "
                "(sim.cameras), and let observations include them"
            )
        return PolicySpec(read, device.action, 1, 1, 1)


class AutoencoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latents of a trained autoencoder, which is frozen.

    path: its folder; every host that makes the policy reads it. patch: sides of a token, in latent
    cells. posterior: "sample" draws latents from it in training, "mode" takes its mean, as
    inference always does. scale: by which latents are multiplied to have unit variance, None for
    the stored one. spread: they are divided by it then, so that clip_sample cuts beyond so many
    deviations (3: Zhu et al. 2025). sha256: what the files hashed to when training began, None
    before that.
    """

    path: str
    patch: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    posterior: Literal["sample", "mode"] = "sample"
    scale: Annotated[float, msgspec.Meta(gt=0)] | None = None
    spread: Annotated[float, msgspec.Meta(gt=0)] = 3.0
    sha256: str | None = None


class VAELatentsConfig(AutoencoderConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latents of an autoencoder that policy=vae trained: path is its folder or its run's."""

    def __post_init__(self) -> None:
        """Find the folder. ConfigError if it is not here."""
        found = find_folder(Path(self.path), WHERE).resolve()
        msgspec.structs.force_setattr(self, "path", str(found))


class DiffusersLatentsConfig(
    AutoencoderConfig, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """Latents of diffusers' AutoencoderKL, such as SDXL's: path is the folder with its files."""

    def __post_init__(self) -> None:
        """Find the files. ConfigError if they are not here."""
        folder = Path(self.path).resolve()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{WHERE}={self.path} has no {name}; the folder of diffusers' AutoencoderKL "
                    f"with {CONFIG} and {WEIGHTS} is right"
                )
        msgspec.structs.force_setattr(self, "path", str(folder))


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the network. fold: by how much pictures are folded before the first level. down, up:
    which levels attend, in the order of encoder and decoder. middle: whether the lowest does.
    groups: of the normalisation. quant, post_quant: whether latents pass one more layer."""

    channels: tuple[Width, ...]
    latent_channels: int
    blocks: Count
    groups: int
    fold: int = 1
    down: tuple[bool, ...]
    up: tuple[bool, ...]
    middle: bool
    quant: bool
    post_quant: bool

    @property
    def stride(self) -> int:
        """Sides of a latent cell, in pixels."""
        return self.fold * 2 ** (len(self.channels) - 1)

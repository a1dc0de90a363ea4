"""Trained autoencoders, read from their folders: ours, and those of diffusers."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch

from embodied.core.config import convert
from embodied.core.errors import ConfigError, CorruptDataError
from policies.autoencoder.configs import WEIGHTS, WHERE, Sizes, Width
from policies.autoencoder.network import AutoencoderKL
from policies.autoencoder.policy import VAE
from policies.checkpoint import arrays_of, construct, load_policy, read_model, restored
from policies.folder import CONFIG, digest, read_config, read_json

_PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


@dataclass(frozen=True, slots=True)
class Stored:
    """scale: by which latents are multiplied to have unit variance. sha256: of the files; None
    where the weights were not read."""

    network: AutoencoderKL
    scale: torch.Tensor
    sha256: str | None


def read_run(folder: Path) -> Stored:
    """An autoencoder that policy=vae trained; on torch's meta device without its weights.

    ConfigError for another policy, CorruptDataError for a damaged folder.
    """
    config = read_config(folder / CONFIG)
    if config.get("policy") != VAE.name:
        raise ConfigError(
            f"{WHERE}={folder} is a policy={config.get('policy')}; one that policy=vae trained is "
            "right"
        )
    made: VAE = construct(config) if _skeleton() else load_policy(folder)
    return Stored(made.network, made.scale, digest(config))


Up = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
Down = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]


class DiffusersConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"class_name": "_class_name", "version": "_diffusers_version", "name": "_name_or_path"},
):
    """config.json of diffusers' AutoencoderKL, for those that this package computes as it does."""

    class_name: Literal["AutoencoderKL"]
    version: str = ""
    name: str = ""
    act_fn: Literal["silu", "swish"] = "silu"
    block_out_channels: Annotated[tuple[Width, ...], msgspec.Meta(min_length=1, max_length=8)] = (
        64,
    )
    down_block_types: tuple[Down, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Up, ...] = ("UpDecoderBlock2D",)
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    layers_per_block: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    norm_num_groups: Annotated[int, msgspec.Meta(ge=1, le=2048)] = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)] = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    sample_size: int | tuple[int, ...] = 32
    force_upcast: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that no network has."""
        levels = len(self.block_out_channels)
        if (len(self.down_block_types), len(self.up_block_types)) != (levels, levels):
            raise ConfigError(
                f"block_out_channels has {levels} levels, down_block_types "
                f"{len(self.down_block_types)} and up_block_types {len(self.up_block_types)}"
            )
        odd = [n for n in self.block_out_channels if n % self.norm_num_groups]
        if odd:
            raise ConfigError(
                f"block_out_channels {odd} are no multiples of norm_num_groups="
                f"{self.norm_num_groups}"
            )

    @property
    def sizes(self) -> Sizes:
        """Of the network."""
        return Sizes(
            channels=self.block_out_channels,
            latent_channels=self.latent_channels,
            blocks=self.layers_per_block,
            groups=self.norm_num_groups,
            down=tuple(name.startswith("Attn") for name in self.down_block_types),
            up=tuple(name.startswith("Attn") for name in self.up_block_types),
            middle=self.mid_block_add_attention,
            quant=self.use_quant_conv,
            post_quant=self.use_post_quant_conv,
        )


def read_diffusers(folder: Path) -> Stored:
    """diffusers' AutoencoderKL; on torch's meta device without its weights.

    ConfigError for a configuration that is not known here, CorruptDataError for weights that are
    not exactly the network's, in float32.
    """
    try:
        found = read_json(folder / CONFIG)
        config = convert(found, DiffusersConfig, CONFIG)
        scale = torch.tensor(config.scaling_factor)

        def make() -> AutoencoderKL:
            return AutoencoderKL(config.sizes)

        if _skeleton():
            return Stored(make(), scale, None)
        data = read_model(folder / WEIGHTS, make)
        arrays = {name: _convolution(name, x) for name, x in arrays_of(data, WEIGHTS).items()}
        network: AutoencoderKL = restored(make, arrays, "autoencoder")
    except (ConfigError, CorruptDataError) as error:
        raise type(error)(
            f"{WHERE}={folder}: {error} The folder of diffusers' AutoencoderKL with {CONFIG} and "
            f"its float32 {WEIGHTS} is right."
        ) from error
    seal = hashlib.sha256(digest(found).encode() + hashlib.sha256(data).digest())
    return Stored(network, scale, seal.hexdigest())


def _convolution(name: str, array: np.ndarray) -> np.ndarray:
    """Projections of an attention as convolutions."""
    linear = "attentions." in name and name.endswith(_PROJECTIONS) and array.ndim == 2
    return array[..., None, None] if linear else array


def _skeleton() -> bool:
    return torch.get_default_device().type == "meta"

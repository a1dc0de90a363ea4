"""From pictures of several cameras to vectors. B batch, T steps, H W height and width, F vector,
L tokens of a picture.

A picture is uint8 [H, W, 3]; it travels as that to the device and becomes a float there.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec
from policies.augmentation import ColourJitter, Crop
from policies.configs import ImagesConfig
from policies.encoders.tokens import count_of, tokens_of

STANDARDS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel of pictures in 0..1; "unit" maps them to −1..1."""


class ImagesEncoder(nn.Module):
    """All cameras' pictures → one vector of `features` for each camera and step."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, cameras: Mapping[str, ArraySpec], config: ImagesConfig, where: str = "policy"
    ) -> None:
        """cameras: specs by observation key, [H, W, 3]; they may differ unless shared.

        where: what the options are part of. sizes: of the pictures as they are seen.
        """
        super().__init__()
        for key, spec in cameras.items():
            if len(spec.shape) != 3 or spec.shape[2] != 3 or spec.dtype != "uint8":
                raise ConfigError(
                    f"'{key}' is {spec.dtype} {spec.shape}; pictures are uint8 [height, width, 3]"
                )
        self.cameras = tuple(cameras)
        cut = {
            key: (max(1, round(config.crop * s.shape[0])), max(1, round(config.crop * s.shape[1])))
            for key, s in cameras.items()
        }
        self._crop = Crop(cut)
        self._jitter = ColourJitter(
            config.brightness, config.contrast, config.saturation, config.hue
        )
        self._groups = [self.cameras] if config.shared else [(key,) for key in self.cameras]
        if config.shared and len(set(cut.values())) > 1:
            sizes = {key: spec.shape for key, spec in cameras.items()}
            raise ConfigError(
                f"{where}.images.shared needs cameras of one size, these have {sizes}; set it to "
                "false, or let the cameras agree"
            )
        self.sizes = cut
        encoder, options = component("encoders", config.encoder, f"{where}.images.encoder")
        self.encoders = nn.ModuleList(encoder(options, cut[group[0]]) for group in self._groups)
        self.features: int = options.features
        for name, values in zip(("mean", "std"), STANDARDS[config.standard], strict=True):
            value_311 = torch.tensor(values)[:, None, None]
            self.register_buffer(name, value_311, persistent=False)

    def forward(
        self, pictures: Mapping[str, torch.Tensor], rng: torch.Generator | None
    ) -> list[torch.Tensor]:
        """uint8 [B, T, H, W, 3] by camera → [B, T·F] for each, in the cameras' order.

        rng: draws crops and colours in training; None for inference.
        """
        return self.encode(self.views({key: pictures[key] for key in self.cameras}, rng))

    def tokens(
        self, pictures: Mapping[str, torch.Tensor], rng: torch.Generator | None
    ) -> list[torch.Tensor]:
        """As `forward`, but [B, T·L, F] for each: the tokens of an encoder that offers them."""
        views = self.views({key: pictures[key] for key in self.cameras}, rng)
        return [v.flatten(1, 2) for v in self._encoded(views, tokens_of)]

    @property
    def counts(self) -> dict[str, int]:
        """L by camera."""
        pairs = zip(self._groups, self.encoders, strict=True)
        return {key: count_of(encoder) for keys, encoder in pairs for key in keys}

    def views(
        self, pictures: Mapping[str, torch.Tensor], rng: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        """Pictures as they are seen, cut and coloured: uint8 [B, T, H, W, 3] of some cameras →
        [B, T, 3, h, w] in 0..1."""
        cut = self._crop(pictures, rng)
        return self._jitter({key: x.to(self.mean.dtype) / 255 for key, x in cut.items()}, rng)

    def encode(self, views: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of all cameras → [B, T·F] for each, in the cameras' order."""
        return [v.flatten(1) for v in self._encoded(views, lambda encoder, x: encoder(x))]

    def _encoded(
        self,
        views: Mapping[str, torch.Tensor],
        encode: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    ) -> list[torch.Tensor]:
        """What `encode` makes of each camera's views, [B, T, …], in the cameras' order."""
        encoded: list[torch.Tensor] = []
        for keys, encoder in zip(self._groups, self.encoders, strict=True):
            x_NCHW = torch.cat([views[key].flatten(0, 1) for key in keys])
            v = encode(encoder, (x_NCHW - self.mean) / self.std)
            parts = v.split([views[key].shape[:2].numel() for key in keys])
            encoded += [
                part.unflatten(0, views[key].shape[:2])
                for key, part in zip(keys, parts, strict=True)
            ]
        return encoded

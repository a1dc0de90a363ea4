"""Random changes of pictures in training. B batch, T history, H W height and width, C channels.

Each transform is frozen and maps pictures by key to pictures by key. With a generator (always of
the CPU, so that every device draws the same) each row and camera gets a draw of its own, the same
for all frames of its history; without one the transform is the deterministic one of inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

Pictures = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Crop:
    """Cut a window out of each picture: at a random place in training, else from the centre."""

    sizes: Mapping[str, tuple[int, int]]
    """Height and width of the window by key."""

    def __call__(self, pictures: Pictures, rng: torch.Generator | None) -> dict[str, torch.Tensor]:
        """[B, T, H, W, C] of any dtype → [B, T, C, h, w], where the keys have a size."""
        return {key: self._cut(x, self.sizes[key], rng) for key, x in pictures.items()}

    @staticmethod
    def _cut(
        x_BTHWC: torch.Tensor, size: tuple[int, int], rng: torch.Generator | None
    ) -> torch.Tensor:
        height, width = size
        above, left = x_BTHWC.shape[2] - height, x_BTHWC.shape[3] - width
        x_BTCHW = x_BTHWC.permute(0, 1, 4, 2, 3)
        if rng is None or not above + left:
            above, left = above // 2, left // 2
            return x_BTCHW[..., above : above + height, left : left + width]
        rows_B = torch.arange(len(x_BTHWC))
        top_B = torch.randint(above + 1, rows_B.shape, generator=rng)
        left_B = torch.randint(left + 1, rows_B.shape, generator=rng)
        windows = x_BTHWC.unfold(2, height, 1).unfold(3, width, 1)
        where = (i.to(x_BTHWC.device, non_blocking=True) for i in (rows_B, top_B, left_B))
        rows_B, top_B, left_B = where
        return windows[rows_B, :, top_B, left_B]


LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""

_TO_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


@dataclass(frozen=True, slots=True)
class ColourJitter:
    """Change brightness, contrast, saturation and hue of each row's pictures.

    brightness, contrast, saturation: each factor is uniform in 1 ± the value; contrast moves
    pixels from or to the frame's mean brightness, saturation from or to their own. hue: turned by
    an angle uniform in ± that share of a full turn around the grey axis of YIQ, which keeps the
    brightness. Together one affine map of colours a row, in this order, cut to 0..1 at its end.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, pictures: Pictures, rng: torch.Generator | None) -> dict[str, torch.Tensor]:
        """[B, T, 3, H, W] in 0..1 → the same."""
        if rng is None or not any((self.brightness, self.contrast, self.saturation, self.hue)):
            return dict(pictures)
        return {key: self._change(x, rng) for key, x in pictures.items()}

    def _change(self, x_BTCHW: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        spread = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        draw_B4 = (2 * torch.rand((len(x_BTCHW), 4), generator=rng) - 1) * spread
        brightness_B, contrast_B, saturation_B = (1 + draw_B4[:, :3]).unbind(1)
        angle_B = 2 * math.pi * draw_B4[:, 3]
        colours_B33 = saturate(saturation_B) @ turn_hue(angle_B)
        colours_B33 = (brightness_B * contrast_B)[:, None, None] * colours_B33
        shift_B = brightness_B * (1 - contrast_B)
        colours_B133 = colours_B33[:, None].to(x_BTCHW)
        mean_BT3 = x_BTCHW.mean(dim=(3, 4))
        shift_BT = (mean_BT3 @ mean_BT3.new_tensor(LUMA)) * shift_B[:, None].to(x_BTCHW)
        changed = (colours_B133 @ x_BTCHW.flatten(3)).view_as(x_BTCHW)
        return (changed + shift_BT[..., None, None, None]).clamp(0, 1)


def saturate(factor_B: torch.Tensor) -> torch.Tensor:
    """Matrices [B, 3, 3] that take colours from their grey (0) to themselves (1) or beyond."""
    grey_33 = torch.tensor(LUMA).expand(3, 3)
    return torch.lerp(grey_33, torch.eye(3), factor_B[:, None, None])


def turn_hue(angle_B: torch.Tensor) -> torch.Tensor:
    """Matrices [B, 3, 3] that turn colours by an angle (rad) around the grey axis of YIQ."""
    cos, sin = angle_B.double().cos(), angle_B.double().sin()
    turn_B33 = torch.eye(3, dtype=torch.float64).repeat(len(angle_B), 1, 1)
    turn_B33[:, 1, 1] = turn_B33[:, 2, 2] = cos
    turn_B33[:, 1, 2], turn_B33[:, 2, 1] = -sin, sin
    to_yiq = torch.from_numpy(_TO_YIQ)
    return (torch.linalg.inv(to_yiq) @ turn_B33 @ to_yiq).float()

"""How far off predictions are, beside the guess that nothing changes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied.core.intervals import paired_bootstrap


def squared_error(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean over an observation's elements, [W, …] → [W]; of pictures in units of the full range."""
    scale = 255.0 if true.dtype == np.uint8 else 1.0
    difference = (found.astype(np.float64) - true.astype(np.float64)) / scale
    return np.square(difference).reshape(len(difference), -1).mean(axis=1)


def centre(pictures: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The window [.., h, w, 3] in the centre of pictures [.., H, W, 3] that a policy which crops
    them sees; what is no picture stays."""
    if pictures.shape[-3:] == like.shape[-3:] or pictures.dtype != np.uint8:
        return pictures
    height, width = like.shape[-3:-1]
    above, left = (pictures.shape[-3] - height) // 2, (pictures.shape[-2] - width) // 2
    return pictures[..., above : above + height, left : left + width, :]


def compared(
    model: Sequence[np.ndarray], other: Sequence[np.ndarray], names: tuple[str, str]
) -> dict[str, Any]:
    """Root mean squared errors of two kinds of predictions of the same windows, paired.

    model, other: squared errors by episode, [W] each. Each episode counts as much as any other.
    difference: of the mean squared errors, the first minus the second; interval: 95 % bootstrap
    over episodes, None for a single one. explained: 1 − first / second, None where the second is 0.
    """
    first = [float(np.mean(errors)) for errors in model]
    second = [float(np.mean(errors)) for errors in other]
    ours, theirs = float(np.mean(first)), float(np.mean(second))
    _, low, high = paired_bootstrap(first, second)
    return {
        f"{names[0]}_rmse": math.sqrt(ours),
        f"{names[1]}_rmse": math.sqrt(theirs),
        "explained": 1 - ours / theirs if theirs > 0 else None,
        "difference": ours - theirs,
        "interval": [low, high] if len(first) > 1 else None,
        "episodes": len(first),
        "windows": sum(len(errors) for errors in model),
    }

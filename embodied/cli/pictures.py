"""Pictures beside and below one another, as files."""

import base64
import io
from collections.abc import Sequence

import numpy as np

_COLUMNS = 8
_SIDE = 96
"""Pictures are enlarged, by a whole number, to about this height."""
_GAP = 4


def column(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [h, w, 3], uint8, enlarged and one below the other, [H, W, 3]."""
    times = max(1, round(_SIDE / len(pictures[0])))
    large = [picture.repeat(times, axis=0).repeat(times, axis=1) for picture in pictures]
    gap = np.full((_GAP, large[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for picture in large for part in (picture, gap)][:-1])


def strip(columns: Sequence[np.ndarray]) -> bytes:
    """Some of the columns, evenly chosen, side by side as PNG."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(columns) - 1, _COLUMNS).round().astype(int))
    gap = np.full((len(columns[0]), _GAP, 3), 255, np.uint8)
    parts = [part for k in chosen for part in (columns[k], gap)][:-1]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts, axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """A PNG as an address that a page can show."""
    return "data:image/png;base64," + base64.b64encode(png).decode()

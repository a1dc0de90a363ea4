"""A one-dimensional array that grows at its end: appending costs amortised constant time."""

import numpy as np

_FIRST = 64


class GrowingArray:
    """Values of one dtype; at most twice the memory that they need, and room for 64."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data = np.empty(_FIRST, dtype)
        self._size = 0

    def extend(self, values: np.ndarray) -> None:
        """Append the values [k]."""
        end = self._size + len(values)
        if end > len(self._data):
            grown = np.empty(max(end, 2 * len(self._data)), self._data.dtype)
            grown[: self._size] = self._data[: self._size]
            self._data = grown
        self._data[self._size : end] = values
        self._size = end

    def replace(self, values: np.ndarray) -> None:
        """Hold these values [k] instead; memory that they do not need is given back."""
        self._data = np.empty(max(_FIRST, len(values)), self._data.dtype)
        self._data[: len(values)] = values
        self._size = len(values)

    @property
    def view(self) -> np.ndarray:
        """What it holds now [size]; not to be kept while it grows."""
        return self._data[: self._size]

    def __len__(self) -> int:
        return self._size

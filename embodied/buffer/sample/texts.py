"""Each episode's task in words, as the bytes a policy reads. E episodes, B batch, L bytes."""

from collections.abc import Sequence

import numpy as np

from embodied.buffer.sample.growing import GrowingArray
from embodied.core.instructions import encode_instruction


class EpisodeTexts:
    """Texts by the numbers of episodes' steps, which stay when episodes are removed.

    max_bytes: L; 0 keeps nothing. Memory: 16 bytes an episode and L for each different text.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._numbers = GrowingArray(np.int64)
        self._rows = GrowingArray(np.int64)
        self._row_of: dict[str, int] = {}
        self._table = np.empty((0, max_bytes), np.uint8)

    def check(self, texts: Sequence[str]) -> None:
        """Take texts into the table; SpecError for one that is longer than L."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._row_of]:
            rows = [encode_instruction(text, self._max_bytes) for text in new]
            self._table = np.concatenate([self._table, rows])
            self._row_of |= {text: len(self._row_of) + i for i, text in enumerate(new)}

    def add(self, numbers: np.ndarray, texts: Sequence[str]) -> None:
        """Add E episodes with the numbers of their first steps, ascending: int64 [E]."""
        self.check(texts)
        self._numbers.extend(numbers)
        self._rows.extend(np.array([self._row_of[text] for text in texts], np.int64))

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Texts of steps by number: uint8 [B, L]."""
        episodes = np.searchsorted(self._numbers.view, numbers, side="right") - 1
        return self._table[self._rows.view[episodes]]

"""Where a trainer's batches come from: its own process, or a loader process beside it."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from embodied.buffer.load.loader import LoaderClient
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import Sampler

_WAIT_S = 0.05


class Batches(Protocol):
    """Batches of windows, as WindowSampler.fetch makes them."""

    @property
    def num_steps(self) -> int:
        """Steps recorded so far; it never falls."""
        ...

    @property
    def num_candidates(self) -> int:
        """Steps that can be drawn."""
        ...

    def refresh(self) -> None:
        """Take over what was recorded meanwhile."""
        ...

    def next(self) -> Mapping[str, np.ndarray] | None:
        """The next batch, good until the following call; None if there is none yet."""
        ...

    def close(self) -> None:
        """Give everything back; safe to call twice."""
        ...


class InlineBatches:
    """Drawn and read by the trainer's own thread: the deterministic way."""

    def __init__(
        self,
        reader: ReplayReader,
        sampler: Sampler[Any],
        batch_size: int,
        rng: np.random.Generator,
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._batch_size = batch_size
        self._rng = rng

    @property
    def num_steps(self) -> int:
        """See Batches."""
        return self._reader.num_seen

    @property
    def num_candidates(self) -> int:
        """See Batches."""
        return self._sampler.num_candidates

    def refresh(self) -> None:
        """See Batches."""
        self._reader.refresh()
        self._sampler.refresh()

    def next(self) -> Mapping[str, np.ndarray]:
        """See Batches."""
        return self._sampler.sample(self._batch_size, self._rng)

    def close(self) -> None:
        """See Batches."""
        self._reader.close()


class LoadedBatches:
    """Made by a loader process, which refreshes by itself."""

    def __init__(self, client: LoaderClient) -> None:
        self._client = client
        self._offset = self._newest = 0

    @property
    def num_steps(self) -> int:
        """See Batches."""
        steps = self._client.counts.steps
        if steps < self._newest:  # a new loader does not know what was deleted before it began
            self._offset += self._newest - steps
        self._newest = steps
        return self._offset + steps

    @property
    def num_candidates(self) -> int:
        """See Batches."""
        return self._client.counts.candidates

    def refresh(self) -> None:
        """See Batches."""
        self._client.poll()

    def next(self) -> Mapping[str, np.ndarray] | None:
        """See Batches; it waits 50 ms at most."""
        return self._client.next(_WAIT_S)

    def close(self) -> None:
        """See Batches."""
        self._client.close()

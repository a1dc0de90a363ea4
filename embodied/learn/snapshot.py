"""Weights on their way out of a learner: copied while it goes on, and by one process only."""

from collections.abc import Mapping

import numpy as np
import torch


class Snapshot:
    """Tensors on their way into this host's memory.

    On a GPU the copy engine brings them, on `stream` and into pinned memory, behind what the
    current stream has been given so far; the learner's next kernels do not wait for it. Elsewhere
    they are there at once. tensors: must not be written any more; they may be freed.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream | None
    ) -> None:
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            return
        self._host = {}
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host[name] = host.copy_(tensor.detach(), non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as arrays, once they have arrived; other threads go on meanwhile."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def publishes() -> bool:
    """Whether this process is the one of its group of learners that publishes: rank 0, or alone.

    Data-parallel learners hold the same weights after every step, so one of them speaks for all.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0

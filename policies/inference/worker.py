"""The process of a member: python -m policies.inference.worker DESCRIPTOR PARENT.

DESCRIPTOR: of an inherited end of a connection. PARENT: number of the process at its other end.
Shapes: B batch, H chunk, D action, C conditioning.
"""

import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch

from embodied.comms.channels import error_reply
from embodied.comms.pair import PairEnd
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, LinkError
from embodied.core.processes import die_with_parent
from policies.base import GenerativePolicy
from policies.checkpoint import construct, load_arrays
from policies.conversions import Scalar
from policies.inference import messages as m
from policies.inference.twin import acting_twin, refresh

Answer = tuple[msgspec.Struct, Mapping[str, np.ndarray]]


class Worker:
    """Answers what is asked of a member."""

    def __init__(self) -> None:
        self._build: m.Build | None = None
        self._source: Any = None
        self._arrays: dict[str, np.ndarray] = {}
        self._twin: GenerativePolicy[Any] | None = None
        self._cond: Any = None

    def answer(self, header: Any, arrays: dict[str, np.ndarray]) -> Answer | None:
        """What messages.py says; CorruptDataError for what does not fit what came before."""
        match header:
            case m.Build():
                return self._make(header)
            case m.Weights():
                return self._take(arrays)
            case m.Load():
                return self._load()
        if self._twin is None:
            raise CorruptDataError(f"{type(header).__name__} came before the weights")
        with torch.inference_mode():
            match header:
                case m.Encode():
                    cond_BC = self._twin.encode(arrays)
                    return m.Encoded(), {"cond": cond_BC.numpy()}
                case m.Condition():
                    self._cond = None
                    cond_BC = _tensor(arrays, "cond", 2)
                    levels = header.log_snrs
                    self._cond = self._twin.prepare(cond_BC, levels) if levels else cond_BC
                    return None
                case m.Predict():
                    return self._predict(self._twin, header, arrays)
        raise CorruptDataError(f"{type(header).__name__} is no request")

    def _make(self, header: m.Build) -> Answer:
        torch.set_num_threads(header.inference.threads)
        self._source, self._build = construct(header.policy), header
        if not isinstance(self._source, GenerativePolicy):
            raise ConfigError(f"{type(self._source).__name__} is no denoiser")
        return m.Done(), {}

    def _take(self, arrays: dict[str, np.ndarray]) -> Answer:
        if self._source is None:
            raise CorruptDataError("weights came before the policy that has them")
        most = sum(value.nbytes for value in self._source.state_dict().values())
        self._arrays |= arrays
        if sum(array.nbytes for array in self._arrays.values()) > most:
            self._arrays = {}
            raise CorruptDataError(f"more weights than the policy's {most} bytes")
        return m.Done(), {}

    def _load(self) -> Answer:
        if self._source is None or self._build is None:
            raise CorruptDataError("weights came before the policy that has them")
        arrays, self._arrays = self._arrays, {}
        load_arrays(self._source, arrays)
        if self._twin is None:
            self._twin = acting_twin(self._source, self._build.inference, gradients=False)
        else:
            refresh(self._twin)
        return m.Done(), {}

    def _predict(
        self, twin: GenerativePolicy[Any], header: m.Predict, arrays: dict[str, np.ndarray]
    ) -> Answer:
        if self._cond is None:
            raise CorruptDataError("a prediction was asked for before its conditioning came")
        x_BHD = _tensor(arrays, "x", 3)
        level: Scalar | None = header.log_snr
        if level is None:
            level = _tensor(arrays, "log_snr", 1)
        p = twin.denoise(x_BHD, level, self._cond)
        return m.Predicted(p.parameterisation), {"value": p.value.numpy()}


def serve(end: PairEnd) -> NoReturn:
    """Answer for ever: LinkError once the other end is gone, CorruptDataError if it cannot be
    read."""
    worker = Worker()
    while True:
        request = end.receive()
        answer: Answer | None
        try:
            answer = worker.answer(request.header, request.arrays)
        except EmbodiedError as error:
            answer = error_reply(error), {}
        if answer is not None:
            end.send(request.id, *answer)


def _tensor(arrays: Mapping[str, np.ndarray], name: str, axes: int) -> torch.Tensor:
    if name not in arrays or arrays[name].ndim != axes:
        raise CorruptDataError(f"'{name}' with {axes} axes is missing; got {sorted(arrays)}")
    return torch.tensor(arrays[name])


def main() -> int:
    """Entry of the process that MemberProcess starts."""
    descriptor, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    try:
        serve(PairEnd(socket.socket(fileno=descriptor), m.REQUESTS))
    except CorruptDataError as error:
        sys.stderr.write(f"member's process: {error}\n")
        return 1
    except LinkError:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())

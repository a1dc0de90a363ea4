"""A member of a composition in a process of its own, as seen by the one that asks it.

Shapes: B batch, H chunk, D action, C conditioning.
"""

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from embodied.comms.channels import ErrorReply
from embodied.comms.pair import PairEnd
from embodied.core.errors import CorruptDataError, LinkError
from embodied.core.protocols import Prediction
from policies.acting import InferenceConfig
from policies.base import GenerativePolicy
from policies.checkpoint import policy_state
from policies.conversions import Scalar
from policies.inference import messages as m

START_S = 180.0
ANSWER_S = 10.0
ROW_S = 1.0
"""An answer about many rows may take longer."""
COMPILE_S = 300.0
"""So may one for which torch.compile comes first."""

_COMMAND = (sys.executable, "-m", "policies.inference.worker")
_END_S = 1.0

H = TypeVar("H", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The conditioning of a member elsewhere, and the levels that it was told to prepare."""

    cond_BC: torch.Tensor
    log_snrs: tuple[float, ...]


class MemberProcess:
    """An Elsewhere. One thread at a time may ask.

    The process ends with this object, with the interpreter, and with the thread that made it. If
    it ends otherwise, answers with what cannot be read, or does not answer in time, that is a
    LinkError, and so is everything that is asked later.
    """

    def __init__(self, label: str, policy: GenerativePolicy[Any], config: InferenceConfig) -> None:
        """Starts the process; `load` waits for it. label: what messages call the member."""
        self._label = label
        self._policy = policy
        self._config = msgspec.structs.replace(config, parallel=False)
        self._count = 0
        self._open = False
        self._told: Any = None
        self._fault = ""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
                pass_fds=[theirs.fileno()],
            )
        self._end = PairEnd(ours, m.REPLIES)
        self._finalizer = weakref.finalize(self, _finish, self._process, self._end)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._fault = self._fault or "is closed"
        self._finalizer()

    def build(self) -> None:
        """Wait until the process has made the member."""
        config, _ = policy_state(self._policy)
        self._ask(m.Build(config, self._config), {}, START_S)
        self._answer(m.Done, START_S)

    def load(self) -> None:
        """Have it act with the weights that the member has now."""
        _, arrays = policy_state(self._policy)
        for name, array in arrays.items():
            self._ask(m.Weights(), {name: array}, ANSWER_S)
            self._answer(m.Done, ANSWER_S)
        self._ask(m.Load(), {}, ANSWER_S)
        self._answer(m.Done, START_S)

    def encode(self, obs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """See Elsewhere."""
        arrays = {key: np.asarray(value) for key, value in obs.items()}
        limit_s = self._limit_s(max(map(len, arrays.values())))
        self._ask(m.Encode(), arrays, limit_s)
        return lambda: self._tensor(self._answer(m.Encoded, limit_s)[1], "cond", axes=2)

    def prepare(self, cond_BC: torch.Tensor, log_snrs: Sequence[float]) -> Share:
        """See Elsewhere."""
        share = Share(cond_BC, tuple(log_snrs))
        self._tell(share)
        return share

    def denoise(
        self, x_BHD: torch.Tensor, log_snr: Scalar, cond: torch.Tensor | Share
    ) -> Callable[[], Prediction]:
        """See Elsewhere; it gives no gradient."""
        if cond is not self._told:
            self._tell(cond)
        arrays = {"x": x_BHD.numpy()}
        level = None if isinstance(log_snr, torch.Tensor) else log_snr
        if isinstance(log_snr, torch.Tensor):
            arrays["log_snr"] = log_snr.numpy()
        limit_s = self._limit_s(len(x_BHD))
        self._ask(m.Predict(level), arrays, limit_s)

        def wait() -> Prediction:
            header, found = self._answer(m.Predicted, limit_s)
            return Prediction(self._tensor(found, "value", axes=3), header.parameterisation)

        return wait

    def _limit_s(self, rows: int) -> float:
        return ANSWER_S + ROW_S * rows + COMPILE_S * self._config.compile

    def _tell(self, cond: torch.Tensor | Share) -> None:
        share = cond if isinstance(cond, Share) else Share(cond, ())
        limit_s = self._limit_s(len(share.cond_BC))
        self._send(m.Condition(share.log_snrs), {"cond": share.cond_BC.numpy()}, limit_s)
        self._told = cond

    def _ask(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], limit_s: float
    ) -> None:
        self._send(header, arrays, limit_s)
        self._open = True

    def _send(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], limit_s: float
    ) -> None:
        if self._fault:
            raise self._error()
        if self._open:  # whoever asked has given it up
            self._receive(limit_s)
        self._count += 1
        try:
            self._end.send(self._count, header, arrays, limit_s)
        except LinkError as error:
            raise self._lost(error) from error

    def _receive(self, limit_s: float) -> tuple[Any, dict[str, np.ndarray]]:
        try:
            reply = self._end.receive(limit_s)
            if reply.id != self._count:
                raise CorruptDataError(f"an answer to {reply.id} in the place of {self._count}")
        except (LinkError, CorruptDataError) as error:
            raise self._lost(error) from error
        self._open = False
        return reply.header, reply.arrays

    def _answer(self, kind: type[H], limit_s: float) -> tuple[H, dict[str, np.ndarray]]:
        if self._fault:
            raise self._error()
        header, arrays = self._receive(limit_s)
        if isinstance(header, ErrorReply):
            raise header.exception()
        if not isinstance(header, kind):
            said = f"{type(header).__name__} in the place of {kind.__name__}"
            raise self._lost(CorruptDataError(said))
        return header, arrays

    def _tensor(self, arrays: Mapping[str, np.ndarray], name: str, axes: int) -> torch.Tensor:
        if name not in arrays or arrays[name].ndim != axes:
            raise self._lost(CorruptDataError(f"no '{name}' with {axes} axes"))
        return torch.tensor(arrays[name])

    def _lost(self, error: LinkError | CorruptDataError) -> LinkError:
        """The process is of no use any more."""
        try:
            status = self._process.wait(_END_S if isinstance(error, LinkError) else 0)
        except subprocess.TimeoutExpired:
            status = None
        how = "" if status is None else f" ({_said(status)})"
        unread = isinstance(error, CorruptDataError)
        self._fault = f"sent what cannot be read: {error}" if unread else f"{error}{how}"
        self.close()
        return self._error()

    def _error(self) -> LinkError:
        return LinkError(
            f"policy '{self._label}' computes in process {self.pid}, which {self._fault}; start "
            "again, or set inference.parallel=false"
        )


def _said(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}, see its messages above"


def _finish(process: "subprocess.Popen[bytes]", end: PairEnd) -> None:
    end.close()
    process.kill()
    process.wait()

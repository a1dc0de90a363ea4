"""A policy as it acts. Shapes: B batch, To history, H chunk, D action."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError
from embodied.core.protocols import Carry
from embodied.core.specs import PolicySpec
from policies.acting import InferenceConfig
from policies.base import GenerativePolicy
from policies.checkpoint import load_arrays, policy_from_state, policy_state
from policies.improved import ImprovedPolicy
from policies.inference.twin import acting_twin, needs_gradients, processes, refresh

_WARM_UP = 3
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Latency:
    """Of the last decisions: how many, and the times that 50 and 99 % of them needed at most."""

    count: int
    p50_ms: float
    p99_ms: float


class _Spare(NamedTuple):
    """A policy of the same configuration, and its twin with acting networks."""

    source: Any
    acting: Any


class ActingPolicy:
    """A Policy whose networks are laid out for acting; everything else is the source's own.

    It acts with the source's weights as they were at the last `refresh`, or with those of the last
    `prepare` from the next `swap` on: then source is another object.
    """

    def __init__(
        self,
        source: Any,
        config: InferenceConfig,
        *,
        rows: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """rows: of the batches to come, for the warm-up. ConfigError without the wanted device."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("inference.device=cuda: torch finds no GPU here; use device=cpu")
        self.source: Any = source.to(config.device) if isinstance(source, nn.Module) else source
        self.config = config
        self.rows = rows
        self._clock = clock
        self._latencies_s: deque[float] = deque(maxlen=_KEPT)
        acted = self._acted(self.source)
        self.spec: PolicySpec = acted.spec
        self._gradients = needs_gradients(acted, config)
        if self._gradients and config.packed:
            raise ConfigError(
                "this policy's rtc.mode=full or guidance needs gradients, which packed weights "
                "lack; leave inference.packed null"
            )
        self._acting: Any = acting_twin(acted, config, gradients=self._gradients)
        self._spare: _Spare | None = None
        if config.warm_up:
            self.warm_up()

    def _acted(self, source: Any) -> Any:
        alone = isinstance(source, ImprovedPolicy) and not self.config.critic
        return source.policy if alone else source

    def refresh(self) -> None:
        """Take over the source's present weights; between decisions only."""
        refresh(self._acting)

    def prepare(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Lay newer weights out beside those that act, which go on acting: for another thread.

        It takes the policy's memory once more. Errors as of checkpoint.load_arrays; then nothing
        may be swapped.
        """
        if self._spare is not None:
            load_arrays(self._spare.source, arrays)
            refresh(self._spare.acting)
            return
        source = policy_from_state(*policy_state(self.source))
        load_arrays(source, arrays)
        source = source.to(self.config.device)
        acted = self._acted(source)
        spare = _Spare(source, acting_twin(acted, self.config, gradients=self._gradients))
        if self.config.warm_up:
            for _ in range(_WARM_UP):
                self._decide(spare.acting, *self._question())
        self._spare = spare

    def swap(self) -> None:
        """Act with the weights that were prepared last; between decisions only."""
        assert self._spare is not None, "nothing is prepared"
        before = _Spare(self.source, self._acting)
        self.source, self._acting = self._spare
        if isinstance(self._acting, GenerativePolicy):
            self._acting.spec, self._acting.solver = before.acting.spec, before.acting.solver
        self._spare = before

    def close(self) -> None:
        """End the members' processes, if there are any; they also end with this object."""
        spare = [] if self._spare is None else processes(self._spare.acting)
        for process in (*processes(self._acting), *spare):
            process.close()

    def set_steps(self, num_steps: int, n_action_steps: int | None = None) -> None:
        """Sample in so many solver steps and execute so many actions; the source keeps its own."""
        if not isinstance(self._acting, GenerativePolicy):
            raise ConfigError(
                f"{type(self.source).__name__} has no solver whose steps could be set"
            )
        if n_action_steps is not None:
            self.spec = msgspec.structs.replace(self.spec, n_action_steps=n_action_steps)
        self._acting.spec = self.spec
        self._acting.solver = self._acting.make_solver(num_steps)

    def warm_up(self) -> None:
        """Decide a few times on zeros: memory is there, kernels are compiled and chosen."""
        for _ in range(_WARM_UP):
            self._decide(self._acting, *self._question())

    def nothing(self) -> dict[str, np.ndarray]:
        """Observations of zeros, as many rows as are to be expected."""
        return {
            key: np.zeros((self.rows, self.spec.n_obs_steps, *array.shape), array.dtype)
            for key, array in self.spec.observation.items()
        }

    def init(self, batch: int) -> Carry | None:
        """See Policy."""
        return self._acting.init(batch)

    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """See Policy."""
        started_s = self._clock()
        decision = self._decide(self._acting, carry, obs, seed, prefix)
        self._latencies_s.append(self._clock() - started_s)
        return decision

    def _decide(
        self,
        acting: Any,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        seed: np.ndarray,
        prefix: np.ndarray | None = None,
    ) -> tuple[Carry | None, np.ndarray]:
        with torch.inference_mode(not self._gradients):
            return acting.act(carry, obs, prefix=prefix, seed=seed)

    def _question(self) -> tuple[Carry | None, dict[str, np.ndarray], np.ndarray]:
        """For a decision on zeros."""
        return self.init(self.rows), self.nothing(), np.zeros(self.rows, np.int64)

    def sample(self, obs: Any, n: int, *, seed: int) -> Any:
        """See Policy."""
        return self._acting.sample(obs, n, seed=seed)

    def loss(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """See Policy; the source's."""
        return self.source.loss(batch)

    def latency(self) -> Latency | None:
        """Of the decisions since the warm-up, a thousand at most; None before the first."""
        if not self._latencies_s:
            return None
        p50, p99 = np.percentile(1e3 * np.array(self._latencies_s), (50, 99))
        return Latency(len(self._latencies_s), float(p50), float(p99))

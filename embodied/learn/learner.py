"""Gradient steps, and everything that must survive a restart with them."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.errors import CorruptDataError, EmbodiedError
from embodied.core.files import read_tensors, write_tensors
from embodied.learn.adamw import AdamW
from embodied.learn.config import LearnerConfig
from embodied.learn.ema import EMA
from embodied.learn.snapshot import Snapshot
from embodied.learn.updates.base import OWN, Cloning, Updates

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PolicyFormat:
    """How policies, which are torch modules, are made and turned into plain data and back.

    statistics: keys of which `make` needs the statistics. updates: what trains a policy, given
    it, the learner's options and a seed.
    """

    statistics: tuple[str, ...]
    make: Callable[[Mapping[str, FeatureStats]], Any]
    pack: Callable[[Any], tuple[dict[str, Any], Arrays]]
    unpack: Callable[[dict[str, Any], Arrays], Any]
    updates: Callable[[Any, LearnerConfig, int], Updates] = Cloning


class Learner:
    """Trains a policy as an algorithm's updates say: AdamW for each of their groups of parameters,
    gradient clipping, EMA."""

    def __init__(
        self, policy: Any, policy_format: PolicyFormat, config: LearnerConfig, *, seed: int
    ) -> None:
        self._device = torch.device(config.device)
        self.policy = policy.to(self._device)
        self._format = policy_format
        self.config = config
        self.step = 0
        self.seconds = 0.0
        self.updates = policy_format.updates(policy, config, seed)
        self.ema = EMA(policy, decay=config.ema_decay, prefix=self.updates.averaged)
        self._described: dict[str, Any] | None = None
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        trained |= {OWN + name: p for name, p in self.updates.parameters().items()}
        self._groups = {
            name: {key: p for key, p in trained.items() if key.startswith(group.prefix)}
            for name, group in self.updates.groups.items()
        }
        self._optimizers = {
            name: AdamW(self._groups[name], weight_decay=group.weight_decay)
            for name, group in self.updates.groups.items()
        }
        policy.seed_training(seed)

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1: of steps or of time, whichever is further."""
        used = self.step / self.config.steps
        if self.config.minutes is not None:
            used = max(used, self.seconds / (60 * self.config.minutes))
        return min(1.0, used)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.progress >= 1.0

    @property
    def acts(self) -> bool:
        """Whether the present weights may act."""
        return self.updates.acts(self.step)

    def pin(self, memory: mmap) -> None:
        """Lock memory in which batches will lie, so that a GPU copies them by itself."""
        if self._device.type == "cuda":
            view = torch.frombuffer(memory, dtype=torch.uint8)
            cudart: Any = torch.cuda.cudart()
            status = cudart.cudaHostRegister(view.data_ptr(), len(memory), 0)
            if int(status):
                raise EmbodiedError(f"cudaHostRegister of {len(memory)} bytes: error {status}")

    def update(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """One gradient step on a batch from a sampler; returns its metrics.

        The batch's memory may be used again as soon as this returns.
        """
        tensors = {
            key: torch.from_numpy(x).to(self._device, non_blocking=True) for key, x in batch.items()
        }
        self.policy.train()
        reduced = self.config.precision == "bfloat16"
        # Casts are not kept: those of before a step, or made without gradients, would be used on.
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=reduced, cache_enabled=False
        ):
            metrics = self.updates.step(tensors, self, self.step)
        self.step += 1
        return metrics

    def descend(self, group: str, loss: torch.Tensor, learning_rate: float) -> float:
        """See Optimisers; EmbodiedError if the gradient is not finite."""
        optimizer, parameters = self._optimizers[group], self._groups[group]
        optimizer.zero_grad()
        with torch.autocast(self._device.type, enabled=False):
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise EmbodiedError(
                f"the gradient of step {self.step} is not finite; lower "
                f"{self.updates.groups[group].setting} (now {learning_rate:g}) or use "
                "learner.precision=float32"
            )
        optimizer.step(learning_rate)
        if self.updates.groups[group].prefix.startswith(self.updates.averaged):
            self.ema.update(self.policy)
        return float(norm)

    @contextmanager
    def averaged(self) -> Generator[None]:
        """See Optimisers."""
        self.ema.exchange(self.policy)
        try:
            yield
        finally:
            self.ema.exchange(self.policy)

    def weights(self) -> tuple[dict[str, Any], Arrays]:
        """Configuration and arrays of the policy with averaged weights: what acts."""
        config, snapshot = self.snapshot()
        return config, snapshot.arrays()

    def snapshot(self) -> tuple[dict[str, Any], Snapshot]:
        """As weights, but on a GPU the arrays are still on their way, and training may go on."""
        if self._described is None:
            self._described = self._format.pack(self.policy)[0]
        averaged = self.ema.parameters()
        state: Mapping[str, torch.Tensor] = self.policy.state_dict()
        fixed = {k: v.detach().clone() for k, v in state.items() if k not in averaged}
        return self._described, Snapshot({**fixed, **averaged}, self._stream)

    def save(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Write policy, averages, optimiser, random state and `extra` as one file, whole or not."""
        config, arrays = self._format.pack(self.policy)
        tensors = {f"policy/{name}": value for name, value in arrays.items()}
        for name, value in self.ema.parameters().items():
            tensors[f"ema/{name}"] = value.cpu().numpy()
        steps: dict[str, float] = {}
        for optimizer in self._optimizers.values():
            tensors |= {f"optimizer/{name}": array for name, array in optimizer.arrays().items()}
            steps |= optimizer.steps()
        for name, value in self.updates.tensors().items():
            tensors[f"updates/{name}"] = value.detach().cpu().numpy()
        tensors["training_rng"] = self.policy.training_rng_state().numpy()
        header = {
            "policy": config,
            "step": self.step,
            "seconds": self.seconds,
            "optimizer_steps": steps,
            "ema_updates": self.ema.updates,
            "extra": dict(extra),
        }
        write_tensors(path, tensors, msgspec.json.encode(header))

    @classmethod
    def load(
        cls, path: Path, policy_format: PolicyFormat, config: LearnerConfig, *, seed: int
    ) -> tuple["Learner", dict[str, Any]]:
        """The learner saved at `path`, and its `extra`; CorruptDataError if it is damaged.

        seed: the one that it was made with.
        """
        arrays, raw = read_tensors(path)
        header: dict[str, Any] = msgspec.json.decode(raw)
        try:
            policy = policy_format.unpack(header["policy"], _under("policy/", arrays))
            learner = cls(policy, policy_format, config, seed=seed)
            averages = {n: torch.from_numpy(v) for n, v in _under("ema/", arrays).items()}
            learner.ema.load(averages, header["ema_updates"])
            moments, steps = _under("optimizer/", arrays), header["optimizer_steps"]
            for optimizer in learner._optimizers.values():
                optimizer.load(moments, steps)
            kept = _under("updates/", arrays)
            learner.updates.load({name: torch.from_numpy(v) for name, v in kept.items()})
            policy.set_training_rng_state(torch.from_numpy(arrays["training_rng"]))
            learner.step, learner.seconds = header["step"], header["seconds"]
        except KeyError as error:
            raise CorruptDataError(
                f"{path} lacks {error}; it was not written by this version. Start a new run."
            ) from error
        return learner, header["extra"]


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}

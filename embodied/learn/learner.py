"""One gradient step, and everything that must survive a restart with it."""

import math
from collections.abc import Callable, Mapping
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
from embodied.learn.config import LearnerConfig
from embodied.learn.ema import EMA
from embodied.learn.snapshot import Snapshot

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PolicyFormat:
    """How policies, which are torch modules, are made and turned into plain data and back.

    statistics: keys of which `make` needs the statistics.
    """

    statistics: tuple[str, ...]
    make: Callable[[Mapping[str, FeatureStats]], Any]
    pack: Callable[[Any], tuple[dict[str, Any], Arrays]]
    unpack: Callable[[dict[str, Any], Arrays], Any]


class Learner:
    """Supervised training of a policy: AdamW, cosine schedule, gradient clipping, EMA."""

    def __init__(
        self, policy: Any, policy_format: PolicyFormat, config: LearnerConfig, *, seed: int
    ) -> None:
        self._device = torch.device(config.device)
        self.policy = policy.to(self._device)
        self._format = policy_format
        self.config = config
        self.step = 0
        self.seconds = 0.0
        self.ema = EMA(policy, decay=config.ema_decay)
        self._described: dict[str, Any] | None = None
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._names = [name for name, p in policy.named_parameters() if p.requires_grad]
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
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

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine to zero over the budget."""
        warmup = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return self.config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))

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
        rate = self.learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.policy.train()
        reduced = self.config.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=reduced):
            loss, metrics = self.policy.loss(tensors)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise EmbodiedError(
                f"the gradient of step {self.step} is not finite; lower learner.learning_rate "
                f"(now {self.config.learning_rate}) or use learner.precision=float32"
            )
        self._optimizer.step()
        self.ema.update(self.policy)
        self.step += 1
        return {**metrics, "grad_norm": float(norm), "learning_rate": rate}

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
        steps = 0.0
        for name, parameter in zip(self._names, self._parameters, strict=True):
            state = self._optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"optimizer/{key}/{name}"] = state[key].cpu().numpy()
            steps = float(state.get("step", 0.0))
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
        cls, path: Path, policy_format: PolicyFormat, config: LearnerConfig
    ) -> tuple["Learner", dict[str, Any]]:
        """The learner saved at `path`, and its `extra`; CorruptDataError if it is damaged."""
        arrays, raw = read_tensors(path)
        header: dict[str, Any] = msgspec.json.decode(raw)
        try:
            policy = policy_format.unpack(header["policy"], _under("policy/", arrays))
            learner = cls(policy, policy_format, config, seed=0)
            averages = {n: torch.from_numpy(v) for n, v in _under("ema/", arrays).items()}
            learner.ema.load(averages, header["ema_updates"])
            learner._load_optimizer(arrays, header["optimizer_steps"])
            policy.set_training_rng_state(torch.from_numpy(arrays["training_rng"]))
            learner.step, learner.seconds = header["step"], header["seconds"]
        except KeyError as error:
            raise CorruptDataError(
                f"{path} lacks {error}; it was not written by this version. Start a new run."
            ) from error
        return learner, header["extra"]

    def _load_optimizer(self, arrays: Mapping[str, np.ndarray], steps: float) -> None:
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if steps:
                moments = {
                    key: torch.from_numpy(arrays[f"optimizer/{key}/{name}"])
                    for key in ("exp_avg", "exp_avg_sq")
                }
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(steps, device=self._device),
                    **{k: v.to(self._device, copy=True) for k, v in moments.items()},
                }


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}

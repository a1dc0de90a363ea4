from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import KINDS, ideal
from torch import nn

from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec
from policies.build import build_critic, build_policy
from policies.checkpoint import save_policy
from policies.chunk import ChunkPolicy
from policies.compose.build import compose
from policies.critics.configs import ImprovementConfig
from policies.critics.ensemble import EnsembleCritic
from policies.improved import improved
from policies.world.planning import planned

SMALL = {
    "mlp": {"name": "mlp", "width": 32, "depth": 1, "time_dim": 16},
    "unet1d": {"name": "unet1d", "channels": [8, 16], "n_groups": 4, "time_dim": 16},
    "dit": {"name": "dit", "width": 16, "depth": 2, "heads": 2, "time_dim": 16},
}
SMALL_CRITIC = {"head": {"name": "scalar"}, "horizon": 4, "members": 3, "width": 16}
SMALL_ALONE = {
    "act": {"width": 16, "heads": 2, "encoder_depth": 1, "latent_dim": 4},
    "gaussian": {"width": 16},
    "vla": {
        "transformer": {"width": 16, "depth": 2, "heads": 2},
        "expert": {"width": 16, "heads": 2, "time_dim": 16},
    },
    "autoregressive": {
        "tokenizer": {"name": "bins", "bins": 17},
        "transformer": {"width": 16, "depth": 2, "heads": 2},
    },
    "uwm": {"width": 16, "depth": 2, "heads": 2, "time_dim": 16, "registers": 2},
    "uva": {
        "width": 16,
        "heads": 2,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "head_width": 16,
        "head_depth": 1,
        "time_dim": 16,
        "frames": 1,
        "drawn": "row",
    },
}

FLAT = ("flow", "diffusion")
COMPOSED = {
    "composed": {"name": "mix", "weights": [0.4, 0.6]},
    "pooled": {"name": "pooled", "proposals": 2},
}

GOAL = {"name": "goal", "targets": {"observation.state": [0.3, -0.2, 0.1]}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Fixtures:
    """Small policies, observations and batches. folder: where bases of adapted policies go, which
    nothing else needs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def device(self, action_dim: int = 2, low: float = -1.0, high: float = 1.0) -> DeviceSpec:
        return DeviceSpec(
            observation={"observation.state": ArraySpec((3,)), "observation.goal": ArraySpec((2,))},
            action=ArraySpec((action_dim,), low=(low,), high=(high,)),
            tick_hz=10.0,
        )

    def stats(self, size: int) -> Any:
        return SimpleNamespace(
            mean=[0.0] * size, std=[1.0] * size, min=[-2.0] * size, max=[2.0] * size
        )

    def all_stats(self) -> dict[str, Any]:
        return {
            "observation.state": self.stats(3),
            "observation.goal": self.stats(2),
            "action": self.stats(2),
        }

    def policy(
        self, name: str = "flow", *, device: DeviceSpec | None = None, seed: int = 0, **options: Any
    ) -> Any:
        if name in COMPOSED:
            pair = {kind: self.policy(kind, device=device, seed=seed, **options) for kind in FLAT}
            return compose(pair, COMPOSED[name])
        if name == "improved":
            base = self.policy(device=device, seed=seed, **options)
            improvement = ImprovementConfig(proposals=6, kept=3, steps=2, step_size=0.1)
            return improved(base, self.critic(base.spec, seed=seed), improvement)
        if name == "planned":
            base = self.policy(device=device, seed=seed, **options)
            world = self.policy("uwm", device=device, seed=seed)
            return planned(base, GOAL, world=world, proposals=4)
        device = device or self.device()
        if name == "lora":
            assert self.folder is not None
            base = self.folder / "base"
            save_policy(base, self.awaken(self.policy(device=device, seed=seed, **options)))
            config = {"base": str(base), "rank": 4}
            return build_policy(name, config, device, device.observation, {}, seed=seed)
        network = options.pop("network", "mlp")
        sizes: dict[str, Any] = SMALL_ALONE.get(name, {})
        if not sizes:
            sizes = {"network": SMALL[network] if isinstance(network, str) else network}
        config = {"horizon": 6, "n_action_steps": 3, **options, **sizes}
        return build_policy(name, config, device, device.observation, self.all_stats(), seed=seed)

    def critic(self, spec: PolicySpec, *, seed: int = 0, **options: Any) -> EnsembleCritic:
        return build_critic(SMALL_CRITIC | options, spec, self.all_stats(), seed=seed)

    def obs(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "observation.state": rng.normal(size=(batch, 2, 3)).astype(np.float32),
            "observation.goal": rng.normal(size=(batch, 2, 2)).astype(np.float32),
        }

    def batch(
        self, batch: int, horizon: int = 6, dim: int = 2, seed: int = 0
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed + 1)
        later = {f"future.{key}": x[:, :1] for key, x in self.obs(batch, seed + 2).items()}
        return {
            **self.obs(batch, seed),
            "action": rng.uniform(-1, 1, (batch, horizon, dim)).astype(np.float32),
            "action_is_pad": np.zeros((batch, horizon), bool),
            **later,
            "future_is_pad": np.zeros((batch, 1), bool),
        }

    def awaken(self, policy: Any, seed: int = 5) -> Any:
        """Random weights in all that is trained, the zero-initialised output layer included."""
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in policy.parameters() if p.requires_grad):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        return policy

    def analytic(
        self,
        policy: ChunkPolicy[Any],
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> ChunkPolicy[Any]:
        """Put a closed form f(x_BHD, time_B11) in the place of the network, in double precision."""

        class Analytic(nn.Module):
            def forward(
                self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor
            ) -> torch.Tensor:
                return function(x, time[:, None, None])

        policy.network = Analytic()
        return policy.double()


@pytest.fixture
def make(tmp_path: Path) -> Fixtures:
    return Fixtures(tmp_path)


@pytest.fixture
def gaussian(make):
    def build(kind, mean, sigma, **options):
        name, extra = KINDS[kind]
        policy = make.policy(name, **extra, **options)
        table = make.policy("diffusion").alpha_bar_N.double()
        return make.analytic(policy, ideal(kind, mean, sigma, table))

    return build


@pytest.fixture
def integrate(make):
    def go(policy, x, generators=None):
        policy = policy.double()
        return policy.integrate(x, policy.encode(make.obs(len(x))), generators)

    return go

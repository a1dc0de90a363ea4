from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embodied.core.specs import ArraySpec, DeviceSpec
from policies.base import GenerativePolicy
from policies.build import build_policy

SMALL = {
    "mlp": {"name": "mlp", "width": 32, "depth": 1, "time_dim": 16},
    "unet1d": {"name": "unet1d", "channels": [8, 16], "n_groups": 4, "time_dim": 16},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Fixtures:
    """Small policies, observations and batches."""

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
    ) -> GenerativePolicy[Any]:
        device = device or self.device()
        network = options.get("network", "mlp")
        network = SMALL[network] if isinstance(network, str) else network
        config = {"horizon": 6, "n_action_steps": 3, **options, "network": network}
        return build_policy(name, config, device, device.observation, self.all_stats(), seed=seed)

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
        return {
            **self.obs(batch, seed),
            "action": rng.uniform(-1, 1, (batch, horizon, dim)).astype(np.float32),
            "action_is_pad": np.zeros((batch, horizon), bool),
        }

    def awaken(self, policy: GenerativePolicy[Any], seed: int = 5) -> GenerativePolicy[Any]:
        """Random weights everywhere, the zero-initialised output layer included."""
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        return policy

    def analytic(
        self,
        policy: GenerativePolicy[Any],
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> GenerativePolicy[Any]:
        """Put a closed form f(x_BHD, time_B11) in the place of the network, in double precision."""

        class Analytic(nn.Module):
            def forward(
                self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor
            ) -> torch.Tensor:
                return function(x, time[:, None, None])

        policy.network = Analytic()
        return policy.double()


@pytest.fixture
def make() -> Fixtures:
    return Fixtures()

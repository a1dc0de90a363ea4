"""Rectified flow. Shapes: B batch, H chunk, D action, C conditioning."""

from typing import Annotated, Literal

import msgspec
import torch

from embodied.core.protocols import Prediction
from policies.base import GenerativePolicy, Generators, PolicyConfig
from policies.conversions import flow_time, signal_noise

BETA_SHAPE = 1.5
BETA_CUT = 0.999


class FlowConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the flow policy.

    num_steps: solver steps. solver: "heun" evaluates the network twice a step. time_sampling:
    density of u in training; "logit_normal" prefers the middle (Esser et al. 2024, section 3.1),
    "beta" the noisy end (π0, Black et al. 2024, appendix B).
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    solver: Literal["euler", "heun"] = "euler"
    time_sampling: Literal["uniform", "logit_normal", "beta"] = "uniform"


class FlowPolicy(GenerativePolicy[FlowConfig]):
    """Learns v(x_u, u) = E[x₁ − n | x_u] on x_u = u x₁ + (1 − u) n and integrates dx = v du.

    Rectified flow (Liu et al. 2022, equation 1) with u = 0 noise and u = 1 data.
    """

    name = "flow"
    Config = FlowConfig

    def integrate(
        self, x_BHD: torch.Tensor, cond_BC: torch.Tensor, generators: Generators
    ) -> torch.Tensor:
        """Solve the flow from u = 0 to 1 on a uniform grid."""
        n = self.config.num_steps
        for k in range(n):
            v_BHD = self._velocity(x_BHD, k / n, cond_BC)
            if self.config.solver == "heun":
                ahead_BHD = self._velocity(x_BHD + v_BHD / n, (k + 1) / n, cond_BC)
                v_BHD = (v_BHD + ahead_BHD) / 2
            x_BHD = x_BHD + v_BHD / n
        return x_BHD

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """‖v(x_u, u) − (x₁ − n)‖² per element."""
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        u_B = self._draw_times(len(action_BHD), rng).to(action_BHD)
        x_BHD = torch.lerp(noise_BHD, action_BHD, u_B[:, None, None])
        v_BHD = self.network(x_BHD, u_B, cond_BC)
        return (v_BHD - (action_BHD - noise_BHD)).square()

    def denoise(self, x_t: torch.Tensor, log_snr: torch.Tensor, cond: torch.Tensor) -> Prediction:
        """Velocity at the flow's time and scale of equal signal-to-noise ratio."""
        signal, noise = signal_noise(log_snr)
        velocity = self.network(x_t / (signal + noise), flow_time(log_snr), cond)
        return Prediction(velocity, "flow")

    def _velocity(self, x_BHD: torch.Tensor, u: float, cond_BC: torch.Tensor) -> torch.Tensor:
        return self.network(x_BHD, x_BHD.new_full((len(x_BHD),), u), cond_BC)

    def _draw_times(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        match self.config.time_sampling:
            case "uniform":
                return torch.rand(batch, generator=rng)
            case "logit_normal":
                return torch.sigmoid(torch.randn(batch, generator=rng))
            case "beta":
                # z ~ Beta(1.5, 1) has the distribution function z^1.5.
                z_B = torch.rand(batch, generator=rng) ** (1 / BETA_SHAPE)
                return BETA_CUT * (1 - z_B)

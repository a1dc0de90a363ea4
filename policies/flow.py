"""Rectified flow. Shapes: B batch, H chunk, D action, C conditioning."""

import torch

from embodied.core.protocols import Prediction
from embodied.core.registry import resolve
from embodied.core.specs import PolicySpec
from policies.base import GenerativePolicy
from policies.configs import FlowConfig, FlowOptions
from policies.conversions import Scalar, flow_time, signal_noise
from policies.networks.stages import Cond, evaluate
from policies.solvers.base import Solver

BETA_SHAPE = 1.5
BETA_CUT = 0.999


class FlowPolicy(GenerativePolicy[FlowOptions]):
    """Learns v(x_u, u) = E[x₁ − n | x_u] on x_u = u x₁ + (1 − u) n and integrates dx = v du.

    Rectified flow (Liu et al. 2022, equation 1) with u = 0 noise and u = 1 data.
    """

    name = "flow"
    Config: type[FlowOptions] = FlowConfig

    def __init__(self, spec: PolicySpec, config: FlowOptions) -> None:
        """Also makes the solver."""
        super().__init__(spec, config)
        self.solver = self.make_solver()

    def make_solver(self, num_steps: int | None = None) -> Solver:
        """See GenerativePolicy."""
        solver = resolve("solvers", self.config.solver)
        return solver(solver.Config(num_steps=num_steps or self.config.num_steps))

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """‖v(x_u, u) − (x₁ − n)‖² per element."""
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        u_B = self._draw_times(len(action_BHD), rng).to(action_BHD)
        x_BHD = torch.lerp(noise_BHD, action_BHD, u_B[:, None, None])
        v_BHD = self.network(x_BHD, u_B, cond_BC)
        return (v_BHD - (action_BHD - noise_BHD)).square()

    def time_of(self, log_snr: Scalar) -> Scalar:
        """The flow's u with the same signal-to-noise ratio."""
        return flow_time(log_snr)

    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Cond) -> Prediction:
        """Velocity at the flow's time and scale of equal signal-to-noise ratio."""
        signal, noise = signal_noise(log_snr)
        x_BHD = x_t / (signal + noise)
        return Prediction(evaluate(self.network, x_BHD, self.time_of(log_snr), cond), "flow")

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

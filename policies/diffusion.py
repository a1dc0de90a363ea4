"""Denoising diffusion. Shapes: B batch, H chunk, D action, C conditioning, N training steps."""

import msgspec
import torch

from embodied.core.protocols import Parameterisation, Prediction
from embodied.core.registry import resolve
from embodied.core.specs import PolicySpec
from policies.base import GenerativePolicy
from policies.configs import DiffusionConfig
from policies.conversions import Scalar
from policies.networks.stages import Cond, evaluate
from policies.schedule import Schedule
from policies.solvers.diffusion import DiffusionSolver

PARAMETERISATIONS: dict[str, Parameterisation] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
}


class DiffusionPolicy(GenerativePolicy[DiffusionConfig]):
    """Learns to predict noise, clean chunk or v from x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε.

    DDPM (Ho et al. 2020, equation 14), v as in Salimans and Ho 2022; the network's time is t / N.
    """

    name = "diffusion"
    Config = DiffusionConfig

    def __init__(self, spec: PolicySpec, config: DiffusionConfig) -> None:
        """Also makes the solver, on the schedule that the network is trained on."""
        super().__init__(spec, config)
        self.solver = solver = self.make_solver()
        self.schedule = Schedule(solver.alpha_bar_N)

    @property
    def alpha_bar_N(self) -> torch.Tensor:
        """ᾱ by training step."""
        return self.schedule.alpha_bar_N

    def make_solver(self, num_steps: int | None = None) -> DiffusionSolver:
        """See GenerativePolicy."""
        options = self.config.solver_config()
        if num_steps is not None:
            options = msgspec.structs.replace(options, num_steps=num_steps)
        return resolve("solvers", self.config.scheduler)(options)

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error of the predicted quantity per element."""
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        n = self.config.num_train_steps
        t_B = torch.randint(n, (len(action_BHD),), generator=rng).to(action_BHD.device)
        alpha_bar_B11 = self.alpha_bar_N[t_B][:, None, None]
        signal, spread = alpha_bar_B11.sqrt(), (1 - alpha_bar_B11).sqrt()
        x_BHD = signal * action_BHD + spread * noise_BHD
        out_BHD = self.network(x_BHD, t_B.to(action_BHD) / n, cond_BC)
        match self.config.prediction_type:
            case "epsilon":
                target_BHD = noise_BHD
            case "sample":
                target_BHD = action_BHD
            case "v_prediction":
                target_BHD = signal * noise_BHD - spread * action_BHD
        return (out_BHD - target_BHD).square()

    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Cond) -> Prediction:
        """The network's output at the time whose log-SNR is `log_snr`."""
        value_BHD = evaluate(self.network, x_t, self.time_of(log_snr), cond)
        return Prediction(value_BHD, PARAMETERISATIONS[self.config.prediction_type])

    def time_of(self, log_snr: Scalar) -> Scalar:
        """The network's time, interpolated between those that it is trained on."""
        return self.schedule.time_of(log_snr)

"""Mean flow: chunks in one step. Shapes: B batch, H chunk, D action, C conditioning.

Geng et al. 2025 (arXiv:2505.13447). On x_u = u x₁ + (1−u) n, from noise at u = 0 to data at u = 1,
the network is the mean velocity over the length l from time u on,

    m(x_u, u, l) = (x_{u+l} − x_u) / l,   m(x_u, u, 0) = v(x_u, u),

so that one step x_{u+l} = x_u + l m is exact. With the end u + l fixed, d(l m)/du = −v along a path
(the paper's equation 6, time reversed), hence

    m = v + l dm/du,   dm/du = v ∂m/∂x + ∂m/∂u − ∂m/∂l.

The right side, without its gradient, is what m is trained on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.protocols import Prediction
from embodied.core.specs import PolicySpec
from policies.base import GenerativePolicy
from policies.checkpoint import load_policy
from policies.compose.policy import check_denoiser
from policies.configs import MeanFlowConfig
from policies.conversions import Scalar, flow_time, signal_noise, velocity_at
from policies.flow import FlowPolicy
from policies.folder import find_folder
from policies.networks.stages import Cond, Prepared
from policies.networks.time import SinusoidalTime
from policies.reading import Array
from policies.solvers.base import Denoise, Solver
from policies.solvers.flow import Euler, FlowSolverConfig

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_u [B, H, D], u [B]) → v [B, H, D]."""

_TIME = 0.01
"""The network is differentiated by time: let its fastest sine turn by 10 rad, not by a thousand."""

_LENGTH_DIM = 32
_FLOOR = 1e-3
_SCORE_STEPS = 10
_FIRST_U, _LAST_U = 0.02, 0.999
"""A teacher that predicts noise has no velocity at u = 0, one that predicts chunks none at 1."""


class MeanFlowPolicy(FlowPolicy):
    """Learns m and acts in `num_steps` steps. As a denoiser, in a composition, it is v."""

    name = "meanflow"
    Config = MeanFlowConfig
    extra_dim = _LENGTH_DIM

    config: MeanFlowConfig

    def __init__(self, spec: PolicySpec, config: MeanFlowConfig) -> None:
        """See FlowPolicy."""
        super().__init__(spec, config)
        self.embed_length = SinusoidalTime(_LENGTH_DIM)
        self._teacher: tuple[GenerativePolicy[Any], ...] = ()

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """See GenerativePolicy. Metric "squared_error": without the rows' weights.

        ConfigError: the teacher does not fit, or cannot be read.
        """
        cond_BC = self._condition(batch, self._training_rng)
        clean_BHD, pad_BH = self._labels(batch, len(cond_BC))
        teacher = self._teachers_velocity(batch) if self.config.teacher else None
        squared_BHD = self._squared(clean_BHD, cond_BC, self._training_rng, teacher)
        valid_BH1 = (~pad_BH)[..., None].to(squared_BHD)
        n_valid_B = valid_BH1.sum((1, 2)) * squared_BHD.shape[-1]
        error_B = (squared_BHD * valid_BH1).sum((1, 2)) / n_valid_B.clamp(min=1)
        known_B = (n_valid_B > 0).to(error_B)
        mean = (error_B.detach() * known_B).sum() / known_B.sum().clamp(min=1) + _FLOOR
        weight_B = known_B * (mean / (error_B.detach() + _FLOOR)) ** self.config.power
        loss = (weight_B * error_B).sum() / known_B.sum().clamp(min=1)
        return loss, {"loss": loss.item(), "squared_error": mean.item() - _FLOOR}

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """‖m − (v + l dm/du)‖² per element with v = x₁ − n."""
        return self._squared(action_BHD, cond_BC, rng, None)

    @property
    def score_solver(self) -> Solver:
        """v alone needs more steps than m."""
        return Euler(FlowSolverConfig(num_steps=max(self.config.num_steps, _SCORE_STEPS)))

    def stepping(self, cond_BC: torch.Tensor, solver: Solver) -> Denoise:
        """The mean velocity over each of Euler's steps; any other solver asks for v."""
        if type(solver) is not Euler:
            return super().stepping(cond_BC, solver)
        ends = pairwise([*solver.grid, 1.0])
        conds = {
            log_snr: super(MeanFlowPolicy, self).prepare(
                self._with_length(cond_BC, end - begin), [log_snr]
            )
            for log_snr, (begin, end) in zip(solver.log_snrs, ends, strict=True)
        }
        denoise = super().denoise
        return lambda x_BHD, log_snr: denoise(x_BHD, log_snr, conds[log_snr])

    def prepare(self, cond_BC: torch.Tensor, log_snrs: Sequence[float]) -> Cond:
        """See GenerativePolicy; for v."""
        prepared = super().prepare(self._with_length(cond_BC, 0.0), log_snrs)
        return prepared if isinstance(prepared, Prepared) else cond_BC

    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Cond) -> Prediction:
        """v = m(x_u, u, 0), see FlowPolicy."""
        if isinstance(cond, torch.Tensor):
            cond = self._with_length(cond, 0.0)
        return super().denoise(x_t, log_snr, cond)

    def time_of(self, log_snr: Scalar) -> Scalar:
        """The flow's time in the network's unit."""
        return _TIME * flow_time(log_snr)

    def _with_length(self, cond_BC: torch.Tensor, length: Scalar) -> torch.Tensor:
        if not isinstance(length, torch.Tensor):
            length = cond_BC.new_full((len(cond_BC),), length)
        return torch.cat([cond_BC, self.embed_length(_TIME * length)], dim=-1)

    def _mean_velocity(
        self, x_BHD: torch.Tensor, u_B: torch.Tensor, length_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        return self.network(x_BHD, _TIME * u_B, self._with_length(cond_BC, length_B))

    def _squared(
        self,
        action_BHD: torch.Tensor,
        cond_BC: torch.Tensor,
        rng: torch.Generator,
        teacher: Velocity | None,
    ) -> torch.Tensor:
        batch = len(action_BHD)
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        one_B, other_B = (self._draw_times(batch, rng).to(action_BHD) for _ in range(2))
        n = math.ceil(self.config.share * batch)
        rows = torch.randperm(batch, generator=rng)[:n].to(action_BHD.device)
        u_B, length_B = one_B.clone(), torch.zeros_like(one_B)
        u_B[rows] = torch.minimum(one_B, other_B)[rows]
        length_B[rows] = (one_B - other_B).abs()[rows]
        x_BHD = torch.lerp(noise_BHD, action_BHD, u_B[:, None, None])
        with torch.no_grad():
            v_BHD = action_BHD - noise_BHD if teacher is None else teacher(x_BHD, u_B)
            change_BHD = self._change(
                x_BHD[rows], u_B[rows], length_B[rows], v_BHD[rows], cond_BC[rows]
            )
            target_BHD = v_BHD.clone()
            target_BHD[rows] += length_B[rows, None, None] * change_BHD
        return (self._mean_velocity(x_BHD, u_B, length_B, cond_BC) - target_BHD).square()

    def _change(
        self,
        x_BHD: torch.Tensor,
        u_B: torch.Tensor,
        length_B: torch.Tensor,
        v_BHD: torch.Tensor,
        cond_BC: torch.Tensor,
    ) -> torch.Tensor:
        """dm/du [B, H, D] by forward differentiation, which attention has in its plain form."""

        def mean_velocity(x: torch.Tensor, u: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            return self._mean_velocity(x, u, length, cond_BC.detach())

        one_B = torch.ones_like(u_B)
        plain = torch.autocast(x_BHD.device.type, enabled=False)
        with plain, sdpa_kernel(SDPBackend.MATH):
            found: Any = torch.func.jvp(
                mean_velocity, (x_BHD, u_B, length_B), (v_BHD, one_B, -one_B)
            )
        return found[1]

    def _teachers_velocity(self, batch: Mapping[str, Array]) -> Velocity:
        if not self._teacher:  # in a tuple, where neither checkpoint nor optimiser finds it
            self._teacher = (self._load_teacher(),)
        (teacher,) = self._teacher
        with torch.no_grad():
            cond_BC = teacher.encode({key: batch[key] for key in teacher.spec.observation})

        def velocity(x_BHD: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
            log_snr_B = 2 * torch.logit(u_B.clamp(_FIRST_U, _LAST_U))
            signal, noise = signal_noise(log_snr_B)
            x_t = x_BHD * (signal + noise)
            return velocity_at(teacher.denoise(x_t, log_snr_B, cond_BC), x_t, signal, noise)

        return velocity

    def _load_teacher(self) -> GenerativePolicy[Any]:
        where = f"policy.teacher={self.config.teacher}"
        folder = find_folder(Path(str(self.config.teacher)), "policy.teacher")
        try:
            teacher = load_policy(folder)
        except (ConfigError, CorruptDataError) as error:
            raise type(error)(f"{where}: {error}") from error
        check_denoiser(where, teacher)
        executed = self.spec.n_action_steps
        if msgspec.structs.replace(teacher.spec, n_action_steps=executed) != self.spec:
            raise ConfigError(
                f"{where} reads {sorted(teacher.spec.observation)} over "
                f"{teacher.spec.n_obs_steps} steps for {teacher.spec.horizon} actions of size "
                f"{teacher.spec.action.size}; this policy {sorted(self.spec.observation)}, "
                f"{self.spec.n_obs_steps}, {self.spec.horizon} and {self.spec.action.size}"
            )
        theirs, ours = teacher.action_normalizer, self.action_normalizer
        same = [
            torch.allclose(getattr(theirs, name), getattr(ours, name).cpu())
            for name in ("offset", "scale")
        ]
        if not all(same):
            raise ConfigError(f"{where} normalises actions in another way than this policy")
        return teacher.to(self.device).eval().requires_grad_(False)

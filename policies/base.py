"""What every policy that samples chunks from a conditional density shares.

Shapes: B batch, T history, H chunk, D action, C conditioning, n samples per row.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import SpecError
from embodied.core.protocols import Carry, Prediction
from embodied.core.specs import PolicySpec
from policies import noise
from policies.acting import RtcConfig, WarmStartConfig
from policies.arrays import put_prefix, shifted
from policies.chunk import ChunkPolicy, valid_mean
from policies.configs import ChunkConfig
from policies.conversions import Scalar
from policies.guidance import Goal, check_delay, guided, soft_mask
from policies.networks.stages import Cond, prepare
from policies.noise import Generators
from policies.reading import Array
from policies.solvers.base import Denoise, Solver

PREPARED_ROWS = 64


C = TypeVar("C", bound=ChunkConfig)


class GenerativePolicy(ChunkPolicy[C]):
    """Observation histories → conditioning → chunks, by a network that denoises.

    A subclass says what the network is trained on (`objective`), how its output is named
    (`denoise`) and by which solver chunks are sampled, unless it is given another.
    """

    solver: Solver
    """What a subclass sets, and anyone may replace: it runs any denoiser."""

    rtc = RtcConfig()
    """How a chunk goes on from committed actions."""

    warm_start: WarmStartConfig | None = None
    """Where the solver begins if the chunk before is known; None always begins from noise."""

    extra_dim = 0
    """What a subclass adds to the network's conditioning."""

    ahead = False
    """Whether what needs no noisy chunk is worked out for all steps at once: faster, but the last
    bits of a row then depend on how many rows and steps there are."""

    def __init__(self, spec: PolicySpec, config: C) -> None:
        """See ChunkPolicy."""
        super().__init__(spec, config)
        self.network = self.make_network()

    def make_network(self) -> nn.Module:
        """What denoises: the network that the options name."""
        named: Any = self.config
        network, options = component("networks", named.network, "policy.network")
        dim = self.encoder.dim + self.extra_dim
        return network(options, self.spec.action.size, self.spec.horizon, dim)

    def integrate(
        self,
        x_BHD: torch.Tensor,
        cond_BC: torch.Tensor,
        generators: Generators,
        *,
        start: int = 0,
        goal: Goal | None = None,
    ) -> torch.Tensor:
        """Carry noise to normalised actions, both [B, H, D].

        x_BHD: standard normal, or noisy as where the solver's step `start` begins. goal: what
        guides it, by `self.rtc`.
        """
        denoise = self.stepping(cond_BC, self.solver)
        if goal is not None:
            levels, clip = self.solver.log_snrs, self.solver.clip
            denoise = guided(denoise, goal, self.rtc, clip=clip, levels=levels)
        return self.solver(denoise, x_BHD, generators, start=start)

    def stepping(self, cond_BC: torch.Tensor, solver: Solver) -> Denoise:
        """What a solver asks in its steps, the conditioning prepared for them."""
        cond = self.prepare(cond_BC, solver.log_snrs)

        def denoise(x_BHD: torch.Tensor, log_snr: float) -> Prediction:
            return self.denoise(x_BHD, log_snr, cond)

        return denoise

    def prepare(self, cond_BC: torch.Tensor, log_snrs: Sequence[float]) -> Cond:
        """The conditioning, with the work at these levels done that needs no noisy chunk.

        `denoise` takes it in the conditioning's place. Nothing is done beyond 64 rows: there it
        saves no time, and the memory grows with rows × levels.
        """
        if not self.ahead or len(cond_BC) > PREPARED_ROWS:
            return cond_BC
        times = dict.fromkeys(self.time_of(log_snr) for log_snr in log_snrs)
        return prepare(self.network, cond_BC, tuple(times))

    @abstractmethod
    def make_solver(self, num_steps: int | None = None) -> Solver:
        """The configured solver, with another number of steps if it is given."""

    @property
    def score_solver(self) -> Solver:
        """What brings its `denoise` to a chunk in a composition: its own solver."""
        return self.solver

    def time_of(self, log_snr: Any) -> Any:
        """What the network is told in the place of a log-SNR, in its shape (float or [B])."""
        return log_snr

    @abstractmethod
    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error [B, H, D] of the network's prediction, for normalised actions."""

    @abstractmethod
    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Cond) -> Prediction:
        """Prediction at normalised x_t [B, H, D] = √ᾱ x₀ + √(1−ᾱ) ε, cond [B, C].

        log_snr: [B], or a float for all rows, which is faster.
        """

    def drawn(self, cond: Any, source: list[int] | torch.Generator) -> Any:
        """The conditioning with what a decision draws beside the noise of its chunk: nothing.

        source: the rows' seeds, or where noise for all of them comes from.
        """
        return cond

    def init(self, batch: int) -> Carry:
        """No chunk is known yet."""
        shape = (batch, self.spec.horizon, self.spec.action.size)
        return {"chunk": np.zeros(shape, np.float32), "known": np.zeros(batch, bool)}

    @torch.no_grad()
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry, np.ndarray]:
        """Chunks [B, H, D] float32 in device units and within the action's bounds.

        obs: [B, To, …] in device units, exactly the spec's keys. seed: integers [B]; a row's noise
        depends on its own seed alone. prefix [B, d, D]: actions that are committed already; they
        stand at the head of the chunk, and what follows goes on from them as `rtc` says. carry:
        the chunks before, decided n_action_steps ticks ago; None for rows that have none.
        SpecError for a prefix of another shape, or with d > H − n_action_steps, and if an action is
        not finite.
        """
        cond_BC = self.encode(obs)
        seeds = noise.check_seeds(seed, len(cond_BC))
        start_BHD = noise.start_noise(seeds, self.spec.horizon, self.spec.action.size)
        cond_BC = self.drawn(cond_BC, seeds)
        generators = noise.step_generators(seeds) if self.solver.stochastic else None
        carry = self.init(len(seeds)) if carry is None else carry
        goal = None if prefix is None else self._goal(prefix, carry)
        x_BHD = self._solve(start_BHD.to(self.low_D), cond_BC, generators, goal, carry)
        if not torch.isfinite(x_BHD).all():
            raise SpecError(f"the {self.name} policy decided on actions that are not finite")
        actions_BHD = self._actions(x_BHD).cpu().numpy()
        if prefix is not None:
            put_prefix(actions_BHD, prefix)
        return {"chunk": actions_BHD.copy(), "known": np.ones(len(seeds), bool)}, actions_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """Draw n chunks for each row: [B, n, H, D] float32 in device units, within bounds."""
        cond_BC = self.encode(obs).repeat_interleave(n, dim=0)
        rng = torch.Generator("cpu").manual_seed(seed % 2**63)
        shape = (self.spec.horizon, self.spec.action.size)
        start_BHD = torch.randn((len(cond_BC), *shape), generator=rng)
        x_BHD = self.integrate(start_BHD.to(self.low_D), self.drawn(cond_BC, rng), rng)
        return self._actions(x_BHD).unflatten(0, (-1, n))

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cloning loss: the mean of the objective over all steps that are not padding.

        batch: the spec's observation keys [B, To, …], action [B, H, D] in device units and
        action_is_pad [B, H] bool; other keys are left alone. Values at padded steps have no
        influence. Noise comes from the generator that `seed_training` seeds.
        """
        cond_BC = self._condition(batch, self._training_rng)
        clean_BHD, pad_BH = self._labels(batch, len(cond_BC))
        loss = valid_mean(self.objective(clean_BHD, cond_BC, self._training_rng), pad_BH)
        return loss, {"loss": loss.item()}

    def _normalized(self, chunk_BHD: np.ndarray) -> torch.Tensor:
        return self._action.normalize(torch.from_numpy(chunk_BHD).to(self.device))

    def _goal(self, prefix: np.ndarray, carry: Carry) -> Goal | None:
        """Y: the committed actions, then what the chunk before says; W: soft where that is known.

        None if nothing is to guide.
        """
        horizon, executed = self.spec.horizon, self.spec.n_action_steps
        wanted_BHD = shifted(carry["chunk"], executed)
        put_prefix(wanted_BHD, prefix)
        committed = prefix.shape[1]
        check_delay(horizon, executed, committed)
        if self.rtc.mode == "copy":
            return None
        masks = [
            soft_mask(horizon, executed, committed, self.rtc.schedule if known else "hard")
            for known in carry["known"]
        ]
        weight_BH1 = torch.stack(masks)[..., None].to(self.low_D)
        return Goal(self._normalized(wanted_BHD), weight_BH1)

    def _solve(
        self,
        noise_BHD: torch.Tensor,
        cond_BC: torch.Tensor,
        generators: Generators,
        goal: Goal | None,
        carry: Carry,
    ) -> torch.Tensor:
        """All rows; those with a chunk before begin from it if `warm_start` says so."""
        known_B = carry["known"]
        if self.warm_start is None or not known_B.any():
            return self.integrate(noise_BHD, cond_BC, generators, goal=goal)
        guess_BHD = self._normalized(shifted(carry["chunk"], self.spec.n_action_steps))
        start = self.warm_start.step(self.solver)
        x_BHD = torch.empty_like(noise_BHD)
        for step, chosen_B in ((0, ~known_B), (start, known_B)):
            rows = torch.from_numpy(chosen_B.nonzero()[0]).to(self.device)
            if not len(rows):
                continue
            begin_BHD = noise_BHD[rows]
            if step:
                begin_BHD = self.solver.noised(guess_BHD[rows], begin_BHD, step)
            own = [generators[k] for k in rows] if isinstance(generators, list) else generators
            part = None if goal is None else Goal(goal.wanted_BHD[rows], goal.weight_BH1[rows])
            x_BHD[rows] = self.integrate(begin_BHD, cond_BC[rows], own, start=step, goal=part)
        return x_BHD

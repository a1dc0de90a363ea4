"""Unified world model.

Zhu et al. 2025 (arXiv:2504.02792). One network denoises the chunk a and the next observation o′,
each at a time of its own. Where its time says that a value is nothing but noise, it is left open;
where it says that there is none in it, it is known. So one network has every conditional:

    p(a | o)      policy             a is denoised, o′ open
    p(o′ | o)     next observation   o′ is denoised, a open
    p(a | o, o′)  inverse            a is denoised, o′ known
    p(o′ | o, a)  forward            o′ is denoised, a known
    p(a, o′ | o)  joint              both are denoised, at one time

B batch, H chunk, D action, K = H·D, C conditioning, S later steps, N numbers of their tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embodied.buffer.sample.windows import FUTURE, FUTURE_IS_PAD
from embodied.core.protocols import Prediction
from embodied.core.specs import PolicySpec
from policies import noise
from policies.chunk import valid_mean
from policies.noise import Generators
from policies.reading import Array, read, read_observations
from policies.world.configs import UWMConfig
from policies.world.forms import FORMS
from policies.world.joint import JointTransformer
from policies.world.policy import ACTIONS, NEXT_OBS, WorldPolicy, finite

_BOTH = (ACTIONS, NEXT_OBS)


class UWM(WorldPolicy[UWMConfig]):
    """A policy, which leaves o′ open, and with `infer` a world model.

    As a denoiser it is told of o′ by its conditioning (see JointTransformer). `encode` puts a fixed
    draw of noise there, decisions one of their own (`drawn`), which stays the same in all steps;
    with `left_out` it says nothing of o′.
    """

    name = "uwm"
    Config = UWMConfig

    open_N: torch.Tensor

    def __init__(self, spec: PolicySpec, config: UWMConfig) -> None:
        """See GenerativePolicy."""
        super().__init__(spec, config)
        step = config.marginal_step
        self._open_time = self.form.last if step is None else step / config.num_train_steps
        open_1N = noise.further_noise([0], self.next.size)
        self.register_buffer("open_N", open_1N[0], persistent=False)

    def make_network(self) -> JointTransformer:
        """See GenerativePolicy."""
        self.next = self.make_next()
        self._check_width(max(size for _, size in self.next.groups), self.config.width, "width")
        size, horizon = self.spec.action.size, self.spec.horizon
        last_time = FORMS[self.config.form](self.config).last
        return JointTransformer(
            self.config, size, horizon, self.next.groups, self.encoder.dim, last_time
        )

    def encode(self, obs: Mapping[str, Array]) -> torch.Tensor:
        """See ChunkPolicy; with o′ open."""
        seen_BC = super().encode(obs)
        if self.config.left_out:
            return seen_BC
        return self._told(seen_BC, self._open_time, self.open_N.expand(len(seen_BC), -1))

    def drawn(self, cond: Any, source: list[int] | torch.Generator) -> torch.Tensor:
        """See GenerativePolicy: the noise in the place of o′."""
        if self.config.left_out:
            return cond
        if isinstance(source, torch.Generator):
            noise_BN = torch.randn((len(cond), self.next.size), generator=source)
        else:
            noise_BN = noise.further_noise(source, self.next.size)
        return torch.cat([cond[:, : -self.next.size], noise_BN.to(cond)], dim=1)

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error of the chunk's prediction per element, given what cond says of o′."""
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        time_B = self.form.draw_times(len(action_BHD), rng).to(action_BHD)
        x_BK, target_BK = self.form.noised(action_BHD.flatten(1), noise_BHD.flatten(1), time_B)
        return (self.network(self._chunk(x_BK), time_B, cond_BC) - self._chunk(target_BK)).square()

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the chunk's prediction and of the next observation's.

        batch: as of GenerativePolicy, with "future." + each predicted key [B, S, …] in device units
        and future_is_pad [B, S] bool. A row whose action is padding at every step has no chunk, one
        with a padded later step no next observation: what it lacks is noise at the last time or
        left out, and no error of it counts (but see `action_free`). Metrics: action_loss,
        next_loss.
        """
        rng, form = self._training_rng, self.form
        seen_BC, clean_next_BN, unseen_B = self._read_batch(batch)
        clean_BHD, pad_BH = self._labels(batch, len(seen_BC))
        idle_B, clean_BK = pad_BH.all(dim=1), clean_BHD.flatten(1)
        noise_BK, noise_BN = (
            torch.randn(clean.shape, generator=rng).to(clean) for clean in (clean_BK, clean_next_BN)
        )
        time_B, next_time_B = (form.draw_times(len(seen_BC), rng).to(clean_BHD) for _ in _BOTH)
        x_BK, target_BK = self._noised(clean_BK, noise_BK, time_B, idle_B)
        next_BN, next_target_BN = self._noised(clean_next_BN, noise_BN, next_time_B, unseen_B)
        out_B = self._left_out(idle_B, unseen_B, rng)
        out_BHD, next_out_BN = self._predicted(
            out_B,
            self._chunk(x_BK),
            time_B.masked_fill(idle_B, form.last),
            next_BN,
            next_time_B.masked_fill(unseen_B, form.last),
            seen_BC,
        )
        if self.config.action_free == "unmasked":
            pad_BH = pad_BH & ~idle_B[:, None]
        action_loss = valid_mean((out_BHD - self._chunk(target_BK)).square(), pad_BH)
        error_B1N = (next_out_BN - next_target_BN).square()[:, None]
        next_loss = valid_mean(error_B1N, (unseen_B | out_B)[:, None])
        loss = action_loss + self.config.next_weight * next_loss
        parts = {"action_loss": action_loss.item(), "next_loss": next_loss.item()}
        return loss, {"loss": loss.item(), **parts}

    @torch.no_grad()
    def infer(
        self,
        obs: Mapping[str, Array],
        *,
        actions: Array | None = None,
        next_obs: Mapping[str, Array] | None = None,
        want: set[str],
        seed: np.ndarray,
    ) -> dict[str, Any]:
        """Sample "actions", "next_obs" or both, one for each row, given the others.

        obs: as of `act`. actions [B, H, D], next_obs: each predicted key [B, S, …], in device
        units, as what is returned. seed: integers [B]; a row depends on its own alone. Where next
        observations are neither given nor wanted, the actions are those of `act`. SpecError for
        what is both given and wanted, and for arrays that do not fit. Of pictures [B, S, H, W, 3]
        the window in the centre counts (images.crop), and comes back.
        """
        given = {ACTIONS: actions, NEXT_OBS: next_obs}
        known = self._check_question(given, want)
        seen_BC = super().encode(obs)
        seeds = noise.check_seeds(seed, len(seen_BC))
        values = {
            ACTIONS: noise.start_noise(seeds, self.spec.horizon, self.spec.action.size).flatten(1),
            NEXT_OBS: noise.further_noise(seeds, self.next.size),
        }
        values = {name: value_BN.to(seen_BC) for name, value_BN in values.items()}
        if actions is not None:
            values[ACTIONS] = self._read_actions(actions, len(seeds)).flatten(1)
        if next_obs is not None:
            values[NEXT_OBS] = self._read_next(next_obs, len(seeds))
        times = {name: self.form.clean if name in known else self._open_time for name in given}
        generators = noise.step_generators(seeds) if self.solver.stochastic else None
        found = self._sample(values, times, sorted(want), seen_BC, generators)
        results: dict[str, Any] = {}
        if ACTIONS in want:
            results[ACTIONS] = self._actions(self._chunk(found[ACTIONS]))
        if NEXT_OBS in want:
            results[NEXT_OBS] = self._observations(found[NEXT_OBS])
        return results

    def _sample(
        self,
        values: Mapping[str, torch.Tensor],
        times: Mapping[str, float],
        wanted: Sequence[str],
        seen_BC: torch.Tensor,
        generators: Generators,
    ) -> dict[str, torch.Tensor]:
        """What is wanted [B, N], from the noise that stands for it in `values`; what is not stays
        there, at its time."""
        network: Any = self.network
        sizes = [values[name].shape[1] for name in wanted]
        open_next = NEXT_OBS not in wanted and times[NEXT_OBS] != self.form.clean
        alone = open_next and self.config.left_out > 0

        def split(x_B1M: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict(zip(wanted, x_B1M[:, 0].split(sizes, dim=1), strict=True))

        def denoise(x_B1M: torch.Tensor, log_snr: float) -> Prediction:
            now = {**values, **split(self.form.scaled(x_B1M, log_snr))}
            level = {**times, **dict.fromkeys(wanted, self.time_of(log_snr))}
            time_B, next_time_B = (seen_BC.new_full((len(seen_BC),), level[n]) for n in _BOTH)
            if alone:
                out_BHD = self.network(self._chunk(now[ACTIONS]), time_B, seen_BC)
                return Prediction(out_BHD.flatten(1)[:, None].to(x_B1M), self.form.kind)
            chunk_BHD, next_BN = network.both(
                self._chunk(now[ACTIONS]), time_B, now[NEXT_OBS], next_time_B, seen_BC
            )
            out = {ACTIONS: chunk_BHD.flatten(1), NEXT_OBS: next_BN}
            return Prediction(self._joined(out, wanted).to(x_B1M), self.form.kind)

        return split(self.solver(denoise, self._joined(values, wanted), generators))

    def _left_out(
        self, idle_B: torch.Tensor, unseen_B: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Which rows' next observations have no tokens [B]; some of those that have a chunk."""
        if not self.config.left_out:
            return torch.zeros_like(idle_B)
        drawn_B = torch.rand(len(idle_B), generator=rng).to(idle_B.device) < self.config.left_out
        return ~idle_B & (unseen_B | drawn_B)

    def _predicted(
        self,
        out_B: torch.Tensor,
        x_BHD: torch.Tensor,
        time_B: torch.Tensor,
        next_BN: torch.Tensor,
        next_time_B: torch.Tensor,
        seen_BC: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chunk and of the next observation, zeros where this is left out."""
        network: Any = self.network
        if not out_B.any():
            return network.both(x_BHD, time_B, next_BN, next_time_B, seen_BC)
        without, among = (rows_B.nonzero()[:, 0] for rows_B in (out_B, ~out_B))
        alone_BHD = network(x_BHD[without], time_B[without], seen_BC[without])
        chunk_BHD, later_BN = network.both(
            x_BHD[among], time_B[among], next_BN[among], next_time_B[among], seen_BC[among]
        )
        whole_BHD = torch.zeros_like(x_BHD).index_copy(0, without, alone_BHD.to(x_BHD))
        return (
            whole_BHD.index_copy(0, among, chunk_BHD.to(x_BHD)),
            torch.zeros_like(next_BN).index_copy(0, among, later_BN.to(next_BN)),
        )

    @staticmethod
    def _joined(values: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> torch.Tensor:
        return torch.cat([values[name] for name in wanted], dim=1)[:, None]

    def _chunk(self, x_BK: torch.Tensor) -> torch.Tensor:
        return x_BK.unflatten(1, (self.spec.horizon, self.spec.action.size))

    def _told(self, seen_BC: torch.Tensor, time: float, next_BN: torch.Tensor) -> torch.Tensor:
        """The conditioning of the chunk's network."""
        return torch.cat([seen_BC, seen_BC.new_full((len(seen_BC), 1), time), next_BN], dim=1)

    def _noised(
        self,
        clean_BN: torch.Tensor,
        noise_BN: torch.Tensor,
        time_B: torch.Tensor,
        absent_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the form; where the value is absent, noise alone."""
        x_BN, target_BN = self.form.noised(clean_BN, noise_BN, time_B)
        return torch.where(absent_B[:, None], noise_BN, x_BN), target_BN

    def _read_batch(
        self, batch: Mapping[str, Array]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was observed [B, C], the next observation [B, N], and which rows have none [B]."""
        obs = read_observations(batch, self.spec, self.device)
        rows, steps = len(next(iter(obs.values()))), len(self.config.future)
        unseen_B = read(batch, FUTURE_IS_PAD, (rows, steps), self.device).bool().any(dim=1)
        later = self._read_later(batch, FUTURE, rows)
        pictures = self._pictures(later)
        seen_BC, views = self.encoder.with_later(obs, pictures, self._training_rng)
        next_BN = self._tokens(later, views, self._training_rng)
        return seen_BC, finite(next_BN.masked_fill(unseen_B[:, None], 0.0), FUTURE), unseen_B

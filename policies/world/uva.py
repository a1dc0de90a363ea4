"""Unified video and action (Li et al. 2025): one vector for each token of what will be seen, from
which one head denoises that token and another the actions.

    mode     what was seen   later tokens   actions   learns
    video    given           some hidden    unknown   the hidden ones
    forward  given           some hidden    given     the hidden ones
    policy   given           all hidden     unknown   actions
    inverse  unknown         given          unknown   actions
    joint    given           some hidden    unknown   both

B batch, T history, S later steps, L tokens of a step, P numbers of a token, N numbers of all tokens
of all steps, n revealed tokens, H chunk, D action, C conditioning, R what else was observed, W
width, M modes.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch

from embodied.buffer.sample.windows import FUTURE, FUTURE_IS_PAD
from embodied.core.protocols import Prediction
from policies import noise
from policies.chunk import valid_mean
from policies.noise import Generators
from policies.reading import Array, read, read_observations
from policies.world.configs import Mode, UVAConfig
from policies.world.frames import Frames, draw_hidden, reveals
from policies.world.heads import ActionHead, DenoisingHead
from policies.world.policy import ACTIONS, NEXT_OBS, Later, WorldPolicy, finite
from policies.world.unified import ActionReader, UnifiedTransformer

MODES: tuple[str, ...] = get_args(Mode)
_SHOWS_ACTIONS = ("forward",)
_LEARNS_ACTIONS = ("policy", "inverse", "joint")
_LEARNS_LATER = ("video", "forward", "joint")

Seen = tuple[torch.Tensor, torch.Tensor]
"""History [B, T, L, P] of what is predicted, and what else was observed [B, R]."""


class UVA(WorldPolicy[UVAConfig]):
    """A policy that decides without sampling what will be seen, and with `infer` a world model.

    Its conditioning is what the transformer says of the actions if all that will be seen is hidden;
    its network the action head alone.
    """

    name = "uva"
    Config = UVAConfig

    def make_network(self) -> ActionHead:
        """See GenerativePolicy."""
        config, spec = self.config, self.spec
        self.next = self.make_next()
        keys: list[tuple[int, int]] = []
        for key, (tokens, size) in zip(self.next.keys, self.next.groups, strict=True):
            if key in self.next.cameras:
                keys.append((tokens // config.frames * size, size))
            else:
                keys.append((size, config.token_size))
        self.frames = Frames(keys)
        self._check_width(self.frames.size, config.head_width, "head_width")
        states = [key for key in self.encoder.states if key in self.next.keys]
        history = spec.n_obs_steps * sum(spec.observation[key].size for key in states)
        grid = (config.frames, self.frames.tokens, self.frames.size)
        self.trunk = UnifiedTransformer(
            config, grid, spec.n_obs_steps, spec.action.size, self.encoder.dim - history
        )
        self.reader = ActionReader(config, config.frames, self.frames.tokens, spec.horizon)
        self.video_head = DenoisingHead(config, self.frames.size, config.width)
        return ActionHead(config, spec.action.size, spec.horizon)

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error of the head per element, each action at a time of its own unless joint."""
        by_itself = self.config.action_head == "steps"
        x_BHD, time, target_BHD = self._noised(action_BHD, 2 if by_itself else 1, rng)
        return (self.network(x_BHD, time, cond_BC) - target_BHD).square()

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared errors of what the drawn modes learn: of the actions' head over all steps
        that are not padding, of the other over hidden tokens.

        batch: as of GenerativePolicy, with "future." + each predicted key [B, S, …] in device units
        and future_is_pad [B, S] bool. Of a row with a padded later step nothing later is shown or
        learned. A mode is drawn from those that something in the batch (or in the row) can be
        learned in. Metrics: action_loss, next_loss, of which a batch that teaches one alone has
        that one.
        """
        rng = self._training_rng
        seen, later_BSLP, unseen_B = self._read_batch(batch)
        rows = len(unseen_B)
        clean_BHD, pad_BH = self._labels(batch, rows)
        modes = self._draw_modes(unseen_B, pad_BH, rng)

        def among(names: tuple[str, ...]) -> torch.Tensor:
            chosen_B = torch.tensor([mode in names for mode in modes])
            return chosen_B.to(self.device)

        inverse_B, policy_B = among(("inverse",)), among(("policy",))
        drawn_BL = draw_hidden(rows, self.frames.tokens, rng).to(self.device)
        hidden_BL = (drawn_BL | (policy_B | unseen_B)[:, None]) & ~(inverse_B & ~unseen_B)[:, None]
        recalled_B = ~inverse_B | self.config.inverse_history
        known_BH = among(_SHOWS_ACTIONS)[:, None] & ~pad_BH
        z_BSLW = self.trunk(seen, recalled_B, later_BSLP, hidden_BL, clean_BHD, known_BH)
        error_BHD = self.objective(clean_BHD, self.reader(z_BSLW), rng)
        acting_B = among(_LEARNS_ACTIONS) & ~(inverse_B & unseen_B)
        action_loss = valid_mean(error_BHD, pad_BH | ~acting_B[:, None])
        x_BSLP, time_BSL, target_BSLP = self._noised(later_BSLP, 3, rng)
        x_BSLP = x_BSLP * self.frames.counts_LP  # what only fills tokens up says nothing
        error_BSLP = (self.video_head(x_BSLP, time_BSL, z_BSLW) - target_BSLP).square()
        learned_BL = hidden_BL & (among(_LEARNS_LATER) & ~unseen_B)[:, None]
        learned_B1LP = learned_BL[:, None, :, None] & self.frames.counts_LP
        learned_BSLP = learned_B1LP.expand_as(error_BSLP)
        next_loss = torch.where(learned_BSLP, error_BSLP, 0.0).sum()
        next_loss = next_loss / learned_BSLP.sum().clamp(min=1)
        loss = action_loss + self.config.next_weight * next_loss
        metrics = {"loss": loss.item()}
        if any(mode in _LEARNS_ACTIONS for mode in modes):
            metrics["action_loss"] = action_loss.item()
        if any(mode in _LEARNS_LATER for mode in modes):
            metrics["next_loss"] = next_loss.item()
        return loss, metrics

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
        observations are neither given nor wanted, the actions are those of `act`; where both are
        wanted, the actions know the tokens of all passes but the last. SpecError for what is both
        given and wanted, and for arrays that do not fit. Of pictures [B, S, H, W, 3] the window in
        the centre counts (images.crop), and comes back.
        """
        self._check_question({ACTIONS: actions, NEXT_OBS: next_obs}, want)
        self._check_keys(obs)
        seen = self._seen(read_observations(obs, self.spec, self.device))
        rows = len(seen[1])
        seeds = noise.check_seeds(seed, rows)
        generators = noise.step_generators(seeds) if self.solver.stochastic else None
        chunk_BHD = None if actions is None else self._read_actions(actions, rows)
        results: dict[str, Any] = {}
        if NEXT_OBS in want:
            later_BSLP, z_BSLW = self._imagine(seen, chunk_BHD, seeds, generators)
            results[NEXT_OBS] = self._observations(self.frames.flat(later_BSLP))
        elif next_obs is not None:
            given_BSLP = self.frames.grid(self._read_next(next_obs, rows))
            z_BSLW = self._z(seen, given_BSLP, recall=self.config.inverse_history)
        else:
            z_BSLW = self._z(seen)
        if ACTIONS in want:
            start_BHD = noise.start_noise(seeds, self.spec.horizon, self.spec.action.size)
            start_BHD = start_BHD.to(self.low_D)
            chunk_BHD = self.integrate(start_BHD, self.reader(z_BSLW), generators)
            results[ACTIONS] = self._actions(chunk_BHD)
        return results

    def _condition(
        self, source: Mapping[str, Array], rng: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ChunkPolicy; [B, H·W]."""
        obs = read_observations(source, self.spec, self.device)
        return self.reader(self._z(self._seen(obs, rng)))

    def _z(
        self,
        seen: Seen,
        later_BSLP: torch.Tensor | None = None,
        hidden_BL: torch.Tensor | None = None,
        actions_BHD: torch.Tensor | None = None,
        *,
        recall: bool = True,
    ) -> torch.Tensor:
        """Z [B, S, L, W]. Later tokens are shown if they are given and not hidden."""
        rest_BR, rows = seen[1], len(seen[1])
        grid = (self.frames.tokens, self.frames.size)
        shown = later_BSLP is not None
        if later_BSLP is None:
            later_BSLP = rest_BR.new_zeros(rows, self.config.frames, *grid)
        if hidden_BL is None:
            hidden_BL = rest_BR.new_full((rows, grid[0]), not shown, dtype=torch.bool)
        horizon, size = self.spec.horizon, self.spec.action.size
        known_BH = rest_BR.new_full((rows, horizon), actions_BHD is not None, dtype=torch.bool)
        if actions_BHD is None:
            actions_BHD = rest_BR.new_zeros(rows, horizon, size)
        recalled_B = rest_BR.new_full((rows,), recall, dtype=torch.bool)
        return self.trunk(seen, recalled_B, later_BSLP, hidden_BL, actions_BHD, known_BH)

    def _imagine(
        self,
        seen: Seen,
        actions_BHD: torch.Tensor | None,
        seeds: list[int],
        generators: Generators,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Later tokens [B, S, L, P], revealed pass by pass in random order, and the last Z."""
        steps, tokens, size = self.config.frames, self.frames.tokens, self.frames.size
        numbers = steps * tokens * size
        drawn_BN = noise.further_noise(seeds, numbers + tokens).to(self.low_D)
        start_BSLP = drawn_BN[:, :numbers].unflatten(1, (steps, tokens, size))
        order_BL = drawn_BN[:, numbers:].argsort(dim=1)
        later_BSLP = torch.zeros_like(start_BSLP)
        hidden_BL = torch.ones_like(order_BL, dtype=torch.bool)
        z_BSLW = self._z(seen, later_BSLP, hidden_BL, actions_BHD)
        for chosen_Bn in order_BL.split(reveals(tokens, self.config.iterations), dim=1):
            if not hidden_BL.all():
                z_BSLW = self._z(seen, later_BSLP, hidden_BL, actions_BHD)
            own_BSnW, own_BSnP = _gather(z_BSLW, chosen_Bn), _gather(start_BSLP, chosen_Bn)
            counts_B1nP = self.frames.counts_LP[chosen_Bn][:, None]
            found_BSnP = self._sample_tokens(own_BSnP, own_BSnW, counts_B1nP, generators)
            index = chosen_Bn[:, None, :, None].expand_as(found_BSnP)
            later_BSLP = later_BSLP.scatter(2, index, found_BSnP)
            hidden_BL = hidden_BL.scatter(1, chosen_Bn, False)
        return later_BSLP, z_BSLW

    def _sample_tokens(
        self,
        start_BSnP: torch.Tensor,
        z_BSnW: torch.Tensor,
        counts_B1nP: torch.Tensor,
        generators: Generators,
    ) -> torch.Tensor:
        """Their values; 0 where they are only filled up."""

        def denoise(x_BQP: torch.Tensor, log_snr: float) -> Prediction:
            x_BSnP = self.form.scaled(x_BQP, log_snr).view_as(start_BSnP) * counts_B1nP
            time = torch.as_tensor(self.time_of(log_snr)).to(x_BSnP)
            time_BSn = time.expand(x_BSnP.shape[:-1])
            out_BSnP = self.video_head(x_BSnP, time_BSn, z_BSnW)
            return Prediction(out_BSnP.flatten(1, 2).to(x_BQP), self.form.kind)

        found_BQP = self.solver(denoise, start_BSnP.flatten(1, 2), generators)
        return found_BQP.view_as(start_BSnP) * counts_B1nP

    def _noised(
        self, clean: torch.Tensor, axes: int, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noisy value, its times, one for each entry of the first `axes` axes, and what is to
        be predicted."""
        flat_QP = clean.flatten(0, axes - 1).flatten(1)
        drawn_QP = torch.randn(flat_QP.shape, generator=rng).to(clean)
        time_Q = self.form.draw_times(len(flat_QP), rng).to(clean)
        x_QP, target_QP = self.form.noised(flat_QP, drawn_QP, time_Q)
        return x_QP.view_as(clean), time_Q.view(clean.shape[:axes]), target_QP.view_as(clean)

    def _draw_modes(
        self, unseen_B: torch.Tensor, pad_BH: torch.Tensor, rng: torch.Generator
    ) -> list[str]:
        """Each row's mode."""
        idle_B = pad_BH.all(dim=1)
        needs = {"video": ~unseen_B, "policy": ~idle_B}
        possible_MB = torch.stack(
            [needs.get(mode, ~unseen_B & ~idle_B) for mode in self.config.modes]
        ).cpu()
        if self.config.drawn == "batch":
            possible_MB = possible_MB.any(dim=1, keepdim=True)
        weight_BM = possible_MB.T.float()
        weight_BM[~possible_MB.any(dim=0)] = 1.0
        drawn_B = torch.multinomial(weight_BM, 1, generator=rng)[:, 0]
        return [self.config.modes[k] for k in drawn_B.expand(len(unseen_B)).tolist()]

    def _seen(self, obs: Mapping[str, torch.Tensor], rng: torch.Generator | None = None) -> Seen:
        """Of observations that were read."""
        return self._with_later(obs, {}, rng)[0]

    def _with_later(
        self, obs: Mapping[str, torch.Tensor], later: Later, rng: torch.Generator | None
    ) -> tuple[Seen, Later]:
        """As `_seen`, and views of later pictures."""
        steps = self.spec.n_obs_steps
        whole = {
            key: torch.cat([obs[key], later[key]], dim=1) if later else obs[key]
            for key in self.next.cameras
        }
        cond_BC, views = self.encoder.with_later(obs, whole, rng)
        history = {key: x[:, :steps] for key, x in views.items()}
        states = self.encoder.states
        *own, rest_BR = cond_BC.split([*self.encoder.sizes[: len(states)], self._others], dim=1)
        rest = [rest_BR]
        for key, part in zip(states, own, strict=True):
            if key not in self.next.keys:
                rest.append(part)
                continue
            shape = (steps, *self.spec.observation[key].shape)
            size = steps * self.spec.observation[key].size
            history[key] = part[:, :size].unflatten(1, shape)
            rest.append(part[:, size:])
        history_BTLP = self.frames.grid(self.next.encode(history, rng))
        return (history_BTLP, torch.cat(rest, dim=1)), {k: x[:, steps:] for k, x in views.items()}

    @property
    def _others(self) -> int:
        return sum(self.encoder.sizes[len(self.encoder.states) :])

    def _read_batch(self, batch: Mapping[str, Array]) -> tuple[Seen, torch.Tensor, torch.Tensor]:
        """What was observed, later tokens [B, S, L, P], and which rows have none [B]."""
        obs = read_observations(batch, self.spec, self.device)
        rows = len(next(iter(obs.values())))
        pads = read(batch, FUTURE_IS_PAD, (rows, self.config.frames), self.device)
        unseen_B = pads.bool().any(dim=1)
        later = self._read_later(batch, FUTURE, rows)
        seen, views = self._with_later(obs, self._pictures(later), self._training_rng)
        next_BN = self._tokens(later, views, self._training_rng)
        next_BN = next_BN.masked_fill(unseen_B[:, None], 0.0)
        return seen, self.frames.grid(finite(next_BN, FUTURE)), unseen_B


def _gather(x_BSLP: torch.Tensor, chosen_Bn: torch.Tensor) -> torch.Tensor:
    steps, size = x_BSLP.shape[1], x_BSLP.shape[3]
    return x_BSLP.gather(2, chosen_Bn[:, None, :, None].expand(-1, steps, -1, size))

"""From observations to the vector that conditions a policy, or to tokens. B batch, T history,
C conditioning, L tokens of a part, F their size."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies.configs import ImagesConfig
from policies.encoders.images import ImagesEncoder
from policies.encoders.tokens import count_of, tokens_of
from policies.normalizer import FeatureStats, LinearNormalizer, Statistics, is_image


class ObservationEncoder(nn.Module):
    """State keys normalised and flattened, pictures and the instruction encoded, one after another.

    A goal is one more step behind the history of its key. Identity normalisers until statistics or
    a checkpoint set them. sizes: of the parts of the vector: each state key's steps, each camera's,
    and the instruction.
    """

    def __init__(
        self,
        spec: PolicySpec,
        images: ImagesConfig,
        language: Mapping[str, Any] | None,
        where: str = "policy",
    ) -> None:
        """language: a registered text encoder and its options, if the spec has an instruction.

        where: what the options are part of.
        """
        super().__init__()
        now = {k: s for k, s in spec.observation.items() if k != TASK and not k.startswith(GOAL)}
        for key in spec.observation:
            base = key.removeprefix(GOAL)
            if base != key and now.get(base) != spec.observation[key]:
                raise ConfigError(f"the {where} reads '{key}', but no '{base}' of the same shape")
        cameras = {k: s for k, s in now.items() if is_image(k, s)}
        steps = {k: spec.n_obs_steps + (GOAL + k in spec.observation) for k in now}
        self.states = tuple(k for k in now if k not in cameras)
        # Module names may hold no dots, keys do: normalisers are kept in the spec's order.
        self.normalizers = nn.ModuleList(LinearNormalizer(now[key].shape) for key in self.states)
        self.sizes = [steps[key] * now[key].size for key in self.states]
        self.images: ImagesEncoder | None = None
        if cameras:
            self.images = ImagesEncoder(cameras, images, where)
            self.sizes += [steps[key] * self.images.features for key in cameras]
        if (TASK in spec.observation) != (language is not None):
            raise ConfigError(
                f"{where}.language is {language} and the {where}'s observation keys are "
                f"{sorted(spec.observation)}: '{TASK}' belongs to them if, and only if, "
                f"{where}.language names a text encoder"
            )
        self.text: nn.Module | None = None
        if language is not None:
            encoder, options = component("text_encoders", language, f"{where}.language")
            self.text = encoder(options)
            self.sizes.append(options.features)

    @property
    def dim(self) -> int:
        """C."""
        return sum(self.sizes)

    def normalizer(self, key: str) -> LinearNormalizer:
        """That of a state key."""
        found = self.normalizers[self.states.index(key)]
        assert isinstance(found, LinearNormalizer)
        return found

    def set_statistics(self, stats: Mapping[str, FeatureStats], mode: Statistics) -> None:
        """Fit the state keys' normalisers to a data set's; ConfigError if a key lacks them."""
        for key in self.states:
            if key not in stats:
                raise unknown("statistics key", key, stats)
            self.normalizer(key).set_statistics(stats[key], mode, key)

    def forward(
        self, obs: Mapping[str, torch.Tensor], rng: torch.Generator | None = None
    ) -> torch.Tensor:
        """[B, C] from tensors [B, T, …] in device units, of the spec's shapes.

        rng: draws what pictures undergo in training; None for inference.
        """
        return self.with_later(obs, {}, rng)[0]

    def with_later(
        self,
        obs: Mapping[str, torch.Tensor],
        later: Mapping[str, torch.Tensor],
        rng: torch.Generator | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As forward, and views [B, S, 3, h, w] in 0..1 of later pictures [B, S, H, W, 3], which
        undergo what those of their camera's history do."""
        obs = _with_goals(obs)
        parts = self._states(obs)
        views: dict[str, torch.Tensor] = {}
        if self.images is not None:
            whole = {key: obs[key] for key in self.images.cameras}
            whole |= {key: torch.cat([obs[key], x], dim=1) for key, x in later.items()}
            found = self.images.views(whole, rng)
            views = {key: found[key][:, obs[key].shape[1] :] for key in later}
            parts += self.images.encode({k: x[:, : obs[k].shape[1]] for k, x in found.items()})
        if self.text is not None:
            parts.append(self.text(obs[TASK][:, -1]))
        return torch.cat(parts, dim=1), views

    @property
    def token_sizes(self) -> list[tuple[int, int]]:
        """L and F of each part that `tokens` gives."""
        found = [(1, size) for size in self.sizes[: len(self.states)]]
        if self.images is not None:
            features = self.images.features
            cameras = self.sizes[len(self.states) :]
            pairs = zip(cameras, self.images.counts.values(), strict=False)
            found += [(size // features * count, features) for size, count in pairs]
        if self.text is not None:
            found.append((count_of(self.text), self.sizes[-1]))
        return found

    def tokens(
        self, obs: Mapping[str, torch.Tensor], rng: torch.Generator | None = None
    ) -> list[torch.Tensor]:
        """As `forward`, but parts by themselves, [B, L, F] each: one token for a state key, those
        that the encoder offers for each picture of a camera, and for the instruction."""
        obs = _with_goals(obs)
        parts = [state[:, None] for state in self._states(obs)]
        if self.images is not None:
            parts += self.images.tokens(obs, rng)
        if self.text is not None:
            parts.append(tokens_of(self.text, obs[TASK][:, -1]))
        return parts

    def _states(self, obs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [self.normalizer(key).normalize(obs[key]).flatten(1) for key in self.states]


def _with_goals(obs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Goals behind the histories of their keys."""
    return {
        key: torch.cat([x, obs[GOAL + key][:, -1:]], dim=1) if GOAL + key in obs else x
        for key, x in obs.items()
    }

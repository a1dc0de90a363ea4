"""A transformer over tokens of which each holds what was seen, what will be, and what is done.

B batch, T history, S later steps, L tokens of a step, P numbers of a token, H chunk, D action,
R what else was observed, W width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from policies.networks.attention import Block
from policies.world.configs import UVAConfig

POOLED = 16
"""Into how many parts a step's tokens are averaged before actions are read from them."""


class UnifiedTransformer(nn.Module):
    """Z, one vector for each token of each later step (Li et al. 2025, section III).

    A token's parts are joined along the channels: its later value, or a learned vector where that
    is hidden; its history, or a learned vector; the actions that lead to its step, or for each that
    is not known a learned vector, the same for all tokens of the step. Hidden tokens stay in the
    encoder. What else was observed goes before the sequence as a token of its own.

    Unlike there, the whole history of a token is joined to each of its later steps, so that there
    may be as many of the one as of the other or not, and there is no dropout.
    """

    def __init__(
        self,
        config: UVAConfig,
        grid: tuple[int, int, int],
        history: int,
        action_dim: int,
        rest_dim: int,
    ) -> None:
        """grid: S, L, P. history: T. action_dim: D. rest_dim: R."""
        super().__init__()
        steps, tokens, size = grid
        width = config.width
        self._steps = steps
        self.later = nn.Linear(size, width)
        self.hidden_W = _normal(width)
        self.history = nn.Linear(history * size, steps * width)
        self.forgotten_W = _normal(width)
        self.actions = nn.Linear(config.horizon // steps * (action_dim + 1), width)
        self.rest = nn.Linear(rest_dim, width) if rest_dim else None
        self.rest_forgotten_W = _normal(width) if rest_dim else None
        self.joined = nn.Linear(3 * width, width)
        places = ("encoder", "decoder", "outlet")
        self.times_SW = nn.ParameterDict({name: _normal(steps, 1, width) for name in places})
        self.places_LW = nn.ParameterDict({name: _normal(tokens, width) for name in places})
        self.inlet_norm = nn.LayerNorm(width)
        self.encoder = nn.ModuleList(
            Block(width, config.heads) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            Block(width, config.heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width)

    def forward(
        self,
        seen: tuple[torch.Tensor, torch.Tensor],
        recalled_B: torch.Tensor,
        later_BSLP: torch.Tensor,
        hidden_BL: torch.Tensor,
        actions_BHD: torch.Tensor,
        known_BH: torch.Tensor,
    ) -> torch.Tensor:
        """Z [B, S, L, W]. seen: history [B, T, L, P] and what else was observed [B, R], of no
        influence where it is not recalled; values that are hidden or not known have none."""
        history_BTLP, rest_BR = seen
        recalled_B111 = recalled_B[:, None, None, None]
        history_BLM = self.history(history_BTLP.transpose(1, 2).flatten(2))
        history_BSLW = history_BLM.unflatten(2, (self._steps, -1)).transpose(1, 2)
        history_BSLW = torch.where(recalled_B111, history_BSLW, self.forgotten_W)
        hidden_B1L1 = hidden_BL[:, None, :, None]
        later_BSLW = torch.where(hidden_B1L1, self.hidden_W, self.later(later_BSLP))
        known_BH1 = known_BH[..., None]
        told_BHE = torch.cat(
            [torch.where(known_BH1, actions_BHD, 0.0), (~known_BH1).to(actions_BHD)], dim=2
        )
        actions_BSW = self.actions(told_BHE.unflatten(1, (self._steps, -1)).flatten(2))
        actions_BSLW = actions_BSW[:, :, None].expand_as(later_BSLW)
        x_BSLW = self.joined(torch.cat([later_BSLW, history_BSLW, actions_BSLW], dim=-1))
        before = self._before(rest_BR, recalled_B)
        x_BNW = torch.cat([*before, (x_BSLW + self._positions("encoder")).flatten(1, 2)], dim=1)
        x_BNW = self.inlet_norm(x_BNW)
        for block in self.encoder:
            x_BNW = block(x_BNW)
        x_BNW = self.encoder_norm(x_BNW)
        positions_NW = F.pad(self._positions("decoder").flatten(0, 1), (0, 0, len(before), 0))
        x_BNW = x_BNW + positions_NW
        for block in self.decoder:
            x_BNW = block(x_BNW)
        z_BNW = self.decoder_norm(x_BNW)[:, len(before) :]
        return z_BNW.unflatten(1, (self._steps, -1)) + self._positions("outlet")

    def _before(self, rest_BR: torch.Tensor, recalled_B: torch.Tensor) -> list[torch.Tensor]:
        if self.rest is None or self.rest_forgotten_W is None:
            return []
        return [
            torch.where(recalled_B[:, None], self.rest(rest_BR), self.rest_forgotten_W)[:, None]
        ]

    def _positions(self, place: str) -> torch.Tensor:
        return self.times_SW[place] + self.places_LW[place]


class ActionReader(nn.Module):
    """From Z to what conditions each action: tokens of a step, then steps are mixed."""

    def __init__(self, config: UVAConfig, steps: int, tokens: int, horizon: int) -> None:
        """steps: S. tokens: L. horizon: H."""
        super().__init__()
        width = config.width
        self._parts = min(tokens, POOLED)
        self.within = nn.Sequential(
            nn.Linear(self._parts * width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.across = nn.Linear(steps, horizon)
        self.steps_HW = _normal(horizon, width)
        self.refined = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, z_BSLW: torch.Tensor) -> torch.Tensor:
        """[B, H·W]."""
        pooled = F.adaptive_avg_pool1d(z_BSLW.flatten(0, 1).transpose(1, 2), self._parts)
        z_BSW = self.within(pooled.flatten(1)).unflatten(0, z_BSLW.shape[:2])
        z_BHW = self.across(z_BSW.transpose(1, 2)).transpose(1, 2) + self.steps_HW
        return self.refined(z_BHW).flatten(1)


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))

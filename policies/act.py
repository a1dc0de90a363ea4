"""Action chunking with transformers. B batch, H chunk, D action, C conditioning, P its parts,
W width, Z latent, n samples per row."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from embodied.core.protocols import Carry
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import put_prefix
from policies.chunk import ChunkPolicy, valid_mean
from policies.configs import ACTConfig
from policies.guidance import check_delay
from policies.networks.attention import Block
from policies.reading import Array


class ACT(ChunkPolicy[ACTConfig]):
    """A conditional VAE over chunks, trained on their L1 error + β KL(q(z | a, state) ‖ N(0, 1)).

    Zhao et al. 2023, section 4 and appendix C: a transformer encoder infers the style z from the
    chunk and the state, without pictures; another one mixes z with the observations, and a decoder
    with one query for each step reads the chunk from them. Acts with z = 0. Unlike there, one
    token for each observation key (a camera's whole picture is one), pre-LN blocks without
    dropout, and no temporal ensembling.
    """

    name = "act"
    Config = ACTConfig

    def __init__(self, spec: PolicySpec, config: ACTConfig) -> None:
        """See ChunkPolicy."""
        super().__init__(spec, config)
        width, heads, action_dim = config.width, config.heads, spec.action.size
        sizes = self.encoder.sizes
        self._states = len(self.encoder.states)
        self.parts = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.kinds_PW = _embedding(1 + len(sizes), width)
        self.posterior_inlet = nn.Linear(action_dim, width)
        self.steps_HW = _embedding(1 + spec.horizon, width)
        self.posterior = nn.ModuleList(Block(width, heads) for _ in range(config.encoder_depth))
        self.posterior_norm = nn.LayerNorm(width)
        self.posterior_outlet = nn.Linear(width, 2 * config.latent_dim)
        self.style = nn.Linear(config.latent_dim, width)
        self.mixer = nn.ModuleList(Block(width, heads) for _ in range(config.encoder_depth))
        self.mixer_norm = nn.LayerNorm(width)
        self.queries_HW = _embedding(spec.horizon, width)
        self.reader = nn.ModuleList(
            Block(width, heads, cross=True) for _ in range(config.decoder_depth)
        )
        self.reader_norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, action_dim)

    @torch.no_grad()
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """See ChunkPolicy; the same chunk whatever the seed. prefix heads the chunk as it is."""
        cond_BC = self.encode(obs)
        noise.check_seeds(seed, len(cond_BC))
        z_BZ = cond_BC.new_zeros(len(cond_BC), self.config.latent_dim)
        actions_BHD = self._actions(self._decode(z_BZ, cond_BC)).cpu().numpy()
        if prefix is not None:
            put_prefix(actions_BHD, prefix)
            check_delay(self.spec.horizon, self.spec.n_action_steps, prefix.shape[1])
        return None, actions_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """Chunks of n styles drawn from the prior: [B, n, H, D] float32 in device units."""
        cond_BC = self.encode(obs).repeat_interleave(n, dim=0)
        rng = torch.Generator("cpu").manual_seed(seed % 2**63)
        z_BZ = torch.randn((len(cond_BC), self.config.latent_dim), generator=rng).to(cond_BC)
        return self._actions(self._decode(z_BZ, cond_BC)).unflatten(0, (-1, n))

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """L1 over all steps that are not padding + β KL; see GenerativePolicy.loss for the batch.

        metrics: loss, l1 (normalised) and kl (nats a row).
        """
        cond_BC = self._condition(batch, self._training_rng)
        clean_BHD, pad_BH = self._labels(batch, len(cond_BC))
        mean_BZ, log_var_BZ = self._infer(clean_BHD, pad_BH, cond_BC)
        noise_BZ = torch.randn(mean_BZ.shape, generator=self._training_rng).to(mean_BZ)
        z_BZ = mean_BZ + (log_var_BZ / 2).exp() * noise_BZ
        l1 = valid_mean((self._decode(z_BZ, cond_BC) - clean_BHD).abs(), pad_BH)
        kl_B = (mean_BZ.square() + log_var_BZ.exp() - 1 - log_var_BZ).sum(dim=1) / 2
        loss = l1 + self.config.kl_weight * kl_B.mean()
        return loss, {"loss": loss.item(), "l1": l1.item(), "kl": kl_B.mean().item()}

    def _tokens(self, cond_BC: torch.Tensor) -> torch.Tensor:
        parts = cond_BC.split(self.encoder.sizes, dim=1)
        tokens = [layer(x) for layer, x in zip(self.parts, parts, strict=True)]
        return torch.stack(tokens, dim=1) + self.kinds_PW[1:]

    def _infer(
        self, action_BHD: torch.Tensor, pad_BH: torch.Tensor, cond_BC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the style, [B, Z] each, float32."""
        state_BPW = self._tokens(cond_BC)[:, : self._states]
        chunk_BHW = self.posterior_inlet(action_BHD) + self.steps_HW[1:]
        head_B1W = self.steps_HW[:1].expand(len(cond_BC), 1, -1)
        x_BLW = torch.cat([head_B1W, state_BPW.to(chunk_BHW), chunk_BHW], dim=1)
        others = pad_BH.new_ones(len(pad_BH), 1 + self._states)
        keep_BL = torch.cat([others, ~pad_BH], dim=1)
        for block in self.posterior:
            x_BLW = block(x_BLW, None, keep_BL)
        found_B2Z = self.posterior_outlet(self.posterior_norm(x_BLW[:, 0]))
        mean_BZ, log_var_BZ = found_B2Z.to(action_BHD).chunk(2, dim=1)
        return mean_BZ, log_var_BZ

    def _decode(self, z_BZ: torch.Tensor, cond_BC: torch.Tensor) -> torch.Tensor:
        """Normalised actions [B, H, D]."""
        style_B1W = (self.style(z_BZ) + self.kinds_PW[0])[:, None]
        x_BLW = torch.cat([style_B1W, self._tokens(cond_BC)], dim=1)
        for block in self.mixer:
            x_BLW = block(x_BLW)
        x_BLW = self.mixer_norm(x_BLW)
        y_BHW = self.queries_HW.expand(len(cond_BC), -1, -1)
        for block in self.reader:
            y_BHW = block(y_BHW, x_BLW)
        return self.outlet(self.reader_norm(y_BHW))


def _embedding(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(rows, width), std=0.02))

"""A policy that decides in tokens. B batch, S tokens of the prefix, n chunks for each row,
P places, p of them settled, G tokens of a place, R rows of tokens, V vocabulary, H chunk,
D action, C conditioning, W width."""

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.config import component
from embodied.core.errors import SpecError
from embodied.core.protocols import Carry
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import put_prefix
from policies.chunk import ChunkPolicy
from policies.guidance import check_delay
from policies.reading import Array, read_observations
from policies.tokens.configs import AutoregressiveConfig
from policies.tokens.heads import OneByOne, Parallel, choose_by
from policies.tokens.prefix import Prefix
from policies.tokens.tokenizers import Tokenizer
from policies.tokens.transformer import Cache, Transformer

TEXTS = 32
"""Chunks of one row that are written side by side; the work of keeping them apart grows with their
square."""


class AutoregressivePolicy(ChunkPolicy[AutoregressiveConfig]):
    """Observations → prefix tokens → a chunk's tokens, place after place, by one transformer.

    Learns −log p of the tokens of the labels, as RT-2 (Brohan et al. 2023) and π0-FAST do, but from
    scratch. A place holds a whole row of the tokenizer's tokens (`decoding` step or parallel) or
    one token (`token`). The conditioning [B, C] is the prefix, a token for each state key and those
    of pictures and words, C = S · W.
    """

    name = "autoregressive"
    Config = AutoregressiveConfig

    def __init__(self, spec: PolicySpec, config: AutoregressiveConfig) -> None:
        """See ChunkPolicy."""
        super().__init__(spec, config)
        width, dim = config.transformer.width, spec.action.size
        kind, options = component("tokenizers", config.tokenizer, "policy.tokenizer")
        self.tokenizer: Tokenizer = kind(options, spec.horizon)
        self.per_place = 1 if config.decoding == "token" else dim
        self.places = self.tokenizer.rows * dim // self.per_place
        vocabulary = self.tokenizer.vocabulary
        self.prefix = Prefix(self.encoder.token_sizes, width)
        self.transformer = Transformer(config.transformer)
        self.start_W = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.embed = nn.Embedding(self.per_place * vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        positions_PW = torch.empty(self.places - 1, width)
        self.positions_PW = nn.Parameter(nn.init.normal_(positions_PW, std=0.02))
        one_by_one = config.decoding == "step" and self.per_place > 1
        self.head = (OneByOne if one_by_one else Parallel)(width, self.per_place, vocabulary)

    @torch.no_grad()
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """See ChunkPolicy. A row's draw depends on its own seed alone.

        prefix [B, d, D] heads the chunk as it is; if the tokenizer has a row for each step, the
        tokens of these actions are taken for drawn, so that the rest goes on from them.
        """
        cond_BC = self.encode(obs)
        seeds = noise.check_seeds(seed, len(cond_BC))
        shape = (self.places, self.per_place)
        u_BnPG = noise.uniform(seeds, shape)[:, None].to(self.low_D)
        settled_BpG = None if prefix is None else self._settled(prefix, len(seeds))
        chunks_BHD = self._draw(cond_BC, u_BnPG, settled_BpG)[:, 0].cpu().numpy()
        if prefix is not None:
            put_prefix(chunks_BHD, prefix)
        return None, chunks_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """See ChunkPolicy. The observations are read once for all n."""
        cond_BC = self.encode(obs)
        rng = torch.Generator("cpu").manual_seed(seed % 2**63)
        shape = (len(cond_BC), n, self.places, self.per_place)
        return self._draw(cond_BC, torch.rand(shape, generator=rng).to(self.low_D))

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean of −log p over the tokens of all steps that are not padding, in nats.

        See GenerativePolicy.loss for the batch, and the tokenizer for what padding counts.
        """
        cond_BC = self._condition(batch, self._training_rng)
        clean_BHD, pad_BH = self._labels(batch, len(cond_BC))
        tokens_BRD = self.tokenizer.encode(clean_BHD)
        error_BRD = -self.log_prob(cond_BC, tokens_BRD)
        weight_BR1 = self.tokenizer.weights(pad_BH)[..., None]
        count = weight_BR1.sum() * error_BRD.shape[-1]
        loss = (error_BRD * weight_BR1).sum() / count.clamp(min=1e-6)
        return loss, {"loss": loss.item()}

    def log_prob(self, cond_BC: torch.Tensor, tokens_BRD: torch.Tensor) -> torch.Tensor:
        """log p of each token [B, R, D], float32, given those before it, at temperature 1."""
        logits_NV = self.logits(cond_BC, tokens_BRD).flatten(0, 2)
        nll_N = F.cross_entropy(logits_NV, tokens_BRD.flatten(), reduction="none")
        return -nll_N.view_as(tokens_BRD)

    def logits(self, cond_BC: torch.Tensor, tokens_BRD: torch.Tensor) -> torch.Tensor:
        """Of each token [B, R, D, V], float32, given those before it, in one pass."""
        tokens_BPG = tokens_BRD.reshape(-1, self.places, self.per_place)
        text_BPW = self._embedded(tokens_BPG[:, :-1]) + self.positions_PW
        known_BPW = self.transformer(self._started(cond_BC), text_BPW)
        logits_BPGV = self.head.logits(known_BPW, tokens_BPG)
        return logits_BPGV.float().view(*tokens_BRD.shape, -1)

    def _condition(
        self, source: Mapping[str, Array], rng: torch.Generator | None = None
    ) -> torch.Tensor:
        obs = read_observations(source, self.spec, self.device)
        return self.prefix(self.encoder.tokens(obs, rng)).flatten(1)

    def _started(self, cond_BC: torch.Tensor) -> torch.Tensor:
        """The prefix, and the token behind which the text begins."""
        prefix_BSW = cond_BC.unflatten(1, (-1, len(self.start_W)))
        start_B1W = self.start_W.expand(len(prefix_BSW), 1, -1)
        return torch.cat([prefix_BSW, start_B1W.to(prefix_BSW)], dim=1)

    def _embedded(self, tokens_G: torch.Tensor) -> torch.Tensor:
        """[…, W] of a place's tokens […, G]."""
        offsets_G = torch.arange(self.per_place, device=tokens_G.device)
        return self.embed(tokens_G + offsets_G * self.tokenizer.vocabulary).sum(dim=-2)

    def _settled(self, prefix: np.ndarray, batch: int) -> torch.Tensor:
        """Tokens [B, p, G] of the places that committed actions settle."""
        shape = (batch, self.spec.horizon, self.spec.action.size)
        chunk_BHD = np.zeros(shape, np.float32)
        put_prefix(chunk_BHD, prefix)
        committed = prefix.shape[1]
        check_delay(self.spec.horizon, self.spec.n_action_steps, committed)
        x_BHD = self._action.normalize(torch.from_numpy(chunk_BHD).to(self.device))
        tokens_BRD = self.tokenizer.encode(x_BHD)[:, : self.tokenizer.settled(committed)]
        return tokens_BRD.reshape(batch, -1, self.per_place)

    def _draw(
        self, cond_BC: torch.Tensor, u_BnPG: torch.Tensor, settled_BpG: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Chunks [B, n, H, D] in device units, drawn by the uniform numbers u behind the first p
        places, if these are settled."""
        n = u_BnPG.shape[1]
        first_BW, kept = self.transformer.read(self._started(cond_BC))
        texts = math.ceil(n / math.ceil(n / TEXTS))
        cache = Cache(kept, texts, self.places - 1)
        settled_BpG = cond_BC.new_empty(0, 0, 0) if settled_BpG is None else settled_BpG
        parts: list[torch.Tensor] = []
        for start in range(0, n, texts):
            part_BnPG = u_BnPG[:, start : start + texts]
            missing = texts - part_BnPG.shape[1]
            part_BnPG = F.pad(part_BnPG, (0, 0, 0, 0, 0, missing))
            cache.rewind()
            parts.append(self._write(first_BW, cache, part_BnPG, settled_BpG))
        tokens_BnPG = torch.cat(parts, dim=1)[:, :n]
        tokens_NRD = tokens_BnPG.reshape(-1, self.tokenizer.rows, self.spec.action.size)
        return self._actions(self.tokenizer.decode(tokens_NRD)).unflatten(0, (-1, n))

    def _write(
        self,
        first_BW: torch.Tensor,
        cache: Cache,
        u_BnPG: torch.Tensor,
        settled_BpG: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens [B, n, P, G], as many texts as the cache has room for."""
        known_BnW = first_BW[:, None].expand(-1, cache.texts, -1)
        places: list[torch.Tensor] = []
        for place in range(self.places):
            if place < settled_BpG.shape[1]:
                tokens_BnG = settled_BpG[:, None, place].expand(-1, cache.texts, -1)
            else:
                choose = functools.partial(self._choose, u_BnPG[:, :, place])
                tokens_BnG = self.head.draw(known_BnW, choose)
            places.append(tokens_BnG)
            if place < self.places - 1:
                x_BnW = self._embedded(tokens_BnG) + self.positions_PW[place]
                known_BnW = self.transformer.write(x_BnW, cache)
        return torch.stack(places, dim=2)

    def _choose(self, u_BnG: torch.Tensor, logits_BnV: torch.Tensor, g: int) -> torch.Tensor:
        if not torch.isfinite(logits_BnV.sum()):
            raise SpecError(f"the {self.name} policy's logits are not finite")
        return choose_by(u_BnG[..., g], logits_BnV, self.config.temperature)

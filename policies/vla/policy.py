"""A small vision-language-action policy. B batch, S tokens of the prefix, H chunk, D action,
C conditioning."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from embodied.core.specs import PolicySpec
from policies.flow import FlowPolicy
from policies.networks.stages import Cond, Prepared, Staged
from policies.reading import Array, read_observations
from policies.tokens.prefix import Prefix
from policies.tokens.transformer import Transformer
from policies.vla.configs import VLAConfig
from policies.vla.expert import ActionExpert, Memory


class VLA(FlowPolicy):
    """A transformer reads pictures, words and states; a flow carries noise to actions that look at
    what it has read, layer by layer (π0, Black et al. 2024).

    The conditioning [B, C] is the keys and values of the prefix, made once for a decision. Unlike
    there everything is trained from scratch, each layer of the expert reads the transformer's by a
    projection of its own, so that their widths may differ, and the time modulates its norms.
    """

    name = "vla"
    Config = VLAConfig

    config: VLAConfig

    def __init__(self, spec: PolicySpec, config: VLAConfig) -> None:
        """See FlowPolicy."""
        super().__init__(spec, config)
        width, depth = config.transformer.width, config.transformer.depth
        self.prefix = Prefix(self.encoder.token_sizes, width)
        self.transformer = Transformer(config.transformer)
        self.memory = Memory(depth, width, config.expert.width)

    def make_network(self) -> nn.Module:
        """See GenerativePolicy: the action expert."""
        prefix = sum(count for count, _ in self.encoder.token_sizes)
        spec, depth = self.spec, self.config.transformer.depth
        return ActionExpert(self.config.expert, spec.action.size, spec.horizon, depth, prefix)

    def prepare(self, cond_BC: torch.Tensor, log_snrs: Sequence[float]) -> Cond:
        """See GenerativePolicy. All times share one memory of the prefix."""
        network = self.network
        if not self.ahead:
            return cond_BC
        assert isinstance(network, Staged)
        times = dict.fromkeys(float(self.time_of(log_snr)) for log_snr in log_snrs)
        rows = len(cond_BC)
        contexts = {t: network.prepare(cond_BC.new_full((rows,), t), cond_BC) for t in times}
        return Prepared(cond_BC, contexts)

    def _condition(
        self, source: Mapping[str, Array], rng: torch.Generator | None = None
    ) -> torch.Tensor:
        obs = read_observations(source, self.spec, self.device)
        prefix_BSW = self.prefix(self.encoder.tokens(obs, rng))
        return self.memory(self.transformer.states(prefix_BSW))

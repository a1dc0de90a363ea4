"""A LeRobot policy of another package, whose noise comes from torch's own random state."""

from dataclasses import dataclass, field

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn


@PreTrainedConfig.register_subclass("noisy")
@dataclass
class NoisyConfig(PreTrainedConfig):
    chunk_size: int = 4
    n_action_steps: int = 2
    normalization_mapping: dict = field(
        default_factory=lambda: {
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.IDENTITY,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    observation_delta_indices = None
    reward_delta_indices = None

    @property
    def action_delta_indices(self):
        return list(range(self.chunk_size))

    def get_optimizer_preset(self):
        raise NotImplementedError

    def get_scheduler_preset(self):
        return None

    def validate_features(self):
        pass


class NoisyPolicy(PreTrainedPolicy):
    """Chunks A s + ε with ε drawn anew; its loss is drawn too."""

    config_class = NoisyConfig
    name = "noisy"

    def __init__(self, config, **kwargs):
        super().__init__(config)
        self.layer = nn.Linear(3, config.chunk_size * 2)

    def get_optim_params(self):
        return self.parameters()

    def reset(self):
        pass

    def _mean(self, batch):
        return self.layer(batch["observation.state"]).unflatten(1, (-1, 2))

    def forward(self, batch):
        mean = self._mean(batch)
        return (mean + torch.randn_like(mean) - batch["action"]).square().mean(), None

    def predict_action_chunk(self, batch, **kwargs):
        mean = self._mean(batch)
        return mean + torch.randn_like(mean)

    def select_action(self, batch, **kwargs):
        raise NotImplementedError

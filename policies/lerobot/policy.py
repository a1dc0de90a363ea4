"""Any chunk-predicting policy of LeRobot 0.4 as one of ours.

Shapes: B batch, To history, H chunk, D action, n samples per row, L bytes of an instruction.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import TASK
from embodied.core.protocols import Carry
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import float32_bounds, put_prefix, without_padding
from policies.guidance import check_delay
from policies.lerobot.chunks import draw, mode, seeded
from policies.lerobot.config import LeRobotConfig
from policies.lerobot.export import read_statistics
from policies.lerobot.models import load_weights, make_model, make_tokenizer
from policies.lerobot.normalizer import LeRobotNormalizer
from policies.normalizer import FeatureStats
from policies.reading import Array, read, read_observations

STATE = "observation.state"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


class LeRobotPolicy(noise.TrainingNoise, nn.Module):
    """LeRobot's model between normalisers of its own; the loss is LeRobot's.

    A row's noise depends on its seed alone, and torch's random state stays as it is.
    """

    name: ClassVar[str] = "lerobot"
    Config = LeRobotConfig

    low_D: torch.Tensor
    high_D: torch.Tensor

    def __init__(self, spec: PolicySpec, config: LeRobotConfig) -> None:
        """Weights are untrained until `load_export` or a checkpoint sets them.

        ConfigError: the model cannot be made, or is another than the spec's.
        MissingDependencyError: a package that it needs is not installed.
        """
        super().__init__()
        self.spec, self.config = spec, config
        if (spec.n_obs_steps, spec.horizon) != (config.n_obs_steps, config.horizon):
            raise ConfigError(
                f"the spec has n_obs_steps={spec.n_obs_steps} and horizon={spec.horizon}; the "
                f"LeRobot policy {config.n_obs_steps} and {config.horizon}"
            )
        for name, bound in zip(("low_D", "high_D"), float32_bounds(spec.action), strict=True):
            self.register_buffer(name, torch.as_tensor(bound), persistent=False)
        export = config.export
        self.model: Any = make_model(export, config.backbone)
        ahead = list(self.model.config.action_delta_indices)
        if ahead[-1] + 1 != spec.horizon:
            raise ConfigError(
                f"LeRobot's '{export.type}' predicts up to {ahead[-1]} steps ahead; its "
                f"configuration says {spec.horizon - 1}"
            )
        self._behind = -ahead[0]
        self._tokenizer: Any = None
        if export.tokenizing is not None:
            self._tokenizer = make_tokenizer(export, config.backbone)
        features = export.features("input_features") | export.features("output_features")
        used = {config.model_key(key) for key in spec.observation} | {"action"}
        self.normalizers = nn.ModuleDict(
            {
                _module_name(key): LeRobotNormalizer(_last_axes(key, features), how, export.eps)
                for key, how in export.normalization.items()
                if key in used and key in features
            }
        )

    def load_export(self) -> None:
        """Weights and statistics of the exported folder.

        CorruptDataError: the weights are not exactly the model's. ConfigError: statistics are
        missing.
        """
        folder = Path(str(self.config.path))
        load_weights(self.model, folder)
        statistics = read_statistics(folder)
        for key in self.config.export.normalization:
            normalizer = self._normalizer(key)
            if normalizer is not None and not self._from_data(key):
                normalizer.set_exported(key, statistics)

    @property
    def normalized_keys(self) -> tuple[str, ...]:
        """Keys of which `set_statistics` needs the statistics; never pictures or text."""
        keys = (*self.spec.observation, "action")
        return tuple(key for key in keys if self._from_data(self.config.model_key(key)))

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """With statistics=data, fit the normalisers to a data set's; ConfigError for one missing"""
        for key in self.normalized_keys:
            if key not in stats:
                raise unknown("statistics key", key, stats)
            normalizer = self._normalizer(self.config.model_key(key))
            assert normalizer is not None
            normalizer.set_statistics(key, stats[key])

    def init(self, batch: int) -> Carry | None:
        """Nothing is carried from decision to decision."""
        return None

    @torch.no_grad()
    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """Chunks [B, H, D] float32 in device units and within the action's bounds.

        prefix [B, d, D] heads the chunk as it is. SpecError if observations or prefix do not fit,
        or if an action is not finite.
        """
        batch = self._batch(self._read(obs))
        actions_BHD = self._draw(batch, noise.check_seeds(seed, _rows(batch)), varied=False)
        chunks_BHD = actions_BHD.cpu().numpy()
        if prefix is not None:
            put_prefix(chunks_BHD, prefix)
            check_delay(self.spec.horizon, self.spec.n_action_steps, prefix.shape[1])
        return None, chunks_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """Draw n chunks for each row: [B, n, H, D] float32 in device units, within bounds."""
        read_BT = self._read(obs)
        batch = self._batch({k: v.repeat_interleave(n, dim=0) for k, v in read_BT.items()})
        drawn = np.random.SeedSequence(seed % 2**64).generate_state(_rows(batch), np.uint64)
        seeds = [int(value) for value in drawn]
        return self._draw(batch, seeds, varied=True).unflatten(0, (-1, n))

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """LeRobot's loss and metrics of a batch as WindowSampler.fetch makes it.

        Padding is filled with the last action, and masked if LeRobot's loss masks it. Steps before
        the present one, which LeRobot's diffusion predicts too, are filled with the first action.
        """
        observed = self._batch(read_observations(batch, self.spec, self.device))
        shape = (_rows(observed), self.spec.horizon, self.spec.action.size)
        action_BHD = read(batch, "action", shape, self.device)
        pad_BH = read(batch, "action_is_pad", shape[:2], self.device).bool()
        action_BHD = without_padding(action_BHD, pad_BH)
        action_BHD = torch.cat([action_BHD[:, :1].expand(-1, self._behind, -1), action_BHD], dim=1)
        pad_BH = torch.cat([pad_BH[:, :1].expand(-1, self._behind), pad_BH], dim=1)
        labels = {
            "action": self._normalized("action", action_BHD),
            "action_is_pad": pad_BH,
            "actions_id_pad": pad_BH,  # where SmolVLA looks for it
        }
        seed = int(torch.randint(2**62, (), generator=self._training_rng))
        with seeded(seed, self.device), mode(self.model, training=True):
            loss, found = self.model({**observed, **labels})
        loss = loss.float()
        numbers = {k: float(v) for k, v in (found or {}).items() if isinstance(v, int | float)}
        return loss, {**numbers, "loss": loss.item()}

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.low_D.device

    def _read(self, obs: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        for key in obs:
            if key not in self.spec.observation:
                raise SpecError(str(unknown("observation key", key, self.spec.observation)))
        return read_observations(obs, self.spec, self.device)

    def _batch(self, read_BT: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Observations as LeRobot's preprocessor leaves them; without history, without its axis."""
        batch: dict[str, torch.Tensor] = {}
        for key, value in read_BT.items():
            if key == TASK:
                continue
            if self.spec.observation[key].dtype == "uint8":
                value = value.movedim(-1, -3).float() / 255
            name = self.config.model_key(key)
            batch[name] = self._normalized(name, value.float())
            if self.spec.n_obs_steps == 1 and self.config.export.type != "diffusion":
                batch[name] = batch[name][:, 0]
        return batch if TASK not in read_BT else batch | self._tokens(read_BT[TASK][:, -1], batch)

    def _tokens(
        self, text_BL: torch.Tensor, batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        options = self.config.export.tokenizing
        assert options is not None
        texts: list[str] = []
        for at, row in enumerate(text_BL.cpu().numpy()):
            try:
                text = row.tobytes().rstrip(b"\0").decode()
            except UnicodeDecodeError as error:
                raise SpecError(f"{TASK} is no UTF-8: {error}") from error
            if options.state_size is not None:
                text = state_prompt(text, batch[STATE][at].cpu().numpy(), options.state_size)
            texts.append(text if not options.newline or text.endswith("\n") else text + "\n")
        found = self._tokenizer(
            texts,
            max_length=options.max_length,
            truncation=True,
            padding=options.padding,
            padding_side=options.padding_side,
            return_tensors="pt",
        )
        ids, known = found["input_ids"], found["attention_mask"].bool()
        return {TOKENS: ids.to(self.device), TOKEN_MASK: known.to(self.device)}

    def _draw(
        self, batch: Mapping[str, torch.Tensor], seeds: list[int], *, varied: bool
    ) -> torch.Tensor:
        x_BHD = draw(self.model, batch, seeds, varied=varied)
        normalizer = self._normalizer("action")
        action_BHD = x_BHD if normalizer is None else normalizer.unnormalize(x_BHD)
        if not torch.isfinite(action_BHD).all():
            raise SpecError(f"the {self.name} policy decided on actions that are not finite")
        shape = (len(seeds), self.spec.horizon, self.spec.action.size)
        if action_BHD.shape != shape:
            raise SpecError(
                f"LeRobot's '{self.config.export.type}' decided on {tuple(action_BHD.shape)}; "
                f"{shape} was expected"
            )
        return action_BHD.float().clamp(self.low_D, self.high_D)

    def _normalizer(self, key: str) -> LeRobotNormalizer | None:
        found = dict(self.normalizers.items()).get(_module_name(key))
        assert found is None or isinstance(found, LeRobotNormalizer)
        return found

    def _normalized(self, key: str, x: torch.Tensor) -> torch.Tensor:
        normalizer = self._normalizer(key)
        return x if normalizer is None else normalizer.normalize(x)

    def _from_data(self, key: str) -> bool:
        """Whether the model's key is normalised by the demonstrations' statistics."""
        features = self.config.export.features("input_features")
        if self.config.statistics == "exported" or self._normalizer(key) is None:
            return False
        return key not in features or features[key].type != "VISUAL"


def state_prompt(text: str, state_D: np.ndarray, size: int) -> str:
    """π0.5's prompt (Physical Intelligence 2025): the instruction and the state, in 256 bins of its
    normalised range, filled up by zeros to `size` numbers."""
    filled = np.zeros(size)
    filled[: len(state_D)] = state_D
    bins = np.digitize(filled, np.linspace(-1, 1, 257)[:-1]) - 1
    words = text.strip().replace("_", " ").replace("\n", " ")
    return f"Task: {words}, State: {' '.join(map(str, bins))};\nAction: "


def _rows(batch: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def _module_name(key: str) -> str:
    """Names of modules have no dots."""
    return key.replace(".", "/")


def _last_axes(key: str, features: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a key's statistics: of pictures, one for each channel."""
    feature = features[key]
    return (feature.shape[0], 1, 1) if feature.type == "VISUAL" else feature.shape

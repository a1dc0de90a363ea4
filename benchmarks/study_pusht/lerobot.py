"""LeRobot's DiffusionPolicy: trained by its own forward pass and settings, acting as a Policy.

Shapes: B batch, To history, H chunk, D action.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

from benchmarks.cloning import Clock, Demonstrations
from embodied.core.errors import EmbodiedError
from embodied.core.files import read_tensors, write_tensors
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.specs import DeviceSpec, PolicySpec
from policies.arrays import float32_bounds
from policies.noise import check_seeds, start_noise
from sim import family
from sim.family import SimConfig

STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
BATCH_SIZE = 64
"""Of the recipe published with lerobot/diffusion_pusht."""

SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim-10": {"noise_scheduler_type": "DDIM", "num_inference_steps": 10},
    "ddpm-100": {},
}
_SCHEDULE_EVERY = 20


def make_config(device: DeviceSpec, **options: Any) -> DiffusionConfig:
    """Its defaults for the state-based task; options as DiffusionConfig's.

    One is not its default: version 0.4.4 leaves the environment's state unnormalised, in pixels.
    Its earlier versions mapped it to [−1, 1], as here.
    """

    def feature(kind: FeatureType, shape: tuple[int, ...]) -> PolicyFeature:
        return PolicyFeature(type=kind, shape=shape)

    made = DiffusionConfig(
        input_features={
            STATE: feature(FeatureType.STATE, device.observation[STATE].shape),
            ENVIRONMENT: feature(FeatureType.ENV, device.observation[ENVIRONMENT].shape),
        },
        output_features={"action": feature(FeatureType.ACTION, device.action.shape)},
        device="cpu",
        push_to_hub=False,
        **options,
    )
    return replace(
        made,
        normalization_mapping={**made.normalization_mapping, "ENV": NormalizationMode.MIN_MAX},
    )


class LeRobotTrainee:
    """Adam, learning rate, warm-up, cosine, gradient clipping and loss as LeRobot has them.

    Its cosine runs over the steps that its speed so far makes of the budget. Of a budget that
    allows fewer than ten times its 500 steps of warm-up, a tenth is warm-up.
    """

    def __init__(
        self,
        folder: Path,
        demonstrations: Demonstrations,
        device: DeviceSpec,
        options: Mapping[str, Any],
        *,
        budget_s: float,
        threads: int,
        seed: int,
    ) -> None:
        """options: DiffusionConfig's."""
        self._path = folder / "checkpoints" / "lerobot.safetensors"
        self._demonstrations = demonstrations
        self._device = device
        self._options = dict(options)
        self._budget_s, self._threads, self._seed = budget_s, threads, seed
        self._statistics = {
            key: {n: torch.tensor(v) for n, v in msgspec.to_builtins(found).items()}
            for key, found in demonstrations.statistics().items()
        }
        self._config = make_config(device, **options)
        self._spec = PolicySpec(
            observation={key: device.observation[key] for key in (STATE, ENVIRONMENT)},
            action=device.action,
            n_obs_steps=self._config.n_obs_steps,
            horizon=self._config.n_action_steps,
            n_action_steps=self._config.n_action_steps,
        )
        # Frames near an episode's end are not drawn; the last one holds no action for us.
        beyond = demonstrations.last - self._config.drop_n_last_frames + 1
        self._candidates = np.flatnonzero(np.arange(len(demonstrations.action)) <= beyond)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._policy = DiffusionPolicy(self._config)
        preset = self._config.get_optimizer_preset()
        self._max_norm = preset.grad_clip_norm
        self._optimizer = preset.build(self._policy.get_optim_params())
        self._before, _ = self._processors(self._config)
        self.step, self.seconds = 0, 0.0
        if self._path.exists():
            self._load()
        self.parameters = sum(p.numel() for p in self._policy.parameters())

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.seconds >= self._budget_s

    def learn(self, seconds: float) -> None:
        """See Trainee."""
        rng = make_rng(self._seed, "batches", self.step)
        torch.manual_seed(derive_seed(self._seed, "training noise", self.step))
        before_s, clock = self.seconds, Clock(self._threads)
        self._policy.train()
        factor = self._schedule()
        while not self.done and self.seconds < before_s + seconds:
            if self.step % _SCHEDULE_EVERY == 0:
                factor = self._schedule()
            for group in self._optimizer.param_groups:
                group["lr"] = self._config.optimizer_lr * factor(self.step)
            self._update(rng)
            self.step += 1
            self.seconds = before_s + clock.seconds()
        self._save()

    def actor(self, sampler: str) -> "LeRobotPolicy":
        """See Trainee."""
        config = make_config(self._device, **self._options, **SAMPLERS[sampler])
        policy = DiffusionPolicy(config)
        policy.load_state_dict(self._policy.state_dict())
        return LeRobotPolicy(policy.eval(), *self._processors(config), self._spec)

    def _processors(self, config: DiffusionConfig) -> tuple[Any, Any]:
        return make_pre_post_processors(config, dataset_stats=self._statistics)

    def _update(self, rng: np.random.Generator) -> None:
        drawn = self._candidates[rng.integers(len(self._candidates), size=BATCH_SIZE)]
        config = self._config
        arrays = self._demonstrations.batch(
            drawn,
            (STATE, ENVIRONMENT),
            n_obs_steps=config.n_obs_steps,
            horizon=config.horizon,
            first_action=config.action_delta_indices[0],
        )
        batch = self._before({key: torch.from_numpy(value) for key, value in arrays.items()})
        loss, _ = self._policy.forward(batch)
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._max_norm)
        if not torch.isfinite(norm):
            raise EmbodiedError(f"LeRobot's gradient of step {self.step} is not finite")
        self._optimizer.step()

    def _schedule(self) -> Any:
        pace_s = self.seconds / self.step if self.step else 0.0
        steps = math.ceil(self._budget_s / pace_s) if pace_s else 1 << 30
        preset = self._config.get_scheduler_preset()
        preset.num_warmup_steps = min(preset.num_warmup_steps, steps // 10)
        return preset.build(self._optimizer, steps).lr_lambdas[0]

    def _save(self) -> None:
        tensors = {f"policy/{k}": v.numpy() for k, v in self._policy.state_dict().items()}
        for name, parameter in self._policy.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}/{name}"] = self._optimizer.state[parameter][key].numpy()
        header = msgspec.json.encode({"step": self.step, "seconds": self.seconds})
        write_tensors(self._path, tensors, header)

    def _load(self) -> None:
        arrays, header = read_tensors(self._path)
        known = msgspec.json.decode(header)
        self.step, self.seconds = known["step"], known["seconds"]
        state = {
            key.removeprefix("policy/"): torch.from_numpy(value)
            for key, value in arrays.items()
            if key.startswith("policy/")
        }
        self._policy.load_state_dict(state)
        for name, parameter in self._policy.named_parameters():
            moments = {
                k: torch.from_numpy(arrays[f"{k}/{name}"]) for k in ("exp_avg", "exp_avg_sq")
            }
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


class LeRobotPolicy:
    """LeRobot's policy as one of ours: the same network, sampler, history and executed actions.

    A row's starting noise depends on its seed alone; the noise that DDPM adds later is drawn for
    all rows together, seeded by the first.
    """

    def __init__(self, policy: DiffusionPolicy, before: Any, after: Any, spec: PolicySpec) -> None:
        self.policy, self.before, self.after, self.spec = policy, before, after, spec
        self._bounds = float32_bounds(spec.action)

    def init(self, batch: int) -> None:
        """No state between decisions."""

    def noise(self, seed: np.ndarray) -> torch.Tensor:
        """Starting noise [B, H, D], and torch's own generator seeded for the rest."""
        seeds = check_seeds(seed, len(seed))
        torch.manual_seed(seeds[0])
        return start_noise(seeds, self.policy.config.horizon, self.spec.action.size)

    @torch.no_grad()
    def act(
        self,
        carry: None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[None, np.ndarray]:
        """Actions [B, n_action_steps, D] from the present one on; a prefix is not supported."""
        if prefix is not None:
            raise EmbodiedError("LeRobot's policy takes no committed actions")
        batch = self.before({key: torch.from_numpy(value) for key, value in obs.items()})
        seen = {key: batch[key] for key in self.spec.observation}
        actions_BHD = self.policy.diffusion.generate_actions(seen, noise=self.noise(seed))
        return None, np.clip(self.after(actions_BHD).numpy(), *self._bounds)


def check_adapter(acting: LeRobotPolicy, *, seed: int, ticks: int = 18) -> float:
    """Greatest difference (pixels) to LeRobot's own select_action along one episode.

    EmbodiedError if it is more than rounding: then the adapter misrepresents LeRobot.
    """
    found, task = family.find("pusht")
    driver = found.make_driver(task, SimConfig())
    driver.open()
    driver.reset(seed)
    acting.policy.reset()
    spec = acting.spec
    seen: deque[dict[str, np.ndarray]] = deque(maxlen=spec.n_obs_steps)
    chunk_HD, worst = np.zeros(0), 0.0
    for tick in range(ticks):
        observation = driver.sense()
        seen.extend([observation] * (1 if seen else spec.n_obs_steps))
        decision = np.array([tick // spec.n_action_steps])
        if tick % spec.n_action_steps == 0:
            obs = {k: np.stack([o[k] for o in seen])[None] for k in spec.observation}
            chunk_HD = acting.act(None, obs, seed=decision)[1][0]
        plain = {key: torch.from_numpy(observation[key]) for key in spec.observation}
        batch = acting.before(plain)
        own = acting.policy.select_action(
            {key: batch[key] for key in spec.observation}, noise=acting.noise(decision)
        )
        own_D = np.clip(acting.after(own).numpy()[0], *acting._bounds)
        action_D = chunk_HD[tick % spec.n_action_steps]
        worst = max(worst, float(np.abs(own_D - action_D).max()))
        driver.drive(action_D)
        driver.step_time()
    driver.close()
    if worst > 0.01:
        raise EmbodiedError(f"the adapter differs from select_action by {worst:.3g} pixels")
    return worst

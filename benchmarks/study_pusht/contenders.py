"""Who takes part, and with which settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.cloning import NO_STEP_LIMIT, Demonstrations, OurTrainee, Trainee
from benchmarks.study_pusht.lerobot import LeRobotTrainee
from embodied.core.config import component
from embodied.core.seeds import derive_seed
from embodied.run import build
from embodied.run.config import TrainConfig, load_train

SMALL = (64, 128, 256)
"""Channels of the U-Net that fits the budget of a CPU, ours and LeRobot's."""

OUR_SMALL = [
    "policy/network=unet1d",
    f"+policy.network.channels={list(SMALL)}",
    "+policy.network.time_dim=128",
    "learner.batch_size=64",
]
"""LeRobot's batch, too: of a budget of minutes more and smaller steps make more."""


@dataclass(frozen=True)
class Contender:
    """overrides: of experiment=pusht, for ours. lerobot: options of LeRobot's DiffusionConfig, for
    theirs. samplers: name → options of the policy that take the place of those it was trained
    with (ours)."""

    samplers: dict[str, dict[str, Any]]
    overrides: list[str] = field(default_factory=list)
    lerobot: dict[str, Any] | None = None


def _contenders() -> dict[str, Contender]:
    flow = {"euler-10": {}}
    diffusion = {"ddim-10": {}, "ddpm-100": {"scheduler": "ddpm", "num_steps": None}}
    theirs: dict[str, dict[str, Any]] = {"ddim-10": {}, "ddpm-100": {}}
    return {
        "flow-mlp": Contender(flow),
        "flow-unet": Contender(flow, OUR_SMALL),
        "diffusion-unet": Contender(diffusion, ["policy=diffusion", *OUR_SMALL]),
        "lerobot-small": Contender(theirs, lerobot={"down_dims": SMALL}),
        "lerobot-small-fast": Contender(theirs, lerobot={"down_dims": SMALL, "optimizer_lr": 1e-3}),
        # 100 steps of this network for 100 episodes take hours of one core: ten only.
        "lerobot-default": Contender({"ddim-10": {}}, lerobot={}),
    }


CONTENDERS = _contenders()


@dataclass(frozen=True)
class Plan:
    """What all contenders share. budget_s: of training, for each."""

    root: Path
    data: str
    budget_s: float
    threads: int
    seed: int
    overrides: tuple[str, ...]

    def config(self, contender: Contender) -> TrainConfig:
        """The shipped experiment with what this contender changes, and the study's budget."""
        config = load_train(
            [
                "experiment=pusht",
                f"demonstrations.dataset.path={self.data}",
                *contender.overrides,
                *self.overrides,
            ]
        )
        learner = msgspec.structs.replace(
            config.learner,
            steps=NO_STEP_LIMIT,
            minutes=self.budget_s / 60,
            threads=self.threads,
        )
        return msgspec.structs.replace(config, learner=learner)


def load_demonstrations(plan: Plan) -> Demonstrations:
    """All of the shipped experiment's."""
    config = plan.config(Contender({}))
    cls, options = component("datasets", config.demonstrations.dataset, "demonstrations.dataset")
    return Demonstrations.of(cls(options).episodes(config.demonstrations.episodes))


def make_trainee(name: str, plan: Plan, demonstrations: Demonstrations) -> Trainee:
    """A contender, where it was left."""
    contender = CONTENDERS[name]
    folder, seed = plan.root / name, derive_seed(plan.seed, "study")
    config = plan.config(contender)
    device = build.device_spec(config)
    if contender.lerobot is None:
        keys: Sequence[str] = build.window_spec(config).observation_keys
        return OurTrainee(
            folder,
            demonstrations,
            device,
            keys,
            config.policy,
            config.learner,
            seed=seed,
            samplers=contender.samplers,
        )
    return LeRobotTrainee(
        folder,
        demonstrations,
        device,
        contender.lerobot,
        budget_s=plan.budget_s,
        threads=plan.threads,
        seed=seed,
    )

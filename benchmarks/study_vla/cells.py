"""One head of the policy from one seed: how it is trained, and judged between the stages."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.study_improvement.cells import call
from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy
from embodied.run.evaluate import Evaluators
from policies.acting import InferenceConfig
from policies.inference.policy import ActingPolicy

TASKS = tuple(
    f"metaworld/{name}"
    for name in (
        "drawer-open",
        "drawer-close",
        "door-open",
        "window-open",
        "window-close",
        "button-press-topdown",
    )
)
CLONING, OFFLINE = 1000, 2500
ROWS = 5
CHUNK = 8

SIMILAR = [
    f"task=[{','.join(TASKS)}]",
    "sim.cameras=[corner2]",
    "sim.image_size=64",
    f"sim.picture_ticks={CHUNK}",
    "sim.horizon=150",
    "observations=[observation.state,observation.images.corner2]",
    "run.mode=lockstep",
    "actors.count=1",
    f"actors.rows={len(TASKS)}",
    "actors.speed=0",
    "actors.ticks_per_round=50",  # 3 robot steps to a gradient step
    "learner.steps_per_round=100",
    "learner.batch_size=64",
    "learner.publish_every=200",
    "learner.checkpoint_every=200",
    "learner.ema_decay=0.99",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
    "evaluation.videos=0",
]
VIT = "patch: 14, width: 64, depth: 1"
"""Of what a crop of 0.875 leaves, 16 tokens."""
POLICY = [
    "policy=vla",
    f"policy.horizon={CHUNK}",
    f"policy.n_action_steps={CHUNK}",
    f"+policy.images.encoder={{{VIT}}}",
    "policy.images.standard=unit",
    "+policy.language.max_words=4",
    "policy.transformer.width=64",
    "policy.transformer.depth=2",
]
HEADS = {
    "flow": ["policy/head=flow", "policy.num_steps=4", "policy.expert.width=64"],
    "tokens": [
        "policy/head=tokens",
        "policy.tokenizer.name=dct",
        "+policy.tokenizer.share=0.25",
        "+policy.tokenizer.scale=8",
        "policy.temperature=0.5",
    ],
}
NOISE = {"flow": 1.0, "tokens": 0.1}
EPISODES = {"flow": 7, "tokens": 10}
"""Of the demonstrations of each task. With ten, screening left clones of 57 % (flow) and of 43 %
(tokens; at a noise of 0.3 of 32 %)."""
PARL = [
    "algorithm=parl",
    f"algorithm.cloning_steps={CLONING}",
    f"algorithm.offline_steps={OFFLINE}",
    "algorithm.critic_observations=[observation.state,observation.environment_state]",
    "+algorithm.critic.language={name: words, max_words: 4}",
    "algorithm.critic_steps=4",
    "algorithm.proposals_age=2000",
    "algorithm.distil_successes=true",
    "algorithm.distil_temperature=2.0",
    "algorithm.improvement.proposals=8",
    "algorithm.improvement.mean=true",
    "algorithm.improvement.kept=8",
]


class Judged(msgspec.Struct, frozen=True):
    """success: of every episode by task, in the order of the start states. ticks: their mean.
    acted: how many steps the robots had made by themselves, all tasks together."""

    success: dict[str, list[bool]]
    ticks: float
    acted: int


@dataclass(frozen=True)
class Cell:
    """root: of the whole study. noise, episodes: of each task's demonstrations."""

    root: Path
    head: str
    seed: int
    noise: float
    episodes: int

    @property
    def run(self) -> RunDir:
        """Its run."""
        return RunDir(self.root / f"{self.head}-{self.noise}-{self.seed}")

    def train(self, online: int) -> None:
        """Train to so many gradient steps of acting, from where an earlier attempt stopped."""
        steps = CLONING + OFFLINE + online
        newest = [row["step"] for row in self.run.read("timings", "learner") if "step" in row]
        if newest and newest[-1] >= steps:
            return
        started_s = time.monotonic()
        call(
            "train",
            *SIMILAR,
            *POLICY,
            *HEADS[self.head],
            *PARL,
            f"seed={self.seed}",
            f"demonstrations.episodes={self.episodes}",
            f"demonstrations.noise={self.noise}",
            f"learner.steps={steps}",
            f"run.dir={self.run.path}",
            f"run.resume={str(self.run.exists()).lower()}",
        )
        self.run.timings("study", {"online": online, "seconds": time.monotonic() - started_s})

    @property
    def minutes(self) -> float:
        """How long it was trained, the sittings that were cut short left out."""
        return sum(row["seconds"] for row in self.run.read("timings", "study")) / 60

    def judged(self, name: str, seeds: Sequence[int], *, alone: bool = False) -> Judged:
        """How the newest weights act from these start states of every task; what an earlier call
        found, if it is kept under this name. alone: without the critic."""
        kept = self.run.path / f"{name}-{seeds[0]}-{len(seeds)}.json"
        if kept.exists():
            return msgspec.json.decode(kept.read_bytes(), type=Judged)
        torch.set_num_threads(1)
        policy, version, config = stored_policy(self.run.path)
        assert config is not None
        acting: Any = ActingPolicy(policy, InferenceConfig(critic=not alone), rows=ROWS)
        evaluators = Evaluators(config.tasks, config.sim, rows=ROWS)
        try:
            results = evaluators.run(acting, version, seeds, films={task: {} for task in TASKS})
        finally:
            evaluators.close()
        own = [row for row in self.run.read("metrics", "actor0") if not row["demonstration"]]
        judged = Judged(
            success={task: [r.success for r in results if r.task == task] for task in TASKS},
            ticks=sum(result.ticks for result in results) / len(results),
            acted=sum(row["ticks"] for row in own),
        )
        write_atomic(kept, msgspec.json.encode(judged))
        return judged

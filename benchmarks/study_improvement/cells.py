"""One contender on one task from one seed: what is trained, and how it is judged."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study_improvement.judging import Judged, judge
from embodied.core.rundir import RunDir

STEPS_PER_ROUND = 100
CLONING, OFFLINE = 2000, 3000
CLONING_TOKENS = 1000


@dataclass(frozen=True)
class Setting:
    """Demonstrations of a task, and how long the policy may act.

    episodes: of the demonstrations, all successful. noise: of the expert's actions. horizon:
    ticks of an episode at most. budget: robot steps. per_update: robot steps to a gradient step.
    selected: whether who acts is judged by the weights that did best while it learned, else by the
    last.
    """

    episodes: int
    noise: float
    horizon: int
    budget: int
    per_update: int = 1
    selected: bool = False


SETTINGS = {
    "drawer-open": Setting(20, 1.0, 150, 10_000),
    "door-open": Setting(20, 1.0, 125, 10_000),
    "window-open": Setting(20, 1.3, 150, 10_000),
    "pick-place": Setting(20, 0.5, 150, 50_000, 2, selected=True),
    "basketball": Setting(20, 0.3, 150, 50_000, 2, selected=True),
    "peg-insert-side": Setting(20, 0.3, 200, 50_000, 2, selected=True),
}
TOKEN_SETTINGS = {
    "drawer-open": Setting(20, 0.7, 150, 10_000),
    "window-open": Setting(20, 1.1, 150, 10_000),
}
"""Both from screening.py, which clones; a clone of tokens does not average noise away as flow does,
and has easier ones."""

SIMILAR = [
    "run.mode=lockstep",
    "actors.count=1",
    "actors.rows=1",
    "actors.speed=0",
    f"learner.steps_per_round={STEPS_PER_ROUND}",
    "learner.batch_size=128",
    "learner.publish_every=500",
    "learner.weights_kept=200",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
    "evaluation.videos=0",
]
FLOW = [
    "policy=flow",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "policy.num_steps=4",
    "+policy.network.width=256",
    "+policy.network.depth=2",
]
TOKENS = [
    "policy=autoregressive",
    "policy.n_obs_steps=1",
    "policy.horizon=4",
    "policy.n_action_steps=4",
    "policy.tokenizer.name=dct",
    "+policy.tokenizer.share=0.25",
    "+policy.tokenizer.scale=8",
    "policy.transformer.width=64",
    "policy.transformer.depth=2",
]
LEARNING = [
    f"algorithm.cloning_steps={CLONING}",
    f"algorithm.offline_steps={OFFLINE}",
    "algorithm.target_rate=0.02",
    "algorithm.critic.members=2",
    "algorithm.critic.width=128",
    "algorithm.critic.depth=2",
    "learner.ema_decay=0.99",
]
PARL = [
    "algorithm=parl",
    *LEARNING,
    "algorithm.proposals_age=1000",
    "algorithm.distil_learning_rate=3.0e-4",
    "algorithm.distil_temperature=0.5",
    "algorithm.distil_successes=true",
    "algorithm.improvement.proposals=8",
    "algorithm.improvement.mean=true",
    "algorithm.improvement.kept=8",
    "algorithm.improvement.step_size=1.0e-2",
]
GLOBAL = [*PARL, "algorithm.improvement.steps=0"]
LOCAL = ["algorithm.improvement.steps=3", "algorithm.improvement.kept=3"]
"""About the share of the proposals that the paper keeps (10 of 32): each costs its own ascent."""
ONE = [
    "algorithm.improvement.proposals=1",
    "algorithm.improvement.kept=1",
    "algorithm.distil_data=false",  # it would be the only candidate
]
GAUSSIAN = [
    "policy=gaussian",
    "policy.horizon=4",
    "policy.n_action_steps=4",
    "algorithm=rlpd",
    *LEARNING,
]


@dataclass(frozen=True)
class Contender:
    """overrides: of the run. before: gradient steps until it acts. averaged: of how many of its
    clone's samples the mean acts; such a one is not trained, its clone is."""

    overrides: tuple[str, ...]
    before: int = 0
    acts: bool = True
    averaged: int = 0


BEFORE = CLONING + OFFLINE
FEWER = f"algorithm.cloning_steps={CLONING_TOKENS}"
CONTENDERS = {
    "clone": Contender((*FLOW, "algorithm=bc"), CLONING, acts=False),
    "mean of 16": Contender((), averaged=16),
    "filtered BC": Contender((*FLOW, "algorithm=filtered_bc")),
    "IDQL": Contender((*FLOW, "algorithm=idql", *LEARNING, "algorithm.proposals=8"), BEFORE),
    "RLPD": Contender((*GAUSSIAN,), BEFORE),
    "PA-RL": Contender((*FLOW, *GLOBAL), BEFORE),
    "with local": Contender((*FLOW, *PARL, *LOCAL), BEFORE),
    "only local": Contender((*FLOW, *PARL, *LOCAL, *ONE), BEFORE),
    "clone of tokens": Contender((*TOKENS, "algorithm=bc"), CLONING_TOKENS, acts=False),
    "PA-RL of tokens": Contender((*TOKENS, *GLOBAL, FEWER), CLONING_TOKENS + OFFLINE),
}


def setting(task: str, contender: str) -> Setting:
    """What a contender learns a task from."""
    if contender.endswith("of tokens"):
        return TOKEN_SETTINGS.get(task, SETTINGS[task])
    return SETTINGS[task]


@dataclass(frozen=True)
class Cell:
    """root: of the whole study."""

    root: Path
    task: str
    setting: Setting
    contender: str
    seed: int

    @property
    def run(self) -> RunDir:
        """The run that is judged."""
        name = "clone" if CONTENDERS[self.contender].averaged else self.contender
        folder = f"{self.task}-{name.replace(' ', '_')}-{self.seed}"
        return RunDir(self.root / folder)

    def judged(self, seeds: range) -> Judged:
        """How it acts from these start states."""
        contender = CONTENDERS[self.contender]
        selected = self.setting.selected and contender.acts and not contender.averaged
        name = f"{self.contender.replace(' ', '_')}-{seeds.start}-{len(seeds)}"
        kept = self.run.path / f"{name}{'-selected' * selected}.json"
        return judge(self.run, kept, seeds, contender.averaged, selected)

    def train(self) -> None:
        """Train to the end of the budget, from where an earlier attempt stopped."""
        contender = CONTENDERS[self.contender]
        if contender.averaged:
            Cell(self.root, self.task, self.setting, "clone", self.seed).train()
            return
        setting = self.setting
        steps = contender.before + contender.acts * setting.budget // setting.per_update
        newest = [row["step"] for row in self.run.read("timings", "learner") if "step" in row]
        if newest and newest[-1] >= steps:
            return
        call(
            "train",
            f"task=metaworld/{self.task}",
            f"seed={self.seed}",
            f"sim.horizon={setting.horizon}",
            f"demonstrations.episodes={setting.episodes}",
            f"demonstrations.noise={setting.noise}",
            *SIMILAR,
            f"actors.ticks_per_round={STEPS_PER_ROUND * setting.per_update}",
            *contender.overrides,
            f"learner.steps={steps}",
            f"run.dir={self.run.path}",
            f"run.resume={str(self.run.exists()).lower()}",
        )


def work(cell: Cell, states: range) -> tuple[Judged, float]:
    """Train it and judge it; also the seconds that took now. SystemExit if it cannot be trained."""
    started_s = time.monotonic()
    cell.train()
    return cell.judged(states), time.monotonic() - started_s


def call(command: str, *overrides: str) -> None:
    """An `embodied` command; SystemExit with what it said if it fails."""
    line = [sys.executable, "-m", "embodied.cli.main", command, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout}\n{done.stderr}")

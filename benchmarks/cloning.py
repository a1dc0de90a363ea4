"""Behaviour cloning in pieces that a study can stop after: data in memory, learner, episodes.

Batches come from arrays in memory, so that no contender of a study waits for its data. Training
time is processor time over the number of threads: what another process takes does not count.
Shapes: N steps, B batch, To history, H chunk, D action.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from embodied.buffer.sample.statistics import FeatureStats, feature_stats
from embodied.buffer.sample.windows import FUTURE, FUTURE_IS_PAD
from embodied.core.episodes import Step
from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.specs import DeviceSpec
from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.run.evaluate import Evaluator
from policies.build import build_policy
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy

NO_STEP_LIMIT = 1 << 40
_LATENCY_S = 5.0
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Demonstrations:
    """Steps of whole episodes. observation: key → [N, ...]. action: [N, D]. first, last: [N],
    rows of the ends of each step's episode."""

    observation: Arrays
    action: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, episodes: Iterable[list[Step]]) -> "Demonstrations":
        """From recorded episodes; what follows an episode's last action is left out."""
        whole = [[step for step in episode if not step.final] for episode in episodes]
        steps = [step for episode in whole for step in episode]
        lengths = [len(episode) for episode in whole]
        ends = np.cumsum(lengths)
        return cls(
            {k: np.stack([s.observation[k] for s in steps]) for k in steps[0].observation},
            np.stack([step.action for step in steps]),
            np.repeat(ends - lengths, lengths),
            np.repeat(ends - 1, lengths),
        )

    def only(self, episodes: slice) -> "Demonstrations":
        """Some of the episodes, in their order."""
        starts = np.unique(self.first)
        rows = np.flatnonzero(np.isin(self.first, starts[episodes]))
        before = np.searchsorted(rows, self.first[rows])
        length = self.last[rows] - self.first[rows]
        observation = {key: value[rows] for key, value in self.observation.items()}
        return Demonstrations(observation, self.action[rows], before, before + length)

    def statistics(self) -> dict[str, FeatureStats]:
        """Of every observation key and of "action"."""
        rows = np.arange(len(self.action))
        features = {**self.observation, "action": self.action}
        return {key: feature_stats(value.__getitem__, rows) for key, value in features.items()}

    def batch(
        self,
        at_B: np.ndarray,
        keys: Iterable[str],
        *,
        n_obs_steps: int,
        horizon: int,
        first_action: int = 0,
        future: Sequence[int] = (),
        future_keys: Iterable[str] = (),
    ) -> Arrays:
        """Windows around steps [B]: the keys [B, To, ...], action [B, H, D], action_is_pad [B, H].

        first_action: where the chunk begins, relative to the step. Beyond an episode's ends its
        first and last step are repeated, as padding. future: S offsets, at which future_keys are
        added [B, S, ...], with future_is_pad [B, S], as WindowSpec names them.
        """
        first_B1, last_B1 = self.first[at_B][:, None], self.last[at_B][:, None]
        seen_BT = np.maximum(at_B[:, None] + np.arange(1 - n_obs_steps, 1), first_B1)
        wanted_BH = at_B[:, None] + np.arange(first_action, first_action + horizon)
        taken_BH = np.clip(wanted_BH, first_B1, last_B1)
        batch = {
            **{key: self.observation[key][seen_BT] for key in keys},
            "action": self.action[taken_BH],
            "action_is_pad": wanted_BH != taken_BH,
        }
        if future:
            later_BS = at_B[:, None] + np.array(future)
            shown_BS = np.minimum(later_BS, last_B1)
            batch |= {FUTURE + key: self.observation[key][shown_BS] for key in future_keys}
            batch[FUTURE_IS_PAD] = later_BS != shown_BS
        return batch

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Steps to learn from, int64 [size]."""
        return rng.integers(len(self.action), size=size)


class Clock:
    """Seconds of processor time per thread since it was made."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._started_s = time.process_time()

    def seconds(self) -> float:
        """So far."""
        return (time.process_time() - self._started_s) / self._threads


class Trainee(Protocol):
    """A contender while it learns and when it acts."""

    step: int
    seconds: float
    done: bool
    parameters: int

    def learn(self, seconds: float) -> None:
        """Train for at most about so long, and keep what was reached."""
        ...

    def actor(self, sampler: str) -> Any:
        """The policy that acts, by the name of one of its samplers."""
        ...


class OurTrainee:
    """One of this repository's policies, with the repository's learner."""

    def __init__(
        self,
        folder: Path,
        demonstrations: Demonstrations,
        device: DeviceSpec,
        keys: Sequence[str],
        policy: Mapping[str, Any],
        config: LearnerConfig,
        *,
        seed: int,
        samplers: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """keys: what it observes. samplers: name → options that take the policy's place."""
        self._path = folder / "checkpoints" / "learner.safetensors"
        self._folder = folder
        self._demonstrations = demonstrations
        self._keys = tuple(keys)
        self._seed = seed
        self._samplers = samplers

        def make(statistics: Mapping[str, FeatureStats]) -> Any:
            options = {key: value for key, value in policy.items() if key != "name"}
            return build_policy(policy["name"], options, device, self._keys, statistics, seed=seed)

        layout = PolicyFormat((*self._keys, "action"), make, policy_state, policy_from_state)
        training_seed = derive_seed(seed, "training noise")
        if self._path.exists():
            self._learner, _ = Learner.load(self._path, layout, config, seed=training_seed)
        else:
            made = make(demonstrations.statistics())
            self._learner = Learner(made, layout, config, seed=training_seed)
        self.parameters = sum(p.numel() for p in self._learner.policy.parameters())

    @property
    def step(self) -> int:
        """Gradient steps so far."""
        return self._learner.step

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._learner.seconds

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self._learner.done

    @property
    def policy_folder(self) -> Path:
        """The averaged weights, as a checkpoint."""
        return self._folder / "policy"

    def learn(self, seconds: float) -> None:
        """See Trainee."""
        learner, spec = self._learner, self._learner.policy.spec
        options = learner.policy.config
        rng = make_rng(self._seed, "batches", learner.step)
        before_s, clock = learner.seconds, Clock(learner.config.threads)
        while not learner.done and learner.seconds < before_s + seconds:
            batch = self._demonstrations.batch(
                self._demonstrations.draw(rng, learner.config.batch_size),
                self._keys,
                n_obs_steps=spec.n_obs_steps,
                horizon=spec.horizon,
                future=options.future,
                future_keys=options.future_keys(self._keys),
            )
            learner.update(batch)
            learner.seconds = before_s + clock.seconds()
        learner.save(self._path, {})
        save_policy(self.policy_folder, policy_from_state(*learner.weights()))

    def actor(self, sampler: str) -> Any:
        """See Trainee."""
        config, arrays = policy_state(load_policy(self.policy_folder))
        options = {**config["options"], **self._samplers[sampler]}
        return policy_from_state({**config, "options": options}, arrays)


def keep_fixed(path: Path, settings: Any) -> None:
    """Write down what a study is of; SystemExit if it was begun with other settings."""
    now = msgspec.json.encode(settings)
    if path.exists() and path.read_bytes() != now:
        raise SystemExit(f"{path.parent} was begun with other settings; use another --root")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, now)


def play_pieces(
    run: RunDir,
    stream: str,
    evaluator: Evaluator,
    make_policy: Callable[[], Any],
    seeds: Sequence[int],
    keep_going: Callable[[], bool],
    *,
    fresh: bool = True,
) -> bool:
    """Episodes that are not in metrics/<stream>.jsonl yet, as many at a time as there are robots.

    fresh: see Evaluator.run. False if keep_going, which is asked before each piece, said no before
    all were played.
    """
    known = {row["seed"] for row in run.read("metrics", stream)}
    missing = [seed for seed in seeds if seed not in known]
    size = len(evaluator.group)
    policy = make_policy() if missing else None
    for start in range(0, len(missing), size):
        if not keep_going():
            return False
        piece = missing[start : start + size]
        for result in evaluator.run(policy, -1, piece, fresh=fresh):
            run.metrics(stream, msgspec.to_builtins(result))
    return True


def latency_ms(policy: Any, demonstrations: Demonstrations, *, calls: int = 21) -> float:
    """Median wall-clock time of a decision for one robot (ms), of fewer calls if they are slow."""
    spec, taken = policy.spec, []
    rng = make_rng(0, "latency")
    for call in range(calls + 2):
        if len(taken) > 4 and sum(taken) > _LATENCY_S:
            break
        at_B = rng.integers(len(demonstrations.action), size=1)
        obs = demonstrations.batch(at_B, spec.observation, n_obs_steps=spec.n_obs_steps, horizon=1)
        obs = {key: obs[key] for key in spec.observation}
        started_s = time.perf_counter()
        policy.act(policy.init(1), obs, seed=np.array([call]))
        taken.append(time.perf_counter() - started_s)
    return 1e3 * float(np.median(taken[2:]))

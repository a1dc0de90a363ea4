"""Policies and experts acting on a group of devices: the loop that makes episodes."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embodied.core.episodes import Step
from embodied.core.errors import EmbodiedError
from embodied.core.frames import Chunk, Frame
from embodied.core.protocols import Policy
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.tasks import Expert, Outcome, Task
from hal.group import DeviceGroup


@dataclass(frozen=True, slots=True)
class Start:
    """How a row begins its next episode. takeover_tick: see EpisodePlan; noise: on the expert."""

    seed: int
    takeover_tick: int | None = None
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One finished episode. peaks: greatest value of each signal; interventions: expert's ticks."""

    row: int
    seed: int
    success: bool
    ticks: int
    total_reward: float
    peaks: dict[str, float]
    interventions: int
    policy_version: int
    demonstration: bool


@dataclass(slots=True)
class _Row:
    """A running episode."""

    start: Start
    first_tick: int
    frames: list[Frame]
    next_decision: int
    total_reward: float = 0.0
    interventions: int = 0
    decisions: int = 0
    peaks: dict[str, float] = field(default_factory=dict)
    version: int = -1


class Rollout:
    """Runs episodes on every row of a group, one tick of all rows at a time.

    next_start(row) gives the row's next episode, or None to leave it idle. on_step receives every
    Step's fields that the sink needs; on_frame is called with (row, frame) for films.
    Decisions of all rows that are due are taken in one batch. Between decisions `set_policy`
    swaps the weights.
    """

    def __init__(
        self,
        group: DeviceGroup,
        task: Task,
        *,
        next_start: Callable[[int], Start | None],
        experts: Sequence[Expert | None] | None = None,
        on_step: Callable[[int, Step], None] | None = None,
        on_frame: Callable[[int, Frame], None] | None = None,
    ) -> None:
        self._group = group
        self._task = task
        self._next_start = next_start
        self._experts = experts or [None] * len(group)
        self._on_step = on_step
        self._on_frame = on_frame
        self._rows: list[_Row | None] = [None] * len(group)
        self._rngs = [make_rng(0)] * len(group)
        self._seq = 0
        self._leases = [device.lease() for device in group.devices]
        self._policy: Policy | None = None
        self.version = -1
        self.latencies_s: list[float] = []
        self.ticks = 0

    def set_policy(self, policy: Policy, version: int) -> None:
        """Use this policy from the next decision on."""
        if policy.init(1) is not None:
            raise EmbodiedError(
                f"{type(policy).__name__} carries state between decisions; rollouts do not keep it"
            )
        self._policy = policy
        self.version = version

    @property
    def has_policy(self) -> bool:
        """Whether a policy has been set."""
        return self._policy is not None

    @property
    def idle(self) -> bool:
        """Whether no row runs an episode."""
        return all(row is None for row in self._rows)

    def tick(self) -> list[Result]:
        """One tick of every row; returns the episodes that ended with it."""
        for index, row in enumerate(self._rows):
            if row is None:
                self._begin(index)
        active = np.array([row is not None for row in self._rows])
        if not active.any():
            return []
        self._decide()
        ticks = [0 if row is None else row.frames[-1].tick for row in self._rows]
        self._group.advance([tick + 1 for tick in ticks], active)
        self.ticks += int(active.sum())
        results: list[Result] = []
        for index, new in enumerate(self._group.frames(ticks, active)):
            row = self._rows[index]
            for done, following in itertools.pairwise(new):
                if row is None:
                    break
                outcome = self._advance(index, row, done, following)
                if outcome.done:
                    results.append(self._finish(index, row, outcome))
                    self._rows[index] = row = None
        return results

    def _begin(self, index: int) -> None:
        start = self._next_start(index)
        if start is None:
            return
        if start.takeover_tick is None and self._policy is None:
            raise EmbodiedError("an episode without an expert needs a policy: set_policy first")
        if start.takeover_tick is not None:
            expert = self._experts[index]
            if expert is None:
                raise EmbodiedError(f"task '{self._task.name}' has no scripted expert to take over")
            expert.reset()
        tick = self._task.reset(self._group.devices[index], start.seed)
        frame = self._group.devices[index].latest()
        self._rngs[index] = make_rng(start.seed, "action noise")
        self._rows[index] = _Row(start, tick, [frame], tick)
        if self._on_frame:
            self._on_frame(index, frame)

    def _decide(self) -> None:
        due: list[int] = []
        for index, row in enumerate(self._rows):
            if row is None:
                continue
            if self._supervised(row):
                self._supervise(index, row)
            elif row.frames[-1].tick >= row.next_decision:
                due.append(index)
        if due:
            self._act(due)

    def _supervised(self, row: _Row) -> bool:
        takeover = row.start.takeover_tick
        elapsed = row.frames[-1].tick - row.first_tick
        return self._policy is None or (takeover is not None and elapsed >= takeover)

    def _supervise(self, index: int, row: _Row) -> None:
        expert = self._experts[index]
        assert expert is not None
        frame = row.frames[-1]
        action_D = expert.act(frame.observation)
        if row.start.noise:
            low, high = self._group.spec.action.bounds()
            spread = row.start.noise * (high - low) / 2
            noisy = action_D + spread * self._rngs[index].standard_normal(action_D.shape)
            action_D = np.clip(noisy, low, high).astype(np.float32)
        self._submit(index, frame, action_D[None])

    def _act(self, due: list[int]) -> None:
        assert self._policy is not None
        spec = self._policy.spec
        obs: dict[str, np.ndarray] = {}
        rows = [row for row in (self._rows[index] for index in due) if row is not None]
        for key in spec.observation:
            obs[key] = np.stack([self._history(row, key, spec.n_obs_steps) for row in rows])
        seeds = [derive_seed(row.start.seed, "decision", row.decisions) for row in rows]
        started_s = time.perf_counter()
        _, actions_BHD = self._policy.act(None, obs, seed=np.array(seeds, np.int64))
        self.latencies_s.append(time.perf_counter() - started_s)
        for index, row, actions_HD in zip(due, rows, actions_BHD, strict=True):
            row.decisions += 1
            row.version = self.version
            row.next_decision = row.frames[-1].tick + spec.n_action_steps
            self._submit(index, row.frames[-1], actions_HD)

    @staticmethod
    def _history(row: _Row, key: str, n_obs_steps: int) -> np.ndarray:
        frames = row.frames[-n_obs_steps:]
        frames = [frames[0]] * (n_obs_steps - len(frames)) + frames
        return np.stack([frame.observation[key] for frame in frames])

    def _submit(self, index: int, frame: Frame, actions_HD: np.ndarray) -> None:
        self._seq += 1
        chunk = Chunk(
            start_tick=frame.tick,
            actions_HD=actions_HD,
            obs_tick=frame.tick,
            valid_until_tick=frame.tick + len(actions_HD) - 1,
            seq=self._seq,
            lease_token=self._leases[index],
            policy_version=self.version,
        )
        ticket = self._group.devices[index].submit(chunk)
        if ticket.rejections and not ticket.late_ticks:
            raise EmbodiedError(
                f"{self._group.devices[index].info.id} rejected a chunk: "
                + "; ".join(rejection.reason for rejection in ticket.rejections)
            )

    def _advance(self, index: int, row: _Row, closed: Frame, following: Frame) -> Outcome:
        elapsed = following.tick - row.first_tick
        outcome = self._task.judge(following, elapsed)
        supervised = self._supervised(row)
        row.interventions += supervised
        row.total_reward += outcome.reward
        for name, value in following.signals.items():
            row.peaks[name] = max(row.peaks.get(name, -np.inf), value)
        if self._on_step:
            action = closed.action
            self._on_step(
                index,
                Step(
                    stream="",
                    episode=-1,
                    index=elapsed - 1,
                    observation=closed.observation,
                    action=np.zeros(self._group.spec.action.shape, np.float32)
                    if action is None
                    else action,
                    reward=outcome.reward,
                    terminated=outcome.terminated,
                    truncated=outcome.truncated,
                    success=outcome.success,
                    intervention=supervised,
                    held=closed.held,
                    policy_version=-1 if supervised else row.version,
                    task=self._task.name,
                    seed=row.start.seed,
                ),
            )
        if self._on_frame:
            self._on_frame(index, following)
        row.frames.append(following)
        kept = max(32, self._policy.spec.n_obs_steps if self._policy else 1)
        if len(row.frames) > 2 * kept:
            del row.frames[:-kept]
        return outcome

    def _finish(self, index: int, row: _Row, outcome: Outcome) -> Result:
        last = row.frames[-1]
        ticks = last.tick - row.first_tick
        if self._on_step:
            self._on_step(
                index,
                Step(
                    stream="",
                    episode=-1,
                    index=ticks,
                    observation=last.observation,
                    action=np.zeros(self._group.spec.action.shape, np.float32),
                    task=self._task.name,
                    seed=row.start.seed,
                    final=True,
                ),
            )
        return Result(
            row=index,
            seed=row.start.seed,
            success=outcome.success,
            ticks=ticks,
            total_reward=row.total_reward,
            peaks=row.peaks,
            interventions=row.interventions,
            policy_version=row.version,
            demonstration=row.interventions == ticks,
        )

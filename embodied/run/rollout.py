"""Policies and experts acting on a group of devices: the loop that makes episodes."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from embodied.core.episodes import Step
from embodied.core.errors import EmbodiedError, NoActionError
from embodied.core.frames import Frame, Observation
from embodied.core.instructions import GOAL, TASK
from embodied.core.protocols import Carry, Distant, Policy, Teleoperator
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.tasks import Expert, Outcome, Reward, Task, judged
from embodied.run.episode import Result, Start
from embodied.run.observing import check_readable
from hal.commander import Commander
from hal.group import DeviceGroup, Leasable
from hal.schedule import ChunkSchedule

_SOURCES_KEPT = 64
_HANDED_TICKS = 4
"""A person's action is given for a few ticks, so that a late one is not a gap."""


@dataclass(slots=True)
class _Row:
    """A running episode. handed: a person acts now. sources: of each chunk by its number, the
    policy version and whether it was an intervention; source: of the last one that moved. carry:
    what the policy remembers; it holds for a decision at carry_tick."""

    start: Start
    first_tick: int
    frames: list[Frame]
    total_reward: float = 0.0
    interventions: int = 0
    decisions: int = 0
    peaks: dict[str, float] = field(default_factory=dict)
    version: int = -1
    mixed: bool = False
    handed: bool = False
    sources: dict[int, tuple[int, bool]] = field(default_factory=dict)
    source: tuple[int, bool] | None = None
    carry: Carry | None = None
    carry_tick: int = -1


class Rollout:
    """Runs episodes on every row of a group, one tick of all rows at a time.

    task: of all rows, or of each its own. next_start(row) gives the row's next episode, or None to
    leave it idle. on_step receives every Step's fields that the sink needs; on_frame is called with
    (row, frame) for films. goals gives the goal of an episode by its row and seed, for policies
    that want one. rewards: of each row, what judges its episodes in the task's place.
    Decisions of all rows that are due are taken in one batch, or, on robots whose time does not
    wait, row by row while the committed actions play. Without a decision (NoActionError) such a
    robot plays them to their end and holds, and is decided for again in the next tick; others wait
    where they are. A row's teleoperator takes over while a
    person takes part. Between decisions `set_policy` swaps the weights. LeaseError and
    DeviceLostError end the rollout; the running episodes stay open and are never learned from.
    """

    def __init__(
        self,
        group: DeviceGroup,
        task: Task | Sequence[Task],
        *,
        next_start: Callable[[int], Start | None],
        experts: Sequence[Expert | None] | None = None,
        teleoperators: Sequence[Teleoperator | None] | None = None,
        on_step: Callable[[int, Step], None] | None = None,
        on_frame: Callable[[int, Frame], None] | None = None,
        goals: Callable[[int, int], Observation] | None = None,
        rewards: Sequence[Reward] | None = None,
    ) -> None:
        self._group = group
        self._tasks = task if isinstance(task, Sequence) else [task] * len(group)
        self._next_start = next_start
        self._experts = experts or [None] * len(group)
        self._teleoperators = teleoperators or [None] * len(group)
        self._on_step = on_step
        self._on_frame = on_frame
        self._goals = goals
        self._rewards = rewards
        self._rows: list[_Row | None] = [None] * len(group)
        self._rngs = [make_rng(0)] * len(group)
        self._commanders = [Commander(device) for device in group.devices]
        self._schedules = [
            ChunkSchedule(group.spec.tick_hz, realtime=device.realtime) for device in group.devices
        ]
        self._realtime = group.devices[0].realtime
        self.rejected = 0
        self.refusal = ""
        self._policy: Policy | None = None
        self._texts: list[np.ndarray | None] = []
        self.version = -1
        self.latencies_s: list[float] = []
        self.ticks = 0

    def set_policy(self, policy: Policy, version: int) -> None:
        """Use this policy from the next decision on; ConfigError if it reads what is not there."""
        spec, goals = self._group.spec, self._goals is not None
        self._texts = [
            check_readable("policy", policy.spec, spec, task, goals=goals) for task in self._tasks
        ]
        if policy is not self._policy:
            for row in self._rows:
                if row is not None:
                    row.carry = None
        self._policy = policy
        self.version = version

    @property
    def devices(self) -> Sequence[Leasable]:
        """The robots, row by row."""
        return self._group.devices

    @property
    def idle(self) -> bool:
        """Whether no row runs an episode."""
        return all(row is None for row in self._rows)

    def abandon(self, index: int) -> None:
        """Leave a row's episode open: it is never learned from. The next tick begins another."""
        self._rows[index] = None

    def tick(self) -> list[Result]:
        """One tick of every row; returns the episodes that ended with it."""
        for index, row in enumerate(self._rows):
            if row is None:
                self._begin(index)
        active = np.array([row is not None for row in self._rows])
        if not active.any():
            return []
        active[self._decide()] = False
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
        helpless = self._policy is None and self._teleoperators[index] is None
        if start.takeover_tick is None and helpless:
            raise EmbodiedError("an episode without an expert needs a policy: set_policy first")
        if start.takeover_tick is not None:
            expert = self._experts[index]
            if expert is None:
                name = self._tasks[index].name
                raise EmbodiedError(f"task '{name}' has no scripted expert to take over")
            expert.reset()
        self._tasks[index].reset(self._commanders[index], start.seed)
        frame = self._group.devices[index].latest()
        if self._rewards is not None:
            self._rewards[index].begin(frame)
        self._rngs[index] = make_rng(start.seed, "action noise")
        self._rows[index] = _Row(start, frame.tick, [frame])
        self._schedules[index].begin(frame.tick)
        if self._on_frame:
            self._on_frame(index, frame)

    def _decide(self) -> list[int]:
        """Take the decisions that are due; the rows whose time waits for one that did not come."""
        due: list[int] = []
        for index, row in enumerate(self._rows):
            if row is None:
                continue
            if self._handed(index, row):
                continue
            if self._supervised(row):
                self._supervise(index, row)
            elif self._policy is not None and self._schedules[index].due(row.frames[-1].tick):
                due.append(index)
        waiting: list[int] = []
        for batch in [[index] for index in due] if self._realtime else [due] if due else []:
            try:
                self._act(batch)
            except NoActionError:
                waiting += [] if self._realtime else batch
        return waiting

    def _handed(self, index: int, row: _Row) -> bool:
        """Let a person act for this tick, if one takes part."""
        teleoperator = self._teleoperators[index]
        if teleoperator is None:
            return False
        frame = row.frames[-1]
        action_D = teleoperator.read(frame.observation)
        if action_D is not None:
            row.carry = None
            actions_HD = np.repeat(action_D[None], _HANDED_TICKS, axis=0)
            self._submit(index, row, frame.tick, actions_HD, supervised=True)
        elif row.handed:
            self._schedules[index].begin(frame.tick)
        row.handed = action_D is not None
        return row.handed

    def _supervised(self, row: _Row) -> bool:
        takeover = row.start.takeover_tick
        elapsed = row.frames[-1].tick - row.first_tick
        return takeover is not None and elapsed >= takeover

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
        count = _HANDED_TICKS if self._realtime else 1
        self._submit(
            index, row, frame.tick, np.repeat(action_D[None], count, axis=0), supervised=True
        )

    def _act(self, due: list[int]) -> None:
        assert self._policy is not None
        spec = self._policy.spec
        obs: dict[str, np.ndarray] = {}
        rows = [row for row in (self._rows[index] for index in due) if row is not None]
        for key in spec.observation:
            if key == TASK:
                told = [text for text in (self._texts[index] for index in due) if text is not None]
                obs[key] = np.repeat(np.stack(told)[:, None], spec.n_obs_steps, axis=1)
            elif key.startswith(GOAL) and self._goals is not None:
                name = key.removeprefix(GOAL)
                ends = [
                    self._goals(index, row.start.seed)[name]
                    for index, row in zip(due, rows, strict=True)
                ]
                obs[key] = np.repeat(np.stack(ends)[:, None], spec.n_obs_steps, axis=1)
            else:
                obs[key] = np.stack([self._history(row, key, spec.n_obs_steps) for row in rows])
        seeds = [derive_seed(row.start.seed, "decision", row.decisions) for row in rows]
        schedule, tick = self._schedules[due[0]], rows[0].frames[-1].tick
        prefix_dD = schedule.prefix(tick)
        prefix = None if prefix_dD is None else prefix_dD[None]
        distant = self._policy if isinstance(self._policy, Distant) else None
        if self._realtime and distant is not None:
            distant.allow(*schedule.time_left_s(tick, spec.horizon, spec.n_action_steps))
        started_s = time.perf_counter()
        carry, actions_BHD = self._policy.act(
            self._carry(rows), obs, prefix=prefix, seed=np.array(seeds, np.int64)
        )
        self.latencies_s.append(time.perf_counter() - started_s)
        version = self.version if distant is None else distant.version
        for place, (index, row) in enumerate(zip(due, rows, strict=True)):
            actions_HD = actions_BHD[place]
            row.mixed |= row.decisions > 0 and row.version != version
            row.decisions += 1
            row.version = version
            frame = row.frames[-1]
            row.carry = carry and {key: value[place : place + 1] for key, value in carry.items()}
            row.carry_tick = frame.tick + spec.n_action_steps
            sensed_ns = max(frame.t_ns.values()) if self._realtime else 0
            elapsed_s = (time.monotonic_ns() - sensed_ns) / 1e9 if self._realtime else 0.0
            start_tick, rest_HD = self._schedules[index].decided(
                frame.tick, actions_HD, spec.n_action_steps, elapsed_s
            )
            self._submit(index, row, start_tick, rest_HD, supervised=False)

    def _carry(self, rows: Sequence[_Row]) -> Carry | None:
        """What the policy remembers of these rows; nothing if it is not asked when it expects."""
        assert self._policy is not None
        fresh = self._policy.init(1)
        if fresh is None:
            return None
        own = [
            row.carry if row.carry and row.carry_tick == row.frames[-1].tick else fresh
            for row in rows
        ]
        return {key: np.concatenate([carry[key] for carry in own]) for key in fresh}

    @staticmethod
    def _history(row: _Row, key: str, n_obs_steps: int) -> np.ndarray:
        frames = row.frames[-n_obs_steps:]
        frames = [frames[0]] * (n_obs_steps - len(frames)) + frames
        return np.stack([frame.observation[key] for frame in frames])

    def _submit(
        self, index: int, row: _Row, start_tick: int, actions_HD: np.ndarray, *, supervised: bool
    ) -> None:
        version = -1 if supervised else row.version
        ticket = self._commanders[index].send(
            actions_HD,
            obs_tick=row.frames[-1].tick,
            start_tick=start_tick,
            policy_version=version,
        )
        row.sources[ticket.seq] = version, supervised
        if len(row.sources) > 2 * _SOURCES_KEPT:
            for seq in sorted(row.sources)[:-_SOURCES_KEPT]:
                del row.sources[seq]
        self._schedules[index].accepted(ticket.first_tick, ticket.accepted_HD)
        if all(rejection.code == "late" for rejection in ticket.rejections):
            return
        row.carry = None
        self.rejected += 1
        self.refusal = "; ".join(rejection.reason for rejection in ticket.rejections)
        if not self._realtime:
            raise EmbodiedError(
                f"{self._group.devices[index].info.id} rejected a chunk: "
                + "; ".join(rejection.reason for rejection in ticket.rejections)
            )

    def _advance(self, index: int, row: _Row, closed: Frame, following: Frame) -> Outcome:
        elapsed = following.tick - row.first_tick
        if self._rewards is None:
            outcome = self._tasks[index].judge(following, elapsed)
        else:
            verdict = self._rewards[index](following)
            outcome = judged(verdict, elapsed, self._tasks[index].horizon)
        if closed.seq in row.sources:
            row.source = row.sources[closed.seq]
        version, supervised = row.source or (row.version, row.handed or self._supervised(row))
        row.interventions += supervised
        row.total_reward += outcome.reward
        for name, value in {**following.signals, "reward": outcome.reward}.items():
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
                    policy_version=-1 if supervised else version,
                    task=self._tasks[index].name,
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
                    task=self._tasks[index].name,
                    seed=row.start.seed,
                    final=True,
                ),
            )
        return Result(
            row=index,
            task=self._tasks[index].name,
            seed=row.start.seed,
            success=outcome.success,
            ticks=ticks,
            total_reward=row.total_reward,
            peaks=row.peaks,
            interventions=row.interventions,
            policy_version=row.version,
            mixed=row.mixed,
            demonstration=row.interventions == ticks,
        )

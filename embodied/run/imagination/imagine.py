"""Predictions of recorded episodes by a world model, and how far off they are.

Shapes: W windows, M predictions one after another, S predicted observations, H chunk, D action.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.buffer.log.segments import list_segments
from embodied.buffer.read.replay import ReplayReader
from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import Composite, WorldModel
from embodied.core.registry import unknown
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.run.build import instruction, stored_policy, task_words
from embodied.run.imagination.config import ImagineConfig, PlannerConfig
from embodied.run.imagination.errors import centre, compared, squared_error
from embodied.run.imagination.recorded import Recorded, find_episodes, read_episode
from policies.checkpoint import save_policy
from policies.world.history import Succession, succession
from policies.world.planning import planned

_FORWARD = ("forward", "unchanged")
_INVERSE = ("inverse", "policy")


@dataclass(frozen=True, slots=True)
class Imagined:
    """One episode. ahead: predictions one chunk ahead of ticks [W], [W, S, …] by key. rolled: those
    made of one another, [M, …] by key, which hold at rolled_ticks [M]; empty where that cannot be.
    Both along the recorded actions; along none where there are none. inverse, policy: actions
    [W, H, D] that are inferred with and without the next observation."""

    recorded: Recorded
    ticks: np.ndarray
    ahead: dict[str, np.ndarray]
    rolled_ticks: np.ndarray
    rolled: dict[str, np.ndarray]
    inverse: np.ndarray
    policy: np.ndarray


class Imagination:
    """A world model and the recorded episodes that it is asked about.

    obstacle: why its predictions cannot be made of one another; None if they can. short: how many
    episodes were passed over because they are too short.
    """

    def __init__(
        self, config: ImagineConfig, model: WorldModel, version: int, words: Callable[[str], str]
    ) -> None:
        """version: of the weights, -1 if unknown. words: from a recorded task to its instruction.

        ConfigError for keys that the model does not predict.
        """
        self.config, self.model = config, model
        self._version, self._words = version, words
        self.keys = config.keys or model.predicted_keys
        for key in self.keys:
            if key not in model.predicted_keys:
                raise unknown("predicted key in keys", key, model.predicted_keys)
        self.short = 0
        self.obstacle: str | None = None
        self._step: Succession | None = None
        try:
            self._step = succession(model)
        except ConfigError as error:
            self.obstacle = str(error)

    def execute(self, on_episode: Callable[[], None] = lambda: None) -> list[Imagined]:
        """Predictions of all chosen episodes; ConfigError if none fits."""
        where = self.config.buffer or self.config.checkpoint
        reach = max(self.model.predicted_ticks)
        found: list[Imagined] = []
        with ReplayReader(buffer_folder(where)) as reader:
            reader.refresh()
            shortest = self.config.start + reach
            chosen, self.short = find_episodes(
                reader, self.config.episodes, self.config.task, shortest, where
            )
            for info in chosen:
                recorded = read_episode(
                    reader, info, self.model, self._words, actions=self.config.actions
                )
                found.append(self._imagine(recorded, reach))
                on_episode()
        return found

    def _imagine(self, recorded: Recorded, reach: int) -> Imagined:
        ticks = recorded.windows(reach, self.config.stride)
        ahead: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        inverse: list[np.ndarray] = []
        policy: list[np.ndarray] = []
        for begin in range(0, len(ticks), self.config.batch_size):
            some = ticks[begin : begin + self.config.batch_size]
            obs, seeds = recorded.histories(some), self._seeds(recorded, "window", some)
            seen = recorded.later(some, self.model.predicted_ticks, self.model.predicted_keys)
            chunks = recorded.chunks(some)
            forward = self.model.infer(obs, actions=chunks, want={"next_obs"}, seed=seeds)
            inferred = self.model.infer(obs, next_obs=seen, want={"actions"}, seed=seeds)
            decided = self.model.infer(obs, want={"actions"}, seed=seeds)
            for key, rows in ahead.items():
                rows.append(_array(forward["next_obs"][key]))
            inverse.append(_array(inferred["actions"]))
            policy.append(_array(decided["actions"]))
        rolled_ticks, rolled = self._roll(recorded)
        return Imagined(
            recorded=recorded,
            ticks=ticks,
            ahead={key: np.concatenate(rows) for key, rows in ahead.items()},
            rolled_ticks=rolled_ticks,
            rolled=rolled,
            inverse=np.concatenate(inverse),
            policy=np.concatenate(policy),
        )

    def _roll(self, recorded: Recorded) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Predictions along the recorded actions, each made of the one before."""
        empty = np.empty(0, np.int64), {}
        if self._step is None:
            return empty
        tick, reach = self.config.start, self._step.ticks
        obs: Mapping[str, Any] = recorded.histories(np.array([tick]))
        at: list[int] = []
        found: list[dict[str, np.ndarray]] = []
        while tick + reach <= recorded.length:
            now = np.array([tick])
            seeds = self._seeds(recorded, "roll", now)
            result = self.model.infer(
                obs, actions=recorded.chunks(now), want={"next_obs"}, seed=seeds
            )["next_obs"]
            try:
                obs = self._step.history(obs, result)
            except SpecError as error:
                self.obstacle, self._step = str(error), None
                return empty
            tick += reach
            at.append(tick)
            found.append({k: _array(result[k])[0, self._step.newest] for k in self.keys})
        return np.array(at), {key: np.stack([row[key] for row in found]) for key in self.keys}

    def _seeds(self, recorded: Recorded, what: str, ticks: np.ndarray) -> np.ndarray:
        names = (recorded.name, what)
        return np.array([derive_seed(self.config.seed, *names, int(t)) for t in ticks], np.uint64)

    def summarise(self, episodes: list[Imagined]) -> dict[str, Any]:
        """Errors by mode, key and horizon: plain JSON values."""
        rolled: dict[str, Any] = {"obstacle": self.obstacle}
        if self._step is not None:
            history = "predicted" if self._step.exact else "first prediction repeated"
            rolled |= {"start": self.config.start, "history": history}
            rolled["errors"] = _rolled_errors(episodes, self.keys, self.config.start)
        return {
            "checkpoint": self.config.checkpoint,
            "version": self._version,
            "buffer": self.config.buffer or self.config.checkpoint,
            "episodes": [e.recorded.name for e in episodes],
            "without_actions": [e.recorded.name for e in episodes if e.recorded.action_TD is None],
            "too_short": self.short,
            "units": {key: _unit(self.model, key) for key in self.keys},
            "one_chunk": _ahead_errors(episodes, self.keys, self.model.predicted_ticks),
            "open_loop": rolled,
            "inverse": self._inverse_errors(episodes),
        }

    def _inverse_errors(self, episodes: list[Imagined]) -> dict[str, Any] | None:
        """Of the actions before the last predicted observation, which it depends on; None where
        none were recorded."""
        steps = min(self.model.spec.horizon, max(self.model.predicted_ticks))
        errors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for episode in episodes:
            chunks = episode.recorded.chunks(episode.ticks)
            if chunks is None:
                continue
            true = chunks[:, :steps]
            for rows, found in zip(errors, (episode.inverse, episode.policy), strict=True):
                rows.append(squared_error(found[:, :steps], true))
        return {"steps": steps, **compared(*errors, _INVERSE)} if errors[0] else None


def load(config: ImagineConfig) -> Imagination:
    """What the configuration describes; sets the process's threads, and keeps the planning policy
    if one is asked for. ConfigError for a policy that is no world model."""
    torch.set_num_threads(config.threads)
    policy, version, stored = stored_policy(Path(config.checkpoint))
    model = world_model(policy, config.checkpoint)
    words = task_words if stored is None else partial(instruction, stored)
    imagination = Imagination(config, model, version, words)
    if config.planner is not None:
        _save_planned(policy, model, config.planner, Path(config.output) / "policy")
    return imagination


def world_model(policy: Any, where: str) -> WorldModel:
    """The policy, or the part of it that is a world model; ConfigError if there is none."""
    parts = policy.parts().values() if isinstance(policy, Composite) else ()
    for part in (policy, *parts):
        if isinstance(part, WorldModel):
            return part
    raise ConfigError(
        f"checkpoint={where} is a {type(policy).__name__}, which does not predict what "
        "will be seen; a world model such as policy=uwm is right"
    )


def buffer_folder(where: str) -> Path:
    """A buffer's folder, or that of a run's directory; ConfigError if it is neither."""
    path = Path(where)
    run = RunDir(path)
    folder = run.buffer if run.exists() else path
    if not folder.is_dir() or not list_segments(folder):
        raise ConfigError(f"buffer={where} is neither a buffer's folder nor a run's: say buffer=…")
    return folder


def _save_planned(policy: Any, model: Any, options: PlannerConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    proposes = policy if options.policy is None else stored_policy(Path(options.policy))[0]
    critic = None
    if options.critic is not None:
        critic = getattr(stored_policy(Path(options.critic))[0], "critic", None)
        if critic is None:
            raise ConfigError(
                f"planner.critic={options.critic} has no critic; a run of parl, idql or rlpd does"
            )
    world = None if model is proposes else model
    made = planned(
        proposes, options.scorer, world=world, proposals=options.proposals, critic=critic
    )
    save_policy(path, made)


def _ahead_errors(
    episodes: list[Imagined], keys: tuple[str, ...], offsets: tuple[int, ...]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for key in keys:
        for step, offset in enumerate(offsets):
            errors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
            for episode in episodes:
                found, seen = episode.ahead[key][:, step], episode.recorded.observation[key]
                now, then = (centre(seen[episode.ticks + shift], found) for shift in (0, offset))
                errors[0].append(squared_error(found, then))
                errors[1].append(squared_error(now, then))
            rows.append({"key": key, "ticks": offset, **compared(*errors, _FORWARD)})
    return rows


def _rolled_errors(
    episodes: list[Imagined], keys: tuple[str, ...], start: int
) -> list[dict[str, Any]]:
    """The later, the fewer episodes last that long."""
    rows: list[dict[str, Any]] = []
    longest = max((episode.rolled_ticks for episode in episodes), key=len)
    for key in keys:
        for step, tick in enumerate(longest.tolist()):
            errors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
            for episode in episodes:
                if step < len(episode.rolled_ticks):
                    seen = episode.recorded.observation[key]
                    found = episode.rolled[key][[step]]
                    errors[0].append(squared_error(found, seen[[tick]]))
                    errors[1].append(squared_error(seen[[start]], seen[[tick]]))
            rows.append({"key": key, "ticks": tick - start, **compared(*errors, _FORWARD)})
    return rows


def _unit(model: WorldModel, key: str) -> str:
    array = model.spec.observation[key]
    return "of the full range" if array.dtype == "uint8" else array.unit


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy()

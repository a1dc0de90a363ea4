"""Recorded episodes as a world model reads them.

Shapes: W windows, To history, H chunk, D action, S predicted observations; T actions of an episode,
which has T + 1 observations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.read.replay import ReplayReader
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK, encode_instruction
from embodied.core.protocols import WorldModel
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec


@dataclass(frozen=True, slots=True)
class Recorded:
    """One episode. name: stream/number. observation: [T + 1, …] by key. length: T. instruction:
    bytes, none if the model reads no instruction."""

    name: str
    spec: PolicySpec
    observation: dict[str, np.ndarray]
    length: int
    action_TD: np.ndarray | None
    instruction: np.ndarray

    def histories(self, ticks: np.ndarray) -> dict[str, np.ndarray]:
        """What the model reads at ticks [W], each key [W, To, …]; the first observation stands in
        for those before it, the last one for the goal."""
        steps = self.spec.n_obs_steps
        at = np.maximum(ticks[:, None] + np.arange(1 - steps, 1), 0)
        found: dict[str, np.ndarray] = {}
        for key in self.spec.observation:
            if key == TASK:
                found[key] = np.tile(self.instruction, (*at.shape, 1))
            elif key.startswith(GOAL):
                found[key] = self.observation[key.removeprefix(GOAL)][np.full_like(at, -1)]
            else:
                found[key] = self.observation[key][at]
        return found

    def chunks(self, ticks: np.ndarray) -> np.ndarray | None:
        """Recorded actions from ticks [W] on, [W, H, D], if there are any; behind the end the last
        one is repeated, as in training."""
        if self.action_TD is None:
            return None
        at = ticks[:, None] + np.arange(self.spec.horizon)
        return self.action_TD[np.minimum(at, self.length - 1)]

    def later(
        self, ticks: np.ndarray, offsets: Sequence[int], keys: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """What was seen so many ticks after ticks [W], each key [W, S, …]."""
        at = ticks[:, None] + np.array(offsets)
        return {key: self.observation[key][at] for key in keys}

    def windows(self, ahead: int, stride: int) -> np.ndarray:
        """Ticks after which at least `ahead` actions follow, every `stride`-th."""
        return np.arange(0, self.length - ahead + 1, stride)


def find_episodes(
    reader: ReplayReader, wanted: int | tuple[str, ...], task: str | None, shortest: int, where: str
) -> tuple[list[EpisodeInfo], int]:
    """The chosen episodes, oldest first, and how many were passed over because they have fewer
    than `shortest` actions. ConfigError for unknown names, named ones that are too short, or none.
    """
    finished = [e for e in reader.finished() if task in (None, e.task)]
    if not finished:
        of = "" if task is None else f" of task '{task}'"
        raise ConfigError(f"buffer={where} holds no finished episode{of}")
    if isinstance(wanted, tuple):
        by_name = {_name(e): e for e in finished}
        for name in wanted:
            if name not in by_name:
                raise unknown("episode", name, by_name)
            if len(by_name[name].rows) < shortest:
                raise ConfigError(
                    f"episode {name} has {len(by_name[name].rows)} actions; the world model's "
                    f"predictions reach {shortest} ticks from start: leave it out, or set an "
                    "earlier start"
                )
        if not wanted:
            raise ConfigError("episodes names none: give a number, or names such as [actor0/3]")
        return [by_name[name] for name in wanted], 0
    chosen: list[EpisodeInfo] = []
    short = 0
    for episode in reversed(finished):
        if len(chosen) == wanted:
            break
        if len(episode.rows) < shortest:
            short += 1
        else:
            chosen.append(episode)
    if not chosen:
        raise ConfigError(
            f"all {short} episodes of buffer={where} are too short: the world model's predictions "
            f"reach {shortest} ticks from start"
        )
    return chosen[::-1], short


def read_episode(
    reader: ReplayReader,
    info: EpisodeInfo,
    model: WorldModel,
    instruction: Callable[[str], str],
    *,
    actions: bool,
) -> Recorded:
    """What the model reads of an episode and predicts. instruction: from its task to words.
    actions: whether to read them; where all steps were held, as a video's are, there are none."""
    spec = model.spec
    read = [k.removeprefix(GOAL) for k in spec.observation if k != TASK]
    names = tuple(dict.fromkeys((*read, *model.predicted_keys)))
    rows = np.append(info.rows, info.final_row)
    observation = reader.gather(names, rows)
    for key in names:
        array = spec.observation[key]
        if observation[key].shape[1:] != array.shape:
            raise ConfigError(
                f"the buffer's '{key}' has shape {observation[key].shape[1:]}, the world model's "
                f"{array.shape}; take a buffer of the same robot"
            )
    words = np.empty(0, np.uint8)
    if TASK in spec.observation:
        words = encode_instruction(instruction(info.task), spec.observation[TASK].size)
    action_TD = None
    if actions and not reader.take("held", info.rows).all():
        action_TD = reader.take("action", info.rows).astype(np.float32)
        if action_TD.shape[1:] != spec.action.shape:
            raise ConfigError(
                f"the buffer's actions have shape {action_TD.shape[1:]}, the world model's "
                f"{spec.action.shape}; take a buffer of the same robot, or actions=false"
            )
    return Recorded(_name(info), spec, observation, len(info.rows), action_TD, words)


def _name(info: EpisodeInfo) -> str:
    return f"{info.stream}/{info.episode}"

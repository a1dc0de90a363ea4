"""A world model on demonstrations that were held back: its predictions beside the guess that
nothing changes, its inverse mode beside its policy mode, and both executed (Zhu et al. 2025).

B rows, S later steps, H chunk, D action.
"""

import shutil
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from benchmarks.study_worlds.cells import Cell, recorded
from benchmarks.study_worlds.pusht import ENVIRONMENT, STATE, Decide, Rows
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step
from embodied.core.files import write_atomic
from embodied.core.protocols import WorldModel
from embodied.core.seeds import derive_seed
from embodied.run.imagination.config import ImagineConfig
from embodied.run.imagination.imagine import load
from policies.checkpoint import load_policy
from sim.pusht import PushTDriver

MODES = ("inverse", "policy", "replay")
"""What was seen later is followed; it is not known; the recorded actions are repeated."""


class Tracked(msgspec.Struct, frozen=True):
    """imagined: as `embodied imagine` reports. followed: greatest coverage of each demonstration by
    mode, within its ticks from its start state; empty where no start state can be set."""

    imagined: dict[str, Any]
    followed: dict[str, list[float]]


def track(cell: Cell) -> Tracked:
    """Of a trained world model; what an earlier call found, if it is kept."""
    kept = cell.run.path / "tracked.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Tracked)
    config = cell.config()
    held = recorded(cell.study, cell.task, config)[-cell.held :]
    folder = cell.run.path / "held"
    shutil.rmtree(folder, ignore_errors=True)
    sink = LocalBuffer(folder)
    for step in (step for episode in held for step in episode):
        sink.add(step)
    sink.close()
    imagination = load(
        ImagineConfig(
            checkpoint=str(cell.policy),
            buffer=str(folder),
            task=None,
            episodes=len(held),
            keys=None,
            start=0,
            stride=4,
            planner=None,
            batch_size=64,
            threads=1,
            seed=0,
            output=str(cell.run.path / "imagined"),
        )
    )
    imagined = imagination.summarise(imagination.execute())
    followed: dict[str, list[float]] = {}
    if cell.task.startswith("pusht"):
        model = load_policy(cell.policy)
        rows = Rows(len(held), config.sim)
        for mode in MODES:
            for driver, episode in zip(rows.drivers, held, strict=True):
                put(driver, episode[0])
            ticks = [len(episode) - 1 for episode in held]
            followed[mode] = rows.play(by_mode(mode, model, held), model.spec, ticks)
        rows.close()
    tracked = Tracked(imagined, followed)
    write_atomic(kept, msgspec.json.encode(tracked))
    return tracked


def put(driver: PushTDriver, step: Step) -> None:
    """Where a demonstration was."""
    x, y, sine, cosine = map(float, step.observation[ENVIRONMENT])
    agent_xy, block_xy = step.observation[STATE], np.array([x, y])
    driver.set_state(agent_xy, block_xy, float(np.arctan2(sine, cosine)))


def by_mode(mode: str, model: WorldModel, episodes: Sequence[list[Step]]) -> Decide:
    """Who decides. Beyond a demonstration's end its last observation and action are repeated."""

    def decide(tick: int, obs: dict[str, np.ndarray], drivers: Sequence[PushTDriver]) -> np.ndarray:
        if mode == "replay":
            horizon = model.spec.horizon
            return np.stack(
                [[e[min(tick + k, len(e) - 2)].action for k in range(horizon)] for e in episodes]
            )
        later = None
        if mode == "inverse":
            later = {
                key: np.stack(
                    [
                        [
                            e[min(tick + k, len(e) - 1)].observation[key]
                            for k in model.predicted_ticks
                        ]
                        for e in episodes
                    ]
                )
                for key in model.predicted_keys
            }
        seeds = np.array([derive_seed(row, "tracking", tick) for row in range(len(episodes))])
        found = model.infer(obs, next_obs=later, want={"actions"}, seed=seeds.astype(np.uint64))
        return found["actions"].numpy()

    return decide

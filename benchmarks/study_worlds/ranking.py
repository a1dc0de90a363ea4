"""Which of a diffusion policy's proposals is executed: the first, or the one that ends nearest to
the goal, as a world model or the simulator itself says (planning of Li et al. 2025).

B rows, n proposals, H chunk, D action.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.study_worlds.cells import ROWS, Cell
from benchmarks.study_worlds.pusht import ENVIRONMENT, GOAL, Decide, Rows, outcome
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from policies.checkpoint import load_policy
from policies.world.planning import Planner
from sim.family import SimConfig
from sim.pusht import PushTDriver

FIRST, SIMULATOR = "first", "simulator"
TICKS = 300


def rank(proposer: Cell, worlds: Mapping[str, Cell]) -> dict[str, list[float]]:
    """Greatest coverage of each start state by who chose; what is kept is not played again."""
    study = proposer.study
    run = RunDir(proposer.run.path.parent / f"ranking-{proposer.seed}")
    policy = load_policy(proposer.policy)
    planners = {
        name: Planner(
            policy,
            load_policy(cell.policy),
            {"name": "goal", "targets": {ENVIRONMENT: GOAL}},
            study.proposals,
        )
        for name, cell in worlds.items()
    }
    found: dict[str, list[float]] = {}
    run.acquire()
    try:
        for chooser in (FIRST, *worlds, SIMULATOR):
            for first in range(study.seeds.start, study.seeds.stop, ROWS):
                seeds = range(first, min(first + ROWS, study.seeds.stop))
                known = {row["seed"] for row in run.read("metrics", chooser)}
                if known.issuperset(seeds):
                    continue
                decide = chosen(chooser, policy, planners, seeds, study.proposals)
                rows = Rows(len(seeds), SimConfig())
                for driver, seed in zip(rows.drivers, seeds, strict=True):
                    driver.reset(seed)
                ticks = [study.horizon or TICKS] * len(seeds)
                for seed, peak in zip(seeds, rows.play(decide, policy.spec, ticks), strict=True):
                    run.metrics(chooser, {"seed": seed, "coverage": peak})
                rows.close()
            by_seed = {row["seed"]: row["coverage"] for row in run.read("metrics", chooser)}
            found[chooser] = [by_seed[seed] for seed in study.seeds]
    finally:
        run.release()
    return found


def chosen(
    chooser: str,
    policy: Any,
    planners: Mapping[str, Planner],
    seeds: Sequence[int],
    proposals: int,
) -> Decide:
    """Who decides; the noise of a tick's proposals is the same for all of them."""
    any_planner = next(iter(planners.values()))

    def decide(tick: int, obs: dict[str, np.ndarray], drivers: Sequence[PushTDriver]) -> np.ndarray:
        drawn = derive_seed(seeds[0], "proposals", tick)
        pool_BnHD = policy.sample(obs, proposals, seed=drawn)
        if chooser == FIRST:
            return pool_BnHD[:, 0].numpy()
        own = [derive_seed(seed, "imagined", tick) for seed in seeds]
        if chooser == SIMULATOR:
            reached = np.stack(
                [
                    outcome(driver, chunk_HD)
                    for driver, pool_nHD in zip(drivers, pool_BnHD.numpy(), strict=True)
                    for chunk_HD in pool_nHD
                ]
            )
            predicted = {ENVIRONMENT: torch.from_numpy(reached)[:, None]}
            each = [seed for seed in own for _ in range(proposals)]
            score_Bn = any_planner.scorer.score({}, predicted, each).view(-1, proposals)
        else:
            score_Bn = planners[chooser].scores(obs, pool_BnHD, own)
        best_B = score_Bn.argmax(dim=1)
        return pool_BnHD[torch.arange(len(best_B)), best_B].numpy()

    return decide

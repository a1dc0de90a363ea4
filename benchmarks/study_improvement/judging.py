"""How a trained contender is judged: on start states that are the same for all.

Shapes: B batch, n samples, H chunk, D action.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.run.build import stored_policy
from embodied.run.evaluate import Evaluator
from policies.acting import InferenceConfig
from policies.inference.policy import ActingPolicy

ROWS = 5
IN_A_ROW = 40
"""Training episodes by which weights are selected."""


class Judged(msgspec.Struct, frozen=True):
    """success, ticks: of every episode, in the order of the start states. steps: how many the
    policy had acted; demonstrated: mean ticks of the demonstrations. version: of its weights."""

    success: list[bool]
    ticks: list[int]
    steps: int
    demonstrated: float
    version: int


class MeanOfSamples:
    """Acts with the mean of n samples of a policy: what it draws, without its noise."""

    def __init__(self, policy: Any, n: int) -> None:
        self._policy = policy
        self._n = n
        self.spec = policy.spec

    def init(self, batch: int) -> None:
        """Nothing is carried between decisions."""

    def act(
        self, carry: None, obs: Mapping[str, np.ndarray], *, prefix: None = None, seed: np.ndarray
    ) -> tuple[None, np.ndarray]:
        """Chunks [B, H, D]; see Policy. A row depends on its own seed alone."""
        rows = [
            self._policy.sample(
                {key: value[row : row + 1] for key, value in obs.items()},
                self._n,
                seed=derive_seed(int(row_seed), "samples"),
            ).mean(dim=1)
            for row, row_seed in enumerate(seed)
        ]
        return None, torch.cat(rows).numpy()


def selected_version(run: RunDir) -> int:
    """The weights that acted in the middle of those training episodes in a row, so many of them,
    that succeeded most often; of several such the last. No start state is seen for it that is
    judged."""
    own = [row for row in run.read("metrics", "actor0") if not row["demonstration"]]
    count = min(IN_A_ROW, len(own))
    successes = np.convolve([row["success"] for row in own], np.ones(count), "valid")
    last = len(successes) - 1 - int(np.argmax(successes[::-1]))
    return own[last + count // 2]["version"]


def judge(
    run: RunDir, kept: Path, seeds: range, averaged: int = 0, selected: bool = False
) -> Judged:
    """Act from each of the seeds' start states; what an earlier call found, if it is kept.

    averaged: of how many samples the mean acts. selected: by selected_version, else the newest.
    """
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Judged)
    torch.set_num_threads(1)
    policy, version, config = stored_policy(run.path, selected_version(run) if selected else None)
    assert config is not None
    acting = (
        MeanOfSamples(policy, averaged)
        if averaged
        else ActingPolicy(policy, InferenceConfig(), rows=ROWS)
    )
    evaluator = Evaluator(config.tasks[0], config.sim, rows=ROWS)
    try:
        results = evaluator.run(acting, version, seeds)
    finally:
        evaluator.close()
    episodes = run.read("metrics", "actor0")
    demonstrated = [row["ticks"] for row in episodes if row["demonstration"]]
    judged = Judged(
        success=[result.success for result in results],
        ticks=[result.ticks for result in results],
        steps=sum(row["ticks"] for row in episodes if not row["demonstration"]),
        demonstrated=float(np.mean(demonstrated)),
        version=version,
    )
    write_atomic(kept, msgspec.json.encode(judged))
    return judged

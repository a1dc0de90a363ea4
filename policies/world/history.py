"""What a world model reads once its predictions have come true.

Shapes: N rows, T history, S predicted observations.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import GOAL, TASK
from embodied.core.protocols import WorldModel
from embodied.core.specs import PolicySpec
from policies.reading import Array


@dataclass(frozen=True, slots=True)
class Succession:
    """From what was observed and what is predicted to the next history.

    newest: which prediction is the newest of it, never one beyond the chunk. ticks: how far on that
    is. exact: whether all steps of the history are observed or predicted; else the prediction
    before stands in for a step between two of them, and the first for those before it, as an
    episode's first observation does.
    """

    model: WorldModel
    newest: int
    ticks: int
    exact: bool

    def history(
        self, obs: Mapping[str, Array], predicted: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Observations [N, T, …] so many ticks later: goals and the instruction stay.

        obs [N, T, …], predicted [N, S, …] as of `infer`. SpecError for predicted pictures that are
        smaller than those that are read (images.crop).
        """
        spec, predicted_ticks = self.model.spec, self.model.predicted_ticks
        found: dict[str, torch.Tensor] = {}
        for key, array in spec.observation.items():
            seen = torch.as_tensor(obs[key])
            if key == TASK or key.startswith(GOAL):
                found[key] = seen
                continue
            later = predicted[key]
            if tuple(later.shape[2:]) != array.shape:
                raise SpecError(
                    f"{key} is predicted as {tuple(later.shape[2:])} and read as {array.shape}: "
                    "what is predicted cannot be read; train with policy.images.crop=1"
                )
            steps: list[torch.Tensor] = []
            for tick in range(self.ticks - spec.n_obs_steps + 1, self.ticks + 1):
                if tick <= 0:
                    steps.append(seen[:, tick - 1].to(later))
                else:
                    steps.append(later[:, max(1, bisect_right(predicted_ticks, tick)) - 1])
            found[key] = torch.stack(steps, dim=1)
        return found


def succession(model: WorldModel) -> Succession:
    """How the model's predictions follow one another; ConfigError if it reads more than it
    predicts."""
    missing = unpredicted(model.spec, model.predicted_keys)
    if missing:
        raise ConfigError(
            f"the world model reads {', '.join(missing)} and does not predict it, so that what it "
            "predicts cannot be read in its turn; train one whose policy.predicts is empty"
        )
    ticks, spec = model.predicted_ticks, model.spec
    newest = sum(tick <= spec.horizon for tick in ticks) - 1
    if ticks[-1] - ticks[0] == len(ticks) - 1:  # successive ones: no further on than they must be
        newest = 0 if ticks[0] == 1 else min(spec.n_obs_steps - 1, newest)
    steps = range(ticks[newest] - spec.n_obs_steps + 1, ticks[newest] + 1)
    exact = all(tick <= 0 or tick in ticks for tick in steps)
    return Succession(model, newest, ticks[newest], exact)


def unpredicted(spec: PolicySpec, keys: tuple[str, ...]) -> list[str]:
    """Observation keys that are read but are not among `keys`, goals and instruction aside."""
    return [k for k in spec.observation if k not in keys and k != TASK and not k.startswith(GOAL)]

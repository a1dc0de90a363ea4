"""The typed configuration of a search for a composed policy's weights."""

from typing import Any, Literal

import msgspec

from embodied.core.errors import ConfigError
from sim import family
from sim.family import SimConfig


class ComposeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Search for the weights of a composed policy, and its report beside its parents.

    policies: policy folders or run directories; labels: what they are called, by default the
    folders' names. task, sim: null takes those of the first run among them. operator, search: a
    registered name, or a name with options; operator "pooled" composes at sample level. total:
    what the weights of operators "product" and "cfg" sum to. metric: an episode's score, its
    success or the greatest value of a signal. demonstrations: a buffer's folder or a run's, for
    Proposition 4.1's weights, where the search then starts; windows: how many of its windows.
    episodes, first_seed: evaluation seeds of the report. output: everything is kept there, and an
    interrupted search continues from it.
    """

    policies: tuple[str, ...]
    labels: tuple[str, ...] | None
    task: str | None
    sim: SimConfig | None
    operator: str | dict[str, Any]
    total: float
    solver: dict[str, Any] | None
    guidance: dict[str, Any] | None
    search: str | dict[str, Any]
    metric: Literal["success", "reward", "coverage"]
    demonstrations: str | None
    windows: int
    episodes: int
    first_seed: int
    rows: int
    seed: int
    output: str

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that cannot be used."""
        for name in ("windows", "episodes", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        last = self.first_seed + self.episodes
        if not 0 <= self.first_seed < last <= family.EVALUATION_SEEDS:
            raise ConfigError(
                f"seeds {self.first_seed} to {last - 1}: evaluation seeds lie in "
                f"0..{family.EVALUATION_SEEDS - 1}"
            )
        if self.labels is not None and len(self.labels) != len(self.policies):
            raise ConfigError(
                f"labels names {len(self.labels)} policies, policies has {len(self.policies)}"
            )

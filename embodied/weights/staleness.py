"""How old the weights may be with which an episode begins."""

from typing import Annotated, Literal

import msgspec


class StalenessBound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds that are looked at before each episode, and never stop one that runs.

    max_staleness_s: since the learner last confirmed that this host has the newest weights that are
    meant for it. max_versions_behind: between what acts and those. None: no bound. A host beyond a
    bound holds its robots between episodes until newer weights or a confirmation have come.
    without_link: while there is no link, which can bring neither, it holds as well, or acts on.
    """

    max_staleness_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_versions_behind: Annotated[int, msgspec.Meta(ge=0)] | None = None
    without_link: Literal["act", "hold"] = "hold"

    @property
    def bounds(self) -> bool:
        """Whether there is any bound."""
        return self.max_staleness_s is not None or self.max_versions_behind is not None

    def check(self, age_s: float, versions_behind: int, linked: bool) -> str:
        """Why no episode may begin with weights so old (WeightMirror.staleness); "" if one may."""
        if not linked and self.without_link == "act":
            return ""
        if self.max_staleness_s is not None and age_s > self.max_staleness_s:
            since = "has not confirmed" if age_s == float("inf") else "last confirmed"
            when = "" if age_s == float("inf") else f" {age_s:.0f} s ago"
            return (
                f"the learner {since} these weights{when}; max_staleness_s is "
                f"{self.max_staleness_s:g}"
            )
        if self.max_versions_behind is not None and versions_behind > self.max_versions_behind:
            return (
                f"these weights are {versions_behind} versions behind the learner's; "
                f"max_versions_behind is {self.max_versions_behind}"
            )
        return ""

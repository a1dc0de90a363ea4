"""How often weights are published, and how much of a link they take: by arithmetic on measurements.

Measured: a gradient step takes s seconds; a publication costs the learner p seconds, in which it
takes no steps; a patch has b bytes; a link carries c bytes a second; a robot is ready to act
with new weights r seconds after they are published (rollout latency). All are exponential moving
averages over about 1/_WEIGHT measurements.

Interval. Weights go out every

    T = max(p / σ, b / (λ c), r)

seconds of learning, with σ = max_share of the learner's time and λ = link_share of the link: no
more often than the learner can afford, the link can carry, or a robot can use.

Learner's account. Averages lag behind a change, so the share of time is kept exactly, by an account
in seconds. Each step of s seconds pays in σ s; each publication takes out what it did cost; one
may begin when p is there. Nothing beyond p (at least one interval's worth) is saved up, so there
are no bursts. Hence, over any stretch of steps, time for publications ≤ σ · time of steps + one
publication, and in the long run the learner is slowed by less than σ.

Link's account. Weights may send bytes as they are paid in at λ c bytes a second, up to one
second's worth: over any t seconds, at most λ c (t + 1).
"""

from typing import Annotated

import msgspec

_WEIGHT = 0.2
_BURST_S = 1.0


class GovernorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """max_share: of the learner's time. link_share: of the link's bytes a second.
    min_interval_s: between publications, whatever is measured."""

    max_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.03
    link_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    min_interval_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class PublishGovernor:
    """When the learner publishes. One thread may use it."""

    def __init__(self, config: GovernorConfig) -> None:
        self._config = config
        self._publish_s: float | None = None
        self._patch_bytes = 0.0
        self._link_bytes_s: float | None = None
        self._rollout_s = 0.0
        self._account_s = 0.0
        self._since_s = 0.0

    def stepped(self, step_s: float) -> None:
        """A gradient step took so long."""
        self._since_s += step_s
        self._account_s += self._config.max_share * step_s
        if self._publish_s is not None:
            self._account_s = min(self._account_s, self._publish_s)

    def published(self, cost_s: float) -> None:
        """A publication took so long of the learner's time."""
        self._publish_s = _average(self._publish_s, cost_s)
        self._account_s -= cost_s
        self._since_s = 0.0

    def sent(self, patch_bytes: int, link_bytes_s: float) -> None:
        """A patch went to a host; link_bytes_s: what its link carries. The slowest host counts
        when the caller reports only that."""
        self._patch_bytes = _average(self._patch_bytes or None, patch_bytes)
        self._link_bytes_s = _average(self._link_bytes_s, link_bytes_s)

    def rolled_out(self, latency_s: float) -> None:
        """A robot was ready to act with new weights so long after they were published."""
        self._rollout_s = _average(self._rollout_s or None, latency_s)

    @property
    def interval_s(self) -> float:
        """T: seconds of learning between publications, of what is measured so far."""
        return max((self._publish_s or 0.0) / self._config.max_share, self._outside_s())

    @property
    def due(self) -> bool:
        """Whether to publish now; at once as long as nothing is measured."""
        if self._publish_s is None:
            return True
        return self._since_s >= self._outside_s() and self._account_s >= self._publish_s

    def _outside_s(self) -> float:
        """The interval that link and robots allow."""
        link_s = 0.0
        if self._link_bytes_s:
            link_s = self._patch_bytes / (self._config.link_share * self._link_bytes_s)
        return max(link_s, self._rollout_s, self._config.min_interval_s)


class LinkBudget:
    """How many bytes of weights may go over a link now. One thread may use it."""

    def __init__(self, link_share: float) -> None:
        self._link_share = link_share
        self._link_bytes_s: float | None = None
        self._account = 0.0
        self._now_s: float | None = None

    def measured(self, link_bytes_s: float) -> None:
        """The link carries so many bytes a second."""
        self._link_bytes_s = _average(self._link_bytes_s, link_bytes_s)

    @property
    def bytes_s(self) -> float:
        """What weights may take in the long run; infinite before anything is measured."""
        return float("inf") if self._link_bytes_s is None else self._link_share * self._link_bytes_s

    def allowed(self, now_s: float) -> int | None:
        """Bytes that may be sent or asked for now, at a monotonic time; None: any number, as
        nothing is measured yet."""
        elapsed_s = 0.0 if self._now_s is None else max(0.0, now_s - self._now_s)
        self._now_s = now_s
        if self._link_bytes_s is None:
            return None
        most = self.bytes_s * _BURST_S
        self._account = min(most, self._account + self.bytes_s * elapsed_s)
        return max(0, int(self._account))

    def sent(self, num_bytes: int) -> None:
        """So many were; those sent before anything was measured are not counted."""
        if self._link_bytes_s is not None:
            self._account -= num_bytes


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)

"""Whether a host's actors may begin an episode with the weights that they have."""

import time

from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.site.status import FILE, read_status
from embodied.weights.staleness import StalenessBound

_LOOK_S = 0.2


def forget_freshness(run: RunDir) -> None:
    """Before a host's roles start: what an earlier link role told, perhaps before the host was
    booted anew and its monotonic clock with it, confirms nothing."""
    (run.path / FILE).unlink(missing_ok=True)


class EpisodeGate:
    """Goes by what the host's link role tells in the run's folder; its death makes weights age."""

    def __init__(self, run: RunDir, bound: StalenessBound) -> None:
        self._run = run
        self._bound = bound
        self._looked_s = float("-inf")
        self._confirmed_ns: int | None = None
        self._newest: int | None = None
        self._linked = False

    def refusal(self, version: int) -> str:
        """Why no episode may begin while this version acts; "" if one may."""
        if not self._bound.bounds:
            return ""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s = now_s
            self._look()
        age_s = float("inf")
        if self._confirmed_ns is not None:
            age_s = (time.monotonic_ns() - self._confirmed_ns) / 1e9
        behind = max(0, (self._newest or 0) - max(0, version))
        return self._bound.check(age_s, behind, self._linked)

    def _look(self) -> None:
        try:
            status = read_status(self._run.path)
        except ConfigError:  # the link role has not come so far
            self._confirmed_ns, self._newest, self._linked = None, None, False
            return
        [host] = status.hosts
        self._confirmed_ns, self._newest = host.confirmed_ns, status.version
        self._linked = host.connected

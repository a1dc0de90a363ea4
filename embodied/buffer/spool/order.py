"""Which steps go next: the running episodes, and a backlog that still gets its share."""

import heapq
from collections.abc import Iterator
from enum import IntEnum

from embodied.buffer.spool.index import SpooledEpisode
from embodied.core.errors import ConfigError


class Kind(IntEnum):
    """Fresh: the newest episode of each stream, and those that were begun as such, to their end.
    Backlog: all others."""

    FRESH = 0
    BACKLOG = 1


class SendingOrder:
    """Divides the link by bytes while both kinds wait: fresh_share of them for fresh steps, which
    go first whenever they have not had it; what one kind does not use the other gets.

    Within fresh the episodes take turns. Within the backlog: episodes with interventions, then
    failures, then the rest, the oldest first.
    """

    def __init__(self, fresh_share: float) -> None:
        if not 0 < fresh_share < 1:
            raise ConfigError(f"fresh_share is {fresh_share}; it must lie between 0 and 1")
        self._shares = (fresh_share, 1 - fresh_share)
        self._spent = [0.0, 0.0]  # bytes by share; start-time fair queueing
        self._newest: dict[str, SpooledEpisode] = {}
        self._fresh: dict[tuple[str, int], SpooledEpisode] = {}
        self._backlog: list[tuple[int, int, SpooledEpisode]] = []

    def note(self, episode: SpooledEpisode) -> None:
        """Take an episode in that is new, or has changed, or is to be sent again."""
        newest = self._newest.get(episode.stream)
        if newest is None or newest.order < episode.order:
            self._newest[episode.stream] = episode
            if newest is not None and not newest.begun:
                self._fresh.pop(newest.key, None)
                self._push(newest)
        if episode.set_aside is not None:
            return
        if episode.begun or self._newest[episode.stream] is episode:
            self._fresh.setdefault(episode.key, episode)
        else:
            self._push(episode)

    def _push(self, episode: SpooledEpisode) -> None:
        if episode.sent < episode.end and episode.queued != episode.rank:
            episode.queued = episode.rank
            heapq.heappush(self._backlog, (episode.rank, episode.order, episode))

    def next_kind(self, *, backlog: bool) -> Kind | None:
        """Which kind may send now; None if none has anything. backlog: whether it may."""
        fresh = any(episode.ready for episode in self._fresh.values())
        waits = self._top() is not None
        if fresh and (not waits or not backlog or self._spent[0] <= self._spent[1]):
            return Kind.FRESH
        return Kind.BACKLOG if waits and backlog else None

    def _top(self) -> SpooledEpisode | None:
        """The backlog's first episode, if it can be sent; removes what is done with."""
        while self._backlog:
            rank, _, episode = self._backlog[0]
            if rank == episode.rank and not episode.begun:
                if episode.ready:
                    return episode
                if episode.unknown:
                    return None
            heapq.heappop(self._backlog)
            if rank == episode.queued:
                episode.queued = None
        return None

    def candidates(self, kind: Kind) -> Iterator[SpooledEpisode]:
        """Episodes to fill a batch from, in order; ask for the next one once one is used up."""
        if kind is Kind.FRESH:
            for episode in list(self._fresh.values()):
                if episode.ready:
                    self._fresh[episode.key] = self._fresh.pop(episode.key)
                    yield episode
        else:
            while (episode := self._top()) is not None:
                yield episode

    def spend(self, kind: Kind, nbytes: int) -> None:
        """Note a batch that was sent."""
        other = Kind(1 - kind)
        waits = self._top() is not None if other is Kind.BACKLOG else self._any_fresh()
        self._spent[kind] += nbytes / self._shares[kind]
        if not waits:  # an idle kind saves nothing up
            self._spent[other] = max(self._spent[other], self._spent[kind])

    def _any_fresh(self) -> bool:
        return any(episode.ready for episode in self._fresh.values())

    def unknown(self, limit: int) -> list[SpooledEpisode]:
        """Episodes that the other side must be asked about, in the order of sending."""
        found = [episode for episode in self._fresh.values() if episode.unknown]
        if self._top() is None and self._backlog:
            queued = heapq.nsmallest(limit, self._backlog)
            found += [episode for _, _, episode in queued if episode.unknown]
        return list(dict.fromkeys(found))[:limit]

    def forget(self, episode: SpooledEpisode) -> None:
        """Leave out an episode that is done with or set aside."""
        if self._fresh.get(episode.key) is episode:
            del self._fresh[episode.key]

"""Which version is meant for which robot: pin, rollback, and trial on canary robots.

Without a rule, every robot gets the store's newest version. With one, a new version acts on the
canary robots alone until the rule of embodied.weights.noninferiority, whose error probabilities
stand there, has shown that it succeeds no less often than the version of all others (by a margin);
then it is for all. If that is not shown it is rejected and never offered again.

Robots only ever go to higher version numbers. To go back, the old version's arrays are published
again as a new version (its metadata say `rollback_of`); so it is with a rejected version, a
rollback by a person, and a pin of what is not the newest. "Latest wins" stays true everywhere.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.files import full_disk_named, write_atomic
from embodied.weights.manifests import Version, WeightManifest
from embodied.weights.noninferiority import Count, judge
from embodied.weights.store import WeightStore

Arrays = Mapping[str, np.ndarray]


class TrialRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """canaries: robots (or hosts) that try new versions. margin, error: as in noninferiority.

    max_episodes: of the new version, at the last of `looks` evenly spaced looks.
    baseline_episodes: that the version of all must have before a new one is tried; they and all
    that follow in the trial are what it is compared with.
    """

    canaries: tuple[str, ...]
    margin: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.15
    error: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.1
    max_episodes: Annotated[int, msgspec.Meta(ge=1)] = 100
    looks: Annotated[int, msgspec.Meta(ge=1)] = 4
    baseline_episodes: Annotated[int, msgspec.Meta(ge=1)] = 50

    def look_at(self, look: int) -> int:
        """Episodes of the new version at look 0, 1 …"""
        return -(-self.max_episodes * (look + 1) // self.looks)


class TrialEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was decided about a version. replacement: of a rejected one, the version that follows
    it with the arrays of what acted before."""

    what: Literal["on trial", "promoted", "rejected"]
    version: Version
    replacement: Version | None = None


class TrialState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is decided. champion: for all; challenger: on trial; counts: of their episodes.

    looked: looks taken at the challenger. pinned: what a person pinned; held: the version that
    stands for it. decided: what ended the last trial. counted: results of each source that are
    counted, since the rule began.
    """

    rule: TrialRule | None = None
    champion: Version | None = None
    champion_count: Count = Count()
    challenger: Version | None = None
    challenger_count: Count = Count()
    looked: int = 0
    rejected: tuple[Version, ...] = ()
    pinned: Version | None = None
    held: Version | None = None
    decided: TrialEvent | None = None
    counted: dict[str, int] = {}

    def needed(self) -> set[int]:
        """Versions that must not be pruned."""
        versions = (self.champion, self.challenger, self.pinned, self.held)
        return {version for version in versions if version is not None}


class Trial:
    """The state of a store's folder: trial.json, whole or not at all, changed under a lock.

    Any process may ask and change it; it holds nothing itself. CorruptDataError if the file is
    damaged.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._path = store.path / "trial.json"

    def state(self) -> TrialState:
        """As it is now."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=TrialState)
        except FileNotFoundError:
            return TrialState()
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise CorruptDataError(
                f"{self._path} is damaged: {error}. Remove it: then the newest weights act"
            ) from error

    def offered(self, robot: str | None = None) -> int | None:
        """The version meant for a robot (or host); for all that try none if it is not named. None
        before the first. Changes nothing."""
        state = self.state()
        if state.held is not None:
            return state.held
        if state.rule is None or state.champion is None:
            return self._store.latest_version()
        if state.challenger is not None and robot in state.rule.canaries:
            return state.challenger
        return state.champion

    def start(
        self, rule: TrialRule, version: int | None = None, against: int | None = None
    ) -> int | None:
        """From now on, versions newer than what acts are tried first. Counts begin anew.

        version: tried at once, and all others stay at `against`, or at what acts: a pinned version
        is let go, but stays. Returns the version that is on trial: itself, or its copy if robots
        have newer ones. Raises ConfigError while another is on trial, or if both are the same
        weights; VersionGoneError, CorruptDataError.
        """
        if not rule.canaries:
            raise ConfigError("a trial needs at least one canary robot")
        with self._changing() as state:
            newest = self._store.latest_version()
            fresh = {"rule": rule, "decided": None, "counted": {}}
            if version is None:
                self._write(state, _crowned(state, newest, Count()), **fresh)
                return None
            if state.challenger is not None:
                raise ConfigError(f"version {state.challenger} is on trial; stop that first")
            acting = state.held or state.champion or newest
            if acting is None:
                raise ConfigError("the run has no weights yet: there is nothing to try")
            tried = self._store.load(version)
            others = self._store.load(acting if against is None else against)
            if tried[1].sha256 == others[1].sha256:
                raise ConfigError(
                    f"version {version} is what all robots have: name the version that it is to be "
                    "compared with, which all others then go back to"
                )
            # First everybody is held at what acts: a copy is the newest as soon as it is there.
            state = self._write(
                state, _crowned(state, acting, Count()), pinned=None, held=None, **fresh
            )
            champion = acting
            if others[1].version != acting:
                champion = self._publish(*others).version
                state = self._write(state, _crowned(state, champion, Count()))
            newer = version > max(acting, champion)
            challenger = version if newer else self._publish(*tried).version
            self._write(state, state, challenger=challenger)
            return challenger

    def stop(self) -> None:
        """From now on, every robot gets the newest version."""
        with self._changing() as state:
            self._write(state, _crowned(state, None, Count()), rule=None)

    def record(self, version: int, success: bool) -> TrialEvent | None:
        """Count an episode in which this version alone acted; what that decided, if anything."""
        with self._changing() as state:
            new, event = self._counting(state, version, success)
            if event is None and new != state:
                self._write(state, new)
            return event

    def tell(
        self, source: str, first: int, results: Sequence[tuple[int, bool]]
    ) -> list[TrialEvent]:
        """Count (version, success) of a source's episodes number `first` and on, each once however
        often it is told; what that decided."""
        events: list[TrialEvent] = []
        with self._changing() as old:
            if old.rule is None:
                return []
            state = old
            for number in range(max(first, old.counted.get(source, 0)), first + len(results)):
                counted = {**state.counted, source: number + 1}
                state = msgspec.structs.replace(state, counted=counted)
                state, event = self._counting(state, *results[number - first])
                events += [] if event is None else [event]
            if state != old:
                self._write(state, state)
        return events

    def advance(self) -> TrialEvent | None:
        """Begin the next trial if one is due: of the newest version, once the version of all has
        its baseline. The first version ever is for all at once."""
        with self._changing() as state:
            newest = self._store.latest_version()
            if state.rule is None or state.held is not None or newest is None:
                return None
            if state.champion is None:
                self._write(state, _crowned(state, newest, Count()))
                return TrialEvent("promoted", newest)
            due = state.champion_count.episodes >= state.rule.baseline_episodes
            if state.challenger is not None or newest <= state.champion or not due:
                return None
            self._write(state, state, challenger=newest)
            return TrialEvent("on trial", newest)

    def rollback(self, version: int) -> WeightManifest:
        """Publish an old version's arrays as the newest, for all at once; a trial ends undecided.

        Raises ConfigError while a version is pinned, VersionGoneError, CorruptDataError.
        """
        with self._changing() as state:
            if state.pinned is not None:
                raise ConfigError(f"version {state.pinned} is pinned; unpin it first")
            copy = self._again(version)
            if state.rule is not None:
                self._write(state, _crowned(state, copy.version, Count()))
            return copy

    def pin(self, version: int) -> int:
        """Hold every robot at a version, and keep it from being pruned, until unpin.

        Returns the version that stands for it: itself if it is the newest, else a copy of it.
        """
        with self._changing() as state:
            self._store.manifest(version)
            state = self._write(state, state, pinned=version, held=version)
            held = version  # from here on nobody is offered anything newer
            if self._store.latest_version() != version:
                held = self._again(version).version
            champion = None if state.rule is None else held
            self._write(state, _crowned(state, champion, Count()), held=held)
            return held

    def unpin(self, version: int) -> None:
        """Let go of a pinned version. ConfigError if it is not the pinned one."""
        with self._changing() as state:
            if version not in (state.pinned, state.held):
                pinned = "none is" if state.pinned is None else f"{state.pinned} is"
                raise ConfigError(f"weights version {version} is not pinned; {pinned}")
            self._write(state, state, pinned=None, held=None)

    def _counting(
        self, state: TrialState, version: int, success: bool
    ) -> tuple[TrialState, TrialEvent | None]:
        """The state with one more episode, written only if that decided something."""
        rule = state.rule
        if rule is None or state.held is not None:
            return state, None
        if version == state.champion:
            count = state.champion_count.plus(success)
            state = msgspec.structs.replace(state, champion_count=count)
        elif version == state.challenger:
            count = state.challenger_count.plus(success)
            state = msgspec.structs.replace(state, challenger_count=count)
        else:
            return state, None
        based = state.champion_count.episodes >= rule.baseline_episodes
        look_at = rule.look_at(state.looked)
        if state.challenger is None or not based or state.challenger_count.episodes < look_at:
            return state, None
        return self._look(state, rule, state.challenger)

    def _look(
        self, state: TrialState, rule: TrialRule, version: int
    ) -> tuple[TrialState, TrialEvent | None]:
        assert state.champion is not None
        verdict = judge(
            state.challenger_count,
            state.champion_count,
            margin=rule.margin,
            error=rule.error,
            looks=rule.looks,
            last=state.looked + 1 == rule.looks,
        )
        if verdict == "promote":
            event = TrialEvent("promoted", version)
            new = self._write(state, _crowned(state, version, Count()), decided=event)
            return new, event
        if verdict == "reject":
            copy = self._again(state.champion).version
            event = TrialEvent("rejected", version, copy)
            new = _crowned(state, copy, state.champion_count)
            rejected = (*state.rejected, version)
            return self._write(state, new, rejected=rejected, decided=event), event
        return msgspec.structs.replace(state, looked=state.looked + 1), None

    def _again(self, version: int) -> WeightManifest:
        return self._publish(*self._store.load(version))

    def _publish(self, arrays: Arrays, old: WeightManifest) -> WeightManifest:
        metadata = {**old.metadata, "rollback_of": old.version}
        return self._store.publish(arrays, old.config, metadata)

    def _write(self, old: TrialState, new: TrialState, **fields: Any) -> TrialState:
        """Put `new`, with these fields replaced, in the place of `old`, durably."""
        new = msgspec.structs.replace(new, **fields)
        for version in new.needed() - old.needed():
            self._store.pin(version)
        write_atomic(self._path, msgspec.json.encode(new))
        for version in old.needed() - new.needed():
            self._store.unpin(version)
        return new

    @contextmanager
    def _changing(self) -> Iterator[TrialState]:
        """The state, while nobody else changes it."""
        with full_disk_named(self._path):
            fd = os.open(
                self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield self.state()
        finally:
            os.close(fd)


def _crowned(state: TrialState, champion: int | None, count: Count) -> TrialState:
    """A version for all, and none on trial."""
    return msgspec.structs.replace(
        state,
        champion=champion,
        champion_count=count,
        challenger=None,
        challenger_count=Count(),
        looked=0,
    )

"""What must hold of steps and weights whatever is killed: read from the files that are left."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.links.chaos.lab import HOST, Lab
from embodied.buffer.log.tail import LogReader
from embodied.buffer.steps.records import decode_header
from embodied.core.errors import CorruptDataError
from embodied.weights.acting import acting_form, digest
from embodied.weights.store import VersionGoneError, WeightStore

Key = tuple[str, int, int]
_DEMONSTRATED = -1


class Steps:
    """The host's steps in a log that is being written: by key, how often.

    A log counts as read up to where `refresh` found its end.
    """

    def __init__(self, path: Path) -> None:
        self._reader = LogReader(path)
        self.payloads: dict[Key, list[bytes]] = {}
        self.versions: set[int] = set()
        self.last: Key | None = None

    def refresh(self) -> None:
        """Read what is new."""
        for key, version, payload in self._new():
            self.payloads.setdefault(key, []).append(payload)
            self.versions.add(version)
            self.last = key

    @property
    def damaged(self) -> list[tuple[int, int]]:
        """(segment, offset) of what cannot be read."""
        return self._reader.damaged

    def close(self) -> None:
        """Close its files."""
        self._reader.close()

    def _new(self) -> Iterator[tuple[Key, int, bytes]]:
        for entry in self._reader.poll():
            if entry.schema > 1:
                header, _ = decode_header(entry.payload)
                if header.stream.startswith(f"{HOST}/"):
                    key = (header.stream, header.episode, header.index)
                    yield key, header.policy_version, bytes(entry.payload)


class Weights:
    """Versions at the host, each compared with what the learner published. acted: whole ones."""

    def __init__(self, lab: Lab) -> None:
        self._here, self._there = WeightStore(lab.host.weights), WeightStore(lab.learner.weights)
        self.acted: set[int] = set()
        self.compared = 0
        self.faults: list[str] = []

    @property
    def published(self) -> int:
        """The newest version at the learner."""
        return self._there.latest_version() or 0

    def refresh(self) -> None:
        """Look at the host's newest version, if it is new."""
        version = self._here.latest_version()
        if version is None or version in self.acted:
            return
        try:
            arrays, manifest = self._here.load(version)
            acting = manifest.acting
            if acting is None or digest(acting_form(arrays, acting.precision)) != acting.sha256:
                self.faults.append(f"weights version {version} at the host is not what was signed")
                return
            self.acted.add(version)
            published, _ = self._there.load(version)
            if digest(acting_form(published, acting.precision)) != acting.sha256:
                self.faults.append(f"weights version {version} at the host was never published")
            self.compared += 1
        except VersionGoneError:
            return
        except CorruptDataError as error:
            self.faults.append(str(error))


def check_steps(lab: Lab, published: int) -> tuple[int, list[str]]:
    """Number of the host's steps, and what is wrong with them; once nothing is written any more."""
    spool, buffer = Steps(lab.host.buffer), Steps(lab.learner.buffer)
    faults: list[str] = []
    for name, log in (("spool", spool), ("learner's buffer", buffer)):
        log.refresh()
        log.close()
        faults += [f"{name}: segment {place[0]} is damaged" for place in log.damaged]
        doubled = [key for key, copies in log.payloads.items() if len(copies) > 1]
        faults += [f"{name}: step {key} is there twice" for key in doubled]
        faults += [f"{name}: step {key} is missing" for key in _gaps(log)]
    here, there = spool.payloads, buffer.payloads
    faults += [f"step {key} was acknowledged and is lost" for key in here.keys() - there.keys()]
    faults += [f"step {key} was never recorded" for key in there.keys() - here.keys()]
    both = here.keys() & there.keys()
    faults += [f"step {key} has changed" for key in both if here[key][0] != there[key][0]]
    unknown = {v for v in buffer.versions if v != _DEMONSTRATED and not 1 <= v <= published}
    faults += [f"steps name weights version {version}, never published" for version in unknown]
    return len(here), faults


def _gaps(log: Steps) -> Iterator[Key]:
    """What was acknowledged before later steps of its episode, and is not there."""
    for stream, episode, index in log.payloads:
        if index and (stream, episode, index - 1) not in log.payloads:
            yield stream, episode, index - 1

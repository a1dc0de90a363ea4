"""How the episodes of this host's actors ended, read from what they write down."""

from typing import Any

import msgspec

from embodied.core.rundir import RunDir
from embodied.run.site.messages import MAX_RESULTS, EpisodeResult


class Results:
    """Follows metrics/actor*.jsonl. episodes: all that ended, demonstrations included."""

    def __init__(self, run: RunDir) -> None:
        self._folder = run.path / "metrics"
        self._places: dict[str, int] = {}
        self._results: list[EpisodeResult] = []
        self.episodes = 0

    def refresh(self) -> None:
        """Read what was added; a line that is not whole yet is read next time."""
        for path in sorted(self._folder.glob("actor*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._places.get(path.name, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._places[path.name] = self._places.get(path.name, 0) + len(whole)
            for line in whole.splitlines():
                self._take(line)

    def since(self, number: int) -> tuple[int, tuple[EpisodeResult, ...]]:
        """Number of the first and the results from there on, as many as one report may bring."""
        first = min(number, len(self._results))
        return first, tuple(self._results[first : first + MAX_RESULTS])

    def _take(self, line: bytes) -> None:
        try:
            row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:  # a killed process left it torn
            return
        self.episodes += 1
        if row["version"] >= 1 and not row["interventions"] and not row["mixed"]:
            self._results.append(EpisodeResult(row["version"], row["success"]))

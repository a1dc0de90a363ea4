"""What becomes of published weights: actors and links tell it, and the governor goes by it."""

from pathlib import Path
from typing import Any

import msgspec

from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir
from embodied.run.site.status import read_status
from embodied.weights.deliveries import Delivery
from embodied.weights.governor import PublishGovernor


class PublishFeedback:
    """Follows the files in which a run's actors and gateway write down how weights arrive.

    Of several robots the quickest counts, since weights that any can use are worth publishing; of
    several links the slowest, since all are to carry them.
    """

    def __init__(self, run: RunDir, governor: PublishGovernor) -> None:
        self._run = run
        self._governor = governor
        self._folder = run.path / "timings"
        self._places = {path: path.stat().st_size for path in self._timings()}
        self._seen: dict[str, int] = {}

    def poll(self) -> None:
        """Tell the governor what is new."""
        latencies_s = [value for path in self._timings() for value in self._rollouts_s(path)]
        if latencies_s:
            self._governor.rolled_out(min(latencies_s))
        if deliveries := self._deliveries():
            slowest = min(deliveries, key=lambda found: found.num_bytes / found.seconds)
            self._governor.sent(slowest.num_bytes, slowest.num_bytes / slowest.seconds)

    def _timings(self) -> list[Path]:
        return sorted(self._folder.glob("actor*.jsonl"))

    def _rollouts_s(self, path: Path) -> list[float]:
        """Rollout latencies in the whole lines that were added."""
        with open(path, "rb") as file:
            file.seek(self._places.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._places[path] = self._places.get(path, 0) + len(whole)
        found: list[float] = []
        for line in whole.splitlines():
            try:
                row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:  # a killed process left it torn
                continue
            found += row.get("rollout_s", [])
        return found

    def _deliveries(self) -> list[Delivery]:
        """What came to hosts since the last call; none without a gateway."""
        try:
            hosts = read_status(self._run.path).hosts
        except EmbodiedError:
            return []
        found: list[Delivery] = []
        for host in hosts:
            delivery = host.delivery
            if host.connected and delivery and delivery.version != self._seen.get(host.name):
                self._seen[host.name] = delivery.version
                found.append(delivery)
        return found

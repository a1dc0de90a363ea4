"""The demonstrations that an actor owes."""

from collections.abc import Iterable, Mapping

from embodied.buffer.read.replay import EpisodeInfo
from embodied.core.errors import EmbodiedError
from embodied.run.config import TrainConfig
from embodied.run.tasks import robot_task

_ATTEMPTS_PER_DEMONSTRATION = 5


class Demonstrations:
    """Those of one task. longest_ticks: of the successful ones, those of others that `saw` was told
    included; 0 while there are none."""

    def __init__(self, task: str, wanted: int) -> None:
        self.longest_ticks = 0
        self.task = task
        self._wanted = wanted
        self._done = 0
        self._attempts = 0
        self._in_hand: set[int] = set()

    @property
    def owed(self) -> bool:
        """Whether there are not yet as many as are wanted."""
        return self._done < self._wanted

    def begin(self, row: int) -> bool:
        """Whether a robot is to begin another one."""
        if self._done + len(self._in_hand) >= self._wanted:
            return False
        self._in_hand.add(row)
        return True

    def left(self, row: int) -> None:
        """The robot's episode, of whatever kind, has ended or will not."""
        self._in_hand.discard(row)

    def saw(self, ticks: int) -> None:
        """Somebody else's succeeded."""
        self.longest_ticks = max(self.longest_ticks, ticks)

    def note(self, *, success: bool, ticks: int) -> None:
        """Count one; EmbodiedError once so many have failed that the rest are not to be had."""
        self._attempts += 1
        if success:
            self._done += 1
            self.saw(ticks)
        if self.owed and self._attempts >= _ATTEMPTS_PER_DEMONSTRATION * max(2, self._wanted):
            raise EmbodiedError(
                f"the expert for '{self.task}' succeeded in {self._done} of {self._attempts} "
                f"attempts; {self._wanted} demonstrations are not to be had. Lower "
                "demonstrations.noise or raise sim.horizon"
            )


def recall(own: Mapping[str, Demonstrations], episodes: Iterable[EpisodeInfo]) -> None:
    """Count the whole demonstrations among recorded episodes that are an actor's own, by stream;
    of others', see how long they are."""
    for episode in episodes:
        ticks = len(episode.rows)
        if not episode.closed or episode.interventions != ticks:
            continue
        if episode.stream in own:
            own[episode.stream].note(success=episode.success, ticks=ticks)
        elif episode.success:
            for shared in own.values():
                if shared.task == episode.task:
                    shared.saw(ticks)


def demonstrations_of(config: TrainConfig, actor: int) -> list[Demonstrations]:
    """What the actor owes, for each of its robots; those of one task share it."""
    rows, tasks = config.actors.rows, config.tasks
    own = [robot_task(tasks, actor, row, rows) for row in range(rows)]
    shared = {task: Demonstrations(task, _share(config, task, actor)) for task in own}
    return [shared[task] for task in own]


def _share(config: TrainConfig, task: str, actor: int) -> int:
    demonstrations, actors = config.demonstrations, config.actors
    if demonstrations.source != "expert":
        return 0
    rows, tasks = actors.rows, config.tasks
    able = [
        index
        for index in range(actors.count)
        if any(robot_task(tasks, index, row, rows) == task for row in range(rows))
    ]
    total, place = demonstrations.episodes or 0, able.index(actor)
    return total // len(able) + (place < total % len(able))

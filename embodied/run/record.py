"""From rollouts to the buffer: who recorded a step, and in which episode."""

from collections.abc import Iterable
from dataclasses import replace

from embodied.buffer.serve.sink import StepSink
from embodied.core.episodes import Step


class Recorder:
    """Numbers the episodes of one robot's stream and hands its steps to a sink."""

    def __init__(self, sink: StepSink, stream: str) -> None:
        self._sink = sink
        self._stream = stream
        self._episode = -1

    def add(self, step: Step) -> None:
        """Record a step; index 0 begins a new episode."""
        if step.index == 0:
            self._episode = max(self._episode + 1, self._sink.next_episode(self._stream))
        self._sink.add(replace(step, stream=self._stream, episode=self._episode))


def import_dataset(sink: StepSink, episodes: Iterable[list[Step]]) -> tuple[int, int]:
    """Append a dataset's episodes; those already there are left. Returns (episodes, steps)."""
    count = steps = 0
    for episode in episodes:
        for step in episode:
            sink.add(step)
        count += 1
        steps += len(episode) - 1
    sink.flush()
    return count, steps

"""The learner's side of a run: from the buffer to published weights, step by step."""

import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from embodied.buffer.load.loader import LoaderClient
from embodied.buffer.read.replay import EpisodeInfo, ReplayReader
from embodied.buffer.sample.limiter import RateLimiter
from embodied.buffer.sample.sampling import Sampling
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.seeds import derive_seed, make_rng
from embodied.learn.batches import Batches, InlineBatches, LoadedBatches
from embodied.learn.bc import BC
from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.publishing import Publisher

StartLoader = Callable[[Callable[[mmap], None]], LoaderClient]
"""Starts a loader, given what pins the memory of its batches."""

_REFRESH_STEPS = 20
_LOG_STEPS = 50


def is_demonstration(episode: EpisodeInfo, only_successful: bool) -> bool:
    """Whether an expert or a person acted in the whole of a usable, finished episode."""
    usable = episode.success or not only_successful
    return episode.closed and usable and episode.interventions == len(episode.rows)


class Trainer:
    """Samples, learns, publishes, checkpoints. Neither starts processes nor decides when to stop.

    The policy is built from the demonstrations' statistics once enough of them are in the
    buffer, or comes from the checkpoint if there is one.
    """

    def __init__(
        self,
        *,
        buffer: Path,
        ram_bytes: int,
        publisher: Publisher,
        checkpoint: Path,
        open_sampling: Callable[[ReplayReader], Sampling],
        policy_format: PolicyFormat,
        algorithm: BC,
        config: LearnerConfig,
        seed: int,
        on_metrics: Callable[[dict[str, Any]], None],
        start_loader: StartLoader | None = None,
    ) -> None:
        self._reader = ReplayReader(buffer, ram_bytes=ram_bytes)
        self._publisher = publisher
        self._checkpoint = checkpoint
        self._open_sampling = open_sampling
        self._sampling: Sampling | None = None
        self._format = policy_format
        self._algorithm = algorithm
        self._config = config
        self._seed = seed
        self._on_metrics = on_metrics
        self._rng = make_rng(seed, "batches")
        slack = config.batch_size + (config.samples_per_insert or 0.0)
        self._limiter = RateLimiter(config.samples_per_insert, min_inserted=0, slack=slack)
        self._inserted = 0
        self._start_loader = start_loader
        self._batches: Batches | None = None
        self._counted = 0
        self._recent: dict[str, list[float]] = {}
        self._saved_step = -1
        self._waiting = False
        self.waited_s = 0.0
        self.learner: Learner | None = None

    @property
    def step(self) -> int:
        """Gradient steps so far, earlier sittings included."""
        return self.learner.step if self.learner else 0

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.learner is not None and self.learner.done

    def demonstrations(self) -> int:
        """Whole demonstrations in the buffer, after reading what is new."""
        self._reader.refresh()
        only_successful = self._algorithm.config.only_successful
        return sum(is_demonstration(e, only_successful) for e in self._reader.finished())

    def start(self) -> None:
        """Build the policy from the data, or continue from the checkpoint (see load_checkpoint)."""
        training_seed = derive_seed(self._seed, "training noise")
        found = load_checkpoint(self._checkpoint, self._format, self._config, training_seed)
        drawn: dict[str, Any] = {}
        if found is not None:
            self.learner, extra = found
            self._rng.bit_generator.state = extra["batches_rng"]
            self._saved_step = self.learner.step
            self._limiter.load(extra["limiter"])
            self._inserted = extra["inserted"]
            drawn = extra["sampler"]
        self._reader.refresh()
        self._sampling = self._open_sampling(self._reader)
        sampler = self._sampling.sampler
        sampler.load(drawn)
        if self.learner is None:
            if not sampler.num_candidates:
                raise ConfigError(
                    f"of {self._reader.num_closed} episodes the algorithm selects no step; "
                    "failed ones need algorithm.only_successful=false, and what a policy did needs "
                    "an algorithm that learns from it (docs/learning.md)"
                )
            policy = self._format.make(sampler.statistics(self._format.statistics))
            self.learner = Learner(policy, self._format, self._config, seed=training_seed)
        if self._start_loader is None:
            size = self._config.batch_size
            self._batches = InlineBatches(self._reader, sampler, size, self._rng)
        else:
            self._sampling.close()
            self._reader.close()
            self._batches = LoadedBatches(self._start_loader(self.learner.pin))
        self._count()

    def update(self) -> bool:
        """One gradient step; False if the rate limiter wants more data first, or none came yet.

        waited_s: time that it has waited for batches.
        """
        self._waiting = not self._update()
        return not self._waiting

    def _update(self) -> bool:
        assert self.learner is not None and self._batches is not None
        started_s = time.perf_counter()
        if self.learner.step % _REFRESH_STEPS == 0:
            self._batches.refresh()
        self._count()
        acts = self.learner.acts
        if acts and not self._limiter.can_sample(self._config.batch_size):
            self._batches.refresh()
            return False
        batch = self._batches.next()
        self.waited_s += time.perf_counter() - started_s
        if batch is None:
            return False
        if acts:
            self._limiter.sampled(self._config.batch_size)
        metrics = self.learner.update(batch)
        for name, value in metrics.items():
            self._recent.setdefault(name, []).append(value)
        if self.learner.step % _LOG_STEPS == 0:
            row = {name: float(np.mean(values)) for name, values in self._recent.items()}
            counts = {"step": self.learner.step, "windows": self._batches.num_candidates}
            self._on_metrics({**row, **counts})
            self._recent.clear()
        step_s = time.perf_counter() - started_s
        self.learner.seconds += step_s
        self._publisher.stepped(step_s)
        return True

    def publish_due(self) -> bool:
        """See Publisher.due; it waits if the last update could not be made. Weights that may not
        act are never due."""
        assert self.learner is not None
        return self.learner.acts and self._publisher.due(self.step, waiting=self._waiting)

    def publish(self, *, final: bool) -> None:
        """See Publisher.publish."""
        assert self.learner is not None
        self._publisher.publish(self.learner, final=final)

    def publishing(self) -> dict[str, float]:
        """See Publisher.decisions."""
        return self._publisher.decisions()

    def checkpoint_due(self) -> bool:
        """Whether checkpoint_every steps have passed since the last checkpoint."""
        return self.step - max(0, self._saved_step) >= self._config.checkpoint_every

    def save(self) -> None:
        """Write a checkpoint; the one before it is kept beside it."""
        if self.learner is None or self._saved_step == self.learner.step:
            return
        assert self._sampling is not None
        newest, previous = _checkpoint_files(self._checkpoint)
        fresh = newest.with_name("learner-next.safetensors")
        self.learner.save(
            fresh,
            {
                "batches_rng": self._rng.bit_generator.state,
                "sampler": self._sampling.sampler.save(),
                "limiter": self._limiter.save(),
                "inserted": self._inserted,
            },
        )
        if newest.exists():
            newest.replace(previous)
        fresh.replace(newest)
        self._saved_step = self.learner.step

    def _count(self) -> None:
        """Tell the rate limiter of steps that were recorded since the last call, if weights act:
        what was there before them is no debt of the learner's."""
        assert self._batches is not None and self.learner is not None
        steps = self._batches.num_steps
        if self._counted == 0:  # what a resumed run had counted before may be deleted by now
            self._counted = min(steps, self._inserted)
        new, self._counted = steps - self._counted, steps
        self._inserted += new
        if self.learner.acts:
            self._limiter.inserted(new)

    def close(self) -> None:
        """Finish publishing, end the loader, close the buffer; safe to call twice."""
        if self._batches is not None:
            self._batches.close()
        if self._sampling is not None:
            self._sampling.close()
        self._reader.close()
        self._publisher.finish()


def _checkpoint_files(folder: Path) -> tuple[Path, Path]:
    return folder / "learner.safetensors", folder / "learner-previous.safetensors"


def load_checkpoint(
    folder: Path, policy_format: PolicyFormat, config: LearnerConfig, seed: int
) -> tuple[Learner, dict[str, Any]] | None:
    """The learner of the newest checkpoint and what was saved with it; None if there is none.

    CorruptDataError for a damaged or foreign one; it says how to go on.
    """
    path = next((path for path in _checkpoint_files(folder) if path.exists()), None)
    if path is None:
        return None
    try:
        return Learner.load(path, policy_format, config, seed=seed)
    except CorruptDataError as error:
        _, previous = _checkpoint_files(folder)
        remedy = (
            f"Remove it to continue from {previous.name}."
            if path != previous and previous.exists()
            else "Remove it to train again from the recorded data, which are intact."
        )
        raise CorruptDataError(f"{error}. {remedy}") from error

"""One contender on one task from one seed: what it learns from, its training, its episodes.

B batch, N steps.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.cloning import Arrays, Demonstrations, OurTrainee, play_pieces
from benchmarks.study_worlds.contenders import CONTENDERS, PATCHES, SIMILAR, TASKS, WORLDS
from embodied.buffer.interchange.recorded import RecordedEpisodes
from embodied.buffer.sample.windows import FUTURE_IS_PAD
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.config import component, compose, convert
from embodied.core.episodes import Step
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.run import build
from embodied.run.collect import collect
from embodied.run.config import CollectConfig, TrainConfig, load_train
from embodied.run.evaluate import Evaluator
from policies.checkpoint import load_policy

ROWS = 25
PIECE_S = 60.0
NO_STEP_LIMIT = 1 << 40


class Study(msgspec.Struct, frozen=True):
    """What all cells share. minutes: of processor time, for each training. episodes, first_seed:
    start states. horizon: ticks of an episode, None for the task's own. data: folder of the PushT
    demonstrations. limit: of those, None for all. held: most that are held back. proposals: of a
    decision that somebody chooses for."""

    root: str
    minutes: float
    episodes: int
    first_seed: int = 0
    horizon: int | None = None
    data: str = "../shared/data"
    limit: int | None = None
    held: int = 20
    proposals: int = 16

    @property
    def seeds(self) -> range:
        """Of the start states."""
        return range(self.first_seed, self.first_seed + self.episodes)


@dataclass(frozen=True)
class Shown(Demonstrations):
    """Demonstrations of which windows do not show everything. later: see Contender. labelled: bool
    [N], which steps have labels; half of a batch is drawn from each kind that there is."""

    later: str
    labelled: np.ndarray

    @classmethod
    def of_all(cls, whole: Demonstrations, later: str, labelled: np.ndarray) -> "Shown":
        """The same steps."""
        return cls(whole.observation, whole.action, whole.first, whole.last, later, labelled)

    def batch(
        self, at_B: np.ndarray, keys: Iterable[str], *, future: Sequence[int] = (), **options: Any
    ) -> Arrays:
        """See Demonstrations."""
        offsets = [0] * len(future) if self.later == "current" else future
        batch = super().batch(at_B, keys, future=offsets, **options)
        batch["action_is_pad"] |= ~self.labelled[at_B][:, None]
        if future and self.later == "none":
            batch[FUTURE_IS_PAD][:] = True
        return batch

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """See Demonstrations."""
        kinds = [np.flatnonzero(kind) for kind in (self.labelled, ~self.labelled) if kind.any()]
        drawn = [rng.choice(kind, size // len(kinds)) for kind in kinds]
        return np.concatenate(drawn)


@dataclass(frozen=True)
class Cell:
    """A training run, and what it is judged by."""

    study: Study
    task: str
    contender: str
    seed: int

    @property
    def run(self) -> RunDir:
        """Its folder."""
        name = self.contender.replace(", ", "-").replace(" ", "_")
        return RunDir(Path(self.study.root) / self.task / f"{name}-{self.seed}")

    @property
    def held(self) -> int:
        """How many demonstrations, the last ones, nothing learns from."""
        return min(self.study.held, TASKS[self.task].held)

    @property
    def policy(self) -> Path:
        """The trained weights, averaged, as a policy's folder."""
        return self.run.path / "policy"

    def config(self) -> TrainConfig:
        """Of the run."""
        task, contender = TASKS[self.task], CONTENDERS[self.contender]
        base = self.contender.partition(",")[0]
        patches = PATCHES if base in WORLDS and "pictures" in self.task else ()
        source = ()
        if task.file is not None:
            source = (f"demonstrations.dataset.path={self.study.data}/{task.file}",)
        config = load_train([*task.overrides, *source, *SIMILAR, *contender.overrides, *patches])
        learner = msgspec.structs.replace(
            config.learner, steps=NO_STEP_LIMIT, minutes=self.study.minutes, threads=1
        )
        return msgspec.structs.replace(config, learner=learner)

    def train(self) -> dict[str, Any]:
        """Train to the end of the time, from where an earlier attempt stopped, and play all start
        states; what was reached."""
        run, config = self.run, self.config()
        run.acquire()
        try:
            trained = run.read("metrics", "trained")
            if not trained:
                learned = self._shown(recorded(self.study, self.task, config))
                trainee = OurTrainee(
                    run.path,
                    learned,
                    build.device_spec(config),
                    build.window_spec(config).observation_keys,
                    config.policy,
                    config.learner,
                    seed=derive_seed(self.seed, "study of worlds"),
                    samplers={"own": {}},
                )
                while not trainee.done:
                    trainee.learn(PIECE_S)
                found = {
                    "parameters": trainee.parameters,
                    "steps": trainee.step,
                    "seconds": trainee.seconds,
                }
                run.metrics("trained", found)
                trained = [found]
            self._play(run, config)
            return trained[-1]
        finally:
            run.release()

    def scores(self) -> list[float]:
        """Of every start state, in their order."""
        metric = TASKS[self.task].metric
        rows = {row["seed"]: row for row in self.run.read("metrics", "episodes")}
        return [score(rows[seed], metric) for seed in self.study.seeds]

    def _shown(self, episodes: list[list[Step]]) -> Demonstrations:
        contender = CONTENDERS[self.contender]
        learned = Demonstrations.of(episodes[: len(episodes) - self.held])
        if contender.tenth and not contender.free:
            learned = learned.only(slice(None, None, 10))
        labelled = np.ones(len(learned.action), bool)
        if contender.free:
            labelled = np.isin(learned.first, np.unique(learned.first)[::10])
        return Shown.of_all(learned, contender.later, labelled)

    def _play(self, run: RunDir, config: TrainConfig) -> None:
        sim = msgspec.structs.replace(config.sim, horizon=self.study.horizon)
        evaluator = Evaluator(config.task, sim, rows=min(ROWS, self.study.episodes))
        try:
            play_pieces(
                run,
                "episodes",
                evaluator,
                lambda: load_policy(self.policy),
                self.study.seeds,
                lambda: True,
            )
        finally:
            evaluator.close()


def work_on(cell: Cell) -> str:
    """Train and judge it, in a process of its own; a line about it."""
    torch.set_num_threads(1)
    started_s = time.monotonic()
    reached = cell.train()
    return (
        f"{cell.task}, {cell.contender}, seed {cell.seed}: {np.mean(cell.scores()):.3f} after "
        f"{reached['steps']} steps in {reached['seconds']:.0f} s; "
        f"{time.monotonic() - started_s:.0f} s in all"
    )


def recorded(study: Study, task: str, config: TrainConfig) -> list[list[Step]]:
    """All demonstrations, those that are held back last."""
    recipe = TASKS[task]
    if recipe.file is not None:
        cls, options = component("datasets", config.demonstrations.dataset, "dataset")
        return list(cls(options).episodes(study.limit))
    folder = Path(study.root) / "demonstrations" / task
    count = recipe.demonstrations + recipe.held
    if not (folder / "finished").exists():
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [f"task={config.task}", f"demonstrations.episodes={count}", f"output={folder}"]
        with LocalBuffer(folder / "buffer") as sink:
            collect(convert(compose("collect", overrides), CollectConfig), sink)
        (folder / "finished").touch()
    found = RecordedEpisodes(RecordedEpisodes.Config(path=str(folder / "buffer")))
    return [e for e in found.episodes() if any(step.success for step in e)][:count]


def score(result: dict[str, Any], metric: str) -> float:
    """An episode's."""
    return float(result["success"]) if metric == "success" else result["peaks"][metric]

"""The typed configuration of a run, and what is derived from it once."""

from typing import Any, Literal

import msgspec

from embodied.buffer.steps.schema import Codecs
from embodied.buffer.write.retention import Retention
from embodied.core import config as core_config
from embodied.core.errors import ConfigError
from embodied.learn.config import LearnerConfig
from hal.gpus import one_gpu
from hal.pool import selectors
from sim import family
from sim.family import SimConfig


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class RunConfig(_Struct, frozen=True):
    """dir: the run's directory; null makes a new one under root, named after task and time.

    mode: "async" runs roles as processes; "lockstep" runs them in turns in one process,
    bit for bit repeatable. resume: continue the run found in dir.
    """

    dir: str | None
    root: str
    mode: Literal["async", "lockstep"]
    resume: bool


class DemonstrationsConfig(_Struct, frozen=True):
    """Where the first data come from.

    source: "expert" (the task's script), "dataset" (see dataset) or "none".
    episodes: how many; null takes all of a dataset. noise: standard deviation of Gaussian
    noise on the expert's executed actions, in units of half the action range.
    dataset: name of a registered dataset and its options.
    """

    source: Literal["expert", "dataset", "none"]
    episodes: int | None
    noise: float
    dataset: dict[str, Any] | None


class ActorsConfig(_Struct, frozen=True):
    """Robots that act for the run.

    devices: null for simulated robots of the task in the actors' own processes; else which of the
    host's devices each actor leases, such as "so101@bench" or "arm[camera.wrist]": they act in
    real time, and one that is lost is replaced or awaited.
    count: actor processes. rows: robots in each. speed: simulated seconds per real second at
    most, 0 for no limit; 1 makes a simulated robot as slow as a real one.
    ticks_per_round: lockstep only, ticks acted per row between two learning rounds.
    """

    count: int
    rows: int
    speed: float
    ticks_per_round: int
    devices: str | None


class EvaluationConfig(_Struct, frozen=True):
    """Fresh-seed evaluation beside the training.

    episodes: per evaluation, on the same evaluation seeds each time. final_episodes: of the last
    weights. every_steps: at least this many gradient steps between two evaluations.
    rows: simulated robots stepped together. videos: rollouts filmed per evaluation.
    """

    episodes: int
    final_episodes: int
    every_steps: int
    rows: int
    videos: int


class BufferConfig(_Struct, frozen=True):
    """segment_mib: size of a log segment. ram_mib: memory budget of each reader. loader: whether
    batches are made by a process of their own (lockstep runs make them in the learner's). codecs:
    feature, or pattern that ends in "*" → how its arrays are stored: raw, zstd, webp, webp:Q,
    jpeg:Q. max_gib: bytes on disk beyond which the oldest segments are deleted; null keeps all.
    pinned: streams that are never deleted, by name or pattern.
    """

    segment_mib: int
    ram_mib: int
    loader: bool
    codecs: dict[str, str]
    max_gib: float | None
    pinned: tuple[str, ...]

    @property
    def retention(self) -> Retention | None:
        """What to delete when; None for nothing."""
        if self.max_gib is None:
            return None
        return Retention(max_bytes=round(self.max_gib * (1 << 30)), pinned=self.pinned)


class TrainConfig(_Struct, frozen=True):
    """Everything that defines a training run."""

    task: str
    seed: int
    sim: SimConfig
    run: RunConfig
    demonstrations: DemonstrationsConfig
    actors: ActorsConfig
    policy: dict[str, Any]
    algorithm: dict[str, Any]
    learner: LearnerConfig
    evaluation: EvaluationConfig
    buffer: BufferConfig


class CollectConfig(_Struct, frozen=True):
    """Demonstrations by a task's scripted expert, or import of a dataset, into a buffer folder."""

    task: str
    seed: int
    sim: SimConfig
    demonstrations: DemonstrationsConfig
    rows: int
    output: str


class EvalConfig(_Struct, frozen=True):
    """Evaluation of a checkpoint or a run's newest weights.

    checkpoint: a policy folder or a run directory. task, sim: null takes the run's own.
    """

    checkpoint: str
    task: str | None
    sim: SimConfig | None
    episodes: int
    first_seed: int
    rows: int
    videos: int
    output: str | None


def load_train(overrides: list[str]) -> TrainConfig:
    """Compose, type and check a training configuration."""
    composed = core_config.compose("train", overrides)
    return check(core_config.convert(composed, TrainConfig))


def check(config: TrainConfig) -> TrainConfig:
    """Raise ConfigError for values that contradict each other; return the same configuration."""
    core_config.component("policies", config.policy, "policy")
    core_config.component("networks", config.policy.get("network"), "policy.network")
    algorithm, _ = core_config.component("algorithms", config.algorithm, "algorithm")
    _check_data(config, collects=algorithm.collects)
    learner = config.learner
    if config.run.mode == "lockstep" and learner.minutes is not None:
        raise ConfigError(
            "learner.minutes depends on the machine's speed and run.mode=lockstep does not: "
            "set learner.minutes=null and learner.steps"
        )
    if learner.minutes is not None and not learner.minutes > 0:
        raise ConfigError(f"learner.minutes is {learner.minutes}; it must be positive, or null")
    if learner.samples_per_insert is not None and not algorithm.collects:
        raise ConfigError(
            f"learner.samples_per_insert waits for new data, and {config.algorithm['name']} "
            "collects none: set it to null"
        )
    if config.run.resume and config.run.dir is None:
        raise ConfigError("run.resume=true needs run.dir: the directory of the run to continue")
    _check_devices(config)
    if learner.device == "cuda":
        one_gpu(learner.gpu)
        if config.run.mode == "lockstep":
            raise ConfigError("run.mode=lockstep repeats bit for bit: it needs learner.device=cpu")
    _check_numbers(config)
    return config


def _check_devices(config: TrainConfig) -> None:
    actors = config.actors
    if actors.devices is None:
        return
    wanted = selectors.parse(actors.devices)
    if sum(selector.count for selector in wanted) != 1 or actors.rows != 1:
        raise ConfigError(
            f"actors.devices is '{actors.devices}' with actors.rows={actors.rows}: each actor "
            "leases one device; set actors.count for more"
        )
    if config.run.mode == "lockstep":
        raise ConfigError("run.mode=lockstep repeats bit for bit; leased devices do not")


def _check_data(config: TrainConfig, *, collects: bool) -> None:
    found, task = family.find(config.task)
    demonstrations = config.demonstrations
    if demonstrations.source == "dataset":
        core_config.component("datasets", demonstrations.dataset, "demonstrations.dataset")
    elif demonstrations.source == "none" and not config.run.resume:
        raise ConfigError(
            "demonstrations.source=none: nothing would ever be learned; use expert or dataset"
        )
    driver = found.make_driver(task, config.sim)
    needs_expert = demonstrations.source == "expert" or collects
    if needs_expert and found.make_expert(task, driver.spec) is None:
        raise ConfigError(
            f"task '{config.task}' has no scripted expert; use demonstrations.source=dataset and "
            "algorithm=bc"
        )
    if demonstrations.source == "expert" and not demonstrations.episodes:
        raise ConfigError("demonstrations.episodes must be at least 1 with source=expert")
    Codecs(config.buffer.codecs)
    if config.buffer.max_gib is not None and not config.buffer.max_gib > 0:
        raise ConfigError(f"buffer.max_gib is {config.buffer.max_gib}; it must be positive or null")


_AT_LEAST = {
    1: {
        "actors": ("count", "rows", "ticks_per_round"),
        "learner": (
            "steps",
            "batch_size",
            "publish_every",
            "checkpoint_every",
            "steps_per_round",
            "threads",
        ),
        "evaluation": ("every_steps", "rows"),
        "buffer": ("segment_mib", "ram_mib"),
    },
    0: {
        "actors": ("speed",),
        "learner": ("gpu_wait_s",),
        "demonstrations": ("noise",),
        "evaluation": ("episodes", "final_episodes", "videos"),
    },
}


def _check_numbers(config: TrainConfig) -> None:
    for least, sections in _AT_LEAST.items():
        for section, fields in sections.items():
            for field in fields:
                value = getattr(getattr(config, section), field)
                if value < least:
                    raise ConfigError(f"{section}.{field} is {value}; it must be at least {least}")
    most = max(config.evaluation.episodes, config.evaluation.final_episodes)
    if most > family.EVALUATION_SEEDS:
        raise ConfigError(f"there are {family.EVALUATION_SEEDS} evaluation seeds, not {most}")


def same_experiment(new: TrainConfig, stored: TrainConfig) -> None:
    """Raise ConfigError unless a resumed run asks for the same data, policy and algorithm."""
    for field in ("task", "seed", "sim", "demonstrations", "policy", "algorithm"):
        if getattr(new, field) != getattr(stored, field):
            raise ConfigError(
                f"run.resume=true: {field} differs from the stored run's "
                f"({getattr(new, field)} here, {getattr(stored, field)} there). "
                "Only learner, actors and evaluation settings may change."
            )
    if new.demonstrations.source == "expert" and (new.actors.count, new.actors.rows) != (
        stored.actors.count,
        stored.actors.rows,
    ):
        raise ConfigError(
            "run.resume=true: actors.count and actors.rows must stay, each owes its own share of "
            f"the demonstrations ({stored.actors.count} and {stored.actors.rows} so far)"
        )

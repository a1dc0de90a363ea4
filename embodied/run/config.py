"""The typed configuration of a run, and what is derived from it once."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.sampling import SamplingConfig, check_sampling
from embodied.buffer.steps.schema import Codecs
from embodied.buffer.write.retention import Retention
from embodied.core import config as core_config
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK, encode_instruction
from embodied.core.specs import DeviceSpec, PolicySpec
from embodied.learn.config import LearnerConfig
from embodied.run.actors_options import ActorsConfig
from embodied.run.algorithm import (
    check_action_free,
    check_actor,
    check_critic,
    check_density,
    make_algorithm,
    observed_spec,
)
from embodied.run.gateway_options import GatewayConfig
from embodied.run.observing import read_keys
from embodied.run.tasks import Tasks, check_robots, device_of, names_of
from hal.gpus import one_gpu
from hal.rewards import make_reward
from policies.acting import InferenceConfig
from policies.initial import check_initial
from policies.specs import policy_spec
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
    episodes: how many of each task; null takes all of a dataset. noise: standard deviation of
    Gaussian noise on the expert's executed actions, in units of half the action range.
    dataset: name of a registered dataset and its options.
    """

    source: Literal["expert", "dataset", "none"]
    episodes: int | None
    noise: float
    dataset: dict[str, Any] | None


class EvaluationConfig(_Struct, frozen=True):
    """Fresh-seed evaluation beside the training.

    episodes: per evaluation and task, on the same evaluation seeds each time. final_episodes: of
    the last weights. every_steps: at least this many gradient steps between two evaluations. rows:
    simulated robots of a task stepped together. videos: rollouts of a task filmed per evaluation.
    imagined: of how many of the newest recorded episodes the report shows at the end what a world
    model predicts.
    """

    episodes: int
    final_episodes: int
    every_steps: int
    rows: int
    videos: int
    imagined: int


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
    """Everything that defines a training run.

    task: one, or several that one policy learns, on equal robots. observations: what the policy
    reads of the robot: keys, or patterns that end in "*"; null for all, the pictures of sim.cameras
    included. All is recorded either way. instructions: words for recorded tasks by name, where they
    are not a registered task's own (see build.instruction). reward: a registered one and its
    options, which judges what actors record in the task's place; null for the task's own.
    Evaluations are always judged by the task. initial: folder of a policy, or of a run, with whose
    weights and normalisers the policy begins; null for fresh ones.
    """

    task: Tasks
    seed: int
    sim: SimConfig
    observations: tuple[str, ...] | None
    initial: str | None
    instructions: dict[str, str]
    run: RunConfig
    demonstrations: DemonstrationsConfig
    actors: ActorsConfig
    policy: dict[str, Any]
    algorithm: dict[str, Any]
    learner: LearnerConfig
    evaluation: EvaluationConfig
    buffer: BufferConfig
    sampling: SamplingConfig
    gateway: GatewayConfig
    reward: dict[str, Any] | None = None
    inference: InferenceConfig = msgspec.field(default_factory=InferenceConfig)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks."""
        return names_of(self.task)


class CollectConfig(_Struct, frozen=True):
    """Demonstrations by a task's scripted expert, or import of a dataset, into a buffer folder.

    reward: see TrainConfig.
    """

    task: str
    seed: int
    sim: SimConfig
    demonstrations: DemonstrationsConfig
    rows: int
    output: str
    reward: dict[str, Any] | None = None


class EvalConfig(_Struct, frozen=True):
    """Evaluation of a checkpoint or a run's newest weights.

    checkpoint: a policy folder or a run directory; null with inference.remote. version: of a run's
    weights, null for the newest. task, sim: null takes the run's own. episodes, videos: of each
    task.
    """

    checkpoint: str | None
    version: int | None
    task: Tasks | None
    sim: SimConfig | None
    episodes: int
    first_seed: int
    rows: int
    videos: int
    output: str | None
    inference: InferenceConfig = msgspec.field(default_factory=InferenceConfig)


def load_train(overrides: list[str]) -> TrainConfig:
    """Compose, type and check a training configuration."""
    composed = core_config.compose("train", overrides)
    return check(core_config.convert(composed, TrainConfig))


def check(config: TrainConfig) -> TrainConfig:
    """Raise ConfigError for values that contradict each other; return the same configuration."""
    algorithm, name = make_algorithm(config.algorithm), config.algorithm["name"]
    spec = _check_policy(config)
    check_critic(algorithm, spec.n_action_steps)
    observed = observed_spec(algorithm, device_of(config.tasks, config.sim), spec).observation
    options = core_config.options_of("policies", config.policy, "policy")
    check_density(algorithm, options)
    check_action_free(algorithm, options, config.sampling)
    evaluation = config.evaluation
    check_actor(algorithm, options, max(evaluation.episodes, evaluation.final_episodes))
    by_person = config.actors.teleoperator is not None
    if by_person and not algorithm.collects:
        raise ConfigError(
            f"actors.teleoperator takes over from a policy, and algorithm={name} lets none act: "
            "take hg_dagger, or another that collects"
        )
    _check_data(config, asks_expert=algorithm.asks_expert and not by_person)
    if config.reward is not None:
        device = device_of(config.tasks, config.sim)
        make_reward(config.reward, device, config.actors.operator)
    if algorithm.proposers and config.run.mode == "lockstep":
        raise ConfigError(
            "run.mode=lockstep repeats bit for bit; when processes beside the learner answer does "
            "not: set algorithm.proposers=0"
        )
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
            f"learner.samples_per_insert waits for new data, and {name} collects "
            "none: set it to null"
        )
    if config.run.resume and config.run.dir is None:
        raise ConfigError("run.resume=true needs run.dir: the directory of the run to continue")
    check_sampling(
        config.sampling,
        {k: a for k, a in observed.items() if k != TASK and not k.startswith(GOAL)},
        lambda path: ReplayReader(path, ram_bytes=config.buffer.ram_mib << 20),
    )
    expert = config.demonstrations.source == "expert"
    config.gateway.check(config.run.mode, algorithm.collects, config.actors.count, expert)
    config.actors.check(config.run.mode)
    check_robots(config.tasks, config.actors)
    if config.inference.remote is not None and config.run.mode == "lockstep":
        raise ConfigError("run.mode=lockstep repeats bit for bit; a policy server does not")
    if config.inference.device != "cpu":
        raise ConfigError(
            "inference.device=cuda is for embodied eval and record: a run leases its GPU for the "
            "learner alone"
        )
    if learner.device == "cuda":
        one_gpu(learner.gpu)
        if config.run.mode == "lockstep":
            raise ConfigError("run.mode=lockstep repeats bit for bit: it needs learner.device=cpu")
    _check_numbers(config)
    return config


def _check_policy(config: TrainConfig) -> PolicySpec:
    options = core_config.options_of("policies", config.policy, "policy")
    for kind, data, where in options.parts():
        core_config.options_of(kind, data, where)
    device = device_of(config.tasks, config.sim)
    keys = read_keys(device, config.observations)
    spec = policy_spec(device, keys, options)
    options.future_keys(spec.observation)
    goals = [key.removeprefix(GOAL) for key in spec.observation if key.startswith(GOAL)]
    if goals and (helpless := _without_expert(config, device)):
        raise ConfigError(
            f"policy.goals is {goals}: the goals of evaluations are what the task's scripted "
            f"expert ends with, and '{helpless[0]}' has none"
        )
    if told := spec.observation.get(TASK):
        words = [family.task_for(name, config.sim, None).instruction for name in config.tasks]
        for text in (*words, *config.instructions.values()):
            encode_instruction(text, told.size)
    if config.initial is not None:
        check_initial(Path(config.initial), config.policy["name"], spec)
    return spec


def _without_expert(config: TrainConfig, device: DeviceSpec) -> list[str]:
    """Those of the tasks that have no scripted expert."""
    return [name for name in config.tasks if family.expert_for(name, device) is None]


def _check_data(config: TrainConfig, *, asks_expert: bool) -> None:
    demonstrations = config.demonstrations
    if demonstrations.source == "dataset":
        core_config.options_of("datasets", demonstrations.dataset, "demonstrations.dataset")
    elif demonstrations.source == "none" and not config.run.resume:
        raise ConfigError(
            "demonstrations.source=none: nothing would ever be learned; use expert or dataset"
        )
    device = device_of(config.tasks, config.sim)
    needs_expert = demonstrations.source == "expert" or asks_expert
    if needs_expert and (helpless := _without_expert(config, device)):
        raise ConfigError(
            f"task '{helpless[0]}' has no scripted expert; use demonstrations.source=dataset and "
            "algorithm=bc"
        )
    if demonstrations.source == "expert" and not demonstrations.episodes:
        raise ConfigError("demonstrations.episodes must be at least 1 with source=expert")
    Codecs(config.buffer.codecs)
    if config.buffer.max_gib is not None and not config.buffer.max_gib > 0:
        raise ConfigError(f"buffer.max_gib is {config.buffer.max_gib}; it must be positive or null")


_AT_LEAST = {
    1: {
        "actors": ("rows", "ticks_per_round"),
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
        "actors": ("count", "speed"),
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
    for field in (
        "task",
        "seed",
        "sim",
        "observations",
        "initial",
        "instructions",
        "reward",
        "demonstrations",
        "policy",
        "algorithm",
    ):
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

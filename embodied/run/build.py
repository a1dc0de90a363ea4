"""What a run's configuration builds; shared by the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.sampling import Sampling, open_sampling
from embodied.buffer.sample.statistics import FeatureStats
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.serve.sink import LocalBuffer, StepSink
from embodied.core.config import component, convert, options_of
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK
from embodied.core.protocols import Policy
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.core.specs import DeviceSpec, PolicySpec
from embodied.learn.parl import PARL
from embodied.run.algorithm import (
    critic_options,
    critic_spec,
    improvement_options,
    make_algorithm,
    observed_spec,
)
from embodied.run.config import DemonstrationsConfig, TrainConfig
from embodied.run.evaluate import summarise_tasks
from embodied.run.observing import read_keys
from embodied.run.record import import_dataset
from embodied.run.remote.policy import connect
from embodied.run.tasks import device_of
from embodied.weights.governor import PublishGovernor
from embodied.weights.store import WeightStore
from embodied.weights.trial import Trial
from policies import specs
from policies.configs import ChunkConfig
from policies.initial import begin_with
from sim import family
from sim.family import SimConfig

if TYPE_CHECKING:  # they load torch, which not every role needs
    from embodied.learn.learner import PolicyFormat
    from embodied.learn.proposers import Proposers
    from embodied.learn.trainer import StartLoader, Trainer
    from policies.acting import InferenceConfig
    from policies.inference.policy import ActingPolicy

MIB = 1 << 20


def device_spec(config: TrainConfig) -> DeviceSpec:
    """Spec of the run's robots, without opening one."""
    return device_of(config.tasks, config.sim)


def window_spec(config: TrainConfig) -> WindowSpec:
    """Which windows the run's algorithm learns from."""
    spec, algorithm = policy_spec(config), make_algorithm(config.algorithm)
    options: ChunkConfig | specs.KnowsSpec = options_of("policies", config.policy, "policy")
    windows = msgspec.structs.replace(
        windows_of(observed_spec(algorithm, device_spec(config), spec)),
        future=options.future,
        future_keys=options.future_keys(spec.observation),
    )
    return algorithm.windows(windows, spec.n_action_steps)


def windows_of(spec: PolicySpec) -> WindowSpec:
    """Which windows a policy learns from."""
    text = spec.observation.get(TASK)
    return WindowSpec(
        spec.n_obs_steps,
        spec.horizon,
        tuple(k for k in spec.observation if k != TASK and not k.startswith(GOAL)),
        task_bytes=0 if text is None else text.size,
        goal_keys=tuple(k.removeprefix(GOAL) for k in spec.observation if k.startswith(GOAL)),
    )


def policy_spec(config: TrainConfig) -> PolicySpec:
    """What the run's policy reads and produces."""
    options = options_of("policies", config.policy, "policy")
    device = device_spec(config)
    return specs.policy_spec(device, read_keys(device, config.observations), options)


def instruction(config: TrainConfig, task: str) -> str:
    """A recorded task in words: as configured, else as the registered task of this name says, else
    its name, which imported data sets have in words."""
    return config.instructions.get(task) or task_words(task)


def task_words(task: str) -> str:
    """What the registered task of this name says, else the name."""
    try:
        found, name = family.find(task)
    except ConfigError:
        return task
    return found.make_task(name, SimConfig()).instruction


def policy_format(config: TrainConfig, proposers: Proposers | None = None) -> PolicyFormat:
    """How the run's policies are made, are trained, and become data and come back."""
    from embodied.learn.learner import PolicyFormat
    from policies.build import build_critic, build_policy
    from policies.checkpoint import policy_from_state, policy_state
    from policies.improved import improved
    from policies.normalizer import is_image

    windows, algorithm = window_spec(config), make_algorithm(config.algorithm)
    device = device_spec(config)

    def make(statistics: Mapping[str, FeatureStats]) -> Any:
        options = {key: value for key, value in config.policy.items() if key != "name"}
        policy = build_policy(
            config.policy["name"],
            options,
            device,
            read_keys(device, config.observations),
            statistics,
            seed=derive_seed(config.seed, "initial weights"),
        )
        if config.initial is not None:
            begin_with(policy, Path(config.initial))
        if algorithm.critic is None:
            return policy
        judged = critic_options(algorithm, policy.spec.n_action_steps)
        seed = derive_seed(config.seed, "initial critic")
        spec = critic_spec(algorithm, device, policy.spec)
        critic = build_critic(judged, spec, statistics, seed=seed)
        return improved(policy, critic, improvement_options(algorithm))

    found = device.observation
    states = [key for key in windows.observation_keys if not is_image(key, found[key])]
    keys = (*states, "action")
    updates = algorithm.updates
    if proposers is not None:
        assert isinstance(algorithm, PARL), algorithm
        updates = partial(algorithm.updates, proposers=proposers)
    return PolicyFormat(keys, make, policy_state, policy_from_state, updates)


def make_trainer(
    run: RunDir,
    config: TrainConfig,
    on_metrics: Callable[[dict[str, Any]], None],
    start_loader: StartLoader | None = None,
    governor: PublishGovernor | None = None,
    proposers: Proposers | None = None,
) -> Trainer:
    """The learner's side of the run; with start_loader, its batches come from that process; with
    a governor, that says when weights go out; with proposers, they draw chunks beside it."""
    from embodied.learn.publishing import Publisher
    from embodied.learn.trainer import Trainer

    return Trainer(
        buffer=run.buffer,
        ram_bytes=config.buffer.ram_mib * MIB,
        publisher=Publisher(
            WeightStore(run.weights), config.learner, sitting=run.sitting(), governor=governor
        ),
        checkpoint=run.checkpoints,
        open_sampling=lambda reader: make_sampling(config, reader),
        policy_format=policy_format(config, proposers),
        algorithm=make_algorithm(config.algorithm),
        config=config.learner,
        seed=config.seed,
        on_metrics=on_metrics,
        start_loader=start_loader,
    )


def make_local_buffer(run: RunDir, config: TrainConfig) -> LocalBuffer:
    """The run's buffer, to be written by this process."""
    return LocalBuffer(
        run.buffer,
        segment_bytes=config.buffer.segment_mib * MIB,
        codecs=config.buffer.codecs,
        retention=config.buffer.retention,
    )


def make_reader(run: RunDir, config: TrainConfig) -> ReplayReader:
    """A reader of the run's buffer."""
    return ReplayReader(run.buffer, ram_bytes=config.buffer.ram_mib * MIB)


def make_sampling(config: TrainConfig, reader: ReplayReader) -> Sampling:
    """What the run's learner learns from."""
    return open_sampling(
        config.sampling,
        reader,
        window_spec(config),
        make_algorithm(config.algorithm).sources(),
        lambda path: ReplayReader(path, ram_bytes=config.buffer.ram_mib * MIB),
        partial(instruction, config),
    )


def import_demonstrations(
    sink: StepSink, demonstrations: DemonstrationsConfig, tasks: Sequence[str]
) -> tuple[int, int] | None:
    """Import the configured dataset, if there is one; returns (episodes, steps)."""
    if demonstrations.source != "dataset":
        return None
    cls, options = component("datasets", demonstrations.dataset or {}, "demonstrations.dataset")
    dataset = cls(options)
    if foreign := sorted(dataset.tasks - set(tasks)):
        raise ConfigError(
            f"demonstrations.dataset holds episodes of {', '.join(foreign)}, and the run's task is "
            f"{', '.join(tasks)}; foreign formats have options to rename (task) and choose them "
            "(only_tasks)"
        )
    return import_dataset(sink, dataset.episodes(demonstrations.episodes))


def demonstrations_wanted(config: TrainConfig) -> int:
    """How many whole demonstrations must be there before training starts: of a dataset, which is
    there from the beginning, none, and without either source what a person will record."""
    demonstrations = config.demonstrations
    if demonstrations.source == "expert":
        return len(config.tasks) * (demonstrations.episodes or 0)
    return 0 if demonstrations.source == "dataset" else 1


def evaluation_row(
    version: int, metadata: Mapping[str, Any], final: bool, results: list[Any]
) -> dict[str, Any]:
    """One row of metrics/evaluation.jsonl: summary and each episode, task by task.

    metadata: of the weights. Training time is left out where it must not matter (lockstep).
    """
    return {
        "version": version,
        "step": metadata["step"],
        "train_seconds": metadata.get("seconds"),
        "final": final,
        **summarise_tasks(results),
        "seeds": [r.seed for r in results],
        "success": [r.success for r in results],
        "ticks": [r.ticks for r in results],
        "peaks": [r.peaks for r in results],
    }


def film_paths(run: RunDir, config: TrainConfig, label: str) -> dict[str, dict[int, Path]]:
    """Where the films of an evaluation's first seeds go, by task."""
    return films_of(config.tasks, range(config.evaluation.videos), run.path / "videos", f"{label}-")


def films_of(
    tasks: Sequence[str], seeds: Sequence[int], folder: Path, label: str = ""
) -> dict[str, dict[int, Path]]:
    """Where films go, by task and seed; a task's name is part of theirs if there are several."""
    named = {task: f"{task.replace('/', '-')}-" if len(tasks) > 1 else "" for task in tasks}
    return {
        task: {seed: folder / f"{label}{name}seed{seed}.mp4" for seed in seeds}
        for task, name in named.items()
    }


def acting_policy(
    path: Path, inference: InferenceConfig, *, rows: int, version: int | None = None
) -> tuple[ActingPolicy, int, TrainConfig | None]:
    """A stored policy, ready to act in batches of so many rows; sets the process's threads.

    version: see stored_policy.
    """
    import torch

    from policies.inference.policy import ActingPolicy

    torch.set_num_threads(inference.threads)
    policy, version, stored = stored_policy(path, version)
    return ActingPolicy(policy, inference, rows=rows), version, stored


def deciding_policy(
    path: Path | None, inference: InferenceConfig, *, rows: int, version: int | None = None
) -> tuple[Policy, int, TrainConfig | None]:
    """What decides: the stored policy, or the one that is served at inference.remote, with the
    stored one as its fallback if that is asked for. version: see stored_policy.

    ConfigError for too few or too many of them, LinkError if no policy server is ready within
    inference.patience_s.
    """
    if inference.remote is None:
        if path is None:
            raise ConfigError("name who decides: checkpoint=..., or inference.remote=...")
        return acting_policy(path, inference, rows=rows, version=version)
    if version is not None and path is None:
        raise ConfigError(
            f"version={version} is of a run's weights; what inference.remote={inference.remote} "
            "serves is chosen there"
        )
    if inference.fallback != (path is not None):
        raise ConfigError(
            f"inference.remote={inference.remote} decides: leave checkpoint null, or set "
            "inference.fallback=true and checkpoint to the policy that decides when it does not"
        )
    local, version, stored = (
        (None, -1, None)
        if path is None
        else acting_policy(path, inference, rows=rows, version=version)
    )
    remote = connect(
        inference.remote,
        patience_s=inference.patience_s,
        connect_s=inference.patience_s,
        local=local,
        local_version=version,
    )
    return remote, remote.version, stored


def stored_policy(path: Path, version: int | None = None) -> tuple[Any, int, TrainConfig | None]:
    """Policy and version of a policy folder, or of a run's weights with its configuration: this
    version, else the newest, unless others are pinned or newer ones are on trial.

    The directory of a search for weights stands for the composed policy in it.
    Raises ConfigError if the path is neither, or the run has no such weights.
    """
    from policies.checkpoint import load_policy, policy_from_state

    run = RunDir(path)
    folder = path if (path / "model.safetensors").exists() else None
    if folder is None and not run.exists():
        raise ConfigError(f"checkpoint={path} is neither a policy folder nor a run directory")
    config = {} if folder is not None else run.read_config()
    if "policies" in config:
        folder = path / "policy"
    if folder is not None:
        if version is not None:
            raise ConfigError(f"{path} has one set of weights: leave version={version} out")
        return load_policy(folder), -1, None
    stored = convert(config, TrainConfig)
    store = WeightStore(run.weights)
    if version is None:
        version = Trial(store).offered()
    if version is None:
        raise ConfigError(f"{path} has published no weights yet")
    if version not in store.versions():
        raise ConfigError(
            f"{path} has no weights version {version}; there are "
            f"{', '.join(map(str, store.versions()))} (a run keeps the newest learner.weights_kept "
            "and those that are pinned)"
        )
    arrays, manifest = store.load(version)
    return policy_from_state(manifest.config, arrays), version, stored

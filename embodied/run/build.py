"""What a run's configuration builds; shared by the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.statistics import FeatureStats
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.serve.sink import LocalBuffer, StepSink
from embodied.core.config import component, convert
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed
from embodied.core.specs import DeviceSpec
from embodied.run.actor import make_algorithm
from embodied.run.config import DemonstrationsConfig, TrainConfig
from embodied.run.evaluate import summarise
from embodied.run.record import import_dataset
from embodied.weights.store import WeightStore
from sim import family

if TYPE_CHECKING:  # they load torch, which not every role needs
    from embodied.learn.learner import PolicyFormat
    from embodied.learn.trainer import StartLoader, Trainer

MIB = 1 << 20


def device_spec(config: TrainConfig) -> DeviceSpec:
    """Spec of the run's robots, without opening one."""
    found, task = family.find(config.task)
    return found.make_driver(task, config.sim).spec


def window_spec(config: TrainConfig) -> WindowSpec:
    """Which windows the run's policy learns from: all observations but pictures."""
    _, options = component("policies", config.policy, "policy")
    keys = tuple(key for key in device_spec(config).observation if ".images." not in key)
    return WindowSpec(options.n_obs_steps, options.horizon, keys)


def policy_format(config: TrainConfig) -> PolicyFormat:
    """How the run's policies are made from statistics, and become data and come back."""
    from embodied.learn.learner import PolicyFormat
    from policies.build import build_policy
    from policies.checkpoint import policy_from_state, policy_state

    def make(statistics: Mapping[str, FeatureStats]) -> Any:
        options = {key: value for key, value in config.policy.items() if key != "name"}
        return build_policy(
            config.policy["name"],
            options,
            device_spec(config),
            window_spec(config).observation_keys,
            statistics,
            seed=derive_seed(config.seed, "initial weights"),
        )

    return PolicyFormat(make, policy_state, policy_from_state)


def make_trainer(
    run: RunDir,
    config: TrainConfig,
    on_metrics: Callable[[dict[str, Any]], None],
    start_loader: StartLoader | None = None,
) -> Trainer:
    """The learner's side of the run; with start_loader, its batches come from that process."""
    from embodied.learn.trainer import Trainer

    return Trainer(
        buffer=run.buffer,
        ram_bytes=config.buffer.ram_mib * MIB,
        weights=WeightStore(run.weights),
        checkpoint=run.checkpoints,
        window=window_spec(config),
        policy_format=policy_format(config),
        algorithm=make_algorithm(config),
        config=config.learner,
        seed=config.seed,
        sitting=run.sitting(),
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


def make_sampler(config: TrainConfig, reader: ReplayReader) -> WindowSampler:
    """What the run's learner learns from."""
    return WindowSampler(reader, window_spec(config), select=make_algorithm(config).select)


def import_demonstrations(
    sink: StepSink, demonstrations: DemonstrationsConfig, task: str
) -> tuple[int, int] | None:
    """Import the configured dataset, if there is one; returns (episodes, steps)."""
    if demonstrations.source != "dataset":
        return None
    cls, options = component("datasets", demonstrations.dataset or {}, "demonstrations.dataset")
    dataset = cls(options)
    if dataset.task != task:
        raise ConfigError(
            f"demonstrations.dataset holds task '{dataset.task}', the run's task is '{task}'"
        )
    return import_dataset(sink, dataset.episodes(demonstrations.episodes))


def demonstrations_wanted(config: TrainConfig) -> int:
    """How many whole demonstrations must be there before training starts."""
    if config.demonstrations.source == "expert":
        return config.demonstrations.episodes or 0
    return 1


def evaluation_row(
    version: int, metadata: Mapping[str, Any], final: bool, results: list[Any]
) -> dict[str, Any]:
    """One row of metrics/evaluation.jsonl: summary and each episode.

    metadata: of the weights. Training time is left out where it must not matter (lockstep).
    """
    return {
        "version": version,
        "step": metadata["step"],
        "train_seconds": metadata.get("seconds"),
        "final": final,
        **summarise(results),
        "seeds": [r.seed for r in results],
        "success": [r.success for r in results],
        "ticks": [r.ticks for r in results],
        "peaks": [r.peaks for r in results],
    }


def film_paths(run: RunDir, seeds: range, label: str) -> dict[int, Path]:
    """Where the films of the first seeds go."""
    return {seed: run.path / "videos" / f"{label}-seed{seed}.mp4" for seed in seeds}


def stored_policy(path: Path) -> tuple[Any, int, TrainConfig | None]:
    """Policy and version of a policy folder, or of a run's newest weights with its configuration.

    Raises ConfigError if the path is neither, or the run has published nothing yet.
    """
    from policies.checkpoint import load_policy, policy_from_state

    run = RunDir(path)
    if (path / "model.safetensors").exists():
        return load_policy(path), -1, None
    if not run.exists():
        raise ConfigError(f"checkpoint={path} is neither a policy folder nor a run directory")
    stored = convert(run.read_config(), TrainConfig)
    store = WeightStore(run.weights)
    version = store.latest_version()
    if version is None:
        raise ConfigError(f"{path} has published no weights yet")
    arrays, manifest = store.load(version)
    return policy_from_state(manifest.config, arrays), version, stored

"""How a learner's batches are drawn, as a configuration: draw strategies and further sources."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.buffer.log.segments import list_segments
from embodied.buffer.read.replay import EpisodeInfo, ReplayReader
from embodied.buffer.sample.action_free import ActionFreeReader
from embodied.buffer.sample.draws import DrawStrategy
from embodied.buffer.sample.samplers import (
    Sampler,
    Select,
    StepFlags,
    WindowSampler,
    WindowSpec,
    select_all,
)
from embodied.buffer.sample.sources import MixtureSampler
from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec

OWN = "own"
"""The source that the run itself records; its parts, if it has several, are named OWN.PART."""


@dataclass(frozen=True, slots=True)
class OwnSource:
    """A part of what the run records. share: of what it gives to batches. optional: nothing of it
    may be there yet; the others then give its part as well."""

    select: Select
    share: float = 1.0
    optional: bool = False


class SourceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Data recorded earlier, which stay as they are.

    path: a buffer's folder, or a run's. ratio: its part of every batch, relative to the others'.
    actions: whether what was done is learned from; without, all steps of all complete episodes
    show what is seen, and their actions, whatever robot's, are no labels. draw: see
    SamplingConfig.
    """

    path: str
    ratio: float = 1.0
    actions: bool = True
    draw: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "uniform"})


class SamplingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """draw: name of a draw strategy (uniform, recency, weighted, stratified) and its options.
    ratio: the part of every batch that comes from what the run records. sources: name → what
    else batches are mixed from, in exact ratios (see sources.Quotas).
    """

    draw: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "uniform"})
    ratio: float = 1.0
    sources: dict[str, SourceConfig] = {}

    def __post_init__(self) -> None:
        """Raise ConfigError for a source that takes the run's own name."""
        for name in self.sources:
            if name.partition(".")[0] == OWN:
                raise ConfigError(
                    f"sampling.sources: '{OWN}' is what the run records; rename '{name}'"
                )


def check_sampling(
    config: SamplingConfig,
    observed: Mapping[str, ArraySpec],
    open_reader: Callable[[Path], ReplayReader],
) -> None:
    """Raise ConfigError for what open_sampling would refuse, as far as it shows before.

    observed: what the policy reads of the robot, which every source must have.
    """
    _make_draw(config.draw, "sampling.draw")
    for name, source in config.sources.items():
        where = f"sampling.sources.{name}"
        _make_draw(source.draw, f"{where}.draw")
        with open_reader(_buffer_folder(source, name)) as reader:
            reader.refresh()
            _check_observed(reader, observed, where)


def _check_observed(reader: ReplayReader, observed: Mapping[str, ArraySpec], where: str) -> None:
    recorded = {feature.name for schema in reader.schemas for feature in schema.observation}
    if missing := [key for key in observed if key not in recorded]:
        common = [key for key in observed if key in recorded]
        choice = (
            f"observations=[{', '.join(common)}] makes it read what both have"
            if common
            else f"the source has {', '.join(sorted(recorded)) or 'nothing'}"
        )
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}, which the policy is to read; {choice}"
        )
    for key, array in observed.items():
        feature = reader.feature(key)
        if (feature.dtype, feature.shape) != (array.dtype, array.shape):
            raise ConfigError(
                f"{where}: {key} is {feature} there and {array.dtype} {list(array.shape)} of the "
                "robot; sources must agree with it"
            )


@dataclass(frozen=True, slots=True)
class Sampling:
    """A sampler, and the readers of further sources that it needs."""

    sampler: Sampler[Any]
    readers: tuple[ReplayReader, ...] = ()

    def close(self) -> None:
        """Close these readers; safe to call twice."""
        for reader in self.readers:
            reader.close()


def open_sampling(
    config: SamplingConfig,
    reader: ReplayReader,
    spec: WindowSpec,
    own: Mapping[str, OwnSource],
    open_reader: Callable[[Path], ReplayReader],
    instruction: Callable[[str], str] = str,
) -> Sampling:
    """The sampler over the run's reader and all sources, as these are now.

    own: names and parts of what the run records; of further sources with actions those steps
    are taken that any part would take. instruction: see WindowSampler. Raises ConfigError for
    an unknown strategy, wrong options, or a source without data.
    """
    samplers = {
        name: WindowSampler(
            reader,
            spec,
            part.select,
            _make_draw(config.draw, "sampling.draw"),
            instruction=instruction,
        )
        for name, part in own.items()
    }
    if len(own) == 1 and not config.sources:
        return Sampling(next(iter(samplers.values())))
    shares = sum(part.share for part in own.values())
    ratios = {name: config.ratio * part.share / shares for name, part in own.items()}
    readers: list[ReplayReader] = []
    try:
        for name, source in config.sources.items():
            where = f"sampling.sources.{name}"
            draw = _make_draw(source.draw, f"{where}.draw")
            found = open_reader(_buffer_folder(source, name))
            readers.append(found)
            found.refresh()
            steps = found if source.actions else ActionFreeReader(found, reader)
            chosen = _any_of(own) if source.actions else select_all
            samplers[name] = WindowSampler(steps, spec, chosen, draw, instruction=instruction)
            if samplers[name].num_candidates == 0:
                raise ConfigError(
                    f"{where}: of {found.num_closed} episodes in {source.path} no step is selected "
                    "for learning; failed episodes need algorithm.only_successful=false, and what "
                    "nobody demonstrated actions=false"
                )
            ratios[name] = source.ratio
        optional = [name for name, part in own.items() if part.optional]
        return Sampling(MixtureSampler(samplers, ratios, optional), tuple(readers))
    except BaseException:
        for found in readers:
            found.close()
        raise


def _any_of(own: Mapping[str, OwnSource]) -> Select:
    def select(episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
        return np.any([part.select(episode, flags) for part in own.values()], axis=0)

    return select


def _make_draw(options: dict[str, Any], where: str) -> DrawStrategy:
    cls, config = component("draws", options, where)
    if cls.has_weights:
        raise ConfigError(
            f"{where}.name={options['name']} draws by priorities, which no algorithm sets; it is "
            "for a sampler of your own in Python"
        )
    return cls(config)


def _buffer_folder(source: SourceConfig, name: str) -> Path:
    path = Path(source.path)
    for folder in (path, path / "buffer"):
        if list_segments(folder):
            return folder
    raise ConfigError(
        f"sampling.sources.{name}.path={path} is neither a buffer's folder nor a run's: it has no "
        "segments"
    )

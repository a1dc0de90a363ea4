"""What a buffer folder holds, in numbers."""

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from embodied.buffer.steps.schema import Schema
from embodied.buffer.upkeep.contents import Contents, Episode


class FeatureInfo(msgspec.Struct, frozen=True):
    """An array of every step, and how it is stored."""

    dtype: str
    shape: tuple[int, ...]
    codec: str


class SchemaInfo(msgspec.Struct, frozen=True):
    """What the steps of some streams consist of: observation features, and "action"."""

    streams: tuple[str, ...]
    features: dict[str, FeatureInfo]


class Totals(msgspec.Struct, frozen=True):
    """Of some episodes: how many, complete ones, successful ones, actions, and how many of these
    an expert or a person took. policy_versions: lowest and highest that acted."""

    episodes: int
    closed: int
    successes: int
    steps: int
    interventions: int
    policy_versions: tuple[int, int] | None


class Place(msgspec.Struct, frozen=True):
    """Where a segment is damaged."""

    file: str
    offset: int


class Summary(msgspec.Struct, frozen=True):
    """nbytes: of all files; segment_bytes: of the segments. unfinished: episodes that go on, or
    were never closed. deleted: episodes that compaction would drop. policy_versions: steps of
    each. damaged: found when the segments were written or opened; verify reads everything."""

    path: str
    nbytes: int
    segments: int
    open_segments: int
    segment_bytes: int
    total: Totals
    unfinished: int
    deleted: int
    streams: dict[str, Totals]
    tasks: dict[str, Totals]
    policy_versions: dict[int, int]
    schemas: tuple[SchemaInfo, ...]
    damaged: tuple[Place, ...]


def summarise(path: Path) -> Summary:
    """Look into a buffer folder, also while it is being written. Raises ConfigError if there is
    none."""
    contents = Contents(path)
    episodes = contents.episodes.values()
    versions: dict[int, int] = {}
    for episode in episodes:
        for version, steps in episode.versions.items():
            versions[version] = versions.get(version, 0) + steps
    names = {segment.number: segment.path.name for segment in contents.segments}
    total = _totals(episodes)
    return Summary(
        path=str(path),
        nbytes=sum(entry.stat().st_size for entry in Path(path).iterdir() if entry.is_file()),
        segments=len(contents.segments),
        open_segments=sum(not segment.sealed for segment in contents.segments),
        segment_bytes=contents.nbytes,
        total=total,
        unfinished=total.episodes - total.closed,
        deleted=len(contents.gone),
        streams=_grouped(episodes, lambda episode: episode.key[0]),
        tasks=_grouped(episodes, lambda episode: episode.task),
        policy_versions=dict(sorted(versions.items())),
        schemas=_schemas(contents),
        damaged=tuple(Place(names[number], offset) for number, offset in contents.damaged),
    )


def _grouped(episodes: Iterable[Episode], by: Callable[[Episode], str]) -> dict[str, Totals]:
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(by(episode), []).append(episode)
    return {name: _totals(group) for name, group in sorted(groups.items())}


def _totals(episodes: Iterable[Episode]) -> Totals:
    found = list(episodes)
    versions = [version for episode in found for version in episode.versions]
    return Totals(
        episodes=len(found),
        closed=sum(episode.closed for episode in found),
        successes=sum(episode.success for episode in found),
        steps=sum(episode.steps for episode in found),
        interventions=sum(episode.interventions for episode in found),
        policy_versions=(min(versions), max(versions)) if versions else None,
    )


def _schemas(contents: Contents) -> tuple[SchemaInfo, ...]:
    streams: dict[Schema, list[str]] = {}
    for stream, schemas in contents.stream_schemas().items():
        for schema in schemas:
            streams.setdefault(schema, []).append(stream)
    return tuple(
        SchemaInfo(
            tuple(names),
            {
                feature.name: FeatureInfo(feature.dtype, feature.shape, feature.codec)
                for feature in (*schema.observation, schema.action)
            },
        )
        for schema, names in streams.items()
    )

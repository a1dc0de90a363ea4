"""Options of `embodied buffer`: key=value words, typed."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T")
Names = tuple[str, ...] | str


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Info(_Options, frozen=True):
    """path: a buffer folder; it may be in use."""

    path: str


class Verify(_Options, frozen=True):
    """path: a buffer folder; it may be in use."""

    path: str


class Merge(_Options, frozen=True):
    """sources: buffer folders. to: the folder that gets all of them, new or not.
    drop_damaged: leave out episodes that have lost steps."""

    sources: Names
    to: str
    drop_damaged: bool = False
    segment_mib: int = 128


class Split(_Options, frozen=True):
    """path: a buffer folder. to: new folder for what is chosen. rest: for all else, if given.
    streams, tasks, episodes: what to choose."""

    path: str
    to: str
    rest: str | None = None
    streams: Names = ()
    tasks: Names = ()
    episodes: tuple[int, ...] | int = ()
    drop_damaged: bool = False
    segment_mib: int = 128


class Compact(_Options, frozen=True):
    """path: a buffer folder that nobody writes or reads."""

    path: str
    drop_damaged: bool = False
    segment_mib: int = 128


class Export(_Options, frozen=True):
    """path: a buffer folder. to: new folder. fps: None: by the steps' times. images: as video or
    as image (lossless). final: with final observations. Which episodes: as split, successful ones
    alone, and at most `limit`."""

    path: str
    to: str
    format: Literal["lerobot"] = "lerobot"
    fps: int | None = None
    images: Literal["video", "image"] = "video"
    final: bool = True
    streams: Names = ()
    tasks: Names = ()
    episodes: tuple[int, ...] | int = ()
    successful: bool = False
    limit: int | None = None


class Import(_Options, frozen=True):
    """to: a buffer folder, new or not. format: a registered data set; all other keys are its
    options. limit: most episodes. codecs: observation key or pattern → codec."""

    to: str
    format: str
    limit: int | None = None
    codecs: dict[str, str] = {}
    segment_mib: int = 128


ACTIONS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "info": (Info, "what a buffer holds (--json for programs)"),
    "verify": (Verify, "read everything and name what is damaged; status 1 if data are lost"),
    "export": (Export, "complete episodes as a LeRobotDataset v3"),
    "import": (Import, "episodes of a data set: lerobot, robomimic, videos, recorded, …"),
    "merge": (Merge, "several buffers into one"),
    "split": (Split, "some episodes into a buffer of their own"),
    "compact": (Compact, "give back the space of deleted episodes"),
}


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """key=value words as a tree; values are YAML, as everywhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from embodied.core.errors import ConfigError

    for word in arguments:
        if "=" not in word:
            raise ConfigError(f"'{word}' is no key=value; a folder is given as path={word}")
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"options cannot be read: {str(error).splitlines()[0]}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def convert(given: dict[str, Any], kind: type[T], action: str) -> T:
    """The options of an action. Raises ConfigError that lists its keys."""
    from embodied.core import config

    try:
        return config.convert(given, kind)
    except config.ConfigError as error:
        if "Known:" in str(error):
            raise
        known = " ".join(getattr(kind, "__struct_fields__", ()))
        raise config.ConfigError(f"{error} (keys of {action}: {known})") from error

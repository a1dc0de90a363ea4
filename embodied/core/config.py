"""Typed configuration: Hydra composes YAML, msgspec types it once, unknown keys fail."""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import msgspec

from embodied.core import registry
from embodied.core.errors import ConfigError

T = TypeVar("T")

_UNKNOWN = re.compile(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?")


def convert(data: Mapping[str, Any], kind: type[T], where: str = "") -> T:
    """`data` as a struct of type `kind`; a ConfigError names the key and the nearest one."""
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        match = _UNKNOWN.search(str(error))
        if match is None:
            text = str(error).replace("`$.", f"`{where}." if where else "`").replace("`$`", where)
            raise ConfigError(f"configuration: {text}") from error
        field, path = match[1], match[2] or ""
        owner = _struct_at(kind, path)
        label = ".".join(part for part in (where, path) if part)
        name = f"{label}.{field}" if label else field
        raise registry.unknown("key", name, _fields(owner, label)) from error


def options_of(kind: str, data: Any, where: str) -> Any:
    """Typed Config of the class registered under data["name"], made of the other keys; a class
    that loads torch is not imported for it (registry.OPTIONS)."""
    options: dict[str, Any] = (
        dict(typing.cast("Mapping[str, Any]", data)) if isinstance(data, Mapping) else {}
    )
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}: name is missing; known: {', '.join(registry.names(kind))}")
    return convert(options, registry.config_type(kind, name), where)


def component(kind: str, data: Any, where: str) -> tuple[Any, Any]:
    """Class registered under data["name"], and its typed Config as `options_of` makes it."""
    options = options_of(kind, data, where)
    return registry.resolve(kind, data["name"]), options


def compose(primary: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `configs/<primary>.yaml` with Hydra overrides into plain dicts and lists.

    Where its defaults have a group at a key (teleoperator@actors.teleoperator), key=choice chooses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    with initialize_config_module("configs", version_base="1.3"):
        try:
            config = hydra_compose(primary, _choosing(primary, overrides))
            composed = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise _readable(primary, overrides, error) from error
    assert isinstance(composed, dict)
    return typing.cast("dict[str, Any]", composed)


def _choosing(primary: str, overrides: Sequence[str]) -> list[str]:
    """Overrides in which key=choice has become group@key=choice, where there is such a group."""
    from omegaconf import OmegaConf

    text = (resources.files("configs") / f"{primary}.yaml").read_text()
    composed = typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(text)))
    entries: list[dict[str, Any] | str] = composed.get("defaults", [])
    names = [name for entry in entries if isinstance(entry, dict) for name in entry]
    groups = {name.partition("@")[2]: name for name in names if "@" in name}

    def choosing(override: str) -> str:
        key, _, choice = override.partition("=")
        names_one = key in groups and choice.isidentifier() and choice != "null"
        return f"{groups[key]}={choice}" if names_one else override

    return [choosing(override) for override in overrides]


def _readable(primary: str, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Name the override that Hydra refused and the nearest key or choice, or what is missing."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(
            f"configuration: {error.full_key} is missing: add {error.full_key}=VALUE "
            f"(configs/{primary}.yaml and what it names say which)"
        )
    if missing := re.search(r"Could not find '([^']+)'", text):
        group, _, choice = missing[1].rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        if options:
            return registry.unknown(f"choice for '{group}'", choice, options)
    if key := re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    ):
        known = sorted(_paths(OmegaConf.to_container(hydra_compose(primary))))
        name = next((o.split("=")[0] for o in overrides if key[1] in o.split("=")[0]), key[1])
        depth = name.count(".")
        near = [path for path in known if path.count(".") == depth] or known
        return registry.unknown("key", name.lstrip("+~"), near)
    given = f" (overrides: {' '.join(overrides)})" if overrides else ""
    return ConfigError(f"configuration: {text.splitlines()[0]}{given}")


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, dict):
        return
    for key, value in typing.cast("dict[str, Any]", node).items():
        yield prefix + key
        yield from _paths(value, f"{prefix}{key}.")


def _fields(kind: Any, prefix: str) -> list[str]:
    fields: tuple[str, ...] = getattr(kind, "__struct_encode_fields__", ())
    return [f"{prefix}.{field}" if prefix else field for field in fields]


def _struct_at(kind: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        kind = typing.get_type_hints(kind).get(part)
        options: list[Any] = [*typing.get_args(kind), kind]
        kind = next((k for k in options if hasattr(k, "__struct_fields__")), None)
    return kind

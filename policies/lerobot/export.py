"""What a policy folder that LeRobot 0.4 exported says of itself; no code of it is run.

The folder: config.json, model.safetensors, policy_preprocessor.json, policy_postprocessor.json and
the statistics that these name. A processor file may name any class that can be imported, so its
steps are read here, by name, and no others than STEPS are accepted.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.registry import unknown
from policies.folder import CONFIG, MODEL, read_bytes, read_json

Mode = Literal["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"]
STATISTICS: dict[Mode, tuple[str, str]] = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""What each mode is made of."""

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
RENAMER, TOKENIZER = "rename_observations_processor", "tokenizer_processor"
NEWLINES = ("smolvla_new_line_processor", "pi0_new_line_processor")
STATE_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
ARRANGED = ("device_processor", "to_batch_processor")
"""Steps that arrange what is here arranged already."""

STEPS = {
    PREPROCESSOR: (*ARRANGED, *NEWLINES, NORMALIZER, RENAMER, STATE_PROMPT, TOKENIZER),
    POSTPROCESSOR: (*ARRANGED, UNNORMALIZER),
}
PATCHED = ("pi0", "pi05", "pi0_fast")
"""Types that need a patched transformers."""

BACKBONE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Files of a language model's folder that are read, those of them that are there."""

MAX_STATISTICS_BYTES = 1 << 24
_ONE_MIB = 1 << 20


class Tokenizing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How instructions become tokens. newline: each ends with one. state_size: π0.5's prompt tells
    the state as well, filled up to so many numbers; None for no such prompt."""

    max_length: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 512
    padding: Literal["longest", "max_length"] = "max_length"
    padding_side: Literal["left", "right"] = "right"
    newline: bool = False
    state_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output of a LeRobot policy; pictures have shape [3, height, width]."""

    type: Literal["STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE"]
    shape: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]


class _Step(msgspec.Struct, kw_only=True):
    """A step of a processor file; a class in the place of a registered name is never imported."""

    registry_name: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    config: dict[str, Any] = {}
    state_file: str | None = None


class _Typed(msgspec.Struct):
    type: str


class _Normalizing(msgspec.Struct, kw_only=True):
    """Options of the steps that normalise."""

    features: dict[str, _Typed] = {}
    norm_map: dict[str, str] = {}
    eps: float = 1e-8
    normalize_observation_keys: list[str] | None = None


class _Renaming(msgspec.Struct, kw_only=True):
    rename_map: dict[str, str] = {}


T = TypeVar("T")


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """model: LeRobot's config.json. rename: from a robot's keys to the model's. normalization: of
    each key that is normalised. eps: of that. tokenizing: None for models that are told nothing.
    backbone_sha256: of the language model's files, None without one."""

    model: dict[str, Any]
    rename: dict[str, str] = {}
    normalization: dict[str, Mode] = {}
    eps: float = 1e-8
    tokenizing: Tokenizing | None = None
    backbone_sha256: str | None = None

    @property
    def type(self) -> str:
        """LeRobot's name of the policy."""
        return str(self.model.get("type"))

    def features(self, which: Literal["input_features", "output_features"]) -> dict[str, Feature]:
        """The model's inputs or outputs; ConfigError for a configuration without them."""
        try:
            return msgspec.convert(self.model.get(which), dict[str, Feature])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{CONFIG} of LeRobot: {which}: {error}") from error


def read_export(path: Path) -> Export:
    """What the exported folder says; its weights and statistics are not read.

    ConfigError: no such folder, a step that is not known, or processors that contradict each
    other. CorruptDataError: a file that is no JSON.
    """
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"policy.path={path} is no folder of a LeRobot policy; give a local one: nothing is "
            "downloaded (hf download REPO --local-dir DIR brings it)"
        )
    model = read_json(path / CONFIG)
    if "type" not in model:
        raise ConfigError(f"{path / CONFIG} has no type: it was not exported by LeRobot 0.4")
    check_patched(str(model["type"]))
    if model.get("use_peft"):
        raise ConfigError(f"{path} holds a PEFT adapter alone: merge it into its policy first")
    before = {str(step.registry_name): step.config for step in _steps(path, PREPROCESSOR)}
    after = {str(step.registry_name): step.config for step in _steps(path, POSTPROCESSOR)}
    normalizer = _typed(before.get(NORMALIZER, {}), _Normalizing, path / PREPROCESSOR)
    unnormalizer = _typed(after.get(UNNORMALIZER, {}), _Normalizing, path / POSTPROCESSOR)
    renaming = _typed(before.get(RENAMER, {}), _Renaming, path / PREPROCESSOR)
    kept = normalizer.normalize_observation_keys
    normalization: dict[str, Mode] = {
        key: mode
        for key, mode in _modes(normalizer).items()
        if key != "action" and (kept is None or key in kept)
    }
    normalization |= {k: m for k, m in _modes(unnormalizer).items() if k == "action"}
    tokenizing = None
    if TOKENIZER in before:
        options = before[TOKENIZER]
        known = {k: options[k] for k in ("max_length", "padding", "padding_side") if k in options}
        newline = any(name in before for name in NEWLINES)
        size = before[STATE_PROMPT].get("max_state_dim", 32) if STATE_PROMPT in before else None
        told = {**known, "newline": newline, "state_size": size}
        tokenizing = _typed(told, Tokenizing, path / PREPROCESSOR)
    return Export(
        model=model,
        rename=renaming.rename_map,
        normalization=normalization,
        eps=normalizer.eps,
        tokenizing=tokenizing,
    )


def check_patched(name: str) -> None:
    """ConfigError if this type of policy needs a transformers that is not here."""
    if name in PATCHED and importlib.util.find_spec("transformers.models.siglip.check") is None:
        raise ConfigError(
            f"LeRobot's '{name}' needs a patched transformers, one that has "
            "transformers.models.siglip.check, which PyPI has not: install the one that LeRobot's "
            "extra [pi] names"
        )


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Statistics by "KEY.NAME", such as "action.mean", as the exported processors have them.

    ConfigError if the two processors disagree on the action's.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for file, step in ((PREPROCESSOR, NORMALIZER), (POSTPROCESSOR, UNNORMALIZER)):
        state = _state_files(path, file).get(step)
        found[file] = {} if state is None else _load(path / state)
    before, after = found[PREPROCESSOR], found[POSTPROCESSOR]
    for key in before.keys() & after.keys():
        if not np.array_equal(before[key], after[key]):
            raise ConfigError(f"{path}: {key} of {PREPROCESSOR} is not that of {POSTPROCESSOR}")
    return {**before, **after}


def export_sha256(path: Path) -> str:
    """SHA-256 over names and contents of all files that make up an exported policy."""
    names = [CONFIG, MODEL, PREPROCESSOR, POSTPROCESSOR]
    names += [n for file in STEPS for n in _state_files(path, file).values()]
    return hash_files(path, names)


def backbone_sha256(path: Path) -> str:
    """SHA-256 over a language model's configuration and tokenizer."""
    return hash_files(path, [name for name in BACKBONE if (path / name).is_file()])


def hash_files(path: Path, names: list[str]) -> str:
    """SHA-256 over the hashes of these files, by name; ConfigError for one that is missing."""
    whole = hashlib.sha256()
    for name in sorted(set(names)):
        one = hashlib.sha256()
        try:
            with open(path / name, "rb") as file:
                while block := file.read(_ONE_MIB):
                    one.update(block)
        except OSError as error:
            raise ConfigError(f"{path / name} cannot be read: {error.strerror}") from error
        whole.update(f"{name}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest()


def _steps(path: Path, file: str) -> list[_Step]:
    """The steps of a processor file; ConfigError for one that is not known."""
    if not (path / file).is_file():
        raise ConfigError(
            f"{path} has no {file}; LeRobot before 0.4 kept statistics in the model: bring it up "
            "to date by python -m lerobot.processor.migrate_policy_normalization"
        )
    steps = _typed(read_json(path / file).get("steps"), list[_Step], path / file)
    for step in steps:
        if step.registry_name not in STEPS[file]:
            raise ConfigError(
                f"{path / file} names the step '{step.registry_name or step.class_}'; only these "
                f"are known, and none is imported: {', '.join(sorted(STEPS[file]))}"
            )
    return steps


def _state_files(path: Path, file: str) -> dict[str, str]:
    """Names of the steps' files in the folder."""
    found: dict[str, str] = {}
    for step in _steps(path, file):
        state = step.state_file
        if state is None:
            continue
        if Path(state).name != state or "\0" in state:
            raise ConfigError(f"{path / file}: state_file {state!r} is no name in the same folder")
        found[str(step.registry_name)] = state
    return found


def _typed(data: Any, kind: type[T], where: Path) -> T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise CorruptDataError(f"{where} cannot be read: {error}.") from error


def _modes(options: _Normalizing) -> dict[str, Mode]:
    """How a processor normalises its features; those that it leaves as they are are left out."""
    found: dict[str, Mode] = {}
    for key, feature in options.features.items():
        mode = options.norm_map.get(feature.type, "IDENTITY")
        if mode == "IDENTITY":
            continue
        if mode not in STATISTICS:
            raise unknown("LeRobot normalisation", mode, STATISTICS)
        found[key] = cast(Mode, mode)
    return found


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(read_bytes(path, MAX_STATISTICS_BYTES))
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CorruptDataError(f"{path} cannot be read: {error}.") from error

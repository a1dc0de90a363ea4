"""LeRobot's own models, made from what an export says, without the network and without weights."""

import contextlib
import importlib
import importlib.util
import io
import os
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError
from embodied.core.registry import unknown
from policies.folder import MODEL, read_json
from policies.lerobot.export import Export, backbone_sha256, check_patched

WITHOUT = {
    "compile_model": False,
    "device": "cpu",
    "load_vlm_weights": False,
    "pretrained_backbone_weights": None,
    "pretrained_path": None,
    "rtc_config": None,
    "use_amp": False,
}
"""Settings by which a model would fetch weights, or compute in a way that is chosen here."""

_IMAGE_TOKENS = {
    "fake_image_token_id": "<fake_token_around_image>",
    "global_image_token_id": "<global-img>",
}


def make_model(export: Export, backbone: str | None) -> Any:
    """LeRobot's PreTrainedPolicy with untrained float32 weights, on torch's default device.

    ConfigError: a type or setting that LeRobot does not know, or what it needs is not here.
    """
    _offline()
    policies = _import("lerobot.policies.factory", "lerobot")
    base = _import("lerobot.configs.policies", "lerobot").PreTrainedConfig
    known = base.get_known_choices()
    if export.type not in known:
        _import("lerobot.utils.import_utils", "lerobot").register_third_party_plugins()
    if export.type not in known:
        raise unknown("LeRobot policy", export.type, known)
    check_patched(export.type)
    settings = {k: v for k, v in export.model.items() if k != "type"}
    settings |= {k: v for k, v in WITHOUT.items() if k in settings}
    if export.type == "diffusion":  # its chunks end where the execution does
        settings["n_action_steps"] = settings["horizon"] - settings["n_obs_steps"] + 1
    if "vlm_model_name" in settings:
        settings["vlm_model_name"] = _backbone(export, backbone)
        _check_architecture(Path(settings["vlm_model_name"]))
    decode = _import("draccus.parsers.decoding", "lerobot").decode
    malformed = _import("draccus.utils", "lerobot").DraccusException
    try:
        with _quiet(), tokenizer_alone(settings.get("vlm_model_name")):
            config = decode(base.get_choice_class(export.type), settings)
            model = policies.get_policy_class(export.type)(config).float()
    except (malformed, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        why = f"{error} {error.__cause__ or ''}".strip()
        raise ConfigError(f"LeRobot's '{export.type}' cannot be made: {why}") from error
    except ImportError as error:
        raise MissingDependencyError(f"LeRobot's '{export.type}': {error}") from error
    ahead = list(config.action_delta_indices)
    if ahead[-1] - ahead[0] + 1 != len(ahead):
        raise ConfigError(f"LeRobot's '{export.type}' predicts steps {ahead}, which have gaps")
    return model


def load_weights(model: Any, folder: Path) -> None:
    """Take over the weights of an export: exactly the model's, or CorruptDataError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, folder / MODEL, strict=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        why = str(error).strip().replace("\n", " ")[:400]
        raise CorruptDataError(f"{folder / MODEL} holds other weights: {why}") from error
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise CorruptDataError(f"{folder / MODEL} holds weights that are not finite")


def make_tokenizer(export: Export, backbone: str | None) -> Any:
    """The tokenizer of the instructions, from local files."""
    _offline()
    auto: Any = _import("transformers", "vla").AutoTokenizer
    return auto.from_pretrained(
        _backbone(export, backbone), local_files_only=True, trust_remote_code=False
    )


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"LeRobot's policies need '{error.name}', which is not installed; "
            f"pip install 'embodied-stack[{extra}]' brings it"
        ) from error


def _offline() -> None:
    """Hugging Face's libraries ask for nothing from now on, in this process."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    hub = _import("huggingface_hub", "lerobot")
    hub.constants.HF_HUB_OFFLINE = True


def _backbone(export: Export, backbone: str | None) -> str:
    """The language model's folder; ConfigError if it is not on this host, or not the same."""
    folder = Path(str(backbone))
    if backbone is None or not folder.is_dir():
        raise ConfigError(
            f"policy.backbone={backbone} is no folder on this host; it holds the configuration and "
            "tokenizer of the policy's language model, which no checkpoint has: copy it here"
        )
    if backbone_sha256(folder) != export.backbone_sha256:
        raise CorruptDataError(
            f"policy.backbone={backbone} is not what the policy was made with; bring that back"
        )
    return str(folder)


def _check_architecture(folder: Path) -> None:
    """ConfigError for a language model of another architecture, whose folder may name code."""
    found = read_json(folder / "config.json").get("model_type")
    if found != "smolvlm":
        raise ConfigError(f"{folder / 'config.json'} describes a '{found}'; smolvlm is right")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def tokenizer_alone(folder: str | None) -> Generator[None]:
    """SmolVLA asks for a whole processor, of which it uses two tokens of the tokenizer: meanwhile
    it gets no more, so that no picture processor, and no package for one, is needed."""
    if folder is None:
        yield
        return
    module = _import("lerobot.policies.smolvla.smolvlm_with_expert", "vla")
    auto = _import("transformers", "vla").AutoTokenizer

    def processor(name: str) -> SimpleNamespace:
        tokenizer = auto.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        ids = {k: tokenizer.convert_tokens_to_ids(text) for k, text in _IMAGE_TOKENS.items()}
        return SimpleNamespace(tokenizer=SimpleNamespace(**ids))

    whole = module.AutoProcessor
    module.AutoProcessor = SimpleNamespace(from_pretrained=processor)
    try:
        yield
    finally:
        module.AutoProcessor = whole

"""Tiny policies exported by LeRobot itself, and a language model's folder that is made up."""

import json
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from embodied.core.specs import ArraySpec, DeviceSpec

STATE, ENV, FRONT = (
    "observation.state",
    "observation.environment_state",
    "observation.images.front",
)
DEVICE = DeviceSpec(
    observation={
        STATE: ArraySpec((3,)),
        ENV: ArraySpec((2,)),
        FRONT: ArraySpec((64, 64, 3), "uint8"),
    },
    action=ArraySpec((2,), low=(-2.0,), high=(2.0,)),
    tick_hz=10.0,
)
WORDS = ("push", "the", "cube", "left", "right", "\n")


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    """Of every key, unlike from element to element."""
    found = {}
    for key, shape in ((STATE, (3,)), (ENV, (2,)), (FRONT, (3, 1, 1)), ("action", (2,))):
        size = shape[0]
        ramp = torch.arange(size, dtype=torch.float32).reshape(shape)
        found[key] = {
            "mean": 0.1 * ramp,
            "std": 0.5 + 0.1 * ramp,
            "min": -1.0 - 0.1 * ramp,
            "max": 1.0 + 0.2 * ramp,
        }
    return found


def features(*keys: str) -> Any:
    """LeRobot's inputs and outputs for these observations."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    known = {
        STATE: PolicyFeature(FeatureType.STATE, (3,)),
        ENV: PolicyFeature(FeatureType.ENV, (2,)),
        FRONT: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    }
    return {
        "input_features": {key: known[key] for key in keys},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
        "device": "cpu",
    }


def export(path, name: str, *, seed: int = 0, **options: Any) -> Any:
    """Write a tiny policy as LeRobot does; returns LeRobot's model and its processors."""
    config = _CONFIGS[name](path, options)
    from lerobot.policies.act.processor_act import make_act_pre_post_processors
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    make = make_act_pre_post_processors if name == "noisy" else make_pre_post_processors

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        if name == "smolvla":
            from policies.lerobot.models import tokenizer_alone

            stack.enter_context(tokenizer_alone(config.vlm_model_name))
        model = get_policy_class(name)(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    before, after = make(config, dataset_stats=statistics())
    model.save_pretrained(path)
    before.save_pretrained(path)
    after.save_pretrained(path)
    return SimpleNamespace(model=model.eval(), before=before, after=after)


def _act(_: Any, options: dict[str, Any]) -> Any:
    from lerobot.policies.act.configuration_act import ACTConfig

    sizes = {
        "chunk_size": 6,
        "n_action_steps": 3,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
        "latent_dim": 4,
        "pretrained_backbone_weights": None,
    }
    return ACTConfig(**{**features(STATE, ENV), **sizes, **options})


def _diffusion(_: Any, options: dict[str, Any]) -> Any:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    sizes = {
        "horizon": 8,
        "n_action_steps": 3,
        "down_dims": (8, 16),
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "num_train_timesteps": 10,
        "num_inference_steps": 4,
        "spatial_softmax_num_keypoints": 4,
    }
    return DiffusionConfig(**{**features(STATE, ENV), **sizes, **options})


def _smolvla(path: Any, options: dict[str, Any]) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    sizes = {
        "chunk_size": 6,
        "n_action_steps": 3,
        "max_state_dim": 4,
        "max_action_dim": 4,
        "resize_imgs_with_padding": (32, 32),
        "tokenizer_max_length": 8,
        "num_steps": 3,
        "num_vlm_layers": 2,
        "vlm_model_name": str(language_model(path.with_name("language model"))),
    }
    return SmolVLAConfig(**{**features(STATE, FRONT), **sizes, **options})


def _noisy(_: Any, options: dict[str, Any]) -> Any:
    from lerobot_plugin import NoisyConfig

    return NoisyConfig(**{**features(STATE, ENV), **options})


def language_model(path: Any) -> Any:
    """A folder with the configuration of a tiny SmolVLM and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig

    path.mkdir(exist_ok=True)
    special = ("<pad>", "<unk>", "<fake_token_around_image>", "<global-img>")
    words = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    config = SmolVLMConfig(
        image_token_id=3,
        pad_token_id=0,
        scale_factor=2,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 16,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    )
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


_CONFIGS = {"act": _act, "diffusion": _diffusion, "noisy": _noisy, "smolvla": _smolvla}

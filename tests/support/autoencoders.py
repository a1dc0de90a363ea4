"""Small autoencoders, in memory and in folders."""

import json

import safetensors.numpy
import torch

from embodied.core.specs import ArraySpec, DeviceSpec
from policies.autoencoder.configs import WEIGHTS
from policies.autoencoder.network import AutoencoderKL
from policies.autoencoder.stored import DiffusersConfig
from policies.build import build_policy
from policies.checkpoint import save_policy
from policies.folder import CONFIG

TOP = "observation.images.top"
EYES = DeviceSpec(
    {TOP: ArraySpec((16, 24, 3), "uint8")}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), tick_hz=10.0
)
TINY = {"channels": [8, 8], "latent_channels": 2}
DIFFUSERS = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.35.2",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "norm_num_groups": 4,
    "latent_channels": 3,
    "layers_per_block": 1,
    "scaling_factor": 0.5,
    "shift_factor": None,
}


def autoencoder(seed=0, **options):
    return build_policy("vae", {**TINY, **options}, EYES, EYES.observation, {}, seed=seed)


def save_vae(folder, seed=0, **options):
    """A folder as a run with policy=vae leaves it, of latents whose scale is 2."""
    made = autoencoder(seed, **options)
    made.statistics_3.copy_(torch.tensor([0.5, 0.0, 0.125]))
    save_policy(folder, made)
    return made


def save_diffusers(folder, change=lambda config, arrays: None, seed=0):
    """A folder as AutoencoderKL.save_pretrained leaves it, but for `change`."""
    config = dict(DIFFUSERS)
    names = {"_class_name": "class_name", "_diffusers_version": "version"}
    sizes = DiffusersConfig(**{names.get(k, k): v for k, v in config.items()}).sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoencoderKL(sizes)
    arrays = {name: x.numpy() for name, x in network.state_dict().items()}
    for name, x in arrays.items():
        if ".to_" in name and x.ndim == 4:
            arrays[name] = x[:, :, 0, 0].copy()
    change(config, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
    return network

"""Pictures as they are predicted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoencoders import save_diffusers, save_vae

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from embodied.core.registry import names
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy

STATE, TOP = "observation.state", "observation.images.top"
SMALL = {
    "patches": {"name": "patches", "patch": 4, "shrink": 1},
    "vae": {"name": "vae", "patch": 2},
    "diffusers": {"name": "diffusers", "patch": 2},
}
SAVE = {"vae": save_vae, "diffusers": save_diffusers}
DEVICE = DeviceSpec(
    {STATE: ArraySpec((3,)), TOP: ArraySpec((20, 20, 3), "uint8")},
    ArraySpec((2,), low=(-1.0,), high=(1.0,)),
    tick_hz=10.0,
)
STATS = {STATE: SimpleNamespace(mean=[0.0] * 3, std=[1.0] * 3, min=[-2.0] * 3, max=[2.0] * 3)}
VIT = {"name": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2, "features": 6}


def latents(options, size=(16, 24)):
    cls, config = component("latents", options, "policy.latents")
    return cls(config, size)


def policy(crop=0.8, options=SMALL["patches"], **images):
    config = {
        "horizon": 4,
        "n_action_steps": 2,
        "next_obs_steps": 2,
        "width": 48,
        "depth": 1,
        "heads": 2,
        "time_dim": 16,
        "latents": options,
        "images": {"encoder": VIT, "crop": crop, **images},
    }
    return build_policy("uwm", config, DEVICE, DEVICE.observation, STATS, seed=0)


def batch_of(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        STATE: rng.normal(size=(rows, 2, 3)).astype(np.float32),
        TOP: rng.integers(0, 256, (rows, 2, 20, 20, 3), np.uint8),
        "future." + STATE: rng.normal(size=(rows, 2, 3)).astype(np.float32),
        "future." + TOP: rng.integers(0, 256, (rows, 2, 20, 20, 3), np.uint8),
        "future_is_pad": np.zeros((rows, 2), bool),
        "action": rng.uniform(-1, 1, (rows, 4, 2)).astype(np.float32),
        "action_is_pad": np.zeros((rows, 4), bool),
    }


@pytest.mark.parametrize("name", names("latents"))
def test_every_registered_one_says_its_sizes_and_leads_back(name, tmp_path):
    options = SMALL[name]
    if name in SAVE:
        SAVE[name](tmp_path / name)
        options = {**options, "path": str(tmp_path / name)}
    made = latents(options)
    pictures = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = made.encode(pictures, None)
    assert tokens.shape == (3, made.tokens, made.size)
    assert made.decode(tokens).shape == pictures.shape
    torch.testing.assert_close(made.encode(pictures[1:2], None)[0], tokens[1])


def test_patches_are_the_pixels_of_their_places():
    made = latents({"name": "patches", "patch": 4, "shrink": 1})
    assert (made.tokens, made.size) == (4 * 6, 3 * 16)
    pictures = torch.arange(3 * 16 * 24, dtype=torch.float32).view(1, 3, 16, 24)
    tokens = made.encode(pictures, None)
    assert torch.equal(made.decode(tokens), pictures)
    place = pictures[0, :, 4:8, 8:12]
    assert set(tokens[0, 6 + 2].tolist()) == set(place.flatten().tolist())


def test_shrunk_pictures_come_back_in_blocks():
    made = latents({"name": "patches", "patch": 4, "shrink": 2})
    assert (made.tokens, made.size) == (2 * 3, 3 * 16)
    pictures = torch.rand(1, 3, 16, 24)
    back = made.decode(made.encode(pictures, None))
    means = torch.nn.functional.avg_pool2d(pictures, 2)
    torch.testing.assert_close(back[..., ::2, 1::2], means)
    with pytest.raises(ConfigError, match=r"16 × 24 pixels, which patches of 12 do not fill"):
        latents({"name": "patches", "patch": 6, "shrink": 2})


def test_later_pictures_undergo_what_their_history_does():
    made = policy(crop=0.6, brightness=0.4, hue=0.2)
    batch = batch_of()
    obs = {key: torch.from_numpy(batch[key]) for key in (STATE, TOP)}
    rng = torch.Generator().manual_seed(0)
    cond, views = made.encoder.with_later(obs, {TOP: obs[TOP]}, rng)
    assert torch.equal(cond, made.encoder(obs, torch.Generator().manual_seed(0)))
    history = made.encoder.images.views({TOP: obs[TOP]}, torch.Generator().manual_seed(0))
    assert views[TOP].shape == (4, 2, 3, 12, 12) and torch.equal(views[TOP], history[TOP])
    others = made.encoder.images.views({TOP: obs[TOP]}, torch.Generator().manual_seed(1))
    assert not torch.equal(views[TOP], others[TOP])


def test_pictures_are_learned_given_and_predicted():
    made, batch = policy(), batch_of()
    assert made.next.groups == ((2, 3), (2 * 16, 48))
    loss, metrics = made.loss(batch)
    loss.backward()
    assert metrics["next_loss"] == pytest.approx(1, abs=0.1)
    obs = {key: batch[key] for key in (STATE, TOP)}
    seed = np.arange(4)
    found = made.infer(obs, actions=batch["action"], want={"next_obs"}, seed=seed)["next_obs"]
    assert found[TOP].shape == (4, 2, 16, 16, 3) and found[TOP].dtype == torch.uint8
    later = {key: batch["future." + key] for key in obs}
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    first = made.infer(obs, next_obs=later, want={"actions"}, seed=seed)["actions"]
    border = {**later, TOP: later[TOP].copy()}
    border[TOP][:, :, :2] = 0
    again = made.infer(obs, next_obs=border, want={"actions"}, seed=seed)["actions"]
    assert torch.equal(first, again)
    border[TOP][:, 1, 8:12, 8:12] //= 2
    assert (made.infer(obs, next_obs=border, want={"actions"}, seed=seed)["actions"] != first).any()
    with pytest.raises(SpecError, match=r"future\.observation\.images\.top is .*float32; uint8"):
        made.loss({**batch, "future." + TOP: batch["future." + TOP].astype(np.float32)})


def test_a_network_that_knows_a_picture_gives_it_back():
    made = policy(crop=1.0)
    picture = batch_of(1)["future." + TOP]
    views = torch.from_numpy(picture).permute(0, 1, 4, 2, 3) / 255
    clean_BN = made.next.encode({STATE: torch.zeros(1, 2, 3), TOP: views}, None)
    alpha_bar_N = made.form.schedule.alpha_bar_N

    def both(chunk, time, later, next_time, seen):
        alpha_bar = alpha_bar_N[(next_time * 100).round().long()][:, None]
        return chunk, (later - alpha_bar.sqrt() * clean_BN) / (1 - alpha_bar).sqrt()

    made.network.both = both
    obs = {key: batch_of(1)[key] for key in (STATE, TOP)}
    found = made.infer(obs, want={"next_obs"}, seed=np.array([0]))["next_obs"][TOP]
    assert (found.int() - torch.from_numpy(picture).int()).abs().max() <= 1

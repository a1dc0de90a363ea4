"""The autoencoder that a run trains, and frozen ones as latents of world models."""

import numpy as np
import pytest
import torch
from actor_critics import LEARNER
from autoencoders import DIFFUSERS, EYES, TOP, autoencoder, save_diffusers, save_vae

from embodied.core.config import component
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.learn.learner import Learner, PolicyFormat
from policies.autoencoder.configs import WEIGHTS, VAEConfig
from policies.autoencoder.policy import kl, psnr, signed
from policies.build import build_policy
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy
from policies.folder import CONFIG


def batch_of(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 256, (rows, 1, 4, 4, 3), np.uint8)
    return {TOP: shades.repeat(4, axis=2).repeat(6, axis=3), "action": np.zeros((rows, 1, 1))}


def learner_of(policy):
    form = PolicyFormat((), lambda _: policy, policy_state, policy_from_state)
    return Learner(policy, form, LEARNER, seed=0)


def latents(name, path, picture=(16, 24), **options):
    cls, config = component("latents", {"name": name, "path": str(path), **options}, "latents")
    return cls(config, picture)


def world(path, name="vae", kind="uwm", **options):
    sizes = {
        "uwm": {"width": 16, "depth": 1, "heads": 2, "time_dim": 16},
        "uva": {"width": 16, "heads": 2, "head_width": 16, "time_dim": 16, "frames": 1},
    }
    config = {
        "n_obs_steps": 1,
        "horizon": 2,
        "n_action_steps": 2,
        "form": "flow",
        "images": {"encoder": {"name": "vit", "patch": 8, "width": 16, "heads": 2}, "crop": 1.0},
        "latents": {"name": name, "path": str(path), **options},
        **sizes[kind],
    }
    return build_policy(kind, config, EYES, EYES.observation, {}, seed=0)


def window(rows=8):
    batch = batch_of(rows)
    return {
        TOP: batch[TOP],
        "future." + TOP: batch_of(rows, seed=1)[TOP],
        "future_is_pad": np.zeros((rows, 1), bool),
        "action": np.random.default_rng(0).uniform(-1, 1, (rows, 2, 1)).astype(np.float32),
        "action_is_pad": np.zeros((rows, 2), bool),
    }


def test_divergence_and_signal_to_noise_have_their_closed_forms():
    rng = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(2, 4, 3, 2, 2, generator=rng)
    normal = torch.distributions.Normal(mean, (log_var / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl(mean, log_var), expected.sum(dim=(1, 2, 3)))
    assert psnr(torch.full((5,), 0.1)).item() == pytest.approx(20)


def test_its_loss_is_the_error_of_pixels_and_the_divergence():
    made, batch = autoencoder(kl_weight=0.5).eval(), batch_of()
    made.seed_training(3)
    loss, metrics = made.loss(batch)
    pictures = signed(torch.from_numpy(batch[TOP]).flatten(0, 1))
    mean, log_var = made.network.encode(pictures)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    back = made.network.decode(mean + (log_var / 2).exp() * noise)
    l1 = (back - pictures).abs().mean()
    divergence = kl(mean, log_var).mean()
    torch.testing.assert_close(loss, l1 + 0.5 * divergence / (3 * 16 * 24))
    assert metrics["kl"] == pytest.approx(divergence.item())
    assert metrics["psnr"] == pytest.approx(psnr((back - pictures) / 2).item())
    assert made.scale == 1


@pytest.mark.slow
def test_training_finds_the_scale_and_reconstructs():
    made = autoencoder()
    learner, batch = learner_of(made), batch_of(16)
    first = learner.update(batch)
    for _ in range(59):
        last = learner.update(batch)
    assert last["psnr"] > first["psnr"] + 1
    policy = policy_from_state(*learner.weights())
    with torch.no_grad():
        mean, log_var = policy.network.encode(signed(torch.from_numpy(batch[TOP]).flatten(0, 1)))
        drawn = policy.scale * (mean + (log_var / 2).exp() * torch.randn(mean.shape))
    assert drawn.std().item() == pytest.approx(1, abs=0.15)
    twin = policy_from_state(*policy_state(policy))
    assert twin.scale == policy.scale and torch.equal(
        twin.reconstruct(torch.from_numpy(batch[TOP][:2, 0])),
        policy.reconstruct(torch.from_numpy(batch[TOP][:2, 0])),
    )


def test_it_reads_pictures_alone_and_decides_nothing():
    with pytest.raises(ConfigError, match="name cameras"):
        VAEConfig().policy_spec(EYES, [])
    with pytest.raises(ConfigError, match="16 × 24 pixels, which cells of 16 do not fill"):
        autoencoder(channels=[8, 8, 8, 8])
    made = autoencoder()
    for ask in (
        lambda: made.init(1),
        lambda: made.act(None, {}, seed=np.zeros(1, int)),
        lambda: made.sample({}, 1, seed=0),
    ):
        with pytest.raises(ConfigError, match="commands no robot"):
            ask()


def test_latents_are_scaled_drawn_and_cut(tmp_path):
    source = save_vae(tmp_path / "vae")
    pictures = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, log_var = source.network.encode(pictures)
    made = latents("vae", tmp_path / "vae", spread=1.0)
    assert (made.tokens, made.size) == (4 * 6, 2)
    torch.testing.assert_close(made.encode(pictures, None), 2 * mean.flatten(2).transpose(1, 2))
    rng = torch.Generator()
    noise = torch.randn(mean.shape, generator=rng.manual_seed(1))
    drawn = 2 * (mean + (log_var / 2).exp() * noise)
    found = made.encode(pictures, rng.manual_seed(1))
    torch.testing.assert_close(found, drawn.flatten(2).transpose(1, 2))
    mode = latents("vae", tmp_path / "vae", spread=4.0, scale=8.0, posterior="mode", patch=2)
    assert (mode.tokens, mode.size) == (2 * 3, 8)
    cells = mode.encode(pictures, rng)[:, 4].unflatten(1, (2, 2, 2))
    torch.testing.assert_close(cells, 2 * mean[:, :, 2:4, 2:4])
    for one in (made, mode):
        back = one.decode(one.encode(pictures, None))
        torch.testing.assert_close(back, source.network.decode(mean))
    with pytest.raises(ConfigError, match="cells of 16 do not fill"):
        latents("vae", tmp_path / "vae", patch=4)


@pytest.mark.parametrize(("name", "kind"), [("vae", "uwm"), ("vae", "uva"), ("diffusers", "uwm")])
def test_a_world_model_learns_latents_and_carries_no_autoencoder(tmp_path, name, kind):
    path = tmp_path / "frozen"
    (save_vae if name == "vae" else save_diffusers)(path)
    made = world(path, name, kind)
    frozen = {n: x.clone() for n, x in made.next.named_parameters()}
    learner = learner_of(made)
    metrics = learner.update(window())
    assert np.isfinite(metrics["loss"])
    assert all(torch.equal(frozen[n], x) for n, x in made.next.named_parameters())
    config, arrays = learner.weights()
    assert frozen and not [key for key in arrays if "next.latents" in key]
    assert learner.ema.parameters().keys() <= arrays.keys()
    twin = policy_from_state(config, arrays)
    obs = {TOP: window()[TOP]}
    results = [
        policy.infer(obs, want={"next_obs"}, seed=np.arange(8))["next_obs"][TOP]
        for policy in (twin, policy_from_state(*policy_state(twin)))
    ]
    assert results[0].shape == (8, 1, 16, 24, 3) and torch.equal(*results)
    learner.save(tmp_path / "learner.safetensors", {})
    again, _ = Learner.load(tmp_path / "learner.safetensors", learner._format, LEARNER, seed=0)
    assert again.policy.config == made.config and made.config.latents["sha256"] is not None


@pytest.mark.parametrize("name", ["vae", "diffusers"])
def test_it_goes_nowhere_without_its_autoencoder(tmp_path, name):
    path = tmp_path / "frozen"
    save = save_vae if name == "vae" else save_diffusers
    save(path)
    save_policy(tmp_path / "world", world(path, name))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"policy\.latents\.path=.*frozen"):
        load_policy(tmp_path / "world")
    _ = save(path, seed=1)
    with pytest.raises(CorruptDataError, match=r"another autoencoder .* bring that one back"):
        load_policy(tmp_path / "world")


def test_only_an_autoencoder_is_taken(tmp_path):
    with pytest.raises(ConfigError, match=r"latents\.path=.*nowhere is no policy's folder"):
        latents("vae", tmp_path / "nowhere")
    save_vae(tmp_path / "vae")
    save_policy(tmp_path / "uwm", world(tmp_path / "vae"))
    with pytest.raises(ConfigError, match="is a policy=uwm; one that policy=vae trained is right"):
        latents("vae", tmp_path / "uwm")
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptDataError, match="does not match its hash"):
        latents("vae", tmp_path / "vae")


def _renamed(config, arrays):
    arrays["decoder.conv_in.other"] = arrays.pop("decoder.conv_in.weight")


def _grown(config, arrays):
    arrays["decoder.conv_in.bias"] = np.zeros(99, np.float32)


def _halved(config, arrays):
    arrays["decoder.conv_in.bias"] = arrays["decoder.conv_in.bias"].astype(np.float16)


def _stuffed(config, arrays):
    arrays["stuffing"] = np.zeros(1 << 20, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "arrays missing or not the autoencoder's"),
        (_grown, r"decoder\.conv_in\.bias is float32 \(99,\)"),
        (_halved, "is float16"),
        (_stuffed, "larger than the"),
        (lambda config, _: config.update(_class_name="AutoencoderTiny"), "Invalid enum value"),
        (lambda config, _: config.update(block_out_channels=[8, 18]), "multiple"),
        (lambda config, _: config.update(block_out_channels=[8]), "has 1 levels"),
        (lambda config, _: config.update(shift_factor=0.1), "shift_factor"),
        (lambda config, _: config.update(norm_type="spatial"), "norm_type"),
    ],
)
def test_other_files_than_the_autoencoders_are_refused(tmp_path, change, message):
    save_diffusers(tmp_path, change)
    with pytest.raises((ConfigError, CorruptDataError), match=message) as caught:
        latents("diffusers", tmp_path)
    assert f"float32 {WEIGHTS} is right" in str(caught.value)


def test_a_folder_that_lacks_a_file_is_refused(tmp_path):
    for name in (WEIGHTS, CONFIG):
        save_diffusers(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ConfigError, match=f"has no {name}; the folder of diffusers'"):
            latents("diffusers", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("attends", [False, True])
def test_it_computes_as_diffusers_does(tmp_path, attends):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    options = {k: v for k, v in DIFFUSERS.items() if not k.startswith("_")}
    if not attends:
        options["down_block_types"] = ["DownEncoderBlock2D"] * 2
        options["up_block_types"] = ["UpDecoderBlock2D"] * 2
    theirs = AutoencoderKL(**options)
    theirs.save_pretrained(tmp_path)
    made = latents("diffusers", tmp_path, spread=1.0)
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(pictures).latent_dist.mean
        found = made.encode(pictures, None)
        torch.testing.assert_close(found, 0.5 * mean.flatten(2).transpose(1, 2))
        torch.testing.assert_close(made.decode(found), theirs.decode(mean).sample)
    policy = world(tmp_path, "diffusers")
    assert np.isfinite(learner_of(policy).update(window())["loss"])
    seen = {TOP: window()[TOP]}
    found = policy.infer(seen, want={"next_obs"}, seed=np.arange(8))["next_obs"]
    assert found[TOP].shape == (8, 1, 16, 24, 3)

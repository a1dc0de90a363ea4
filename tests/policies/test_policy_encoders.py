import numpy as np
import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import TASK, encode_instruction
from embodied.core.registry import names, resolve
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy
from policies.checkpoint import policy_from_state, policy_state
from policies.compose.build import compose
from policies.configs import ChunkConfig
from policies.reading import read_observations

SMALL = {
    "resnet18": {"name": "resnet18", "width": 16, "features": 6, "pooling": "average"},
    "vit": {"name": "vit", "patch": 5, "width": 16, "depth": 1, "heads": 2, "features": 6},
}
TEXT = {"name": "ngrams", "max_bytes": 24, "buckets": 64, "width": 8, "features": 5}
LEFT, RIGHT = "observation.images.left", "observation.images.right"

TRAINED = [n for n in names("policies") if issubclass(resolve("policies", n).Config, ChunkConfig)]
"""Policies with an encoder of their own."""


ALONE = {
    "act": {"width": 16, "heads": 2, "encoder_depth": 1},
    "gaussian": {"width": 16},
    "autoregressive": {"transformer": {"width": 16, "depth": 1, "heads": 2}},
    "vla": {
        "transformer": {"width": 16, "depth": 1, "heads": 2},
        "expert": {"width": 16, "heads": 2},
    },
    "uwm": {
        "width": 32,
        "depth": 1,
        "heads": 2,
        "time_dim": 16,
        "latents": {"name": "patches", "patch": 3, "shrink": 1},
    },
    "uva": {
        "width": 32,
        "heads": 2,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "head_width": 32,
        "time_dim": 16,
        "frames": 1,
        "drawn": "row",
        "latents": {"name": "patches", "patch": 3, "shrink": 1},
    },
}


def device(**pictures):
    observation = {"observation.state": ArraySpec((3,))}
    observation |= {
        f"observation.images.{k}": ArraySpec((n, n, 3), "uint8") for k, n in pictures.items()
    }
    return DeviceSpec(observation, ArraySpec((2,), low=(-1.0,), high=(1.0,)), tick_hz=10.0)


def policy(make, spec, *, name="flow", language=None, goals=(), **images):
    network = {"name": "mlp", "width": 16, "depth": 1, "time_dim": 4}
    sizes = ALONE.get(name, {"network": network})
    options = {
        "horizon": 4,
        "n_action_steps": 2,
        "language": language,
        "goals": list(goals),
        "images": {"encoder": SMALL["resnet18"], **images},
        **sizes,
    }
    return build_policy(name, options, spec, spec.observation, make.all_stats(), seed=0)


def observations(spec, batch=3, steps=2, seed=0, text=None):
    rng = np.random.default_rng(seed)
    found = {}
    for key, array in spec.observation.items():
        shape = (batch, steps, *array.shape)
        if array.dtype == "uint8":
            found[key] = rng.integers(0, 256, shape, np.uint8)
        else:
            found[key] = rng.normal(size=shape).astype(np.float32)
    if text is not None:
        found[TASK] = np.tile(encode_instruction(text, 24), (batch, steps, 1))
    return found


def batch_of(spec, **options):
    obs = observations(spec, **options)
    n = len(next(iter(obs.values())))
    action = np.random.default_rng(1).uniform(-1, 1, (n, 4, 2)).astype(np.float32)
    later = {f"future.{key}": x[:, :1] for key, x in obs.items() if key != TASK}
    pads = {"action_is_pad": np.zeros((n, 4), bool), "future_is_pad": np.zeros((n, 1), bool)}
    return {**obs, "action": action, **later, **pads}


@pytest.mark.parametrize("size", [(16, 16), (84, 84), (37, 50)])
@pytest.mark.parametrize("name", names("encoders"))
def test_image_encoders_take_pictures_of_any_size(name, size):
    torch.manual_seed(0)
    cls, options = component("encoders", SMALL[name], "policy")
    encoder = cls(options, size)
    x = torch.randn(3, 3, *size)
    out = encoder(x)
    assert out.shape == (3, 6) and out.isfinite().all()
    torch.testing.assert_close(encoder(x[1:2])[0], out[1])
    moved = x.clone()
    moved[0, :, size[0] // 2, size[1] // 2] += 5
    changed = encoder(moved)
    assert (changed[0] != out[0]).any() and torch.equal(changed[1:], out[1:])


def test_resnet18_is_the_published_one_but_for_its_norms_and_its_head():
    """11,176,512 parameters: torchvision's 11,689,512 without its classifier of 513,000."""
    cls, options = component("encoders", {"name": "resnet18", "pooling": "average"}, "policy")
    with torch.device("meta"):
        encoder = cls(options, (224, 224))
        assert encoder.stages(encoder.stem(torch.empty(1, 3, 224, 224))).shape == (1, 512, 14, 14)
    count = sum(p.numel() for key, p in encoder.named_parameters() if "outlet" not in key)
    assert count == 11_176_512
    groups = {m.num_groups for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {4, 8, 16, 32}


def test_spatial_softmax_finds_the_place_of_a_peak():
    from policies.encoders.resnet import SpatialSoftmax

    pool = SpatialSoftmax(2, 2)
    with torch.no_grad():
        pool.maps.weight[:] = 100 * torch.eye(2)[:, :, None, None]
    maps = torch.zeros(1, 2, 5, 9)
    maps[0, 0, 4, 0] = maps[0, 1, 1, 6] = 1
    torch.testing.assert_close(pool(maps), torch.tensor([[-1, 0.5, 1, -0.5]]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("encoder", names("encoders"))
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_parameter(make, name, encoder, shared):
    spec = device(left=20, right=20)
    made = policy(make, spec, name=name, language=TEXT, encoder=SMALL[encoder], shared=shared)
    make.awaken(made)
    loss, _ = made.loss(batch_of(spec, batch=8, text="push the block"))
    loss.backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    assert len(list(made.encoder.images.encoders)) == (1 if shared else 2)


def test_a_shared_encoder_treats_cameras_alike_and_their_order_is_the_specs(make):
    spec = device(left=20, right=20)
    obs = observations(spec)
    swapped = {**obs, LEFT: obs[RIGHT], RIGHT: obs[LEFT]}
    for shared in (True, False):
        made = policy(make, spec, shared=shared)
        state, left, right = made.encode(obs).split(made.encoder.sizes, dim=1)
        found = made.encode(swapped).split(made.encoder.sizes, dim=1)
        assert torch.equal(found[0], state)
        assert torch.allclose(found[1], right, atol=1e-6) == shared
        assert torch.allclose(found[2], left, atol=1e-6) == shared
        torch.testing.assert_close(made.encode(dict(reversed(obs.items()))), made.encode(obs))


def test_spatial_softmax_learns_too():
    cls, options = component("encoders", {"name": "resnet18", "width": 16, "keypoints": 3}, "p")
    encoder = cls(options, (40, 64))
    encoder(torch.randn(2, 3, 40, 64)).square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, key


def test_history_is_one_pass_and_each_step_its_own_vector(make):
    spec = device(left=20)
    made = policy(make, spec)
    obs = observations(spec)
    passes = []
    made.encoder.images.encoders[0].register_forward_hook(lambda m, x, y: passes.append(len(y)))
    base = made.encode(obs)
    assert passes == [6] and base.shape == (3, 2 * 3 + 2 * 6)
    moved = {key: value.copy() for key, value in obs.items()}
    moved[LEFT][:, 1] = 255 - moved[LEFT][:, 1]
    changed = made.encode(moved)
    assert torch.equal(changed[:, : 6 + 6], base[:, : 6 + 6])
    assert (changed[:, 12:] != base[:, 12:]).any(dim=1).all()


def test_inference_sees_the_centre_and_training_draws_from_its_own_generator(make):
    spec = device(left=20)
    made = policy(make, spec, crop=0.5, brightness=0.3, hue=0.1)
    obs = observations(spec)
    border = {**obs, LEFT: obs[LEFT].copy()}
    border[LEFT][:, :, :5] = border[LEFT][:, :, :, 15:] = 0
    assert torch.equal(made.encode(border), made.encode(obs))
    made.train()
    assert torch.equal(made.encode(obs), made.eval().encode(obs))
    losses = []
    for seed in (0, 0, 1):
        made.seed_training(seed)
        torch.manual_seed(len(losses))
        cond = made._condition(obs, made._training_rng)
        losses.append(cond)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_pictures_are_standardised_as_stated(make):
    spec = device(left=20)
    seen = []
    for standard, low in (("unit", -1.0), ("imagenet", -0.485 / 0.229)):
        made = policy(make, spec, standard=standard, crop=1.0)
        made.encoder.images.encoders[0].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        made.encode({**observations(spec), LEFT: np.zeros((3, 2, 20, 20, 3), np.uint8)})
        assert seen[-1][:, 0].unique().item() == pytest.approx(low, rel=1e-6)


def parts(made, obs):
    found = made.encoder(read_observations(obs, made.spec, made.device))
    return found.split(made.encoder.sizes, dim=1)


@pytest.mark.parametrize("name", TRAINED)
def test_a_goal_is_one_more_step_behind_the_history_of_its_key(make, name):
    spec = device(left=20, right=20)
    made = make.awaken(policy(make, spec, name=name, goals=["observation.state", LEFT]))
    obs = observations(spec)
    goals = observations(spec, seed=9)
    obs |= {f"goal.{key}": goals[key] for key in ("observation.state", LEFT)}
    assert made.encoder.sizes == [3 * 3, 3 * 6, 2 * 6]
    assert made.normalized_keys == ("observation.state",)
    state, left, _ = parts(made, obs)
    torch.testing.assert_close(
        state[:, 6:] * 2, torch.from_numpy(goals["observation.state"][:, -1])
    )
    there = parts(made, {**obs, LEFT: np.repeat(obs["goal." + LEFT][:, -1:], 2, 1)})[1]
    torch.testing.assert_close(there[:, :6], left[:, 12:], atol=1e-5, rtol=0)
    assert not torch.allclose(left[:, :6], left[:, 12:], atol=1e-5)
    seed = np.arange(3)
    other = {**obs, "goal." + LEFT: obs["goal." + LEFT][::-1].copy()}
    assert (made.act(None, obs, seed=seed)[1] != made.act(None, other, seed=seed)[1]).any()
    made.loss({**batch_of(spec), **obs})[0].backward()
    with pytest.raises(SpecError, match=f"'goal.{LEFT}' is missing"):
        made.encode({key: value for key, value in obs.items() if key != "goal." + LEFT})
    with pytest.raises(ConfigError, match=r"policy.goals 'observation.stat'.*observation.state"):
        policy(make, spec, goals=["observation.stat"])
    alone = DeviceSpec({"goal.observation.state": ArraySpec((3,))}, spec.action, tick_hz=10.0)
    with pytest.raises(ConfigError, match=r"reads 'goal.observation.state', but no 'obs"):
        policy(make, alone)


@pytest.mark.parametrize("name", TRAINED)
def test_a_policy_with_pictures_and_text_survives_the_way_through_its_state(make, name):
    spec = device(left=20, right=24)
    made = make.awaken(policy(make, spec, name=name, language=TEXT))
    twin = policy_from_state(*policy_state(made))
    obs, seed = observations(spec, text="lift the cube"), np.arange(3)
    expected = made.act(None, obs, seed=seed)[1]
    np.testing.assert_array_equal(twin.act(None, obs, seed=seed)[1], expected)
    assert twin.spec.observation[TASK] == ArraySpec((24,), "uint8")


def test_the_instruction_changes_what_is_done_and_the_newest_one_counts(make):
    spec = device()
    made = make.awaken(policy(make, spec, language=TEXT))
    seed = np.zeros(3, int)
    texts = ("push", "pull", "", "push the red block", "push the block red", "тяни")
    chunks = [made.act(None, observations(spec, text=t), seed=seed)[1] for t in texts]
    for i, chunk in enumerate(chunks):
        assert all((chunk != other).any() for other in chunks[:i]), texts[i]
    late = observations(spec, text="push")
    late[TASK][:, 0] = encode_instruction("pull", 24)
    np.testing.assert_array_equal(made.act(None, late, seed=seed)[1], chunks[0])


def test_bytes_behind_the_end_of_a_text_mean_nothing():
    torch.manual_seed(0)
    cls, _ = component("text_encoders", TEXT, "policy")
    encoder = cls(cls.Config(buckets=512))
    short, long = (torch.from_numpy(encode_instruction("open", n).copy())[None] for n in (4, 90))
    torch.testing.assert_close(encoder(short), encoder(long))


def test_a_language_policy_learns_to_do_as_told(make):
    spec = device()
    made = policy(make, spec, name="act", language=TEXT)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    told = {"go left": -0.5, "go right": 0.5}
    for step in range(60):
        text, value = list(told.items())[step % 2]
        batch = batch_of(spec, batch=8, seed=step, text=text)
        batch["action"][:] = value
        loss, _ = made.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for text, value in told.items():
        chunk = made.act(None, observations(spec, seed=99, text=text), seed=np.arange(3))[1]
        assert np.abs(chunk - value).max() < 0.2


def test_what_does_not_fit_is_named(make):
    spec = device(left=20)
    made = policy(make, spec, language=TEXT)
    good = observations(spec, text="push")
    for obs, match in (
        ({k: v for k, v in good.items() if k != LEFT}, f"'{LEFT}' is missing"),
        ({k: v for k, v in good.items() if k != TASK}, "'task' is missing"),
        ({**good, LEFT: good[LEFT][:, :, :-1]}, r"left has shape.*\[3, 2, 20, 20, 3\]"),
        ({**good, LEFT: good[LEFT] / np.float32(255)}, "left is torch.float32.*uint8"),
        ({**good, TASK: good[TASK][..., :8]}, r"task has shape \(3, 2, 8\)"),
    ):
        with pytest.raises(SpecError, match=match):
            made.encode(obs)
    with pytest.raises(SpecError, match=r"'push the whole.*30 bytes.*reads 24.*max_bytes"):
        encode_instruction("push the whole of the block it", 24)
    with pytest.raises(SpecError, match="zero byte"):
        encode_instruction("a\0b", 24)
    for options, match in (
        ({"encoder": {"name": "resnet"}}, "unknown encoder 'resnet'.*resnet18"),
        ({"encoder": {**SMALL["vit"], "patch": 40}}, "no patch of 40"),
        ({"encoder": {**SMALL["vit"], "heads": 3}}, "multiple of heads"),
        ({"encoder": {"name": "resnet18", "width": 40}}, "width"),
        ({"encoder": {"name": "resnet18", "width": 16}}, "1 × 1.*pooling=average"),
        ({"crop": 0.0}, "crop"),
        ({"hue": 0.7}, "hue"),
        ({"language": {"name": "clip"}}, "unknown text_encoder 'clip'.*ngrams"),
    ):
        with pytest.raises(ConfigError, match=match):
            policy(make, spec, **options)
    with pytest.raises(ConfigError, match="shared needs cameras of one size"):
        policy(make, device(left=20, right=24), shared=True)
    with pytest.raises(ConfigError, match="'task' belongs to them"):
        task = DeviceSpec({"task": ArraySpec((3,), "uint8")}, spec.action, tick_hz=10.0)
        policy(make, task)


def test_policies_with_other_eyes_compose(make):
    both = device(left=20)
    blind = policy(make, device(), name="diffusion", language=TEXT)
    seeing = policy(make, both, goals=["observation.state"])
    operator = {"name": "mix", "weights": [0.5, 0.5]}
    composed = compose({"blind": make.awaken(blind), "seeing": make.awaken(seeing)}, operator)
    obs = observations(both, text="push")
    obs["goal.observation.state"] = obs["observation.state"]
    assert set(composed.spec.observation) == set(obs)
    _, chunk = composed.act(None, obs, seed=np.arange(3))
    assert chunk.shape == (3, 4, 2)
    for key in (LEFT, TASK):
        other = {**obs, key: 255 - obs[key]}
        assert (composed.act(None, other, seed=np.arange(3))[1] != chunk).any()
    with pytest.raises(SpecError, match=f"policy 'seeing' needs '{LEFT}'"):
        composed.encode({key: value for key, value in obs.items() if key != LEFT})

"""What sees, is told and acts: its memory, its two heads, and the tokens that they read."""

import numpy as np
import pytest
import torch

from embodied.core.config import component, compose, options_of
from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import TASK, encode_instruction
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.acting import InferenceConfig, RtcConfig
from policies.build import build_policy
from policies.compose.build import compose as composition
from policies.inference.policy import ActingPolicy
from policies.networks.stages import Prepared

CAMERA, STATE = "observation.images.front", "observation.state"
VIT = {"name": "vit", "patch": 8, "width": 16, "depth": 1, "heads": 2, "features": 12}
WORDS = {"name": "words", "max_bytes": 24, "max_words": 4, "buckets": 64, "width": 16}
TRUNK = {"width": 32, "depth": 2, "heads": 2}
HEADS = {
    "vla": {"expert": {"width": 24, "heads": 2}, "num_steps": 4},
    "autoregressive": {"tokenizer": {"name": "bins", "bins": 17}},
}


def device(size=16):
    pictures = ArraySpec((size, size, 3), "uint8")
    action = ArraySpec((2,), low=(-1.0,), high=(1.0,))
    return DeviceSpec({STATE: ArraySpec((3,)), CAMERA: pictures}, action, tick_hz=10.0)


def policy(make, name="vla", **options):
    config = {
        **{"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "language": WORDS},
        **{"transformer": TRUNK, "images": {"encoder": VIT, "crop": 1.0}},
        **HEADS.get(name, {}),
        **options,
    }
    spec = device()
    return build_policy(name, config, spec, spec.observation, make.all_stats(), seed=0)


def observations(rows, text="push the block", seed=0):
    rng = np.random.default_rng(seed)
    return {
        STATE: rng.normal(size=(rows, 1, 3)).astype(np.float32),
        CAMERA: rng.integers(0, 256, (rows, 1, 16, 16, 3), np.uint8),
        TASK: np.tile(encode_instruction(text, 24), (rows, 1, 1)),
    }


def text(words, length=24):
    return torch.from_numpy(encode_instruction(words, length).copy())[None]


def test_the_prefix_is_a_token_for_the_state_each_patch_and_each_word(make):
    for steps in (1, 2):
        made = policy(make, n_obs_steps=steps)
        assert made.encoder.token_sizes == [(1, 3 * steps), (4 * steps, 12), (4, 64)]
        assert made.prefix.positions_SW.shape == (5 + 4 * steps, 32)
    made = policy(make, images={"encoder": {"name": "resnet18", "width": 16, "pooling": "average"}})
    assert made.encoder.token_sizes[1] == (1, 64)
    goals = policy(make, goals=[STATE, CAMERA])
    assert goals.encoder.token_sizes == [(1, 6), (8, 12), (4, 64)]


@pytest.mark.parametrize("name", HEADS)
def test_every_token_of_the_prefix_has_a_say(make, name):
    made = make.awaken(policy(make, name))
    seen = []
    made.prefix.register_forward_hook(lambda module, args, out: seen.append(out))
    made.prefix.positions_SW.requires_grad_()
    batch = {**observations(3), "action": np.zeros((3, 4, 2), np.float32)}
    loss, _ = made.loss({**batch, "action_is_pad": np.zeros((3, 4), bool)})
    (slope,) = torch.autograd.grad(loss, seen)
    assert slope.shape == (3, 9, 32) and (slope.abs().amax(dim=-1) > 0).all()


def test_an_encoders_tokens_have_its_vector_as_their_mean():
    torch.manual_seed(0)
    for data, x in ((VIT, torch.randn(3, 3, 16, 24)), (WORDS, text("open the drawer"))):
        kind = "encoders" if data is VIT else "text_encoders"
        cls, options = component(kind, data, "policy")
        encoder = cls(options, (16, 24)) if data is VIT else cls(options)
        tokens = encoder.tokens(x)
        assert tokens.shape == (len(x), encoder.count, options.features)
        torch.testing.assert_close(tokens.mean(dim=1), encoder(x))


def test_a_word_is_itself_wherever_it_stands():
    cls, options = component("text_encoders", {**WORDS, "buckets": 4096}, "policy")
    encoder = cls(options)

    def rows(words):
        return encoder.words(text(words))[0].tolist()

    push, red, block, nothing = rows("push red block")
    assert len({push, red, block, 0}) == 4 and nothing == 0
    assert rows("  block\tred push ") == [block, red, push, 0]
    assert rows("pus h") != [push, 0, 0, 0] and rows("hsup")[0] != push
    assert rows("") == [0, 0, 0, 0]
    assert rows("red red red block") == [red, red, red, block]
    longer = [rows(f"a b c d{rest}") for rest in ("", " e", " f", " e f", " f e")]
    assert len({row[3] for row in longer}) == 5 and len({tuple(row[:3]) for row in longer}) == 1
    assert rows("тяни") != rows("толкай")
    short = cls(options).words(text("open", 4))
    assert torch.equal(short, encoder.words(text("open", 24)))


@pytest.mark.parametrize("name", HEADS)
def test_learns_to_do_as_told_with_what_it_sees(make, name):
    """The light's side and the word make four different targets, half a unit apart."""
    made = policy(make, name)
    optimizer = torch.optim.Adam(made.parameters(), lr=5e-3)

    def scene(rng, rows):
        obs = observations(rows, seed=int(rng.integers(1 << 30)))
        side, told = (rng.choice([-1, 1], rows) for _ in range(2))
        columns = np.arange(16) >= 8
        light = np.where(columns == (side > 0)[:, None], 200, 40).astype(np.uint8)
        obs[CAMERA][:] = light[:, None, None, :, None]
        words = {
            -1: encode_instruction("move from it", 24),
            1: encode_instruction("move to it", 24),
        }
        obs[TASK] = np.stack([words[int(k)] for k in told])[:, None]
        return obs, 0.5 * told + 0.25 * side

    rng = np.random.default_rng(0)
    for _ in range(160 if name == "vla" else 60):
        obs, target = scene(rng, 32)
        action = np.broadcast_to(target[:, None, None], (32, 4, 2)).astype(np.float32)
        loss, _ = made.loss({**obs, "action": action, "action_is_pad": np.zeros((32, 4), bool)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs, target = scene(rng, 40)
    _, chunk = made.act(None, obs, seed=np.arange(40))
    assert (np.abs(chunk - target[:, None, None]).max(axis=(1, 2)) < 0.25).mean() > 0.85


def test_the_prefix_is_read_once_for_a_decision(make):
    made = make.awaken(policy(make))
    seen = []
    made.transformer.layers[0].query_key_value.register_forward_hook(lambda *_: seen.append("read"))
    made.network.layers[0].query_key_value.register_forward_hook(lambda *_: seen.append("step"))
    made.act(None, observations(3), seed=np.arange(3))
    assert seen == ["read"] + ["step"] * 4


@pytest.mark.parametrize("rtc", ["identity", "full", "copy"])
def test_acts_laid_out_for_acting_as_it_does_itself(make, rtc):
    made = make.awaken(policy(make))
    made.rtc = RtcConfig(mode=rtc)
    obs, seed = observations(2), np.arange(2)
    carry, first = made.act(None, obs, seed=seed)
    prefix = first[:, 2:3]
    expected = made.act(carry, obs, prefix=prefix, seed=seed)[1]
    np.testing.assert_array_equal(expected[:, :1], prefix)
    acting = ActingPolicy(made, InferenceConfig(), rows=2)
    carry, again = acting.act(None, obs, seed=seed)
    np.testing.assert_allclose(again, first, atol=1e-5)
    found = acting.act(carry, obs, prefix=prefix, seed=seed)[1]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if rtc == "identity":
        reduced = ActingPolicy(made, InferenceConfig(dtype="bfloat16"), rows=2)
        np.testing.assert_allclose(reduced.act(None, obs, seed=seed)[1], first, atol=0.1)


def test_what_is_worked_out_ahead_shares_one_memory(make):
    made = make.awaken(policy(make))
    cond = made.encode(observations(2))
    made.ahead = True
    prepared = made.prepare(cond, made.solver.log_snrs)
    assert isinstance(prepared, Prepared) and len(prepared.contexts) == 4
    for context in prepared.contexts.values():
        assert context[0].data_ptr() == cond.data_ptr()
    x = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    for level in made.solver.log_snrs[1:]:
        ahead = made.denoise(x, level, prepared).value
        torch.testing.assert_close(ahead, made.denoise(x, level, cond).value)


def test_composes_with_a_flow_that_reads_less(make):
    seeing = make.awaken(policy(make, num_steps=4))
    config = {"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "num_steps": 4}
    spec = device()
    blind = build_policy("flow", config, spec, [STATE], make.all_stats(), seed=1)
    pair = {"seeing": seeing, "blind": make.awaken(blind)}
    obs, seed = observations(3), np.arange(3)
    alone = composition(pair, {"name": "mix", "weights": [1.0, 0.0]})
    np.testing.assert_allclose(
        alone.act(None, obs, seed=seed)[1], seeing.act(None, obs, seed=seed)[1], atol=1e-6
    )
    both = composition(pair, {"name": "mix", "weights": [0.5, 0.5]})
    chunk = both.act(None, obs, seed=seed)[1]
    told = both.act(None, {**obs, TASK: observations(3, "pull")[TASK]}, seed=seed)[1]
    assert chunk.shape == (3, 4, 2) and (told != chunk).any()


def test_the_configuration_offers_both_heads():
    for head, name in (("flow", "vla"), ("tokens", "autoregressive")):
        given = compose("train", ["task=pointmass", "policy=vla", f"policy/head={head}"])["policy"]
        options = options_of("policies", given, "policy")
        assert given["name"] == name and options.images.encoder["name"] == "vit"
        assert options.language == {"name": "words"} and options.transformer.depth == 4
        for kind, data, where in options.parts():
            options_of(kind, data, where)
    with pytest.raises(ConfigError, match="multiple of heads"):
        options_of("policies", {"name": "vla", "expert": {"width": 30, "heads": 4}}, "policy")


def test_an_instruction_is_needed_where_words_are_read(make):
    with pytest.raises(SpecError, match="'task' is missing"):
        obs = observations(2)
        policy(make).encode({key: value for key, value in obs.items() if key != TASK})
    silent = policy(make, language=None)
    assert silent.encoder.token_sizes == [(1, 3), (4, 12)]

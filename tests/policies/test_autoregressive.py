"""The autoregressive policy: its law, its cache, its seeds, and what it learns."""

import itertools
import math

import numpy as np
import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from policies import noise
from policies.build import build_policy
from policies.tokens.heads import choose_by
from policies.tokens.policy import TEXTS

DECODINGS = ("step", "parallel", "token")
SIZES = {"transformer": {"width": 32, "depth": 2, "heads": 2}}
SHALLOW = {"transformer": {"width": 64, "depth": 1, "heads": 2}}


def made(make, *, dim=2, bins=5, name="autoregressive", **options):
    options = {"tokenizer": {"name": "bins", "bins": bins}, **SIZES, **options}
    device = make.device(action_dim=dim)
    config = {"horizon": 4, "n_action_steps": 2, **options}
    return build_policy(name, config, device, device.observation, make.all_stats(), seed=0)


def nothing(make, rows):
    return {key: np.zeros_like(value) for key, value in make.obs(rows).items()}


def teach(policy, make, draw, *, steps, rows=128, rate=1e-2):
    """Clone chunks [rows, H, D] that `draw` makes, whatever is observed."""
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        action = draw(rng, rows).astype(np.float32)
        batch = {**nothing(make, rows), "action": action}
        loss, _ = policy.loss(batch | {"action_is_pad": np.zeros(action.shape[:2], bool)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("n", [1, 3, TEXTS + 5])
def test_what_is_written_with_the_cache_is_what_one_pass_over_all_tokens_says(make, decoding, n):
    """Every token is the one that the uniform number chooses by the full pass's logits."""
    policy = make.awaken(made(make, dim=3, bins=9, decoding=decoding))
    cond = policy.encode(make.obs(2))
    u = torch.rand((2, n, policy.places, policy.per_place), generator=torch.Generator())
    with torch.no_grad():
        chunks = policy._draw(cond, u).flatten(0, 1)
        tokens = policy.tokenizer.encode(policy.action_normalizer.normalize(chunks))
        logits = policy.logits(cond.repeat_interleave(n, dim=0), tokens)
    expected = choose_by(u.view(tokens.shape), logits, 1.0)
    assert (expected == tokens).float().mean() > 0.995  # rounding may cross an edge


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_token_depends_on_those_before_it_alone(make, decoding):
    policy = make.awaken(made(make, decoding=decoding))
    cond = policy.encode(make.obs(1))
    tokens = torch.randint(5, (1, 4, 2), generator=torch.Generator().manual_seed(0))
    base = policy.logits(cond, tokens).flatten(1, 2)
    for index in range(8):
        other = tokens.flatten(1).clone()
        other[0, index] = (other[0, index] + 1) % 5
        found = policy.logits(cond, other.view_as(tokens)).flatten(1, 2)
        changed = (found != base).any(dim=-1)[0]
        first = index + 1 if decoding != "parallel" else 2 * (index // 2 + 1)
        assert not changed[:first].any() and changed[first:].all()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_drawn_law_is_the_product_of_its_conditionals(make, decoding):
    """All 81 chunks of 2 × 2 numbers of 3 values: counts against exp log_prob."""
    policy = make.awaken(made(make, bins=3, horizon=2, n_action_steps=1, decoding=decoding))
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    obs = make.obs(1)
    with torch.no_grad():
        cond = policy.encode(obs).expand(81, -1)
        law = policy.log_prob(cond, every).sum((1, 2)).exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-4)
    n = 20_000
    tokens = (policy.sample(obs, n, seed=0)[0] + 1).long().flatten(1)
    counts = torch.bincount((tokens * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    chi_square = ((counts - n * law) ** 2 / (n * law).clamp(min=1e-9))[n * law > 5].sum()
    assert chi_square < 80 + 4 * math.sqrt(160)


def test_the_law_is_sharpened_by_the_temperature(make):
    p = torch.tensor([0.5, 0.3, 0.2])
    u = torch.linspace(0, 1, 100_001)[:-1]
    for temperature in (1.0, 0.5, 2.0):
        found = choose_by(u, p.log().expand(len(u), 3), temperature)
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        shares = torch.bincount(found, minlength=3) / len(u)
        torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    policy = make.awaken(made(make, temperature=0.0))
    likeliest = policy.sample(make.obs(2), 3, seed=0)
    assert torch.equal(likeliest, likeliest[:, :1].expand_as(likeliest))
    assert torch.equal(likeliest, policy.sample(make.obs(2), 3, seed=1))


def test_numbers_at_the_ends_choose_tokens_that_can_be():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    ends = torch.tensor([0.0, 1 - 2**-24])
    found = choose_by(ends, logits.expand(2, 4), 1.0)
    assert found[0] == 1 and found[1] in (2, 3)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_learns_a_joint_law_but_for_a_step_in_parallel(make, decoding):
    """Both numbers of a step are the same one of three, each step anew: the loss ends at the law's
    entropy, log 3 a step, or at that of its marginals, twice as much, where they are parallel."""
    policy = made(make, bins=3, decoding=decoding, **SHALLOW)

    def draw(rng, rows):
        return np.repeat(rng.integers(-1, 2, (rows, 4, 1)), 2, axis=2)

    losses = teach(policy, make, draw, steps=100)
    per_token = math.log(3) * (1 if decoding == "parallel" else 0.5)
    assert np.mean(losses[-20:]) == pytest.approx(per_token, abs=0.02)
    chunks = policy.sample(nothing(make, 1), 2000, seed=1)[0]
    alike = (chunks[..., 0] == chunks[..., 1]).float().mean().item()
    assert alike == pytest.approx(1 / 3 if decoding == "parallel" else 1, abs=0.03)
    shares = [(chunks[..., 0] == value).float().mean().item() for value in (-1, 0, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


@pytest.mark.parametrize("tokenizer", ["bins", "dct"])
def test_has_the_moments_of_what_it_is_taught(make, tokenizer):
    """A mixture of two chunks and noise: mean, deviation and the correlation of the steps."""
    options = {"bins": {"bins": 21}, "dct": {"scale": 8.0, "share": 0.5}}[tokenizer]
    policy = made(make, dim=1, tokenizer={"name": tokenizer, **options}, **SHALLOW)

    def draw(rng, rows):
        side = rng.choice([-0.5, 0.5], (rows, 1, 1))
        return side * [[1], [1], [0.9], [0.8]] + 0.05 * rng.standard_normal((rows, 1, 1))

    teach(policy, make, draw, steps=200)
    taught = draw(np.random.default_rng(1), 20_000)[..., 0]
    found = policy.sample(nothing(make, 1), 4000, seed=0)[0, ..., 0].numpy()
    np.testing.assert_allclose(found.mean(0), taught.mean(0), atol=1 / 16)
    np.testing.assert_allclose(found.std(0), taught.std(0), atol=1 / 16)
    np.testing.assert_allclose(np.corrcoef(found.T), np.corrcoef(taught.T), atol=0.03)


def test_the_rest_goes_on_from_the_committed_actions(make):
    """Chunks are all −½ or all +½: alone a coin's toss, after +½ always +½."""
    policy = made(make, dim=1, **SHALLOW)

    def draw(rng, rows):
        return rng.choice([-0.5, 0.5], (rows, 1, 1)) * np.ones((4, 1))

    teach(policy, make, draw, steps=60)
    obs, seeds = nothing(make, 200), np.arange(200)
    _, free = policy.act(None, obs, seed=seeds)
    assert (free == free[:, :1]).all(axis=1).mean() > 0.97
    assert 0.35 < (free[:, 0] > 0).mean() < 0.65
    prefix = np.full((200, 2, 1), 0.45, np.float32)
    _, chunks = policy.act(None, obs, prefix=prefix, seed=seeds)
    np.testing.assert_array_equal(chunks[:, :2], prefix)
    assert (chunks[:, 2:] == 0.5).mean() > 0.97


@pytest.mark.parametrize("tokenizer", ["bins", "dct"])
def test_a_prefix_heads_the_chunk_and_must_fit(make, tokenizer):
    policy = make.awaken(made(make, tokenizer={"name": tokenizer}))
    seed, prefix = np.array([0, 1]), np.full((2, 1, 2), 0.25, np.float32)
    _, free = policy.act(None, make.obs(2), seed=seed)
    _, chunk = policy.act(None, make.obs(2), prefix=prefix, seed=seed)
    np.testing.assert_array_equal(chunk[:, :1], prefix)
    assert (chunk[:, 1:] == free[:, 1:]).all() == (tokenizer == "dct")
    for wrong in (prefix[:1], prefix[:, :0], prefix[..., :1]):
        with pytest.raises(SpecError, match="prefix has shape"):
            policy.act(None, make.obs(2), prefix=wrong, seed=seed)
    with pytest.raises(SpecError, match=r"3 actions are committed.*at most 2"):
        policy.act(None, make.obs(2), prefix=prefix.repeat(3, axis=1), seed=seed)


def test_a_row_decides_by_its_own_seed_alone_and_in_company(make):
    policy = make.awaken(made(make))
    obs, seeds = make.obs(40), np.arange(40)
    _, together = policy.act(None, obs, seed=seeds)
    for row in (0, 17, 39):
        alone = {key: value[row : row + 1] for key, value in obs.items()}
        _, chunk = policy.act(None, alone, seed=seeds[row : row + 1])
        np.testing.assert_array_equal(chunk[0], together[row])
    same = nothing(make, 40)
    _, chunks = policy.act(None, same, seed=seeds)
    assert len({chunk.tobytes() for chunk in chunks}) > 30
    np.testing.assert_array_equal(policy.act(None, same, seed=seeds + 1)[1][:-1], chunks[1:])


def test_uniform_numbers_are_a_rows_own():
    seeds = list(range(500))
    u = noise.uniform(seeds, (8, 3))
    assert torch.equal(noise.uniform([7], (8, 3))[0], u[7])
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_observations_are_read_once_for_all_samples_and_a_step_takes_one_pass(make):
    policy = made(make, dim=3)
    seen = []
    first = policy.transformer.layers[0].query_key_value
    first.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    policy.sample(make.obs(5), 7, seed=0)
    assert seen == [(5, 3)] + [(5, 7)] * 3


@pytest.mark.parametrize("tokenizer", ["bins", "dct"])
def test_padded_steps_have_no_influence(make, tokenizer):
    policy = make.awaken(made(make, tokenizer={"name": tokenizer}))
    batch = make.batch(5, horizon=4)
    pad = batch["action_is_pad"] = np.arange(4) >= np.array([4, 3, 2, 1, 0])[:, None]
    plain, metrics = policy.loss(batch)
    assert metrics == {"loss": plain.item()}
    for value in (123.0, np.nan, np.inf):
        other = {**batch, "action": np.where(pad[..., None], value, batch["action"])}
        assert policy.loss(other)[0] == plain
    if tokenizer == "bins":
        tokens = policy.tokenizer.encode(torch.from_numpy(batch["action"]))
        cond = policy.encode({key: batch[key] for key in policy.spec.observation})
        # What is padded comes last, so that nothing valid depends on how it is filled.
        expected = -policy.log_prob(cond, tokens)[torch.from_numpy(~pad)].mean()
        torch.testing.assert_close(plain, expected)
    batch["action_is_pad"][:] = True
    assert policy.loss(batch)[0] == 0


def test_device_units_and_bounds(make):
    policy = make.awaken(make.policy("autoregressive", device=make.device(low=-3.0, high=5.0)))
    chunks = policy.sample(make.obs(4), 50, seed=0)
    values = torch.linspace(-3, 5, 17)
    assert ((chunks[..., None] - values).abs().amin(-1) < 1e-5).all()
    assert chunks.min() == -3 and chunks.max() == 5


def test_what_does_not_fit_is_named(make):
    for options, match in (
        ({"action_normalization": "gaussian"}, "set action_normalization: spec or limits"),
        ({"transformer": {"width": 30, "heads": 4}}, "multiple of heads"),
        ({"decoding": "steps"}, "decoding"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=match):
            component("policies", {"name": "autoregressive", **options}, "policy")
    with pytest.raises(ConfigError, match=r"unknown tokenizer 'bin'.*'bins'"):
        made(make, tokenizer={"name": "bin"})
    policy = made(make)
    with torch.no_grad():
        policy.head.outlet.bias[0] = torch.nan
    with pytest.raises(SpecError, match="autoregressive policy's logits are not finite"):
        policy.act(None, make.obs(1), seed=np.zeros(1, int))

"""Composition at score level, against the closed forms of methods.md C4."""

import itertools

import numpy as np
import pytest
import torch
from gaussians import HALF, KINDS, PAIRS, SOLVER, affine, ends, moments, one

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.specs import DeviceSpec
from policies.compose.build import compose
from policies.conversions import epsilon_of, signal_noise
from policies.solvers.flow import Euler


@pytest.mark.parametrize("kinds", list(itertools.combinations_with_replacement(KINDS, 2)))
@pytest.mark.parametrize(
    ("pair", "expected"), [("equal", (0.19576, 0.022946)), ("unequal", (-0.14806, 0.019034))]
)
def test_mixed_gaussians_in_every_pair_of_parameterisations(
    gaussian, integrate, kinds, pair, expected
):
    """C4.1 and C4.2 with DDIM-10: the second exposes −.4, the geometric product's mean."""
    means, sigmas, weights = PAIRS[pair]
    policies = {f"p{i}": gaussian(kinds[i], means[i], sigmas[i]) for i in range(2)}
    composed = compose(policies, {"name": "mix", "weights": weights}, solver=SOLVER)
    assert moments(integrate(composed, ends())) == pytest.approx(expected, abs=3e-5)


@pytest.mark.parametrize("kinds", [("epsilon", "flow"), ("flow", "v"), ("sample", "sample")])
@pytest.mark.parametrize(
    ("pair", "expected"), [("equal", (0.2, 0.034361)), ("unequal", (-0.24194, 0.021319))]
)
def test_mixed_gaussians_under_ddpm(gaussian, integrate, kinds, pair, expected):
    means, sigmas, weights = PAIRS[pair]
    policies = {f"p{i}": gaussian(kinds[i], means[i], sigmas[i]) for i in range(2)}
    solver = {"name": "ddpm", "timestep_spacing": "leading", "clip_sample": False}
    composed = compose(policies, {"name": "mix", "weights": weights}, solver=solver)
    rng = torch.Generator().manual_seed(0)
    out = integrate(composed, torch.randn(2000, 6, 2, dtype=torch.float64, generator=rng), rng)
    n, (mean, variance) = out.numel(), expected
    assert out.mean().item() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert out.var().item() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


def test_four_parameterisations_compose_to_one_score(gaussian, make):
    """C4.3: w of one Gaussian in any two parameterisations is that Gaussian's score."""
    x = torch.randn(3, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for log_snr in gaussian("epsilon", 0.2, 0.3).solver.log_snrs[1:]:
        signal, noise = signal_noise(log_snr)
        expected = noise * (x - signal * 0.2) / (signal**2 * 0.09 + noise**2)
        for kinds in itertools.combinations(KINDS, 2):
            members = {kind: gaussian(kind, 0.2, 0.3) for kind in kinds}
            composed = compose(members, {"name": "mix", "weights": [0.3, 0.7]}).double()
            got = epsilon_of(composed.denoise(x, log_snr, composed.encode(make.obs(3))), x, log_snr)
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kinds", [("flow", "epsilon"), ("v", "flow"), ("flow", "flow")])
@pytest.mark.parametrize("alone", [0, 1])
def test_all_the_weight_on_one_member_is_that_member_bit_for_bit(make, kinds, alone):
    policies = {}
    for i, kind in enumerate(kinds):
        name, options = KINDS[kind]
        policies[f"p{i}"] = make.awaken(make.policy(name, seed=i, horizon=6 + 2 * i, **options))
    weights = [0.0, 0.0]
    weights[alone] = 1.0
    composed = compose(policies, {"name": "mix", "weights": weights})
    parent = policies[f"p{alone}"]
    assert composed.spec == parent.spec
    obs, seeds = make.obs(4), np.arange(4)
    calls = []
    policies[f"p{1 - alone}"].register_forward_pre_hook(lambda *_: calls.append(0))
    policies[f"p{1 - alone}"].network.register_forward_pre_hook(lambda *_: calls.append(0))
    np.testing.assert_array_equal(
        composed.act(None, obs, seed=seeds)[1], parent.act(None, obs, seed=seeds)[1]
    )
    assert torch.equal(composed.sample(obs, 3, seed=5), parent.sample(obs, 3, seed=5))
    assert not calls


def test_observations_are_encoded_once_per_chunk(make):
    policies = {str(i): make.awaken(make.policy(seed=i)) for i in range(2)}
    composed = compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    counts = dict.fromkeys(policies, 0)
    for label, policy in policies.items():
        original = policy.encode

        def encode(obs, label=label, original=original):
            counts[label] += 1
            return original(obs)

        policy.encode = encode
    composed.act(None, make.obs(2), seed=np.arange(2))
    assert counts == {"0": 1, "1": 1}


OPERATORS = {
    "product": ({"name": "product", "weights": [0.8, 0.9]}, lambda f, level: (0.8, 0.9)),
    "cfg": (
        {"name": "cfg", "unconditional": "p0", "weights": [1.7]},
        lambda f, level: (1 - 1.7, 1.7),
    ),
    "steps": (
        {"name": "mix", "weights": [1.0, 0.0], "stages": [{"begin": 0.5, "weights": [0.2, 0.8]}]},
        lambda f, level: (0.2, 0.8) if f >= 0.5 else (1.0, 0.0),
    ),
    "levels": (
        {
            "name": "mix",
            "weights": [0.6, 0.4],
            "stage_axis": "log_snr",
            "stages": [{"begin": -1.0, "weights": [0.1, 0.9]}, {"begin": 2.0, "weights": [1, 0]}],
        },
        lambda f, level: (1, 0) if level >= 2 else (0.1, 0.9) if level >= -1 else (0.6, 0.4),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kinds", [("epsilon", "epsilon"), ("v", "flow"), ("sample", "epsilon")])
def test_operators_follow_their_affine_recursion(gaussian, integrate, name, kinds):
    options, weights = OPERATORS[name]
    means, sigmas, _ = PAIRS["unequal"]
    policies = {f"p{i}": gaussian(kinds[i], means[i], sigmas[i]) for i in range(2)}
    composed = compose(policies, options, solver=SOLVER)
    levels = composed.solver.log_snrs

    def terms(log_snr):
        w = weights(levels.index(log_snr) / len(levels), log_snr)
        return sum(w[i] * one(log_snr, means[i], sigmas[i]) for i in range(2))

    expected = affine(terms, levels)
    assert moments(integrate(composed, ends())) == pytest.approx(expected, abs=2e-6)


def test_weights_that_change_need_one_level_for_all_rows(gaussian, make):
    policies = {f"p{i}": gaussian("epsilon", 0.2 * i, 0.2) for i in range(2)}
    composed = compose(policies, OPERATORS["levels"][0], solver=SOLVER).double()
    x, cond = torch.zeros(2, 6, 2, dtype=torch.float64), composed.encode(make.obs(2))
    same = composed.denoise(x, torch.tensor([0.5, 0.5], dtype=torch.float64), cond)
    torch.testing.assert_close(same.value, composed.denoise(x, 0.5, cond).value)
    with pytest.raises(ConfigError, match="one level for all rows"):
        composed.denoise(x, torch.tensor([0.5, 3.0], dtype=torch.float64), cond)


def test_weights_of_each_dimension(gaussian, integrate):
    policies = {f"p{i}": gaussian("epsilon", m, 0.2) for i, m in enumerate((-0.5, 0.5))}
    operator = {"name": "mix", "weights": [[0.3, 1.0], [0.7, 0.0]]}
    out = integrate(compose(policies, operator, solver=SOLVER), ends())
    expected = integrate(
        compose(policies, {"name": "mix", "weights": [0.3, 0.7]}, solver=SOLVER), ends()
    )
    torch.testing.assert_close(out[..., 0], expected[..., 0])
    alone = integrate(
        compose(policies, {"name": "mix", "weights": [1.0, 0.0]}, solver=SOLVER), ends()
    )
    torch.testing.assert_close(out[..., 1], alone[..., 1])


@pytest.mark.parametrize("operator", ["mix", "product", "or", "and"])
def test_the_longer_members_score_stays_on_the_tail(gaussian, make, operator):
    """C1.5, renormalised: on the tail the composition is the longer member."""
    policies = {
        "short": gaussian("epsilon", -0.5, 0.1),
        "long": gaussian("flow", 0.5, 0.3, horizon=9),
    }
    options = {"mix": {"weights": [0.6, 0.4]}, "product": {"weights": [0.6, 0.4]}}.get(operator, {})
    solver = {"name": "ddpm"} if operator in ("or", "and") else None
    composed = compose(policies, {"name": operator, **options}, solver=solver).double()
    assert composed.spec.horizon == 9
    x = torch.randn(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = epsilon_of(composed.denoise(x, 0.3, composed.encode(make.obs(2))), x, 0.3)
    a, b = one(0.3, 0.5, 0.3)
    torch.testing.assert_close(got[:, 6:], a * x[:, 6:] - b, atol=1e-6, rtol=0)
    c, d = one(0.3, -0.5, 0.1)
    if operator in ("mix", "product"):
        head = 0.6 * (c * x - d) + 0.4 * (a * x - b)
        torch.testing.assert_close(got[:, :6], head[:, :6], atol=1e-6, rtol=0)


def test_members_may_differ_in_observations_and_history(make):
    device = make.device()
    goal_only = DeviceSpec(
        observation={"observation.goal": device.observation["observation.goal"]},
        action=device.action,
        tick_hz=10.0,
    )
    policies = {
        "both": make.awaken(make.policy("diffusion", n_obs_steps=1)),
        "goal": make.awaken(make.policy("flow", device=goal_only, n_obs_steps=2)),
    }
    composed = compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    assert set(composed.spec.observation) == set(device.observation)
    assert composed.spec.n_obs_steps == 2
    obs = make.obs(3)
    chunk = composed.act(None, obs, seed=np.arange(3))[1]
    older = {**obs, "observation.state": obs["observation.state"].copy()}
    older["observation.state"][:, 0] += 5  # only the member without that history sees it
    np.testing.assert_array_equal(composed.act(None, older, seed=np.arange(3))[1], chunk)
    del obs["observation.goal"]
    with pytest.raises(SpecError, match=r"'both' needs 'observation.goal'"):
        composed.act(None, obs, seed=np.arange(3))


def rescaled(make, policy, scale, shift):
    """The same density of device actions, learned under another action normalisation."""
    policy._action.scale.mul_(torch.as_tensor(scale, dtype=policy._action.scale.dtype))
    policy._action.offset.add_(torch.as_tensor(shift, dtype=policy._action.offset.dtype))
    return policy


@pytest.mark.parametrize("kinds", [("epsilon", "v"), ("flow", "epsilon"), ("flow", "flow")])
def test_shifted_and_scaled_normalisers_are_converted_exactly(gaussian, make, integrate, kinds):
    """N(μ, σ²) in device units is N((μ − o)/c, (σ/c)²) to a member with offset o and scale c."""
    means, sigmas, weights = PAIRS["unequal"]
    c, o = 1.6, torch.tensor([0.3, -0.2])
    plain = {f"p{i}": gaussian(kinds[i], means[i], sigmas[i]) for i in range(2)}
    other = gaussian(kinds[1], (means[1] - o.double()) / c, sigmas[1] / c)
    odd = {"p0": plain["p0"], "p1": rescaled(make, other, c, o)}
    operator = {"name": "mix", "weights": weights}
    # Within the levels that both schedules know the conversion is exact.
    solver = {"name": "euler", "grid": [0.05, 0.2, 0.4, 0.6, 0.8]}
    expected = integrate(compose(plain, operator, solver=solver), ends())
    composed = compose(odd, operator, solver=solver)
    assert composed.config.members[1].ratio == pytest.approx(1 / c)
    got = integrate(composed, ends())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_normalisers_that_scale_dimensions_apart_are_refused(make):
    policies = {"a": make.policy(), "b": rescaled(make, make.policy(), [1.0, 2.0], [0.0, 0.0])}
    with pytest.raises(ConfigError, match=r"'b' scales .* 'a' in dimensions \[\d\].*pooled"):
        compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    compose(policies, {"name": "pooled"})
    compose(policies, {"name": "mix", "weights": [0.0, 1.0]})


def test_clipping_reaches_as_far_as_any_member(gaussian, make, integrate):
    """Two members whose ±1 is not the same: B's +1 is the composition's 3, and the other way."""
    for kind in ("sample", "flow"):
        a = gaussian(kind, 0.0, 0.1)
        b = rescaled(make, gaussian(kind, 0.5, 0.1), 1.0, 2.0)
        for order, first_shift in (({"a": a, "b": b}, 0.0), ({"b": b, "a": a}, 2.0)):
            for w in (0.3, 0.95):
                weights = [1 - w, w] if first_shift == 0 else [w, 1 - w]
                solver = {"name": "ddim", "num_steps": 20}
                mix = compose(order, {"name": "mix", "weights": weights}, solver=solver)
                out = integrate(mix, torch.zeros(2, 6, 2, dtype=torch.float64))
                assert out.mean().item() == pytest.approx(2.5 * w - first_shift, abs=0.02)


def test_superposed_policies_are_no_members(make):
    pair = {"a": make.policy("flow"), "b": make.policy("flow")}
    superposed = compose(pair, {"name": "or"}, solver={"name": "ddpm", "num_train_steps": 20})
    with pytest.raises(ConfigError, match=r"'c' is superposed by 'or'.*compose its members"):
        compose({"c": superposed, "a": pair["a"]}, {"name": "mix", "weights": [0.5, 0.5]})


def test_a_composition_in_a_composition_keeps_its_training_noise(make):
    inner = compose({"a": make.policy("flow"), "b": make.policy("flow")}, HALF)
    outer = compose({"inner": inner, "c": make.policy("flow")}, HALF)
    outer.seed_training(3)
    state = outer.training_rng_state()
    first = outer.loss(make.batch(4))[0].item()
    outer.set_training_rng_state(state)
    assert outer.loss(make.batch(4))[0].item() == first
    with pytest.raises(CorruptDataError, match="training noise has"):
        outer.set_training_rng_state(state[:-1])


def test_actions_that_are_not_finite_are_no_decision(make):
    pair = {k: make.policy("diffusion", prediction_type="sample") for k in "ab"}
    solver = {"name": "heun", "first_u": 0.01, "num_steps": 4}
    product = compose(pair, {"name": "product", "weights": [1.0, 1.0]}, solver=solver)
    with pytest.raises(SpecError, match="not finite"):
        product.act(None, make.obs(2), seed=np.arange(2))


def test_heun_ends_with_euler_where_members_predict_chunks(make):
    flow = make.policy("flow", solver="heun", num_steps=4)
    sample = make.policy("diffusion", prediction_type="sample")
    for policies in ({"a": flow, "b": sample}, {"b": sample, "a": flow}):
        chunk = compose(policies, HALF).act(None, make.obs(2), seed=np.arange(2))[1]
        assert np.abs(chunk).max() < 1


def test_default_solvers(make):
    flow, diffusion = make.policy("flow", num_steps=7), make.policy("diffusion")
    assert compose({"a": diffusion, "b": flow}, HALF).solver is diffusion.solver
    assert compose({"a": flow, "b": flow}, HALF).solver is flow.solver
    mixed = compose({"a": flow, "b": diffusion}, HALF).solver
    assert isinstance(mixed, Euler) and mixed.grid[0] > 0 and len(mixed.grid) == 7 and mixed.clip
    product = compose({"a": flow, "b": flow}, {"name": "product", "weights": [1.0, 1.0]}).solver
    assert isinstance(product, Euler) and product.grid[0] > 0
    for policies in ({"a": flow, "b": diffusion}, {"a": diffusion, "b": flow}):
        chunk = compose(policies, HALF).act(None, make.obs(2), seed=np.arange(2))[1]
        assert np.isfinite(chunk).all()


def test_compositions_nest(gaussian, integrate):
    means, sigmas, weights = PAIRS["unequal"]
    a, b = (gaussian("v", means[i], sigmas[i]) for i in range(2))
    inner = compose({"a": a, "b": b}, {"name": "mix", "weights": weights}, solver=SOLVER)
    outer = compose({"ab": inner, "a": a}, {"name": "mix", "weights": [0.4, 0.6]}, solver=SOLVER)
    flat = compose({"a": a, "b": b}, {"name": "mix", "weights": [0.8, 0.2]}, solver=SOLVER)
    torch.testing.assert_close(integrate(outer, ends()), integrate(flat, ends()))

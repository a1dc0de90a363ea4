"""Proposition 4.1's weights: the quadratic against brute force and against known errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.core.errors import ConfigError
from policies.compose.analytic import error_products, simplex_weights
from policies.compose.build import compose


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_the_quadratic_is_minimal_on_the_simplex(seed, n):
    rng = np.random.default_rng(seed)
    errors = rng.normal(size=(n, 5)) * rng.uniform(0.2, 3, (n, 1)) + rng.normal(size=5)
    products = errors @ errors.T
    w = simplex_weights(products)
    assert w.min() >= 0 and w.sum() == pytest.approx(1)
    others = rng.dirichlet(np.ones(n) * 0.5, 500)
    assert w @ products @ w <= np.einsum("ki,ij,kj->k", others, products, others).min() + 1e-9


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        ([[1.0, 0.2], [0.2, 3.0]], (3 - 0.2) / (1 - 0.4 + 3)),
        ([[1.0, 1.5], [1.5, 9.0]], 1.0),
        ([[9.0, 1.5], [1.5, 1.0]], 0.0),
        ([[2.0, 2.0], [2.0, 2.0]], 1.0),
    ],
)
def test_two_members_have_the_papers_weight(products, expected):
    """w* = clip₀¹[(E‖e₂‖² − E⟨e₁,e₂⟩) / E‖e₁ − e₂‖²]."""
    assert simplex_weights(np.array(products))[0] == pytest.approx(expected)


def biased(make, shift, noise, phase):
    """ε* of N(0.2, .2²) with a constant bias and a fixed pseudo-random error of known size."""
    policy = make.policy("diffusion")
    table = policy.alpha_bar_N.double()

    def network(x, time):
        a = table[(time * 100).round().long()]
        ideal = (1 - a).sqrt() * (x - a.sqrt() * 0.2) / (a * 0.04 + 1 - a)
        return ideal + shift + noise * torch.sin(1e4 * x + phase) * 2**0.5

    return make.analytic(policy, network)


def test_the_empirical_parabola_is_the_formulas(make):
    """C4.5: errors e₁ = .3 + .4 r₁ and e₂ = −.1 + .2 r₂ with r independent of unit variance."""
    rng = np.random.default_rng(0)
    batch = {**make.batch(500), "action": (0.2 + 0.2 * rng.standard_normal((500, 6, 2)))}
    policies = {"a": biased(make, 0.3, 0.4, 0.0), "b": biased(make, -0.1, 0.2, np.pi / 2)}
    composed = compose(policies, {"name": "mix", "weights": [0.5, 0.5]}).double()
    products = error_products(composed, [batch], seed=0, log_snrs=composed.solver.log_snrs[2:])
    gaps = np.array(
        [[products[0, 0] - products[0, 1], 0], [0, products[1, 1] - products[0, 1]]]
    )  # what ε in the place of ε* adds is the same everywhere
    e11, e12, e22 = 0.09 + 0.16, -0.03, 0.01 + 0.04
    assert gaps[0, 0] == pytest.approx(e11 - e12, abs=0.02)
    assert gaps[1, 1] == pytest.approx(e22 - e12, abs=0.02)
    best = simplex_weights(products)
    assert best[0] == pytest.approx((e22 - e12) / (e11 - 2 * e12 + e22), abs=0.03)
    for w in (0.0, 0.3, 1.0):
        value = np.array([w, 1 - w]) @ products @ np.array([w, 1 - w]) - products[0, 1]
        formula = w**2 * e11 + 2 * w * (1 - w) * e12 + (1 - w) ** 2 * e22 - e12
        assert value == pytest.approx(formula, abs=0.03)


def test_padded_steps_have_no_part_in_it(make):
    policies = {"a": make.awaken(make.policy()), "b": make.awaken(make.policy("diffusion"), 6)}
    composed = compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    batch = make.batch(16)
    batch["action_is_pad"][:, 4:] = True
    wild = {**batch, "action": batch["action"].copy()}
    wild["action"][:, 4:] = 9.0
    a, b = (error_products(composed, [x], seed=0) for x in (batch, wild))
    np.testing.assert_allclose(a, b)
    with pytest.raises(ConfigError, match="no demonstrations"):
        error_products(composed, [], seed=0)


def test_too_many_members_are_refused():
    with pytest.raises(ConfigError, match="at most 12"):
        simplex_weights(np.eye(13))


def test_of_equal_members_the_first_is_taken():
    for n in range(2, 5):
        assert simplex_weights(np.ones((n, n))).tolist() == np.eye(n)[0].tolist()

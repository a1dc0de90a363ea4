"""The optimiser of actions against what is known in closed form. B batch, n chunks, H, D."""

import pytest
import torch
from chi_square import deviates
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from embodied.core.errors import ConfigError, EmbodiedError, SpecError
from policies.critics.configs import ImprovementConfig
from policies.improvement import ascend, choose, improve

LOW, HIGH = torch.tensor([-1.0]), torch.tensor([1.0])


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def quadratic(centre):
    def q_of(actions_BnHD):
        return -(actions_BnHD - centre).square().sum((2, 3))

    return q_of


@pytest.mark.parametrize(("alpha", "steps"), [(0.25, 3), (3e-4, 10), (0.5, 1), (0.9, 7)])
def test_ascent_on_a_parabola_is_its_recursion(alpha, steps):
    """a_m − c = (1 − 2α)^m (a₀ − c): .125 at α = .25, m = 3."""
    start, centre = 0.3 * uniform(2, 5, 4, 3).double(), 0.1
    found, q = ascend(quadratic(centre), start, LOW, HIGH, steps, alpha)
    torch.testing.assert_close(found - centre, (1 - 2 * alpha) ** steps * (start - centre))
    torch.testing.assert_close(q, quadratic(centre)(found))


def test_steps_are_taken_where_the_bounds_are_one():
    """The same parabola over each element's own share of its range; one that is fixed stays."""
    low, high = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([5.0, 0.1, 2.0])
    middle, half = (high + low) / 2, (high - low) / 2
    x = 0.3 * uniform(2, 5, 4, 3)

    def q_of(actions):
        return quadratic(0.1)((actions - middle)[..., :2] / half[:2]) + actions[..., 2].sum(2)

    found, _ = ascend(q_of, middle + half * x, low, high, 3, 0.25)
    expected = middle + half * (0.1 + 0.125 * (x - 0.1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(
    alpha=st.floats(1e-4, 100.0),
    steps=st.integers(0, 6),
    frequency=st.floats(0.1, 30.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_proposal_ever_gets_worse_or_leaves_its_bounds(alpha, steps, frequency, seed):
    def q_of(actions):
        return (frequency * actions).sin().sum((2, 3)) - actions.square().sum((2, 3))

    start = uniform(3, 4, 2, 2, seed=seed)
    found, q = ascend(q_of, start, LOW, HIGH, steps, alpha)
    assert (q >= q_of(start)).all()
    assert torch.equal(q, q_of(found)) and found.abs().max() <= 1
    if steps == 0:
        assert torch.equal(found, start)


def test_an_ascent_that_diverges_keeps_its_start():
    start = 0.2 + 0.1 * uniform(1, 6, 1, 1)
    found, _ = ascend(quadratic(0.2), start, LOW, HIGH, 8, 1.5)
    assert torch.equal(found, start)


def test_the_best_are_kept_of_each_row():
    start = uniform(5, 32, 2, 3)
    q = quadratic(0.0)(start)
    options = ImprovementConfig(kept=7, steps=0)
    found, kept = improve(quadratic(0.0), start, LOW, HIGH, options)
    torch.testing.assert_close(kept, q.sort(dim=1, descending=True).values[:, :7])
    torch.testing.assert_close(quadratic(0.0)(found), kept)
    assert torch.equal(found[:, 0], choose(start, q, None, None))
    everything = ImprovementConfig(proposals=32, kept=32, steps=0)
    assert torch.equal(improve(quadratic(0.0), start, LOW, HIGH, everything)[0], start)


def test_recorded_chunks_take_the_place_of_the_worst_kept():
    start, data = uniform(5, 8, 2, 3), uniform(5, 2, 3, seed=1)
    for kept in (3, 8):
        options = ImprovementConfig(proposals=8, kept=kept, steps=0)
        found, q = improve(quadratic(0.0), start, LOW, HIGH, options, data)
        best = improve(quadratic(0.0), start, LOW, HIGH, replace(options, kept=kept - 1))[0]
        assert torch.equal(found[:, :-1], best)
        assert torch.equal(found[:, -1], data)
        torch.testing.assert_close(quadratic(0.0)(found), q)


def test_the_mean_of_the_proposals_is_one_more():
    """Of noisy proposals around the best action the mean is the best; it counts for the kept ones,
    also where all drawn ones would be."""
    start = 0.3 * uniform(5, 8, 2, 3)
    mean = start.mean(dim=1)
    options = ImprovementConfig(proposals=8, kept=8, steps=0, mean=True)
    found, q = improve(quadratic(mean[:, None]), start, LOW, HIGH, options)
    torch.testing.assert_close(found[:, 0], mean)
    torch.testing.assert_close(q[:, 0], torch.zeros(5))
    assert found.shape == start.shape
    data = uniform(5, 2, 3, seed=1)
    found, _ = improve(quadratic(mean[:, None]), start, LOW, HIGH, options, data)
    torch.testing.assert_close(found[:, [0, -1]], torch.stack([mean, data], dim=1))


def bimodal(rows, n, seed=0):
    """½ N(−.5, .05²) + ½ N(.5, .05²)."""
    rng = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (rows, n, 1, 1), generator=rng) - 0.5
    return side + 0.05 * torch.randn((rows, n, 1, 1), generator=rng)


def hills(actions):
    """Greatest at .6; a lower hill on the left, a valley between."""
    a = actions.sum((2, 3))
    return (-((a - 0.6) ** 2) / 0.045).exp() + 0.5 * (-((a + 0.6) ** 2) / 0.045).exp()


def test_the_best_of_many_finds_the_right_mode_and_the_ascent_stays_in_its_own():
    proposals = bimodal(2000, 32)
    both, q = improve(hills, proposals, LOW, HIGH, ImprovementConfig(kept=4, step_size=1e-2))
    chosen = choose(both, q, None, None)
    assert (chosen > 0.5).all() and (chosen - 0.6).abs().max() < 0.05
    single = proposals[:, :1]
    alone = ImprovementConfig(proposals=1, kept=1, steps=50, step_size=1e-2)
    stayed, _ = improve(hills, single, LOW, HIGH, alone)
    assert torch.equal(stayed.sign(), single.sign())
    assert (stayed.abs() - 0.6).abs().max() < (single.abs() - 0.6).abs().max()


TILT = {"mean": 0.2, "sigma": 0.5, "centre": 0.8, "tau": 0.7}


def tilted(temperature, seed=0):
    """Choices among 400 proposals of N(μ, σ²) under Q = −(a − c)² / 2τ², for 4,000 rows."""
    rng = torch.Generator().manual_seed(seed)
    start = TILT["mean"] + TILT["sigma"] * torch.randn((4000, 400, 1, 1), generator=rng)

    def q_of(actions):
        return quadratic(TILT["centre"])(actions) / (2 * TILT["tau"] ** 2)

    options = ImprovementConfig(proposals=400, kept=400, steps=0, temperature=temperature)
    kept, q = improve(q_of, start, LOW, HIGH, options)
    return choose(kept, q, temperature, rng).flatten()


def test_choices_by_softmax_follow_the_exponential_tilt():
    """π exp(Q) is the Gaussian of precision 1/σ² + 1/τ²; argmax and other temperatures are not."""
    precision = 1 / TILT["sigma"] ** 2 + 1 / TILT["tau"] ** 2
    mean = TILT["mean"] / TILT["sigma"] ** 2 + TILT["centre"] / TILT["tau"] ** 2
    shares = torch.arange(1, 20) / 20
    edges = mean / precision + torch.special.ndtri(shares) / precision**0.5

    def differs(temperature):
        counts = torch.bucketize(tilted(temperature), edges).bincount(minlength=20)
        return deviates(counts, [0.05] * 20)

    assert not differs(1.0)
    assert differs(None) and differs(0.5) and differs(2.0)


def test_a_rows_draw_depends_on_its_own_generator():
    actions, q = uniform(6, 9, 2, 2), uniform(6, 9, seed=1)

    def drawn(seeds):
        return choose(actions, q, 0.7, [torch.Generator().manual_seed(s) for s in seeds])

    first = drawn(range(6))
    assert torch.equal(drawn([7, 1, 8, 3, 9, 5])[1::2], first[1::2])
    many = torch.stack([drawn([s] * 6) for s in range(40)])
    assert (many != many[0]).flatten(1).any(1).any()
    sure = torch.full((6, 9), -torch.inf)
    sure[:, 4] = 0.0
    assert torch.equal(choose(actions, sure, 0.7, torch.Generator()), actions[:, 4])


def test_gradients_go_through_actions_alone_under_any_callers_mode():
    scale = torch.nn.Parameter(torch.tensor(2.0))

    def q_of(actions):
        return scale * quadratic(0.0)(actions)

    start = uniform(3, 8, 2, 2).requires_grad_()
    options = ImprovementConfig(proposals=8, kept=4, steps=3, step_size=0.1)
    found, q = improve(q_of, start, LOW, HIGH, options)
    assert scale.grad is None and start.grad is None
    assert not found.requires_grad and not q.requires_grad
    with torch.no_grad():
        again, _ = improve(q_of, start, LOW, HIGH, options)
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kept": 33}, r"improvement\.kept is 33 and improvement\.proposals 32"),
        ({"proposals": 4}, r"improvement\.kept is 10 and improvement\.proposals 4"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ImprovementConfig(**options)


def test_what_cannot_be_improved_is_refused():
    start = uniform(2, 8, 2, 1)
    with pytest.raises(SpecError, match=r"8 proposals, of which improvement\.kept=10"):
        improve(quadratic(0.0), start, LOW, HIGH, ImprovementConfig())
    options = ImprovementConfig(proposals=8, kept=4)
    with pytest.raises(ConfigError, match="finite bounds"):
        improve(quadratic(0.0), start, LOW, HIGH * torch.inf, options)
    for kept in (4, 8):
        options = ImprovementConfig(proposals=8, kept=kept, steps=2)
        with pytest.raises(EmbodiedError, match="diverged"):
            improve(quadratic(torch.nan), start, LOW, HIGH, options)

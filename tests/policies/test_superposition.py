"""OR and AND along the path, against the closed forms of methods.md C1 and C4.4."""

import math

import pytest
import torch

from embodied.core.config import component
from embodied.core.protocols import Prediction
from policies.compose.operators import Level
from policies.conversions import epsilon_of, signal_noise

PARAMETERISATIONS = ("epsilon", "sample", "v", "flow")


def make_operator(name, n, **options):
    cls, config = component("operators", {"name": name, **options}, "operator")
    return cls(config, tuple(f"p{i}" for i in range(n)), 2)


def make_solver(n, train=None):
    options = {"num_train_steps": train or n, "num_steps": n, "clip_sample": False}
    cls, config = component("solvers", {"name": "ddpm", **options}, "solver")
    return cls(config)


def prediction(x, log_snr, mean, sigma, kind="epsilon"):
    s, n = signal_noise(log_snr)
    epsilon = n * (x - s * mean) / (s**2 * sigma**2 + n**2)
    value = {
        "epsilon": epsilon,
        "sample": (x - n * epsilon) / s,
        "v": (epsilon - n * x) / s,
        "flow": (x - (s + n) * epsilon) / s,
    }[kind]
    return Prediction(value, kind)


def levels(gaussians, kinds=None, lengths=None):
    kinds = kinds or ["epsilon"] * len(gaussians)

    def level(x, log_snr):
        sizes = lengths or (x.shape[1],) * len(gaussians)
        return Level(
            x, log_snr, float, sizes, None,
            lambda used: {
                i: prediction(x[:, : sizes[i]], log_snr, *gaussians[i], kinds[i]) for i in used
            },
        )  # fmt: skip

    return level


def log_density(y, sigma_t, mean, sigma):
    """log q of y = x / √ᾱ at noise σ_t, summed over the chunk."""
    variance = sigma**2 + sigma_t**2
    return -((y - mean).square() / variance + math.log(2 * math.pi * variance)).sum((1, 2)) / 2


def start(batch, seed=0, shape=(1, 1)):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, dtype=torch.float64, generator=rng), rng


def integrate(operator, solver, gaussians, batch, **options):
    """Final chunks, κ per step, log q̂ per step and the x of every step."""
    x, rng = start(batch)
    kappas, estimates, path = [], [], []
    level = levels(gaussians, **options)

    def spy(x, log_snr):
        path.append(x)
        return level(x, log_snr)

    out = operator.integrate(
        solver, spy, x, rng, lambda k, q: (kappas.append(k), estimates.append(q))
    )
    return out, kappas, estimates, path


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("kind", PARAMETERISATIONS)
def test_and_moves_all_densities_alike(n, kind):
    """C4.4: |d log q_i − d log q_j| < 1e-10 in every step, κ summing to 1."""
    rng = torch.Generator().manual_seed(2)
    means = torch.randn(n, 3, 2, dtype=torch.float64, generator=rng)
    gaussians = [(0.3 * mean, 0.2 + 0.05 * i) for i, mean in enumerate(means)]
    solver = make_solver(50)
    x, rng = start(6, shape=(3, 2))
    seen = []
    operator = make_operator("and", n)
    operator.integrate(
        solver, levels(gaussians, [kind] * n), x, rng, lambda k, q: seen.append((k, q))
    )
    last = torch.zeros(6, n, dtype=torch.float64)
    for kappa, log_q in seen:
        torch.testing.assert_close(kappa.sum(1), torch.ones(6, dtype=torch.float64))
        change = log_q - last
        assert (change - change[:, :1]).abs().max().item() < 1e-10 * log_q.abs().clamp(
            min=1.0
        ).max()
        last = log_q


def test_and_of_two_is_the_closed_form():
    """κ₁ = ½ − ⟨dW, s₁ − s₂⟩ / (g dτ ‖s₁ − s₂‖²), with g dW and g²dτ as the module states."""
    gaussians = [(-0.4, 0.2), (0.5, 0.3)]
    solver = make_solver(40)
    x, rng = start(5, shape=(3, 2))
    twin = torch.Generator().manual_seed(0)
    torch.randn(5, 3, 2, dtype=torch.float64, generator=twin)
    seen, path = [], []
    level = levels(gaussians)

    def spy(x, log_snr):
        path.append(x)
        return level(x, log_snr)

    make_operator("and", 2).integrate(solver, spy, x, rng, lambda k, q: seen.append(k))
    for k, step in enumerate(solver.steps[:-1]):
        z = torch.randn(5, 3, 2, dtype=torch.float64, generator=twin)
        after = solver.steps[k + 1]
        sigma, ahead = step.noise / step.signal, after.noise / after.signal
        size = sigma**2 - ahead**2
        gdw = math.sqrt(size * ahead**2 / sigma**2) * z
        scores = [
            -epsilon_of(prediction(path[k], step.log_snr, *g), path[k], step.log_snr) / sigma
            for g in gaussians
        ]
        apart = scores[0] - scores[1]
        expected = 0.5 - (gdw * apart).sum((1, 2)) / (size * apart.square().sum((1, 2)))
        torch.testing.assert_close(seen[k][:, 0], expected, rtol=2e-3, atol=2e-3)


def test_and_of_the_same_density_is_that_density():
    """The guard: members that agree count equally, and nothing blows up."""
    one = (0.2, 0.3)
    solver = make_solver(50)
    out, kappas, _, _ = integrate(make_operator("and", 2), solver, [one, one], 4)
    x, rng = start(4)
    expected = solver(lambda x, log_snr: prediction(x, log_snr, *one), x, rng)
    torch.testing.assert_close(out, expected)
    assert all((kappa == 0.5).all() for kappa in kappas)
    out, kappas, _, _ = integrate(make_operator("and", 3), solver, [one, one, (-0.4, 0.2)], 4)
    assert out.isfinite().all()
    for kappa in kappas:  # the twins share what one of them would have
        torch.testing.assert_close(kappa[:, 0], kappa[:, 1], atol=1e-6, rtol=1e-6)


def test_and_ends_where_the_densities_are_equal():
    """Two Gaussians of one variance: AND stays on the plane between them, x = 0."""
    out, _, _, _ = integrate(
        make_operator("and", 2), make_solver(200), [(-0.5, 0.2), (0.5, 0.2)], 500
    )
    assert out.abs().max().item() < 0.15


def mixture_epsilon(x, log_snr, gaussians, priors):
    """ε* of Σ π_i q_i, exactly."""
    s, n = signal_noise(log_snr)
    logs = torch.stack(
        [
            log_density(x / s, n / s, *g) + math.log(p)
            for g, p in zip(gaussians, priors, strict=True)
        ],
        1,
    )
    w = torch.softmax(logs, 1)
    parts = [prediction(x, log_snr, *g).value for g in gaussians]
    return sum(w[:, i, None, None] * part for i, part in enumerate(parts))


@pytest.mark.parametrize("kind", PARAMETERISATIONS)
def test_or_with_true_densities_is_the_mixtures_score(kind):
    """C4.4: with T = 1 and ℓ = log π, κ-mixed scores are the mixture's, to rounding."""
    gaussians, priors = [(-0.5, 0.2), (0.4, 0.1), (0.9, 0.3)], [0.2, 0.5, 0.3]
    operator = make_operator("or", 3, offsets=[math.log(p) for p in priors])
    x, _ = start(20, shape=(2, 2))
    for log_snr in (-4.0, -1.0, 0.5, 3.0):
        s, n = signal_noise(log_snr)
        log_q = torch.stack([log_density(x / s, n / s, *g) for g in gaussians], 1)
        kappa = operator.kappa(log_q[..., None], log_q, log_q)
        epsilons = levels(gaussians, [kind] * 3)(x, log_snr).epsilons()
        mixed = sum(kappa[:, i, None, None] * epsilons[i] for i in range(3))
        expected = mixture_epsilon(x, log_snr, gaussians, priors)
        torch.testing.assert_close(mixed, expected, atol=1e-9, rtol=0)


def test_or_without_a_path_starts_from_the_priors():
    operator = make_operator("or", 2, offsets=[math.log(0.2), math.log(0.8)])
    x, _ = start(3)
    level = levels([(-0.5, 0.2), (0.4, 0.1)])(x, 0.0)
    epsilons = level.epsilons()
    expected = 0.2 * epsilons[0] + 0.8 * epsilons[1]
    torch.testing.assert_close(operator.combine(level).value, expected)


def density_error(n):
    """Root mean square error of log q̂₁ − log q̂₂ along the path, before the last step."""
    gaussians = [(-0.5, 0.2), (0.4, 0.3)]
    solver = make_solver(n)
    _, _, estimates, path = integrate(make_operator("or", 2), solver, gaussians, 400)
    errors = []
    for step, x, log_q in zip(solver.steps[1:], path[1:], estimates, strict=False):
        if step.log_snr > 4:
            break
        y, sigma = x / step.signal, step.noise / step.signal
        true = log_density(y, sigma, *gaussians[0]) - log_density(y, sigma, *gaussians[1])
        errors.append((log_q[:, 0] - log_q[:, 1] - true).square().mean())
    return torch.stack(errors).mean().sqrt().item()


def test_accumulated_densities_approach_the_true_ones():
    """C4.4: the error of the estimator goes to 0 with the step, as its square root."""
    errors = [density_error(n) for n in (50, 200, 800)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.1


def test_or_samples_the_mixture():
    """Shares and moments of .3 N(−.6, .15²) + .7 N(.6, .1²)."""
    gaussians, priors = [(-0.6, 0.15), (0.6, 0.1)], [0.3, 0.7]
    operator = make_operator("or", 2, offsets=[math.log(p) for p in priors])
    out, _, _, _ = integrate(operator, make_solver(400), gaussians, 3000)
    left = out.flatten() < 0
    assert left.double().mean().item() == pytest.approx(0.3, abs=0.04)
    for rows, (mean, sigma) in ((left, gaussians[0]), (~left, gaussians[1])):
        assert out.flatten()[rows].mean().item() == pytest.approx(mean, abs=0.02)
        assert out.flatten()[rows].std().item() == pytest.approx(sigma, rel=0.12)


def test_unequal_chunks_share_the_head():
    """κ is worked out where all members reach; the tail is the longer member's."""
    gaussians = [(-0.5, 0.2), (0.5, 0.3)]
    for name in ("or", "and"):
        x, rng = start(50, shape=(5, 1))
        out = make_operator(name, 2).integrate(
            make_solver(100), levels(gaussians, lengths=(3, 5)), x, rng
        )
        assert out[:, 3:].mean().item() == pytest.approx(0.5, abs=0.12)
        assert out.isfinite().all()

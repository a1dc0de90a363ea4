import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from embodied.core.errors import ConfigError
from policies.checkpoint import save_policy
from policies.compose.build import compose
from policies.conversions import epsilon_of, flow_log_snr, signal_noise, velocity_at
from policies.solvers.flow import FlowSolverConfig, Heun

MU, SIGMA = 0.2, 0.3


def spread(u):
    return (u**2 * SIGMA**2 + (1 - u) ** 2) ** 0.5


def velocity(x, u):
    """E[x₁ − n | x_u] for x₁ ~ N(MU, SIGMA²)."""
    return MU + (u * SIGMA**2 - (1 - u)) / spread(u) ** 2 * (x - u * MU)


def mean_velocity(x, u, length):
    """(x_{u+l} − x_u) / l along the path on which (x − u MU) / spread(u) stays as it is."""
    moved = (u + length) * MU + (x - u * MU) * spread(u + length) / spread(u)
    return torch.where(length > 0, (moved - x) / torch.where(length > 0, length, 1), velocity(x, u))


@pytest.fixture
def exact(make):
    """Policies whose network is the closed form, in double precision."""

    class Exact(nn.Module):
        def forward(self, x, time, cond):
            return mean_velocity(x, 100 * time[:, None, None], cond[:, -1][:, None, None])

    def policy(**options):
        made = make.policy("meanflow", **options)
        made.network = Exact()

        def with_length(cond_BC, length):
            length_B = torch.as_tensor(length, dtype=cond_BC.dtype).expand(len(cond_BC))
            return torch.cat([cond_BC, length_B[:, None]], dim=-1)

        made._with_length = with_length
        return made.double()

    return policy


def standardized(policy):
    """Mean and standard deviation of the samples, which are affine in the noise."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 6, 2)
    out = policy.integrate(ends, torch.zeros(2, 10, dtype=torch.float64), None)
    return out[0, 0, 0].item(), (out[1, 0, 0] - out[0, 0, 0]).item()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_number_of_steps_is_exact(exact, n):
    assert standardized(exact(num_steps=n)) == pytest.approx((MU, SIGMA), abs=1e-12)


def test_another_solver_is_given_the_velocity(exact):
    policy, flow = exact(), exact()
    policy.solver = Heun(FlowSolverConfig(num_steps=40))
    assert standardized(policy) == pytest.approx((MU, SIGMA), abs=2e-3)
    flow.solver = Heun(FlowSolverConfig(num_steps=2))
    assert abs(standardized(flow)[1] - SIGMA) > 0.01, "two of Heun's steps are not exact"


def test_what_it_learns_is_the_mean_velocity(exact):
    """With the true v, the right side of m = v + l dm/du is m: nothing is left of the error."""
    policy = exact(share=1.0)
    rng = torch.Generator().manual_seed(0)
    action = torch.randn(256, 6, 2, dtype=torch.float64, generator=rng)
    cond = torch.zeros(256, 10, dtype=torch.float64)
    true = policy._squared(action, cond, rng, lambda x, u: velocity(x, u[:, None, None]))
    assert true.max() < 1e-18
    wrong = policy._squared(action, cond, rng, lambda x, u: velocity(x, u[:, None, None]) + 0.1)
    assert wrong.mean() > 1e-3


def test_the_change_along_a_path_is_that_of_differences(make):
    """dm/du by two neighbouring points of the path, over a network with random weights."""
    for network in ("mlp", "unet1d", "dit"):
        policy = make.awaken(make.policy("meanflow", network=network)).double()
        rng = torch.Generator().manual_seed(1)
        x, v = torch.randn(2, 4, 6, 2, dtype=torch.float64, generator=rng)
        u, length = torch.rand(2, 4, dtype=torch.float64, generator=rng) / 2
        cond = torch.randn(4, 10, dtype=torch.float64, generator=rng)
        h = 1e-6
        ends = [policy._mean_velocity(x + s * v, u + s, length - s, cond) for s in (-h, h)]
        found = policy._change(x, u, length, v, cond)
        torch.testing.assert_close(found, (ends[1] - ends[0]) / (2 * h), atol=1e-6, rtol=1e-5)


def test_as_a_denoiser_it_is_the_flow(exact):
    policy = exact()
    log_snr = torch.linspace(-6, 6, 13, dtype=torch.float64)
    x = torch.randn(13, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.sigmoid(log_snr)[:, None, None]
    variance = alpha_bar * SIGMA**2 + 1 - alpha_bar
    wanted = (1 - alpha_bar).sqrt() / variance * (x - alpha_bar.sqrt() * MU)
    prediction = policy.denoise(x, log_snr, torch.zeros(13, 10, dtype=torch.float64))
    torch.testing.assert_close(epsilon_of(prediction, x, log_snr), wanted, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_one_step_of_a_trained_network_finds_the_modes(make):
    """Chunks are all 0.5 or all −0.5; a flow's single step goes to their mean."""
    sign = np.random.default_rng(0).choice([-1, 1], (8, 256, 1, 1))
    batches = [make.batch(256) | {"action": np.full((256, 6, 2), 0.5 * k, "f4")} for k in sign]

    def share_at_modes(name):
        network = {"name": "mlp", "width": 128, "depth": 2, "time_dim": 16}
        policy = make.policy(name, num_steps=1, network=network)
        optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
        for step in range(300):
            loss, _ = policy.loss(batches[step % 8])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = policy.sample(make.obs(1), 500, seed=0).mean((0, 2, 3))
        assert 0.2 < (mean > 0).float().mean() < 0.8
        return ((mean.abs() > 0.25) & (mean.abs() < 0.75)).float().mean().item()

    assert share_at_modes("meanflow") > 0.6 and share_at_modes("flow") < 0.3


def test_in_a_composition_it_takes_the_steps_of_a_flow(exact, make):
    pair = {"a": exact(), "b": exact()}
    composed = compose(pair, {"name": "mix", "weights": [0.5, 0.5]})
    assert len(pair["a"].solver.log_snrs) == 1 and len(composed.solver.log_snrs) == 10
    flow = exact()
    flow.solver = composed.solver
    flow.stepping = super(type(flow), flow).stepping  # v, whatever the solver
    conditions = composed.encode(make.obs(2))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 6, 2)
    found = composed.integrate(ends, conditions, None)
    wanted = flow.integrate(ends, torch.zeros(2, 10, dtype=torch.float64), None)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


def test_any_row_learns_the_mean_and_at_least_one_does(make):
    """Batches may hold one source after the other."""
    for share, batch, wanted in ((0.25, 8, 2), (0.25, 1, 1), (0.0, 8, 0)):
        policy, seen = make.policy("meanflow", share=share), []
        policy._mean_velocity = lambda x, u, length, cond, seen=seen: seen.append(length) or 0 * x
        policy._change = lambda x, *_: torch.zeros_like(x)
        rng = torch.Generator().manual_seed(0)
        for _ in range(40):
            policy._squared(torch.zeros(batch, 6, 2), torch.zeros(batch, 10), rng, None)
        moving = torch.stack(seen) > 0
        assert (moving.sum(1) == wanted).all()
        assert moving.any(0).all() == (wanted > 0)


def test_rows_weigh_by_their_error_and_padding_does_not_count(make):
    policy = make.policy("meanflow", power=1.0)
    error = torch.tensor([0.5, 0.1, 7.0])
    policy._squared = lambda *_: error[:, None, None].expand(3, 6, 2).clone()
    batch = make.batch(3)
    batch["action_is_pad"][2] = True
    loss, metrics = policy.loss(batch)
    weights = (0.3 + 1e-3) / (error[:2] + 1e-3)
    assert loss.item() == pytest.approx((weights * error[:2]).mean().item(), rel=1e-5)
    assert metrics["squared_error"] == pytest.approx(0.3, rel=1e-5)
    policy.config = msgspec.structs.replace(policy.config, power=0.0)
    assert policy.loss(batch)[0].item() == pytest.approx(0.3, rel=1e-5)


def test_alone_in_a_mix_it_acts_as_by_itself(make):
    policy = make.awaken(make.policy("meanflow"))
    composed = compose(
        {"m": policy, "f": make.policy("flow")}, {"name": "mix", "weights": [1.0, 0.0]}
    )
    obs, seeds = make.obs(3), np.arange(3)
    expected = policy.act(None, obs, seed=seeds)[1]
    np.testing.assert_array_equal(composed.act(None, obs, seed=seeds)[1], expected)


@pytest.fixture
def teacher(make, tmp_path):
    def saved(name, **options):
        policy = make.awaken(make.policy(name, **options))
        save_policy(tmp_path / name / "policy", policy)
        return policy, str(tmp_path / name)

    return saved


@pytest.mark.parametrize("name", ["flow", "diffusion", "meanflow", "composed", "uwm"])
def test_a_teachers_velocity_takes_the_datas_place(make, teacher, name):
    taught_by, folder = teacher(name)
    policy = make.policy("meanflow", teacher=folder)
    batch = make.batch(8)
    x = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.995])
    log_snr = torch.tensor([flow_log_snr(k) for k in u.tolist()])
    signal, noise = signal_noise(log_snr)
    x_t = x * (signal + noise)
    with torch.no_grad():
        p = taught_by.denoise(x_t, log_snr, taught_by.encode(make.obs(8)))
        wanted = velocity_at(p, x_t, signal, noise)
        found = policy._teachers_velocity(batch)(x, u)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    loss, metrics = policy.loss(batch)
    loss.backward()
    assert np.isfinite(metrics["loss"])
    assert all(p.grad is None for p in policy._teacher[0].parameters())
    assert not any("teacher" in key for key in policy.state_dict()), "it travels with no checkpoint"


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("act", {}, ConfigError, "is no denoiser"),
        ("flow", {"horizon": 8}, ConfigError, "for 8 actions of size 2; this policy"),
        ("flow", {"action_normalization": "limits"}, ConfigError, "normalises actions in another"),
        (None, {}, ConfigError, "policy.teacher=nowhere is no policy's folder"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(make, teacher, name, options, error, says):
    folder = teacher(name, **options)[1] if name else "nowhere"
    policy = make.policy("meanflow", teacher=folder)
    with pytest.raises(error, match=says):
        policy.loss(make.batch(4))

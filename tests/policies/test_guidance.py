import math

import numpy as np
import pytest
import torch

from embodied.core.errors import SpecError
from embodied.core.protocols import Prediction
from policies.acting import RtcConfig
from policies.conversions import flow_log_snr, sample_at, signal_noise
from policies.guidance import Goal, guided, soft_mask
from policies.solvers.diffusion import DDIM, DiffusionSolverConfig
from policies.solvers.flow import Euler, FlowSolverConfig

HORIZON, MEAN = 4, 0.3
ROOT = 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(4)
WANTED = torch.tensor([0.9, 0.7, -0.2, 0.0]).double()[None, :, None]
WEIGHT = torch.tensor([1.0, 0.6, 0.2, 0.0]).double()[None, :, None]
GOAL = Goal(WANTED, WEIGHT)
NAMES = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v", "flow": "flow"}


def jacobian(signal, noise):
    """∂x̂₀/∂x_t of the exact denoiser for N(MEAN, COVARIANCE), steps of one dimension."""
    return signal * COVARIANCE @ torch.linalg.inv(signal**2 * COVARIANCE + noise**2 * torch.eye(4))


def gaussian(parameterisation="flow"):
    """That denoiser, in any parameterisation."""

    def denoise(x, log_snr):
        s, n = signal_noise(log_snr)
        clean = MEAN + torch.einsum("ij,bjd->bid", jacobian(s, n), x - s * MEAN)
        epsilon = (x - s * clean) / n
        values = {
            "epsilon": epsilon,
            "sample": clean,
            "v": s * epsilon - n * clean,
            "flow": clean - epsilon,
        }
        return Prediction(values[parameterisation], parameterisation)

    return denoise


def recursion(x, grid, mode, beta):
    """Guided Euler steps in flow time, with matrices in the place of gradients."""
    for u, ahead in zip(grid, [*grid[1:], 1.0], strict=True):
        scale = 1 / math.sqrt(u**2 + (1 - u) ** 2)
        j_flow = scale * jacobian(u * scale, (1 - u) * scale)  # ∂Â¹/∂A, because x_t = scale·A
        clean = MEAN + j_flow @ (x - u * MEAN)
        r2 = (1 - u) ** 2 / (u**2 + (1 - u) ** 2)
        weight = min(beta, (1 - u) / (u * r2)) if u else beta
        error = WEIGHT[0, :, 0] * (WANTED[0, :, 0] - clean)
        push = j_flow.T @ error if mode == "full" else error
        x = x + (ahead - u) * ((clean - x) / (1 - u) + weight * push)
    return x


@pytest.mark.parametrize("beta", [1.0, 5.0, 1e9])
@pytest.mark.parametrize("mode", ["identity", "full"])
def test_a_guided_flow_follows_the_papers_equations_exactly(mode, beta):
    solver = Euler(FlowSolverConfig(grid=(0.05, 0.2, 0.4, 0.6, 0.8)))
    start = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    config = RtcConfig(mode=mode, beta=beta)
    got = solver(guided(gaussian(), GOAL, config), start)
    scale = 1 / math.sqrt(0.05**2 + 0.95**2)
    for row in range(3):
        expected = recursion(start[row, :, 0] / scale, [0.05, 0.2, 0.4, 0.6, 0.8], mode, beta)
        torch.testing.assert_close(got[row, :, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["identity", "full"])
@pytest.mark.parametrize("name", ["epsilon", "sample", "v"])
def test_diffusion_under_guidance_goes_where_the_flow_goes(mode, name):
    ddim = DDIM(DiffusionSolverConfig(num_steps=8, clip_sample=False, timestep_spacing="leading"))
    levels = [(1 + math.exp(-level / 2)) ** -1 for level in ddim.log_snrs]
    start = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(1)).double()
    config = RtcConfig(mode=mode)
    got = ddim(guided(gaussian(name), GOAL, config), start)
    expected = Euler(FlowSolverConfig(grid=tuple(levels)))(guided(gaussian(), GOAL, config), start)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_without_beta_the_estimate_is_that_of_pseudoinverse_guidance():
    """x̂₀′ = x̂₀ + (∂x̂₀/∂x)ᵀ W (Y − x̂₀) / √ᾱ; for data of unit variance, Y itself where W = 1."""
    x = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(3)).double()
    for log_snr in (-3.0, 0.0, 2.5):
        s, n = signal_noise(log_snr)
        clean = sample_at(gaussian()(x, log_snr), x, s, n)
        p = guided(gaussian("epsilon"), GOAL, RtcConfig(mode="full", beta=1e12))(x, log_snr)
        error = WEIGHT * (WANTED - clean)
        expected = clean + torch.einsum("ji,bjd->bid", jacobian(s, n), error) / s
        torch.testing.assert_close(sample_at(p, x, s, n), expected, atol=1e-10, rtol=0)

        def unit(x, log_snr):
            return Prediction(signal_noise(log_snr)[0] * x, "sample")

        p = guided(unit, GOAL, RtcConfig(mode="full", beta=1e12))(x, log_snr)
        torch.testing.assert_close(p.value[:, :1], WANTED[:, :1].expand(2, 1, 1))


def test_the_two_jacobians_differ_by_the_known_matrix():
    x = torch.randn(1, 4, 1, generator=torch.Generator().manual_seed(4)).double()
    for u in (0.2, 0.5, 0.9):
        log_snr = flow_log_snr(u)
        s, n = signal_noise(log_snr)
        plain = gaussian()(x, log_snr).value
        pushes = {
            mode: guided(gaussian(), GOAL, RtcConfig(mode=mode))(x, log_snr).value - plain
            for mode in ("identity", "full")
        }
        factor = (s + n) * jacobian(s, n).T
        torch.testing.assert_close(
            pushes["full"], torch.einsum("ij,bjd->bid", factor, pushes["identity"])
        )


@pytest.mark.parametrize("mode", ["identity", "full"])
@pytest.mark.parametrize("name", list(NAMES.values()))
def test_nothing_changes_where_nothing_is_wanted(mode, name):
    x = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(5))
    none = Goal(torch.full((2, 4, 1), 7.0), torch.zeros(2, 4, 1))
    p = guided(gaussian(name), none, RtcConfig(mode=mode))(x.double(), 0.4)
    assert torch.equal(p.value, gaussian(name)(x.double(), 0.4).value)


def test_the_mask_is_the_papers():
    mask = soft_mask(16, 5, 4).tolist()
    assert mask[:4] == [1.0] * 4 and mask[11:] == [0.0] * 5
    for i in range(4, 11):
        c = (16 - 5 - i) / (16 - 5 - 4 + 1)
        assert mask[i] == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1))
    assert soft_mask(8, 4, 4).tolist() == [1.0] * 4 + [0.0] * 4
    assert soft_mask(8, 2, 1, "linear").tolist() == pytest.approx(
        [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]
    )
    with pytest.raises(SpecError, match=r"5 actions are committed.*at most 4"):
        soft_mask(8, 4, 5)


@pytest.mark.parametrize("name", ["flow", "diffusion"])
@pytest.mark.parametrize("mode", ["identity", "full", "copy"])
def test_committed_actions_head_the_chunk_whatever_the_mode(make, name, mode):
    policy = make.awaken(make.policy(name, device=make.device(low=-4.0, high=8.0)))
    policy.rtc = RtcConfig(mode=mode)
    obs, seeds = make.obs(2), np.arange(2)
    prefix = np.random.default_rng(0).uniform(-4, 8, (2, 3, 2)).astype(np.float32)
    carry, free = policy.act(policy.init(2), obs, seed=seeds)
    carry, chunk = policy.act(carry, obs, prefix=prefix, seed=seeds)
    np.testing.assert_array_equal(chunk[:, :3], prefix)
    assert np.array_equal(chunk[:, 3:], free[:, 3:]) == (mode == "copy")
    _, again = policy.act(carry, obs, seed=seeds)
    np.testing.assert_array_equal(again, free)  # nothing committed: nothing guides


def test_what_is_committed_is_normalised_before_it_guides(make):
    """The goal a solver sees is Y in the network's units, whatever the device's."""
    policy = make.policy(device=make.device(low=-4.0, high=8.0))
    carry = policy.init(1)
    carry = {"chunk": np.full((1, 6, 2), 5.0, np.float32), "known": np.ones(1, bool)}
    goal = policy._goal(np.full((1, 2, 2), 8.0, np.float32), carry)
    assert goal.wanted_BHD[0, :, 0].tolist() == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5])
    assert goal.weight_BH1[0, :, 0].tolist() == pytest.approx(soft_mask(6, 3, 2).tolist())
    unknown = {**carry, "known": np.zeros(1, bool)}
    goal = policy._goal(np.full((1, 2, 2), 8.0, np.float32), unknown)
    assert goal.weight_BH1[0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_a_guided_chunk_goes_on_smoothly(make, name):
    """Demonstrations go up or down at random: the next chunk must go the way of the one before."""
    policy = make.policy(
        name,
        device=make.device(action_dim=1),
        horizon=8,
        network={"name": "mlp", "width": 64, "depth": 2},
    )
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(250):
        action = rng.choice([-0.5, 0.5], (128, 1, 1)).repeat(8, 1).astype(np.float32)
        batch = {**make.obs(128, int(rng.integers(1 << 30))), "action": action}
        loss, _ = policy.loss({**batch, "action_is_pad": np.zeros((128, 8), bool)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    carry, before = policy.act(policy.init(64), make.obs(64), seed=np.arange(64))
    seams = {}
    for mode in ("copy", "identity", "full"):
        policy.rtc = RtcConfig(mode=mode)
        prefix = before[:, 3:5]
        _, chunk = policy.act(carry, make.obs(64, 1), prefix=prefix, seed=np.arange(100, 164))
        seams[mode] = np.abs(chunk[:, 2, 0] - chunk[:, 1, 0])
    assert (seams["copy"] > 0.5).mean() > 0.25, "half of the chunks go the other way"
    assert (seams["identity"] > 0.5).mean() < 0.2
    assert (seams["full"] > 0.5).mean() < 0.2
    assert max(seams["identity"].mean(), seams["full"].mean()) < 0.4 * seams["copy"].mean()


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("name", ["flow", "sample"])
def test_no_step_goes_beyond_what_is_wanted(n, name):
    """A denoiser whose chunks are all 0, pushed towards 1 where W = 1."""
    goal = Goal(torch.ones(1, 4, 1), torch.tensor([1.0, 0.5, 0.0, 0.0])[None, :, None])
    solver = Euler(FlowSolverConfig(num_steps=n))

    def still(x, log_snr):
        _, noise = signal_noise(log_snr)
        return Prediction(-x / noise if name == "flow" else 0 * x, name)

    start = torch.randn(1, 4, 1, generator=torch.Generator().manual_seed(0))
    out = solver(guided(still, goal, RtcConfig(), levels=solver.log_snrs), start)[0, :, 0]
    assert 0.3 < out[0] <= 1 + 1e-5 and 0 < out[1] <= 0.5 + 1e-5 and out[2:].abs().max() < 1e-5

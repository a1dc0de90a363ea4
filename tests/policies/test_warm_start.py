import numpy as np
import pytest

from embodied.core.errors import ConfigError
from policies.acting import WarmStartConfig
from policies.arrays import shifted
from policies.noise import start_noise

MU, SIGMA = 0.2, 0.3


def velocity(sigma):
    def network(x, u):
        slope = (u * sigma**2 - (1 - u)) / (u**2 * sigma**2 + (1 - u) ** 2)
        return MU + slope * (x - u * MU)

    return network


def carry_of(values):
    chunk = np.broadcast_to(np.asarray(values, np.float32)[:, None, None], (len(values), 6, 2))
    return {"chunk": chunk.copy(), "known": np.ones(len(values), bool)}


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_from_an_exact_chunk_it_ends_where_the_full_run_ends(make, fraction):
    """Data that are one point: every path ends there."""
    policy = make.analytic(make.policy(), velocity(0.0))
    obs, seeds = make.obs(3), np.arange(3)
    full = policy.act(None, obs, seed=seeds)[1]
    policy.warm_start = WarmStartConfig(fraction=fraction)
    warm = policy.act(carry_of([MU] * 3), obs, seed=seeds)[1]
    np.testing.assert_allclose(warm, full, atol=1e-6)
    np.testing.assert_allclose(warm, MU, atol=1e-6)


@pytest.mark.parametrize("skipped", [2, 5, 9])
def test_it_follows_its_recursion_exactly(make, skipped):
    """Steps k..n from x_u = u·guess + (1−u)·noise, for N(MU, SIGMA²): affine in guess and noise."""
    policy = make.analytic(make.policy(device=make.device(low=-9.0, high=9.0)), velocity(SIGMA))
    policy.warm_start = WarmStartConfig(fraction=skipped / 10)
    assert policy.warm_start.step(policy.solver) == skipped
    guess = np.array([0.5, -1.0]) / 9

    def expected(noise, guess):
        u = skipped / 10
        x = u * guess + (1 - u) * noise
        for k in range(skipped, 10):
            x = x + velocity(SIGMA)(x, k / 10) / 10
        return np.clip(x, -1, 1)

    noise = start_noise([0, 1], 6, 2).double().numpy()
    _, chunk = policy.act(carry_of(guess * 9), make.obs(2), seed=np.arange(2))
    np.testing.assert_allclose(chunk / 9, expected(noise, guess[:, None, None]), atol=1e-6)


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_rows_with_and_without_a_chunk_decide_alike_alone_and_in_company(make, name):
    options = {"scheduler": "ddpm", "num_steps": 10} if name == "diffusion" else {}
    policy = make.awaken(make.policy(name, **options))
    policy.warm_start = WarmStartConfig(fraction=0.5)
    obs, seeds = make.obs(4), np.array([5, 6, 7, 8])
    carry, first = policy.act(policy.init(4), obs, seed=seeds)
    carry["known"][[1, 3]] = False
    _, together = policy.act(carry, obs, seed=seeds)
    np.testing.assert_allclose(together[[1, 3]], first[[1, 3]], atol=1e-5)
    assert np.abs(together[[0, 2]] - first[[0, 2]]).max() > 1e-4
    for row in range(4):
        part = {k: v[[row]] for k, v in carry.items()}
        _, alone = policy.act(part, {k: v[[row]] for k, v in obs.items()}, seed=seeds[[row]])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_the_chunk_before_is_shifted_to_the_present_tick():
    chunk = np.arange(5.0)[None, :, None]
    assert shifted(chunk, 2)[0, :, 0].tolist() == [2, 3, 4, 4, 4]


def test_where_it_begins(make):
    solver = make.policy().solver
    assert WarmStartConfig(log_snr=0.0).step(solver) == 5
    assert WarmStartConfig(log_snr=99.0).step(solver) == 9
    assert WarmStartConfig(fraction=0.99).step(solver) == 9
    for options in ({}, {"fraction": 0.5, "log_snr": 0.0}):
        with pytest.raises(ConfigError, match="either fraction or log_snr"):
            WarmStartConfig(**options)

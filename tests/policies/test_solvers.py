"""Solvers against their own affine recursions on Gaussians, and against diffusers' steps."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction
from policies.conversions import flow_log_snr, flow_time, sample_of, signal_noise, velocity_at

PARAMETERISATIONS = ("epsilon", "sample", "v", "flow")


def make_solver(name, **options):
    cls, config = component("solvers", {"name": name, **options}, "solver")
    return cls(config)


def moments(log_snr, means, sigmas, weights):
    """ε* = A x − B of a weighted sum of Gaussians' scores (methods.md, C4.2)."""
    signal, noise = signal_noise(log_snr)
    a = b = 0.0
    for mean, sigma, weight in zip(means, sigmas, weights, strict=True):
        k = weight * noise / (signal**2 * sigma**2 + noise**2)
        a, b = a + k, b + k * signal * mean
    return a, b


def gaussian(means, sigmas=(1.0,), weights=(1.0,), parameterisation="epsilon"):
    """The denoiser with that ε*, in any parameterisation."""

    def denoise(x, log_snr):
        a, b = moments(log_snr, means, sigmas, weights)
        signal, noise = signal_noise(log_snr)
        epsilon = a * x - b
        match parameterisation:
            case "epsilon":
                value = epsilon
            case "sample":
                value = (x - noise * epsilon) / signal
            case "v":
                value = (epsilon - noise * x) / signal
            case "flow":
                value = velocity_at(Prediction(epsilon, "epsilon"), x, signal, noise)
        return Prediction(value, parameterisation)

    return denoise


def propagate(solver, denoise):
    """Mean and variance after a deterministic solver, which is affine in its noise."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    low, high = solver(denoise, ends).flatten().tolist()
    return low, (high - low) ** 2


def propagate_ancestral(solver, means, sigmas, weights):
    """Mean and variance through the table of a stochastic solver."""
    mean, variance = 0.0, 1.0
    for step in solver.steps:
        a, b = moments(step.log_snr, means, sigmas, weights)
        slope = step.sample * (1 - step.noise * a) / step.signal + step.keep
        mean = slope * mean + step.sample * step.noise * b / step.signal
        variance = slope**2 * variance + step.spread**2
    return mean, variance


# methods.md C4.1 and C4.2: (means, sigmas, weights) → (mean, variance) per sampler.
PAIRS = {
    "equal variances": ((-0.5, 0.5), (0.2, 0.2), (0.3, 0.7)),
    "unequal variances": ((-0.5, 0.5), (0.1, 0.3), (0.5, 0.5)),
}
TABLE = [
    ("equal variances", "ddpm", 100, (0.2, 0.034361)),
    ("equal variances", "ddpm", 1000, (0.2, 0.039236)),
    ("equal variances", "ddim", 10, (0.19576, 0.022946)),
    ("unequal variances", "ddpm", 100, (-0.24194, 0.021319)),
    ("unequal variances", "ddpm", 1000, (-0.24920, 0.024208)),
    ("unequal variances", "ddim", 10, (-0.14806, 0.019034)),
]


@pytest.mark.parametrize(("pair", "name", "n", "expected"), TABLE)
def test_published_values_of_composed_gaussians(pair, name, n, expected):
    options = {"timestep_spacing": "leading", "clip_sample": False}
    if name == "ddpm":
        solver = make_solver(name, num_train_steps=n, **options)
        mean, variance = propagate_ancestral(solver, *PAIRS[pair])
    else:
        mean, variance = propagate(
            make_solver(name, num_steps=n, **options), gaussian(*PAIRS[pair])
        )
    assert mean == pytest.approx(expected[0], abs=2e-4 if name == "ddpm" else 1e-5)
    assert variance == pytest.approx(expected[1], abs=2e-6)


def test_the_ancestral_solver_follows_its_own_table():
    """The recursion above describes the solver that runs: 10⁵ samples have its moments."""
    solver = make_solver("ddpm", clip_sample=False)
    rng = torch.Generator().manual_seed(0)
    x = solver(gaussian(*PAIRS["unequal variances"]), torch.randn(10**5, 1, 1, generator=rng), rng)
    mean, variance = propagate_ancestral(solver, *PAIRS["unequal variances"])
    assert x.mean().item() == pytest.approx(mean, abs=4 * (variance / 1e5) ** 0.5)
    assert x.var().item() == pytest.approx(variance, rel=4 * (2 / 1e5) ** 0.5)


def joint_gaussian(index, other_x, other_alpha_bar):
    """ε* of one of UWM's modalities (a, o′), the other one held at its own level (A5.1 and 2).

    index: 0 denoises a, 1 denoises o′. other_x: [B], what the other one shows.
    """
    gain_o, gain_a, gain_k, var_a, var_w = 0.9, 0.5, -0.4, 0.09, 0.01
    mean = torch.tensor([gain_k, gain_o + gain_a * gain_k], dtype=torch.float64)
    cov = torch.tensor(
        [[var_a, gain_a * var_a], [gain_a * var_a, gain_a**2 * var_a + var_w]], dtype=torch.float64
    )

    def denoise(x, log_snr):
        signal, noise = signal_noise(log_snr)
        d = torch.full((2,), other_alpha_bar**0.5, dtype=torch.float64)
        r = torch.full((2,), 1 - other_alpha_bar, dtype=torch.float64)
        d[index], r[index] = signal, noise**2
        both = torch.empty(len(x), 2, dtype=torch.float64)
        both[:, index], both[:, 1 - index] = x.flatten(), other_x
        gain = torch.diag(r.sqrt()) @ torch.linalg.inv(
            torch.diag(d) @ cov @ torch.diag(d) + torch.diag(r)
        )
        return Prediction(((both - d * mean) @ gain.T)[:, index].view_as(x), "epsilon")

    return denoise


# Mode → modality, what the other one shows (None: one draw of N(0, 1)), after 10 and 100 steps.
UWM = {
    "policy": (0, None, (-0.38686, 0.06042), (-0.39994, 0.08582)),
    "video": (1, None, (0.68732, 0.01777), (0.69994, 0.03005)),
    "forward": (1, 0.2, (0.98892, 0.00418), (0.99789, 0.00876)),
    "inverse": (0, 0.8, (-0.25927, 0.01534), (-0.26381, 0.02657)),
}


@pytest.mark.parametrize("mode", UWM)
@pytest.mark.parametrize("n", [10, 100])
def test_uwm_sampler_table(mode, n):
    """methods.md A5.3: DDIM over one modality, the other one frozen noise or shown unnoised."""
    index, shown, *expected = UWM[mode]
    solver = make_solver("ddim", num_steps=n, timestep_spacing="leading", clip_sample=False)
    level = solver.log_snrs[0] if shown is None else solver.log_snrs[-1]
    # The chunk is affine in its own noise and in what is shown: three points say all.
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None, None]
    others = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) + (shown or 0.0)
    zero, own, other = (
        solver(joint_gaussian(index, others, signal_noise(level)[0] ** 2), x).flatten().tolist()
    )
    variance = (own - zero) ** 2 + ((other - zero) ** 2 if shown is None else 0.0)
    assert (zero, variance) == pytest.approx(expected[n == 100], abs=2e-5)


MU, SIGMA = 0.2, 0.3
ONE = ((MU,), (SIGMA,), (1.0,))


def flow_recursion(us, *, heun):
    """Mean and standard deviation through v = MU + s(u)(x − u MU)."""

    def slope(u):
        return (u * SIGMA**2 - (1 - u)) / (u**2 * SIGMA**2 + (1 - u) ** 2)

    def both(mean, std, u):
        return MU + slope(u) * (mean - u * MU), slope(u) * std

    scale = math.hypot(us[0], 1 - us[0])
    mean, std = 0.0, scale
    for u, ahead in pairwise([*us, 1.0]):
        dm, ds = both(mean, std, u)
        if heun:
            dm2, ds2 = both(mean + dm * (ahead - u), std + ds * (ahead - u), ahead)
            dm, ds = (dm + dm2) / 2, (ds + ds2) / 2
        mean, std = mean + dm * (ahead - u), std + ds * (ahead - u)
    return mean, std**2


GRIDS = [tuple(k / 10 for k in range(10)), (0.0, 0.05, 0.3, 0.8), (0.0,), (0.1, 0.5)]


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("parameterisation", ["flow", "v", "epsilon"])
def test_flow_solvers_follow_their_recursion_on_any_grid(parameterisation, grid, heun):
    if grid[0] == 0 and parameterisation != "flow":
        grid = (1e-3, *grid[1:])
    solver = make_solver("heun" if heun else "euler", grid=grid)
    assert solver.log_snrs == tuple(flow_log_snr(u) for u in grid)
    denoise = gaussian(*ONE, parameterisation=parameterisation)
    if grid[0] == 0:  # the closed form at pure noise, where ε* says nothing of the mean

        def denoise(x, log_snr, inner=denoise):
            return Prediction(MU - x, "flow") if log_snr == -math.inf else inner(x, log_snr)

    assert propagate(solver, denoise) == pytest.approx(flow_recursion(grid, heun=heun), abs=1e-9)


def dpm_recursion(levels):
    """Mean and standard deviation of DPM-Solver++(2M), written with λ = log_snr / 2."""
    mean, std, before, last_h = 0.0, 1.0, None, 0.0
    for here, ahead in pairwise([*levels, math.inf]):
        (a0, s0), (a1, s1) = signal_noise(here), signal_noise(ahead)
        k = a0 * SIGMA**2 / (a0**2 * SIGMA**2 + s0**2)
        x0 = (MU + k * (mean - a0 * MU), k * std)
        h = (ahead - here) / 2
        d = x0
        if before is not None and ahead < math.inf:
            d = tuple(x + (x - y) * h / (2 * last_h) for x, y in zip(x0, before, strict=True))
        gain = -a1 * math.expm1(-h)
        mean, std = s1 / s0 * mean + gain * d[0], s1 / s0 * std + gain * d[1]
        before, last_h = x0, h
    return mean, std**2


@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_dpm_solver_follows_its_recursion(parameterisation, n):
    solver = make_solver("dpmsolver++", num_steps=n, clip_sample=False)
    got = propagate(solver, gaussian(*ONE, parameterisation=parameterisation))
    assert got == pytest.approx(dpm_recursion(solver.log_snrs), abs=1e-6)


SOLVERS = {
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "dpmsolver++": {"clip_sample": False},
    "euler": {"first_u": 1e-3},
    "heun": {"first_u": 1e-3},
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS[1:])
def test_any_parameterisation_runs_under_any_solver(name, parameterisation):
    """Diffusion's denoisers under flow's solvers and the other way round, to the same chunk."""
    solver = make_solver(name, **SOLVERS[name])
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = partial(solver, x_BHD=x)
    expected = run(gaussian(*ONE), generators=torch.Generator().manual_seed(1))
    got = run(
        gaussian(*ONE, parameterisation=parameterisation),
        generators=torch.Generator().manual_seed(1),
    )
    # Heun's last step is Euler's for a denoiser that has no velocity where no noise is left.
    tolerance = 0.05 if name == "heun" and parameterisation == "sample" else 1e-6
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_euler_is_ddim_at_the_same_levels():
    ddim = make_solver("ddim", clip_sample=False)
    euler = make_solver("euler", grid=[flow_time(log_snr) for log_snr in ddim.log_snrs])
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise = gaussian(*PAIRS["unequal variances"])
    torch.testing.assert_close(euler(denoise, x), ddim(denoise, x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS[:3])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++"])
def test_steps_are_diffusers(name, parameterisation, clip, spacing):
    """The tables against the schedulers' own `step`, on a denoiser that is no Gaussian's."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    options = {
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction" if parameterisation == "v" else parameterisation,
        "timestep_spacing": spacing,
    }
    scheduler = {
        "ddim": lambda: DDIMScheduler(clip_sample=clip, **options),
        "ddpm": lambda: DDPMScheduler(clip_sample=clip, **options),
        "dpmsolver++": lambda: DPMSolverMultistepScheduler(
            lambda_min_clipped=-5.1, thresholding=clip, sample_max_value=1.0, **options
        ),
    }[name]()
    # diffusers' DDIM with linspace aims at a level that it does not visit next, unless N = n.
    n = 100 if name == "ddim" and spacing == "linspace" else 10
    scheduler.set_timesteps(n)
    solver = make_solver(name, num_steps=n, timestep_spacing=spacing, clip_sample=clip)

    def value(x):
        return torch.sin(3 * x) + 0.3 * x.roll(1, dims=1)

    x = expected = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        extra = {"generator": rng} if name == "ddpm" else {}
        expected = scheduler.step(value(expected), t, expected, return_dict=False, **extra)[0]
    got = solver(
        lambda x, log_snr: Prediction(value(x), parameterisation),
        x,
        torch.Generator().manual_seed(1),
    )
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "heun"])
def test_a_warm_start_goes_on_where_a_whole_run_would(name):
    """Started at step k with the x of the whole run there, it ends in the same chunk."""
    solver = make_solver(name, **SOLVERS[name])
    denoise = gaussian(*PAIRS["equal variances"])
    seen = []

    def spy(x, log_snr):
        seen.append((x, log_snr))
        return denoise(x, log_snr)

    x = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = solver(spy, x)
    at = [x for x, log_snr in seen if log_snr == solver.log_snrs[4]][-1]
    # Without its history the multistep solver takes one step of first order.
    tolerance = 0.02 if name == "dpmsolver++" else 1e-9
    torch.testing.assert_close(solver(denoise, at, start=4), whole, atol=tolerance, rtol=0)
    assert solver.stochastic is False and list(solver.log_snrs) == sorted(solver.log_snrs)


def test_noised_has_the_level_of_its_step():
    solver = make_solver("ddim")
    signal, noise = signal_noise(solver.log_snrs[7])
    clean, eps = torch.full((1, 2, 1), 3.0), torch.full((1, 2, 1), 5.0)
    torch.testing.assert_close(solver.noised(clean, eps, 7), signal * clean + noise * eps)
    assert signal**2 + noise**2 == pytest.approx(1, abs=1e-12)


def test_wrapping_denoise_guides_every_step():
    """A guide that pulls x̂₀ to a point: the chunk ends there."""
    denoise = gaussian(*PAIRS["equal variances"])

    def guided(x, log_snr):
        sample = sample_of(denoise(x, log_snr), x, log_snr)
        return Prediction(sample + (0.7 - sample), "sample")

    for name in ("ddim", "dpmsolver++", "euler"):
        x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
        out = make_solver(name, **SOLVERS[name])(guided, x)
        torch.testing.assert_close(out, torch.full_like(out, 0.7), atol=1e-4, rtol=0)


def test_clipping_keeps_flow_solvers_within_the_bounds():
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    for name in ("euler", "heun"):
        for clip, end in ((True, 1.0), (False, 3.0)):
            solver = make_solver(name, clip_sample=clip)
            out = solver(lambda x, _: Prediction(torch.full_like(x, 3.0), "sample"), x)
            torch.testing.assert_close(out, torch.full_like(out, end), atol=1e-5, rtol=0)


def test_rows_draw_from_their_own_streams():
    solver = make_solver("ddpm", num_steps=5)
    denoise = gaussian(*PAIRS["equal variances"])
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))

    def streams():
        return [torch.Generator().manual_seed(k) for k in range(3)]

    together = solver(denoise, x, streams())
    alone = solver(denoise, x[1:2], streams()[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)


def test_a_float_level_is_the_tensor_of_it():
    for log_snr in (-30.0, -3.0, 0.0, 3.0, 30.0):
        tensor = torch.tensor([log_snr], dtype=torch.float64)
        expected = [x.item() for x in (*signal_noise(tensor), flow_time(tensor))]
        assert (*signal_noise(log_snr), flow_time(log_snr)) == pytest.approx(expected, rel=1e-12)
    assert signal_noise(-math.inf) == (0.0, 1.0) and signal_noise(math.inf) == (1.0, 0.0)
    assert flow_time(-math.inf) == 0.0 and flow_time(math.inf) == 1.0
    assert flow_time(flow_log_snr(0.3)) == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("grid", [[], [0.5, 0.2], [0.0, 1.0], [-0.1, 0.5], [0.2, 0.2]])
def test_a_grid_must_lead_from_noise_to_data(grid):
    with pytest.raises(ConfigError, match="must rise within"):
        make_solver("euler", grid=grid)


def test_epsilon_has_no_velocity_at_pure_noise():
    with pytest.raises(ConfigError, match="first_u"):
        make_solver("euler")(gaussian(*ONE), torch.zeros(1, 1, 1))


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ConfigError, match="num_train_steps=100"):
        make_solver("ddim", num_steps=101)

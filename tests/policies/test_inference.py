import math

import numpy as np
import pytest
import torch
from sizes import full_only

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.registry import names
from policies.acting import InferenceConfig, RtcConfig, WarmStartConfig
from policies.checkpoint import policy_state
from policies.compose.build import compose
from policies.inference import packing
from policies.inference.planner import choose, fit, measured
from policies.inference.policy import ActingPolicy
from policies.networks.stages import Staged, evaluate, prepare

QUICK = {"threads": 1, "warm_up": False}


def acting(policy, **options):
    return ActingPolicy(policy, InferenceConfig(**{**QUICK, **options}))


@pytest.fixture(autouse=True)
def pack_everything(monkeypatch):
    """The tests' networks are too small to be packed otherwise."""
    monkeypatch.setattr(packing, "PACKED_FROM", 0)


@pytest.mark.parametrize("network", names("networks"))
def test_work_done_ahead_changes_nothing(make, network):
    policy = make.awaken(make.policy(network=network))
    cond, x = torch.randn(3, 10), torch.randn(3, 6, 2)
    prepared = prepare(policy.network, cond, (0.1, 0.7))
    for time in (0.1, 0.7, 0.4):  # the last one was not prepared
        expected = policy.network(x, torch.full((3,), time), cond)
        for given in (prepared, cond):
            got = evaluate(policy.network, x, time, given)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flow", "diffusion"])
@pytest.mark.parametrize("network", names("networks"))
def test_acting_changes_nothing_but_the_time(make, name, network):
    policy = make.awaken(make.policy(name, network=network))
    obs, seeds = make.obs(3), np.arange(3)
    expected = policy.act(None, obs, seed=seeds)[1]
    act = acting(policy)
    if network == "unet1d":
        kinds = {type(module) for module in act._acting.network._body.modules()}
        assert packing.PackedConv1d in kinds and torch.nn.Conv1d not in kinds
    np.testing.assert_allclose(act.act(act.init(3), obs, seed=seeds)[1], expected, atol=1e-5)
    torch.testing.assert_close(
        act.sample(obs, 2, seed=1), policy.sample(obs, 2, seed=1), atol=1e-5, rtol=0
    )
    if not isinstance(policy.network, Staged):
        return
    half = acting(policy, dtype="bfloat16").act(None, obs, seed=seeds)[1]
    assert 0 < np.abs(half - expected).max() < 0.2 and np.abs(half - expected).mean() < 0.02


def test_every_convolution_is_packed_exactly():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 9)
    for conv in (
        torch.nn.Conv1d(6, 10, 5, padding=2),
        torch.nn.Conv1d(6, 4, 1),
        torch.nn.Conv1d(6, 8, 3, 2, 1),
        torch.nn.Conv1d(6, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        torch.nn.ConvTranspose1d(6, 4, 4, 2, 1),
        torch.nn.ConvTranspose1d(6, 4, 3, 2, 1, output_padding=1),
    ):
        with torch.no_grad():
            packed = packing.PackedConv1d(conv)
            torch.testing.assert_close(packed(x), conv(x), atol=1e-5, rtol=0)
            torch.testing.assert_close(packed(x[:1, :, :4]), conv(x[:1, :, :4]), atol=1e-5, rtol=0)


def test_new_weights_count_from_the_refresh_on(make):
    policy = make.awaken(make.policy(network="unet1d"))
    act, obs, seeds = acting(policy), make.obs(1), np.arange(1)
    before = act.act(None, obs, seed=seeds)[1]
    make.awaken(policy, seed=9)
    act.refresh()
    after = act.act(None, obs, seed=seeds)[1]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, policy.act(None, obs, seed=seeds)[1], atol=1e-5)
    source = acting(policy).source
    assert source is policy and torch.nn.Conv1d in {type(m) for m in policy.modules()}


def test_prepared_weights_count_from_the_swap_on(make):
    act = acting(make.awaken(make.policy(network="unet1d")))
    act.set_steps(3)
    obs, seeds = make.obs(1), np.arange(1)
    first = act.act(None, obs, seed=seeds)[1]
    decisions = []
    for seed in (8, 9):
        newer = make.awaken(make.policy(network="unet1d"), seed=seed)
        act.prepare(policy_state(newer)[1])
        before = decisions[-1] if decisions else first
        np.testing.assert_array_equal(act.act(None, obs, seed=seeds)[1], before)
        act.swap()
        decisions.append(act.act(None, obs, seed=seeds)[1])
        assert np.abs(decisions[-1] - before).max() > 1e-3
        fresh = acting(newer)
        fresh.set_steps(3)
        np.testing.assert_array_equal(decisions[-1], fresh.act(None, obs, seed=seeds)[1])
    broken = {name: np.full_like(x, np.nan) for name, x in policy_state(act.source)[1].items()}
    with pytest.raises(CorruptDataError, match="not finite"):
        act.prepare(broken)
    np.testing.assert_array_equal(act.act(None, obs, seed=seeds)[1], decisions[-1])


def test_a_composition_acts_with_packed_members(make):
    members = {
        "a": make.awaken(make.policy("flow", network="unet1d")),
        "b": make.awaken(make.policy("diffusion"), seed=6),
    }
    policy = compose(members, {"name": "mix", "weights": [0.5, 0.5]})
    obs, seeds = make.obs(2), np.arange(2)
    act = acting(policy)
    assert packing.PackedConv1d in {type(module) for module in act._acting.modules()}
    expected = policy.act(None, obs, seed=seeds)[1]
    np.testing.assert_allclose(act.act(None, obs, seed=seeds)[1], expected, atol=1e-4)
    act.set_steps(3)
    assert len(act._acting.solver.log_snrs) == 3 != len(policy.solver.log_snrs)


def test_every_kind_of_composition_acts(make):
    members = {label: make.awaken(make.policy(), seed=k) for k, label in enumerate("ab")}
    prefix = np.full((2, 2, 2), 0.25, np.float32)
    for operator in ({"name": "or"}, {"name": "pooled"}):
        solver = {"name": "ddpm", "num_train_steps": 20} if operator["name"] == "or" else None
        policy = compose(members, operator, solver=solver)
        act, obs, seeds = acting(policy), make.obs(2), np.arange(2)
        for given in (None, prefix):
            expected = policy.act(None, obs, prefix=given, seed=seeds)[1]
            got = act.act(act.init(2), obs, prefix=given, seed=seeds)[1]
            np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.raises(ConfigError, match="no solver"):
        act.set_steps(3)


def test_gradients_through_the_network_are_there_when_guidance_needs_them(make):
    policy = make.awaken(make.policy(network="unet1d"))
    prefix = np.full((1, 2, 2), 0.5, np.float32)
    act = acting(policy, rtc=RtcConfig(mode="full"))
    assert policy.rtc.mode == "identity"
    policy.rtc = RtcConfig(mode="full")
    expected = policy.act(None, make.obs(1), prefix=prefix, seed=np.arange(1))[1]
    got = act.act(None, make.obs(1), prefix=prefix, seed=np.arange(1))[1]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_would_bend_a_superposition_is_refused_before_it_acts(make):
    pair = {"a": make.policy(), "b": make.policy()}
    policy = compose(pair, {"name": "or"}, solver={"name": "ddpm", "num_train_steps": 20})
    for options in ({"rtc": RtcConfig()}, {"warm_start": WarmStartConfig(fraction=0.5)}):
        with pytest.raises(ConfigError, match="need their path from pure noise"):
            acting(policy, **options)
    acting(policy, rtc=RtcConfig(mode="copy"))


def test_the_planner_times_decisions_with_committed_actions(make):
    act = ActingPolicy(make.policy(), InferenceConfig(warm_up=False))
    given, decide = [], act._acting.act
    act._acting.act = lambda carry, obs, *, prefix=None, seed: (
        given.append((bool(carry["known"].all()), prefix))
        or decide(carry, obs, prefix=prefix, seed=seed)
    )
    measured(act, decisions=2)(3)
    assert [known for known, _ in given] == [False, True, True]
    assert [prefix is not None and prefix.shape == (1, 3, 2) for _, prefix in given] == [0, 1, 1]


def test_latencies_are_of_decisions_after_the_warm_up(make):
    times = iter([])

    def clock():
        return next(times)

    policy = make.policy()
    act = ActingPolicy(policy, InferenceConfig(warm_up=False), clock=clock)
    assert act.latency() is None
    times = iter(np.cumsum([0.0] + [0.010, 1.0] * 98 + [0.030, 1.0, 0.050, 1.0]).tolist())
    for _ in range(100):
        act.act(None, make.obs(1), seed=np.arange(1))
    found = act.latency()
    assert found.count == 100 and found.p50_ms == pytest.approx(10) and 30 < found.p99_ms < 50


def test_options_that_contradict_each_other_are_refused(make):
    for options, match in (
        ({"cuda_graphs": True}, "cuda_graphs needs"),
        ({"compile": True, "packed": True}, "packed is for"),
    ):
        with pytest.raises(ConfigError, match=match):
            InferenceConfig(**options)
    policy = make.policy()
    policy.network = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"bfloat16 needs a network in two stages.*Identity"):
        acting(policy, dtype="bfloat16")
    if not packing.packable(torch.bfloat16):
        with pytest.raises(ConfigError, match="kernels of oneDNN for bfloat16"):
            acting(make.policy(network="unet1d"), dtype="bfloat16", packed=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            acting(make.policy(), device="cuda")


@full_only
@pytest.mark.slow
def test_compiled(make):
    policy = make.awaken(make.policy())
    expected = policy.act(None, make.obs(1), seed=np.arange(1))[1]
    got = acting(policy, compile=True).act(None, make.obs(1), seed=np.arange(1))[1]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(make, dtype, graphs):
    policy = make.awaken(make.policy(network="unet1d"))
    obs, seeds = make.obs(2), np.arange(2)
    expected = policy.act(None, obs, seed=seeds)[1]
    options = {"device": "cuda", "dtype": dtype, "compile": graphs, "cuda_graphs": graphs}
    act = ActingPolicy(policy, InferenceConfig(**options), rows=2)
    got = act.act(None, obs, seed=seeds)[1]
    np.testing.assert_allclose(got, expected, atol=1e-3 if dtype == "float32" else 0.2)
    np.testing.assert_array_equal(act.act(None, obs, seed=seeds)[1], got)


PLAN = {"tick_hz": 50.0, "horizon": 16, "num_steps": (10, 1, 2, 5), "n_action_steps": (8,)}


def test_the_most_steps_that_fit_are_chosen_and_no_more_are_measured():
    asked = []

    def p95_s(n):
        asked.append(n)
        return 0.020 + 0.025 * n

    plan = choose(p95_s, **PLAN)  # H − s = 8 ticks = 160 ms
    assert (plan.num_steps, plan.n_action_steps, asked) == (5, 8, [1, 2, 5, 10])
    assert plan.budget_ms == pytest.approx(160) and plan.p95_ms == pytest.approx(145)
    assert "5 solver steps need 145.0 ms" in plan.reason and "10 steps need 270.0" in plan.reason
    assert choose(p95_s, **PLAN, delay=4).num_steps == 2  # 80 ms
    # Executing fewer actions is preferred where it leaves the time: s = 4 leaves 80 ms.
    fewer = choose(p95_s, **{**PLAN, "num_steps": (1, 2), "n_action_steps": (2, 4, 8)})
    assert (fewer.num_steps, fewer.n_action_steps) == (2, 4)
    assert "no more were allowed" in fewer.reason
    with pytest.raises(ConfigError, match=r"1 solver steps do not fit.*45.0 ms.*50 Hz.*20.0 ms"):
        choose(p95_s, **PLAN, delay=1)
    for wrong, match in (({"num_steps": ()}, "num_steps"), ({"n_action_steps": (17,)}, r"1\.\.16")):
        with pytest.raises(ConfigError, match=match):
            choose(p95_s, **{**PLAN, **wrong})


def test_latency_is_measured_by_the_clock_and_the_choice_acts(make):
    policy = make.policy()
    now = [0.0]
    act = ActingPolicy(policy, InferenceConfig(warm_up=False))
    network = act._acting.network
    refine = network.refine

    def slow(x, context):
        now[0] += 0.010
        return refine(x, context)

    network.refine = slow
    p95_s = measured(act, decisions=3, clock=lambda: now[0])
    assert p95_s(4) == pytest.approx(0.040) and p95_s(7) == pytest.approx(0.070)
    assert len(policy.solver.log_snrs) == 10, "the source keeps its own"
    plan = fit(act, tick_hz=0.001, num_steps=(2, 3))
    assert plan.num_steps == 3 == len(act._acting.solver.log_snrs)
    assert math.isclose(plan.budget_ms, 3e6) and act.spec.n_action_steps == 3
    act.refresh()
    assert len(act._acting.solver.log_snrs) == 3, "new weights keep the plan"

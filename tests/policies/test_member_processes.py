"""Members of a composition in processes of their own."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch

from embodied.comms.channels import Reply
from embodied.comms.pair import PairEnd
from embodied.core.errors import ConfigError, CorruptDataError, LinkError, SpecError
from embodied.core.processes import alive
from policies.acting import InferenceConfig, RtcConfig
from policies.checkpoint import policy_state
from policies.compose.build import compose
from policies.inference import messages as m
from policies.inference import process, twin, worker
from policies.inference.policy import ActingPolicy
from policies.inference.process import MemberProcess
from tests.policies.conftest import Fixtures

LARGE_ENOUGH = {"name": "unet1d", "channels": [64, 128], "n_groups": 4, "time_dim": 16}
"""Some of its convolutions are packed."""

SERIAL = InferenceConfig(warm_up=False)
PARALLEL = InferenceConfig(warm_up=False, parallel=True)
MIX = {"name": "mix", "weights": [0.4, 0.6]}
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module")
def members():
    made = Fixtures()
    return {
        "a": made.awaken(made.policy("flow", network=LARGE_ENOUGH), seed=1),
        "b": made.awaken(made.policy("diffusion", network=LARGE_ENOUGH), seed=2),
    }


@pytest.fixture(scope="module")
def mixed(members):
    """A mix whose member b computes elsewhere."""
    act = ActingPolicy(compose(members, MIX), PARALLEL)
    [other] = twin.processes(act._acting)
    yield act
    act.close()
    assert not alive(other.pid)
    with pytest.raises(LinkError, match=r"'b'.*is closed"):
        act.sample(Fixtures().obs(1), 1, seed=0)


def same(parallel, serial, rows, prefix=None):
    obs, seeds = Fixtures().obs(rows), np.arange(rows)
    carry = None
    for _ in range(2):
        expected = serial.act(carry, obs, prefix=prefix, seed=seeds)[1]
        carry, found = parallel.act(carry, obs, prefix=prefix, seed=seeds)
        np.testing.assert_array_equal(found, expected)
    assert torch.equal(parallel.sample(obs, 2, seed=3), serial.sample(obs, 2, seed=3))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        pytest.param(MIX, {}, id="mix"),
        pytest.param(
            {"name": "product", "weights": [[0.5, 1.5], 0.7]}, {}, id="product", marks=SLOW
        ),
        pytest.param(
            {"name": "mix", "weights": [1, 0], "stages": [{"begin": 0.5, "weights": [0, 1]}]},
            {},
            id="stages",
            marks=SLOW,
        ),
        pytest.param(
            {"name": "critic", "critic": {"name": "medoid"}},
            {"solver": {"name": "ddim"}},
            id="critic",
            marks=SLOW,
        ),
        pytest.param(
            {"name": "or"},
            {"solver": {"name": "ddpm", "num_train_steps": 8}},
            id="or",
            marks=SLOW,
        ),
    ],
)
def test_the_same_bit_for_bit_as_one_after_the_other(members, mixed, operator, options):
    policy = compose(members, operator, **options)
    serial, parallel = ActingPolicy(policy, SERIAL), ActingPolicy(policy, SERIAL)
    parallel._acting.elsewhere = mixed._acting.elsewhere  # the member is the same
    prefix = np.full((3, 2, 2), 0.25, np.float32)
    for rows, given in ((1, None), (3, prefix)):
        same(parallel, serial, rows, given)


def test_members_of_another_scale_and_fewer_steps(members, mixed, make):
    wide = make.policy("flow", network=LARGE_ENOUGH, action_normalization="limits", horizon=8)
    policy = compose({"wide": make.awaken(wide), "b": members["b"]}, MIX)
    assert policy.config.members[1].ratio == pytest.approx(2)
    serial, parallel = ActingPolicy(policy, SERIAL), ActingPolicy(policy, SERIAL)
    parallel._acting.elsewhere = mixed._acting.elsewhere
    same(parallel, serial, 3)
    for act in (parallel, serial):
        act.set_steps(2)
    same(parallel, serial, 65)  # too many for their conditioning to be prepared


def test_new_weights_reach_the_process_at_the_refresh(members, mixed, make):
    before = mixed.act(None, make.obs(1), seed=np.arange(1))[1]
    make.awaken(members["b"], seed=9)
    np.testing.assert_array_equal(mixed.act(None, make.obs(1), seed=np.arange(1))[1], before)
    mixed.refresh()
    assert np.abs(mixed.act(None, make.obs(1), seed=np.arange(1))[1] - before).max() > 1e-3
    same(mixed, ActingPolicy(mixed.source, SERIAL), 2)


def test_after_an_error_the_next_decision_is_right(mixed, make):
    wrong = {**make.obs(2), "observation.goal": np.zeros((2, 2, 9), np.float32)}
    with pytest.raises(SpecError, match=r"observation\.goal"):
        mixed.act(None, wrong, seed=np.arange(2))
    [other] = twin.processes(mixed._acting)
    with pytest.raises(SpecError, match=r"observation\.goal"):
        other.encode(wrong)()
    same(mixed, ActingPolicy(mixed.source, SERIAL), 2)


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_at_once(members, make):
    act = ActingPolicy(compose(members, MIX), PARALLEL)
    [other] = twin.processes(act._acting)
    os.kill(other.pid, signal.SIGKILL)
    started_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(LinkError, match=rf"policy 'b' .*process {other.pid},.*signal 9.*start"):
            act.act(None, make.obs(1), seed=np.arange(1))
    assert time.monotonic() - started_s < 5


def test_no_process_outlives_the_object_that_asks_it(members):
    other = MemberProcess("b", members["b"], PARALLEL)
    pid = other.pid
    assert alive(pid)
    del other
    assert not alive(pid)


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed(members):
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        other = MemberProcess("b", members["b"], PARALLEL)
        other.build()
        os.write(writing, other.pid.to_bytes(4, "little"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int.from_bytes(os.read(reading, 4), "little")
    deadline_s = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    os.close(reading)
    os.close(writing)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended != (0, 0)


LINK = "import socket, sys, time; link = socket.socket(fileno=int(sys.argv[1]));"


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("link.sendall(b'\\xff' * 64); link.recv(1 << 20); time.sleep(9)", "sent what cannot be"),
        ("time.sleep(9)", r"gave no answer in 0\.5 s"),
        ("link.recv(1); sys.exit(3)", "exit status 3"),
    ],
    ids=["garbage", "silence", "end"],
)
def test_a_process_that_fails_to_answer_is_an_error_in_time(members, monkeypatch, script, match):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", LINK + script))
    monkeypatch.setattr(process, "START_S", 0.5 if "no answer" in match else 20.0)
    other = MemberProcess("b", members["b"], PARALLEL)
    started_s = time.monotonic()
    with pytest.raises(LinkError, match=match):
        other.build()
    assert time.monotonic() - started_s < 8 and not alive(other.pid)


@pytest.mark.parametrize(
    ("late", "header", "arrays", "match"),
    [
        (0, m.Done(), {}, "Done in the place of Encoded"),
        (1, m.Encoded(), {"cond": np.zeros((1, 9))}, "an answer to"),
        (0, m.Encoded(), {}, "no 'cond' with 2 axes"),
        (0, m.Encoded(), {"cond": np.zeros(9)}, "no 'cond' with 2 axes"),
    ],
)
def test_an_answer_that_does_not_fit_ends_the_process(
    members, monkeypatch, make, late, header, arrays, match
):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-c", LINK + "time.sleep(9)"))
    other = MemberProcess("b", members["b"], PARALLEL)
    other._end.receive = lambda limit_s: Reply(other._count - late, header, arrays)
    with pytest.raises(LinkError, match=f"sent what cannot be read: .*{match}"):
        other.encode(make.obs(1))()
    assert not alive(other.pid)


def test_the_process_refuses_what_does_not_fit(members):
    config, arrays = policy_state(members["b"])
    one = dict([next(iter(arrays.items()))])
    build = m.Build(config, SERIAL)
    x = {"x": np.zeros((1, 6, 2), np.float32)}
    for match, *requests in (
        ("before the weights", (m.Predict(0.0), x)),
        ("before the policy", (m.Weights(), one)),
        ("missing", (build, {}), (m.Weights(), one), (m.Load(), {})),
        ("more weights", (build, {}), (m.Weights(), {**arrays, "more": np.zeros(1)})),
        ("before its cond", (build, {}), (m.Weights(), arrays), (m.Load(), {}), (m.Predict(0), x)),
        ("is no request", (build, {}), (m.Weights(), arrays), (m.Load(), {}), (m.Done(), {})),
    ):
        answering = worker.Worker()
        for request in requests[:-1]:
            assert answering.answer(*request) == (m.Done(), {})
        with pytest.raises(CorruptDataError, match=match):
            answering.answer(*requests[-1])
    with pytest.raises(ConfigError, match="no denoiser"):
        worker.Worker().answer(m.Build({**config, "policy": "act", "options": {}}, SERIAL), {})


def test_the_process_ends_at_frames_that_cannot_be_read():
    for data, error in ((b"\xff" * 64, CorruptDataError), (b"", LinkError)):
        ours, theirs = socket.socketpair()
        ended = []

        def serve(link, ended=ended):
            try:
                worker.serve(PairEnd(link, m.REQUESTS))
            except (CorruptDataError, LinkError) as found:
                ended.append(type(found))

        thread = threading.Thread(target=serve, args=(theirs,))
        thread.start()
        ours.sendall(data)
        if not data:
            ours.close()
        thread.join(10)
        assert ended == [error]
        ours.close()
        theirs.close()


def test_which_members_get_a_process(make, monkeypatch):
    started = []

    class Recorded:
        def __init__(self, label, policy, config):
            started.append(label)

        def build(self):
            pass

        load = build

    monkeypatch.setattr(twin, "MemberProcess", Recorded)
    a, b, c, d, e = (make.policy(seed=k) for k in range(5))
    inner = compose({"b": b, "c": c}, MIX)
    outer = {"a": a, "inner": inner, "d": d, "e": e}
    weights = {"name": "mix", "weights": [0.3, 0.4, 0.3, 0]}
    ActingPolicy(compose(outer, weights), PARALLEL)
    assert sorted(started) == ["c", "d"]
    started.clear()
    pushed = {"guidance": {"critic": {"name": "medoid"}, "scale": 1.0}}
    for options, policy in (
        ({}, compose({"a": a, "b": b}, MIX, **pushed)),
        ({"rtc": RtcConfig(mode="full")}, inner),
        ({"parallel": False}, inner),
    ):
        config = InferenceConfig(**{"warm_up": False, "parallel": True, **options})
        act = ActingPolicy(policy, config)
        expected = policy.act(None, make.obs(2), seed=np.arange(2))[1]
        found = act.act(None, make.obs(2), seed=np.arange(2))[1]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not started
    with pytest.raises(ConfigError, match="gradients"):
        ActingPolicy(compose({"a": a, "b": b}, MIX, **pushed), InferenceConfig(packed=True))
    with pytest.raises(ConfigError, match="device=cpu"):
        InferenceConfig(parallel=True, device="cuda")

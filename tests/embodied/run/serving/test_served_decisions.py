"""Decisions of a policy server in a process of its own, against the same policy here."""

import threading
import time

import numpy as np
import pytest
from served import ROWS, Padded, make_policy, observations, publish, published, stored

from embodied.comms.channels import RequestClient
from embodied.core.errors import ConfigError, EmbodiedError, LinkError, RunInUseError, SpecError
from embodied.run.remote import messages as m
from embodied.run.remote.requests import Request, request_arrays
from embodied.run.serving.process import ServeConfig, serve
from embodied.run.serving.server import BatchingConfig, PolicyServer
from embodied.run.serving.weights import Served
from embodied.weights.store import WeightStore
from embodied.weights.trial import Trial
from policies.acting import InferenceConfig, WarmStartConfig


def health(server):
    with RequestClient(server.address, m.REPLIES) as client:
        return client.request(m.Check(), {}, 10.0)[0]


def wait_for(condition):
    ends_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def episode(policy, robot, decisions=6):
    """What a robot is told: rows, history of carry and committed actions vary with its number."""
    rows, carry, told = 1 + robot % 2, None, []
    carry = policy.init(rows)
    for decision in range(decisions):
        seed = np.arange(rows) + 100 * robot + 10 * decision
        prefix = None if decision % 3 == 0 else told[-1][:, 8 : 8 + 1 + decision % 3]
        obs = observations(rows, 1000 * robot + decision)
        carry, actions = policy.act(carry, obs, prefix=prefix, seed=seed)
        told.append(actions)
    return told


UNET = {"name": "unet1d", "channels": [32], "n_groups": 4, "time_dim": 16}


@pytest.mark.parametrize(
    ("options", "inference"),
    [
        ({}, {}),
        pytest.param(
            {"network": UNET, "num_steps": 4},
            {"warm_start": WarmStartConfig(fraction=0.5)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mlp", "unet1d, warm start"],
)
def test_decisions_are_bit_for_bit_local_ones_whatever_they_are_batched_with(
    start, tmp_path, options, inference
):
    folder = stored(tmp_path / "policy", **options)
    # Slow enough that the robots' requests meet while the server is busy.
    server = start(folder, slow_s=0.002, inference=inference)
    local = Padded(make_policy(**options), **inference)
    robots, told = 4, {}

    def robot(number):
        policy = server.connect()
        told[number] = episode(policy, number)
        policy.close()

    threads = [threading.Thread(target=robot, args=(number,)) for number in range(robots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(told) == list(range(robots))
    for number in range(robots):
        for remote, here in zip(told[number], episode(local, number), strict=True):
            np.testing.assert_array_equal(remote, here)
    found = health(server)
    assert found.decided == robots * 6 and found.dropped == found.refused == 0
    assert sum(found.batch_rows) < found.decided, "requests were joined"
    assert sum(n * count for n, count in enumerate(found.batch_rows, 1)) == 6 * (2 * 1 + 2 * 2)
    assert 0 < found.p50_ms <= found.p99_ms


def test_committed_actions_head_the_chunk_and_guide_the_rest(start, tmp_path):
    server = start(stored(tmp_path / "policy"))
    remote, local = server.connect(), Padded(make_policy())
    assert remote.spec == local.spec
    obs, seed = observations(2, 1), np.array([3, 4])
    prefix = np.full((2, 5, 2), 0.25, np.float32)
    _, free = remote.act(remote.init(2), obs, seed=seed)
    carry, guided = remote.act(remote.init(2), obs, prefix=prefix, seed=seed)
    np.testing.assert_array_equal(guided[:, :5], prefix)
    assert not np.array_equal(guided[:, 5:], free[:, 5:])
    np.testing.assert_array_equal(
        guided, local.act(local.init(2), obs, prefix=prefix, seed=seed)[1]
    )
    assert carry is not None
    remote.close()


def raw(rows=1):
    carry = {"chunk": np.zeros((rows, 16, 2), np.float32), "known": np.zeros(rows, bool)}
    return request_arrays(Request(observations(rows, 1), np.arange(rows), carry))


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


STATE = "obs/observation.state"
MALFORMED = {
    "a wrong shape": (lambda a: {**a, STATE: a[STATE][..., :1]}, r"state has shape \(1, 2, 1\)"),
    "another dtype": (lambda a: {**a, STATE: a[STATE].astype(np.float64)}, "dtype float64"),
    "not a number": (lambda a: {**a, STATE: a[STATE] * np.nan}, "not finite"),
    "a key missing": (lambda a: without(a, STATE), "missing or not the policy's: obs/obs"),
    "a key too many": (lambda a: {**a, "obs/x": a["seed"]}, "not the policy's: obs/x"),
    "no seed": (lambda a: without(a, "seed"), "not the policy's: seed"),
    "a seed of floats": (lambda a: {**a, "seed": np.zeros(1)}, "seed is float64"),
    "no rows": (lambda a: {k: v[:0] for k, v in a.items()}, r"B in 1\.\.4"),
    "rows that differ": (lambda a: {**a, "seed": np.arange(2)}, r"shape \(1, 2, 2\)"),
    "a greater carry": (
        lambda a: {**a, "carry/chunk": np.zeros((1, 4096, 2), np.float32)},
        "carry/chunk has shape",
    ),
    "a carry not finite": (
        lambda a: {**a, "carry/chunk": np.full((1, 16, 2), np.inf, np.float32)},
        "carry/chunk holds values",
    ),
    "a long prefix": (lambda a: {**a, "prefix": np.zeros((1, 9, 2), np.float32)}, r"d in 1\.\.8"),
    "a flat prefix": (lambda a: {**a, "prefix": np.zeros(2, np.float32)}, r"d in 1\.\.8"),
    "a wide prefix": (lambda a: {**a, "prefix": np.zeros((1, 2, 3), np.float32)}, "prefix has"),
}


def test_wrong_requests_get_clear_errors_and_the_server_lives(start, tmp_path):
    server = start(stored(tmp_path / "policy"))
    remote = server.connect()
    with RequestClient(server.address, m.REPLIES) as client:
        described, _ = client.request(m.Describe(), {}, 10.0)
        right = m.Act(described.fingerprint, 10_000)
        for make, message in MALFORMED.values():
            with pytest.raises(SpecError, match=message):
                client.request(right, make(raw()), 10.0)
        with pytest.raises(SpecError, match=r"B in 1\.\.4"):
            client.request(right, raw(ROWS + 1), 10.0)
        with pytest.raises(SpecError, match="another policy"):
            client.request(m.Act("0" * 32, 10_000), raw(), 10.0)
        header, arrays = client.request(right, raw(), 10.0)
    assert header == m.Acted(-1) and arrays["actions"].shape == (1, 16, 2)
    with pytest.raises(ConfigError, match=r"5 rows.*takes 4"):
        remote.act(None, observations(5, 1), seed=np.arange(5))
    with pytest.raises(SpecError, match="not finite"):
        remote.act(
            None,
            {**observations(1, 1), "observation.state": np.full((1, 2, 2), np.nan, "f")},
            seed=np.arange(1),
        )
    assert health(server).refused == len(MALFORMED) + 3 and server.alive
    remote.close()


def test_requests_whose_time_is_over_are_dropped_not_computed(start, tmp_path):
    server = start(stored(tmp_path / "policy"), slow_s=0.3)
    remote = server.connect()
    before = health(server)
    with RequestClient(server.address, m.REPLIES) as client:
        described, _ = client.request(m.Describe(), {}, 10.0)
        numbers = [client.send(m.Act(described.fingerprint, 1), raw()) for _ in range(12)]
        patient = client.send(m.Act(described.fingerprint, 60_000), raw())
        replies = {}
        while len(replies) < 13:
            assert client.wait(20.0), "every request is answered"
            replies |= {reply.id: reply.header for reply in client.receive_ready()}
    assert isinstance(replies.pop(patient), m.Acted)
    late = [replies[number] for number in numbers if not isinstance(replies[number], m.Acted)]
    assert late, "all but those that came between two batches"
    assert all(reply.kind == "LinkError" and "had 1 ms" in reply.message for reply in late)
    found = health(server)
    assert found.dropped - before.dropped == len(late)
    remote.close()


def test_new_weights_come_between_batches_and_each_answer_names_its_own(start, tmp_path):
    run = published(tmp_path / "run")
    policies = {publish(run, make_policy(0)): make_policy(0)}
    server = start(run.path, follow=True)
    remote = server.connect()
    assert remote.version == 1
    obs, seed = observations(1, 1), np.array([1])
    told = []
    ends_s = time.monotonic() + 20
    while not told or told[-1][0] < 3:
        assert time.monotonic() < ends_s
        _, actions = remote.act(remote.init(1), obs, seed=seed)
        told.append((remote.version, actions))
        if remote.version == len(policies) < 3:
            made = make_policy(len(policies))
            policies[publish(run, made)] = made
    expected = {
        version: Padded(policy).act(None, obs, seed=seed)[1] for version, policy in policies.items()
    }
    assert {version for version, _ in told} == {1, 2, 3}
    for version, actions in told:
        np.testing.assert_array_equal(actions, expected[version])
    assert health(server).version == 3
    remote.close()


def test_weights_that_are_damaged_are_passed_over_and_named(start, tmp_path):
    run = published(tmp_path / "run")
    publish(run, make_policy(0))
    server = start(run.path, follow=True)
    server.connect().close()
    (run.weights / "versions" / "00000002.json").write_text("{}")
    wait_for(lambda: health(server).fault)
    assert health(server).version == 1 and server.alive
    publish(run, make_policy(1))
    wait_for(lambda: health(server).version == 3)
    assert not health(server).fault


def test_a_pinned_version_is_served_until_it_is_let_go(tmp_path):
    run = published(tmp_path / "run")
    trial = Trial(WeightStore(run.weights))
    trial.pin(publish(run, make_policy(0)))
    publish(run, make_policy(1))
    served = Served(run.path, InferenceConfig(), rows=ROWS, follow=True)
    assert served.version == 1 and not served.refresh()
    trial.unpin(1)
    wait_for(served.refresh)
    assert served.version == 2
    trial.pin(2)
    publish(run, make_policy(2))
    served.close()
    again = Served(run.path, InferenceConfig(), rows=ROWS, follow=True)
    assert again.version == 2
    again.close()


def test_the_blocking_handler_gives_a_gateways_threads_the_same(tmp_path):
    folder = stored(tmp_path / "policy")
    batching = BatchingConfig(rows=ROWS, max_wait_ms=0.0, max_queued=4)
    server = PolicyServer(
        lambda: Served(folder, InferenceConfig(), rows=ROWS, follow=False), batching
    )
    assert server.handler(m.Check(), {})[0].ready is False
    with pytest.raises(LinkError, match="warming up"):
        server.handler(m.Describe(), {})
    ended = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda: not ended.is_set(),))
    thread.start()
    try:
        wait_for(lambda: server.handler(m.Check(), {})[0].ready)
        described, fresh = server.handler(m.Describe(), {})
        assert sorted(fresh) == ["carry/chunk", "carry/known"] and described.rows == ROWS
        header, arrays = server.handler(m.Act(described.fingerprint, 10_000), raw())
        assert header == m.Acted(-1)
        local = Padded(make_policy())
        here = local.act(local.init(1), observations(1, 1), seed=np.arange(1))[1]
        np.testing.assert_array_equal(arrays["actions"], here)
    finally:
        ended.set()
        thread.join(20)
    with pytest.raises(LinkError, match="ends"):
        server.handler(m.Act(described.fingerprint, 10_000), raw())


def test_one_address_has_one_server_and_its_configuration_is_checked(start, tmp_path):
    folder = stored(tmp_path / "policy")
    server = start(folder)
    server.connect().close()
    batching = BatchingConfig(rows=2, max_wait_ms=0.0, max_queued=1)
    options = {"checkpoint": str(folder), "follow": False, "report_s": 1.0, "batching": batching}
    with pytest.raises(RunInUseError, match="another process serves"):
        serve(ServeConfig(listen=server.address, **options), lambda: True, lambda health: None)
    with pytest.raises(ConfigError, match="power of two, such as 8"):
        BatchingConfig(rows=6, max_wait_ms=0.0, max_queued=1)
    for address, match in (("tcp://0.0.0.0:1", "mTLS"), ("carrier://pigeon", "unknown")):
        with pytest.raises(ConfigError, match=match):
            ServeConfig(listen=address, **options)
    with pytest.raises(ConfigError, match=r"leave inference\.remote null"):
        ServeConfig(listen=None, **options, inference=InferenceConfig(remote="ipc:///somewhere"))
    with pytest.raises(EmbodiedError, match="follow=true needs a run directory"):
        Served(folder, InferenceConfig(), rows=2, follow=True)

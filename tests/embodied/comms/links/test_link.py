"""Links over real gRPC on the loopback interface: requests, pushes, order, back-pressure."""

import threading
import time

import numpy as np
import pytest
from linking import HELLO, KIND, Ask, Tell, double, frozen, gateway, wait_for

from embodied.buffer.serve.client import BufferClient
from embodied.buffer.serve.messages import REPLIES, REQUESTS
from embodied.comms.channels import Requests
from embodied.comms.links.client import Link
from embodied.comms.links.requests import MAX_IN_FLIGHT
from embodied.comms.links.server import LinkServer
from embodied.comms.links.services import Service
from embodied.comms.links.wire import Hello
from embodied.core.errors import ConfigError, EmbodiedError, LinkError, SpecError, StorageFullError


def dial(server, hello=HELLO, **options):
    return Link(getattr(server, "address", server), hello, None, **options)


def test_requests_with_arrays_and_several_in_flight():
    rng = np.random.default_rng(0)
    with gateway() as server, dial(server) as link:
        client: Requests = link.requests("control", Tell)
        for size in (0, 1, 1000, 30_000):
            arrays = {
                "bool": rng.random(size) > 0.5,
                "x": rng.normal(size=size),
                "columns": np.asfortranarray(rng.normal(size=(size, 3)).astype(np.float32)),
            }
            header, found = client.request(Ask(size), arrays, 10)
            assert header == Tell(2 * size)
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array * 2)
        sent = {client.send(Ask(i), {}): i for i in range(20)}
        assert client.request(Ask(100), {}, 10)[0] == Tell(200)
        replies = []
        while len(replies) < 20:
            assert client.wait(10)
            replies += client.receive_ready()
        assert {r.id: r.header.n for r in replies} == {k: 2 * i for k, i in sent.items()}
        assert not client.wait(0)


def test_arrays_may_be_written_as_soon_as_send_returns():
    def smallest(host, header, arrays):
        return Tell(int(arrays["x"].max())), {}

    with gateway(smallest) as server, dial(server) as link:
        client = link.requests("experience", Tell)
        link.wait(10)
        array = np.ones(20_000_000, np.uint8)
        client.send(Ask(1), {"x": array})
        array[:] = 77
        assert client.wait(10)
        assert client.receive_ready()[0].header == Tell(1)


def test_refusals_come_back_as_their_type():
    def refuse(host, header, arrays):
        assert host == "left-arm"
        raise StorageFullError("disk of /x is full")

    with gateway(refuse) as server, dial(server) as link:
        with pytest.raises(StorageFullError, match="disk of /x is full"):
            link.requests("control", Tell).request(Ask(1), {}, 10)
        with pytest.raises(EmbodiedError, match="kind 'weights' are not served here; control"):
            link.requests("weights", Tell).request(Ask(1), {}, 10)
        with pytest.raises(EmbodiedError, match="cannot be decoded"):
            link.requests("control", Tell).request(Tell(1), {}, 10)
        with pytest.raises(ConfigError, match="unknown kind of message 'controll'"):
            link.requests("controll", Tell)
        with pytest.raises(SpecError, match="those of kind 'control' have at most 1048576"):
            link.requests("control", Tell).request(Ask(1), {"x": frozen(2 << 20)}, 10)


def test_an_answer_above_its_kinds_largest_is_an_error_at_the_host():
    with gateway() as server, dial(server) as link:
        client = link.requests("experience", Tell)
        with pytest.raises(SpecError, match="those of kind 'experience' have at most"):
            client.request(Ask(1), {"x": frozen(2 << 20)}, 10)
        assert client.request(Ask(1), {}, 10)[0] == Tell(2)


def test_one_that_nobody_serves_is_a_link_error_and_send_says_so():
    with dial("127.0.0.1:9") as link:
        client = link.requests("control", Tell)
        assert client.send(Ask(1), {}) is None and not link.push("control", Ask(1), {})
        with pytest.raises(LinkError, match=r"no answer from 127.0.0.1:9 in 0.05 s"):
            client.request(Ask(1), {}, 0.05)
        wait_for(lambda: "unavailable" in link.status().reason)
        assert not link.status().connected


def test_a_slow_kind_delays_no_other_nor_another_host():
    hold, held = threading.Event(), threading.Event()

    def slow(host, header, arrays):
        if header.n == 0:
            held.set()
            assert hold.wait(30)
        return double(host, header, arrays)

    with gateway(slow) as server, dial(server) as one, dial(server, Hello("b", "", "")) as two:
        experience = one.requests("experience", Tell)
        one.wait(10)
        numbers = [experience.send(Ask(n), {}) for n in range(3)]
        assert held.wait(10)
        assert one.requests("control", Tell).request(Ask(1), {}, 10)[0] == Tell(2)
        assert two.requests("experience", Tell).request(Ask(1), {}, 10)[0] == Tell(2)
        assert not experience.receive_ready()
        hold.set()
        replies = []
        while len(replies) < 3:
            assert experience.wait(10)
            replies += experience.receive_ready()
        assert [reply.id for reply in replies] == numbers, "in order"


def test_pushes_arrive_in_order_and_the_latest_wins():
    with gateway() as server, dial(server) as link:
        control, weights = link.notices("control", Tell), link.notices("weights", Tell)
        with pytest.raises(ConfigError, match="have a receiver already"):
            link.notices("control", Tell)
        link.wait(10)
        wait_for(lambda: "left-arm" in server.peers())
        assert not server.push("nobody", "control", Tell(0), {})
        for n in range(20):
            assert server.push("left-arm", "control", Tell(n), {"x": np.arange(n)})
        found = []
        while len(found) < 20:
            assert control.wait(10)
            found += control.receive_ready()
        assert [header.n for header, _ in found] == list(range(20))
        assert found[3][1]["x"].tolist() == [0, 1, 2]
        # Nobody takes the weights: what was begun stays, of the others only the newest.
        for n in range(100):
            assert server.push("left-arm", "weights", Tell(n), {"x": frozen(1000)}, key="policy")
        newest = -1
        while newest < 99:
            assert weights.wait(10)
            newest = weights.receive_ready()[-1][0].n
        wait_for(lambda: server.peers()["left-arm"].depths["weights"] == 0)
        traffic = server.peers()["left-arm"].traffic["weights"]
        assert traffic.sent + traffic.dropped == 100


def test_telemetry_needs_no_answer_and_gives_way():
    seen = []
    hold = threading.Event()

    def watch(host, header, arrays):
        seen.append(header.n)
        assert hold.wait(30)
        return Tell(0), {}

    with gateway(watch) as server, dial(server) as link:
        link.wait(10)
        for n in range(2000):
            assert link.push("telemetry", Ask(n), {})
        assert link.status().traffic["telemetry"].dropped > 1000
        hold.set()
        wait_for(lambda: seen and seen[-1] == 1999)
        assert seen == sorted(seen)


def test_a_small_message_overtakes_a_large_one():
    with gateway() as server, dial(server) as link:
        weights = link.notices("weights", Tell)
        control = link.requests("control", Tell)
        control.request(Ask(1), {}, 10)
        assert server.push("left-arm", "weights", Tell(1), {"x": frozen(200_000_000)})
        wait_for(lambda: link.status().traffic["weights"].received_bytes > 0)
        for n in range(3):
            control.request(Ask(n), {}, 10)
        assert link.status().traffic["weights"].received == 0, "it still comes"
        assert weights.wait(60)
        assert len(weights.receive_ready()[0][1]["x"]) == 200_000_000


def test_block_refuses_when_full_and_goes_on_when_there_is_room():
    hold = threading.Event()

    def slow(host, header, arrays):
        assert hold.wait(30)
        return Tell(header.n), {}

    with gateway(slow) as server, dial(server) as link:
        client = link.requests("experience", Tell)
        link.wait(10)
        count = 0
        while client.send(Ask(count), {"x": frozen(8 << 20)}) is not None:
            count += 1
            assert count < 100
        # Bounds hold at both ends: what waits here, and what the gateway has not handled.
        bound = KIND["experience"].up.total_bytes
        assert 1 <= count * (8 << 20) <= 3 * bound
        hold.set()
        replies = []
        while len(replies) < count:
            assert client.wait(10)
            replies += client.receive_ready()
        assert [reply.header.n for reply in replies] == list(range(count))
        assert client.send(Ask(0), {}) is not None


def test_requests_nobody_receives_are_bounded():
    with gateway() as server, dial(server) as link:
        client = link.requests("control", Tell)
        link.wait(10)
        wait_for(lambda: client.send(Ask(1), {}) is None)
        wait_for(lambda: client.num_late + len(client._ready) == MAX_IN_FLIGHT)
        assert len(client.receive_ready()) == MAX_IN_FLIGHT
        number = client.send(Ask(2), {})
        client.forget(number)
        wait_for(lambda: client.num_late == 1)
        client.close()
        assert client.send(Ask(1), {}) is None


def test_a_cap_holds_bulk_back_and_not_control():
    with gateway() as server, dial(server, cap_bytes_per_s=2e6) as link:
        link.wait(10)
        started_s = time.monotonic()
        client, control = link.requests("experience", Tell), link.requests("control", Tell)
        client.send(Ask(1), {"x": frozen(2_000_000)})
        for n in range(5):
            assert control.request(Ask(n), {}, 10)[0] == Tell(2 * n)
        assert not client.receive_ready()
        assert client.wait(10)
        assert time.monotonic() - started_s > 0.7


def test_status_at_both_ends():
    with gateway(software="9") as server, dial(server) as link:
        link.requests("control", Tell).request(Ask(1), {"x": np.zeros(500)}, 10)
        wait_for(lambda: link.status().rtt_ms is not None)
        wait_for(lambda: server.peers()["left-arm"].rtt_ms is not None)
        here, there = link.status(), server.peers()["left-arm"]
        assert here.connected and here.reconnects == 0 and here.reason == ""
        assert (there.host, there.run, there.software) == ("left-arm", "run-1", "0.1")
        for a, b in ((here, there), (there, here)):
            assert a.traffic["control"].sent == 1
            assert a.traffic["control"].sent_bytes == b.traffic["control"].received_bytes > 0
            assert abs(a.since_s - time.time()) < 60 and set(a.depths.values()) == {0}


def test_a_buffer_client_works_over_a_link():
    """Its requests go where a relay to the buffer service would be; the answers come back."""
    asked = []

    def service(host, header, arrays):
        asked.append(type(header).__name__)
        raise StorageFullError("full")

    services = {"experience": Service(REQUESTS, service)}
    with (
        LinkServer("127.0.0.1:0", services, None, lambda *_: None) as server,
        dial(server) as link,
        BufferClient(link.requests("experience", REPLIES), "s") as client,
    ):
        with pytest.raises(StorageFullError):
            client.stats(10)
        with pytest.raises(StorageFullError):
            client.next_episode()
    assert asked == ["StatsRequest", "EpisodeRequest"]


def test_links_without_certificates_stay_inside_the_host(tmp_path):
    for address in ("0.0.0.0:0", "[::]:0", "10.0.0.1:1", "gateway:1"):
        with pytest.raises(ConfigError, match="without a certificate"):
            gateway(address=address)
    for address in ("10.0.0.1:1", "gateway:1"):
        with pytest.raises(ConfigError, match="without a certificate"):
            dial(address)
    for address in ("dns:///x:1", ":1", "*:1"):
        for refused in (lambda a=address: gateway(address=a), lambda a=address: dial(a)):
            with pytest.raises(ConfigError):
                refused()
    with gateway(address=f"unix:{tmp_path}/s") as server, dial(server) as link:
        assert link.requests("control", Tell).request(Ask(1), {}, 10)[0] == Tell(2)
    with gateway() as server, pytest.raises(ConfigError, match="cannot listen on"):
        gateway(address=server.address)

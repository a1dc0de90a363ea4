"""Who goes first: running episodes, interventions, failures; and the cap on bytes per second."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spooling import HOST, STREAM, Link, check_arrived, learners_site, make_step, pump_all, record

from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.bucket import TokenBucket
from embodied.buffer.spool.index import SpooledEpisode
from embodied.buffer.spool.order import Kind, SendingOrder
from embodied.buffer.spool.uploader import Uploader
from embodied.core.errors import ConfigError

BATCH = 1 << 12


def test_fresh_steps_wait_for_few_batches_while_hours_are_caught_up(tmp_path):
    with (
        LocalBuffer(tmp_path / "spool", segment_bytes=1 << 18) as spool,
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST, batch_bytes=BATCH) as uploader,
    ):
        backlog = [("arm", n) for n in range(30)] + [("leg", n) for n in range(10)]
        for name, number in backlog:
            record(spool, number, length=49, stream=f"{HOST}/{name}")
            uploader.pump()
        assert uploader.status().depth_steps == 2000 and not link.batches
        with learners_site(tmp_path) as log:
            link.reach()
            added: dict[tuple[str, int, int], int] = {}
            for i in range(240):  # three streams run on while the backlog is caught up
                for name in ("arm", "leg", "new"):
                    step = make_step(200 + i // 60, i % 60, 59, f"{HOST}/{name}")
                    spool.add(step)
                    added[step.key] = len(link.batches)
                uploader.pump()
                link.wait(0.002)
            backlog_sent = sum(key not in added for key in link.sent)
            pump_all(uploader, link)
            check_arrived(tmp_path / "spool", log)
        # The first episodes of the streams are asked about before they go: one round trip.
        waits = {
            key: number - added[key]
            for number, batch in enumerate(link.batches)
            for key in batch
            if key in added and key[1] > 200
        }
        assert len(waits) == 3 * (240 - 60)
        assert max(waits.values()) <= 12
        assert sum(wait <= 4 for wait in waits.values()) > 0.9 * len(waits)
        assert backlog_sent > 1000


def test_interventions_go_first_then_failures_then_the_rest(tmp_path):
    kinds = random.Random(3).choices(["intervention", "failure", "success"], k=30)
    with (
        LocalBuffer(tmp_path / "spool", segment_bytes=1 << 16) as spool,
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
    ):
        for number, kind in enumerate(kinds):
            for index in range(6):
                intervened = kind == "intervention" and index == 2
                succeeded = kind != "failure" and index == 4
                spool.add(make_step(number, index, 5, intervention=intervened, success=succeeded))
        spool.add(make_step(99, 0, 9))  # what runs now
        link.reach()
        with Uploader(tmp_path / "spool", link, HOST, batch_bytes=300) as uploader:
            pump_all(uploader, link)
        check_arrived(tmp_path / "spool", log)
    order = list(dict.fromkeys(number for _, number, _ in link.sent))
    assert order[0] == 99
    ranks = {"intervention": 0, "failure": 1, "success": 2}
    assert order[1:] == sorted(range(30), key=lambda n: (ranks[kinds[n]], n))


def test_the_cap_holds_by_the_clock_and_is_used(tmp_path):
    now = [100.0]
    rate = 10_000
    with (
        LocalBuffer(tmp_path / "spool") as spool,
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
    ):
        for number in range(12):
            record(spool, number, length=49, numbers=2)
        budget = TokenBucket(rate, burst_bytes=500, clock=lambda: now[0])
        with Uploader(
            tmp_path / "spool",
            link,
            HOST,
            budget=budget,
            batch_bytes=1000,
            clock=lambda: now[0],
            resend_s=1e6,
        ) as uploader:
            link.reach()
            began_s = now[0]
            for _ in range(3000):
                uploader.pump()
                link.wait(0.002)
                status = uploader.status()
                assert status.sent_bytes <= 500 + rate * (now[0] - began_s) + 1000
                if not status.depth_steps:
                    break
                if not status.in_flight_batches:
                    now[0] += 0.02
            assert status.depth_steps == 0
            assert status.sent_bytes >= 0.9 * rate * (now[0] - began_s) > 0
        check_arrived(tmp_path / "spool", log)
    with pytest.raises(ConfigError, match="positive"):
        TokenBucket(0)


def episode(number, steps, stream):
    made = SpooledEpisode(stream, number, number, 0)
    made.end, made.known = steps, True
    return made


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=20, max_size=40),
    st.floats(0.2, 0.9),
)
def test_both_kinds_get_their_share_while_both_wait(sizes, share):
    order = SendingOrder(share)
    order.note(episode(0, 1 << 30, STREAM))  # backlog without end
    order.note(episode(1, 1 << 30, STREAM))
    sent = [0, 0]
    largest = max(max(pair) for pair in sizes)
    for pair in sizes:
        kind = order.next_kind(backlog=True)
        assert kind is not None
        assert next(order.candidates(kind)).number == (1 if kind is Kind.FRESH else 0)
        order.spend(kind, pair[kind])
        sent[kind] += pair[kind]
        lag = sent[0] / share - sent[1] / (1 - share)
        assert -largest / (1 - share) <= lag <= largest / share
    assert order.next_kind(backlog=False) is Kind.FRESH


def test_what_one_kind_does_not_use_is_not_saved_up():
    order = SendingOrder(0.75)
    old, running = episode(0, 1 << 30, STREAM), episode(1, 0, STREAM)
    order.note(old)
    order.note(running)
    for _ in range(50):
        assert order.next_kind(backlog=True) is Kind.BACKLOG
        order.spend(Kind.BACKLOG, 1000)
    running.end = 1 << 30
    kinds = []
    for _ in range(40):
        kind = order.next_kind(backlog=True)
        assert kind is not None
        kinds.append(kind)
        order.spend(kind, 1000)
    assert kinds[0] is Kind.FRESH and kinds.count(Kind.FRESH) == 30
    assert Kind.BACKLOG in kinds[:4]

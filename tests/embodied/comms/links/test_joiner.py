"""Parts to messages: only what a sender that keeps the rules sends, in bounded memory."""

import dataclasses
import resource

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.comms.links import wire
from embodied.comms.links.joiner import Joiner
from embodied.comms.links.kinds import KINDS, WEIGHTS, Bound, Kind
from embodied.comms.links.outbox import Outbox, count_from_zero
from embodied.core.errors import CorruptDataError

A_BOUND, B_BOUND = Bound(3, 100, 60), Bound(2, 50, 50)
A = Kind(id=1, name="a", priority=0, policy="block", up=A_BOUND, down=A_BOUND)
B = Kind(id=2, name="b", priority=0, policy="block", up=B_BOUND, down=B_BOUND)
BOUNDS = {A: A_BOUND, B: B_BOUND}


def part(data, kind=1, message=1, offset=0, total=None):
    return wire.Part(
        kind, message, offset, len(data) if total is None else total, crc32c.crc32c(data), data
    )


@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.binary(min_size=1, max_size=50)), max_size=20),
    st.integers(1, 20),
)
def test_what_an_outbox_cuts_is_joined(messages, most):
    outbox, joiner = Outbox(BOUNDS, count_from_zero(BOUNDS)), Joiner(BOUNDS)
    left, joined = list(messages), []
    while True:
        while left and outbox.put(left[0][0], [left[0][1]]):
            left.pop(0)
        cut = outbox.take(most)
        if cut is None:
            break
        raw = wire.part_piece(cut.kind.id, cut.message, cut.offset, cut.total, cut.views)
        found = wire.parse(raw)
        assert isinstance(found, wire.Part)
        whole = joiner.add(found)
        if whole is not None:
            joined.append((whole.kind, bytes(whole.message)))
            assert outbox.handled(whole.kind.id, *joiner.handled(whole))
    for kind in (A, B):
        assert [m for m in joined if m[0] is kind] == [m for m in messages if m[0] is kind]


@pytest.mark.parametrize(
    "change,why",
    [
        ({"kind": 9}, "kind 9; known are 1, 2"),
        ({"total": 0}, "0 bytes of kind 'a'; 1 to 60"),
        ({"total": 1 << 62}, "1 to 60 are right"),
        ({"message": 0}, "message 1 at byte 0"),
        ({"message": 2}, "message 1 at byte 0"),
        ({"offset": 1}, "message 1 at byte 0"),
        ({"total": 3}, "4 bytes at byte 0 of a message of 3"),
        ({"crc32c": 1}, "checksum"),
        ({"data": b""}, "a part of 0 bytes"),
        ({"data": bytes(1 + wire.MAX_PIECE_BYTES)}, "a part of 1048577 bytes"),
    ],
)
def test_a_first_part_that_breaks_the_rules(change, why):
    joiner = Joiner(BOUNDS)
    with pytest.raises(CorruptDataError, match=why):
        joiner.add(dataclasses.replace(part(b"abcd"), **change))
    assert joiner.add(part(b"abcd")) is not None, "and nothing of it stays"


@pytest.mark.parametrize(
    "second",
    [
        part(b"abc", offset=0, total=9),
        part(b"abc", offset=2, total=9),
        part(b"abc", offset=4, total=9),
        part(b"abc", offset=3, total=10),
        part(b"abc", offset=3, total=9, message=2),
        part(b"abcdefg", offset=3, total=9),
    ],
    ids=["again", "overlap", "gap", "other total", "other message", "too long"],
)
def test_a_later_part_that_breaks_the_rules(second):
    joiner = Joiner(BOUNDS)
    joiner.add(part(b"abc", total=9))
    with pytest.raises(CorruptDataError):
        joiner.add(second)


def test_a_message_is_taken_once():
    joiner = Joiner(BOUNDS)
    joiner.add(part(b"abc"))
    with pytest.raises(CorruptDataError, match="message 2 at byte 0"):
        joiner.add(part(b"abc"))


def test_no_more_is_held_than_was_declared():
    joiner = Joiner(BOUNDS)
    first = joiner.add(part(bytes(60)))
    with pytest.raises(CorruptDataError, match="1 of 60 bytes are not handled"):
        joiner.add(part(bytes(41), message=2))
    joiner.add(part(bytes(10), message=2))
    joiner.add(part(bytes(10), message=3))
    with pytest.raises(CorruptDataError, match="at most 3 messages of 100 bytes"):
        joiner.add(part(b"x", message=4))
    assert first is not None and joiner.handled(first) == (1, 60)
    assert joiner.add(part(b"x", message=4)) is not None


@given(
    st.lists(
        st.builds(
            wire.Part,
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(0, 70),
            st.integers(0, 70) | st.just(1 << 63),
            st.just(crc32c.crc32c(b"abcd")) | st.integers(0, 2**32 - 1),
            st.just(b"abcd"),
        ),
        max_size=20,
    )
)
def test_whatever_comes_is_joined_or_refused(parts):
    joiner, whole = Joiner(BOUNDS), 0
    for each in parts:
        try:
            whole += joiner.add(each) is not None
        except CorruptDataError:
            return
    assert whole <= 5


def test_memory_is_touched_only_as_bytes_come():
    joiner = Joiner({kind: kind.down for kind in KINDS})
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    joiner.add(part(b"abcd", kind=WEIGHTS.id, total=1 << 30))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 10_000

"""Queues of messages: policies, bounds and order, against a plain model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.comms.links.kinds import CONTROL, EXPERIENCE, KINDS, WEIGHTS, Bound, Kind, by_name
from embodied.comms.links.outbox import Outbox, count_from_zero
from embodied.core.errors import ConfigError, SpecError

BOUND = Bound(3, 30, 20)


def make(policy, bound=BOUND, **options):
    kind = Kind(id=1, name="k", priority=0, policy=policy, up=bound, down=bound, **options)
    traffic = count_from_zero([kind])
    return kind, Outbox({kind: bound}, traffic), traffic["k"]


def drain(outbox, most=1 << 20):
    """Whole messages in the order in which they were begun."""
    found = {}
    while (cut := outbox.take(most)) is not None:
        data = found.setdefault((cut.kind.name, cut.message), bytearray())
        assert len(data) == cut.offset
        data += b"".join(cut.views)
        if len(data) == cut.total:
            lane = [m for (name, _), m in found.items() if name == cut.kind.name]
            assert outbox.handled(cut.kind.id, len(lane), sum(map(len, lane)))
    return [bytes(data) for data in found.values()]


class Model:
    """A list of (key, data, kept)."""

    def __init__(self, policy):
        self.policy, self.rows, self.dropped = policy, [], 0

    def full(self, data):
        size = sum(len(row[1]) for row in self.rows) + len(data)
        return len(self.rows) >= BOUND.messages or size > BOUND.total_bytes

    def put(self, key, data, kept):
        if not kept and self.policy == "latest":
            rest = [row for row in self.rows if row[0] != key or row[2]]
            self.dropped += len(self.rows) - len(rest)
            self.rows = rest
        while not kept and self.policy != "block" and self.full(data):
            oldest = next((row for row in self.rows if not row[2]), None)
            self.dropped += 1
            if oldest is None:
                return False
            self.rows.remove(oldest)
        if self.full(data):
            return False
        self.rows.append((key, data, kept))
        return True


put = st.tuples(st.sampled_from("ab"), st.binary(min_size=1, max_size=20), st.booleans())


@given(st.sampled_from(["block", "drop_oldest", "latest"]), st.lists(put | st.none(), max_size=30))
def test_policies_do_as_a_plain_model(policy, steps):
    kind, outbox, traffic = make(policy)
    model = Model(policy)
    sent = []
    for step in steps:
        if step is None:
            sent += drain(outbox, 7)
            model_sent, model.rows = [row[1] for row in model.rows], []
            assert sent[len(sent) - len(model_sent) :] == model_sent
            outbox, traffic = make(policy)[1:]  # counts of handled messages begin anew
            model.dropped = 0
            continue
        key, data, kept = step
        assert outbox.put(kind, [data], key, kept) == model.put(key, data, kept)
        assert traffic.dropped == model.dropped
        assert outbox.depths() == {"k": len(model.rows)}
    assert drain(outbox) == [row[1] for row in model.rows]


def test_what_is_under_way_is_finished_before_the_latest():
    kind, outbox, traffic = make("latest")
    outbox.put(kind, [b"old-old-old"], "w")
    assert b"".join(outbox.take(4).views) == b"old-"
    for data in (b"one", b"two", b"three"):
        assert outbox.put(kind, [data], "w")
    assert b"".join(outbox.take(100).views) == b"old-old"
    assert b"".join(outbox.take(100).views) == b"three"
    assert outbox.take(100) is None and traffic.dropped == 2 and traffic.sent == 2


def test_nothing_begins_before_the_other_end_has_room():
    kind, outbox, _ = make("block")
    for size in (20, 10):
        assert outbox.put(kind, [bytes(size)])
        assert outbox.take(100).nbytes == size
    assert outbox.put(kind, [bytes(5)])
    assert outbox.take(100) is None
    assert not outbox.handled(kind.id, 3, 30), "more than was begun"
    assert not outbox.handled(kind.id, 1, 31)
    assert not outbox.handled(77, 0, 0)
    assert outbox.handled(kind.id, 1, 20)
    assert not outbox.handled(kind.id, 0, 0), "less than before"
    assert outbox.take(100).nbytes == 5


def test_a_message_above_its_kinds_largest_is_an_error():
    kind, outbox, _ = make("block")
    with pytest.raises(SpecError, match="21 bytes; those of kind 'k' have at most 20"):
        outbox.put(kind, [bytes(21)])


def test_urgent_kinds_pass_and_others_share_by_weight():
    outbox = Outbox({kind: kind.down for kind in KINDS}, count_from_zero(KINDS))
    piece = 1 << 14
    outbox.put(WEIGHTS, [bytes(1 << 20)])
    for _ in range(40):  # weights alone: no debt to those who come later
        assert outbox.take(piece).kind is WEIGHTS
    for _ in range(3):
        outbox.put(EXPERIENCE, [bytes(300_000)])
    order = [outbox.take(piece).kind for _ in range(18)]
    assert 11 <= order.count(EXPERIENCE) <= 13, "shares of .6 and .3"
    outbox.put(CONTROL, [b"now"])
    assert outbox.take(piece, urgent_only=True).kind is CONTROL
    assert outbox.take(piece, urgent_only=True) is None


def test_kinds_that_cannot_be_told_apart_are_errors():
    assert by_name(KINDS)["weights"] is WEIGHTS
    with pytest.raises(ConfigError, match="share a name or an id"):
        by_name([CONTROL, CONTROL])
    with pytest.raises(ConfigError, match="at least one message"):
        Bound(1, 10, 11)
